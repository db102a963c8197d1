// How turns look: their elements, the line of facts under an answer, copying, scrolling.

import { render } from "./markdown.js";

const messages = document.getElementById("messages");

function copyOf(template) {
  return document.getElementById(template).content.firstElementChild.cloneNode(true);
}

/** Whether the end of the conversation is in view, so that it should stay there. */
function atEnd() {
  const page = document.documentElement;
  return window.innerHeight + window.scrollY >= page.scrollHeight - 40;
}

export function scrollToEnd() {
  window.scrollTo(0, document.documentElement.scrollHeight);
}

/** Add what the user wrote; `onEdit` gets what it is changed to. */
export function addQuestion(turn, onEdit) {
  const element = copyOf("question");
  element.querySelector(".text").textContent = turn.content;
  element.querySelector(".edit").addEventListener("click", () => edit(element, turn, onEdit));
  messages.append(element);
}

function edit(element, turn, onEdit) {
  const form = copyOf("editor");
  const field = form.querySelector("textarea");
  field.value = turn.content;
  element.classList.add("editing");
  element.append(form);
  grow(field);
  field.focus();
  const leave = () => {
    form.remove();
    element.classList.remove("editing");
    element.querySelector(".edit").focus();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) onEdit(field.value);
  });
  form.querySelector(".cancel").addEventListener("click", leave);
  field.addEventListener("input", () => grow(field));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    if (sends(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
}

/** Whether a key sends what is in a field: Enter, but not one that ends a composition of letters. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** Make a field as high as its text; chat.css bounds it. */
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/** Add an answer; gives functions that show how far it is: `update`, soon, and `finish`, at once. */
export function addAnswer(turn, onAgain) {
  const element = copyOf("answer");
  const text = element.querySelector(".text");
  let awaited = 0;
  element.querySelector(".again").addEventListener("click", onAgain);
  element.querySelector(".answer > .under .copy").addEventListener("click", (event) => {
    copy(turn.content, event.target);
  });
  text.addEventListener("click", ({ target }) => {
    if (target.matches(".copy")) copy(target.closest(".code").querySelector("code").textContent, target);
  });
  messages.append(element);

  function show() {
    awaited = 0;
    const follow = atEnd();
    render(text, turn.content);
    element.querySelector(".facts").textContent = factsOf(turn);
    element.querySelector(".problem").textContent = turn.problem ?? "";
    element.querySelector(".answer > .under .copy").hidden = turn.content === "";
    element.querySelector(".again").textContent = turn.problem ? "Try again" : "Regenerate";
    if (follow) scrollToEnd();
  }
  return {
    update() {
      element.ariaBusy = "true";
      awaited ||= requestAnimationFrame(show);
    },
    finish() {
      cancelAnimationFrame(awaited);
      element.ariaBusy = "false";
      show();
    },
  };
}

/** Remove the turns from a number on. */
export function keep(count) {
  while (messages.children.length > count) messages.lastChild.remove();
}

function factsOf({ tokens, first, rate, ending }) {
  const facts = [];
  if (tokens !== undefined) facts.push(tokens === 1 ? "1 token" : `${tokens.toLocaleString("en")} tokens`);
  if (first !== undefined) facts.push(`first token after ${duration(first)}`);
  if (rate !== undefined) facts.push(`${digits(rate)} tokens/s`);
  if (ending) facts.push(ending);
  return facts.join(" · ");
}

function duration(seconds) {
  return seconds < 1 ? `${digits(seconds * 1000)} ms` : `${digits(seconds)} s`;
}

function digits(value) {
  return value.toLocaleString("en", { maximumSignificantDigits: value < 100 ? 2 : 3 });
}

async function copy(text, button) {
  const name = button.textContent;
  button.textContent = (await toClipboard(text)) ? "Copied" : "Not copied";
  setTimeout(() => {
    button.textContent = name;
  }, 1500);
}

/** Pages by plain http from another machine have no clipboard of their own: there, the old way. */
async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = document.createElement("textarea");
    field.className = "hidden";
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return done;
  }
}
