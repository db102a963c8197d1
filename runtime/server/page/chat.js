// The conversation: what is sent, what comes back, and what the controls do.

import { listModels, readLoad, stored, streamChat, untilReady } from "./client.js";
import { addAnswer, addQuestion, grow, keep, scrollToEnd, sends } from "./view.js";

const at = (id) => document.getElementById(id);
const say = (id, text) => {
  at(id).textContent = text;
};
const parameters = [...at("parameters").querySelectorAll("input")];

let turns = []; // { role, content }, by turns; an answer has { tokens, first, rate, ending, problem } too
let running = null; // ends the answer that is under way
let watching = false; // whether the load is being read
let rest = 0; // seconds until it is read again

// ---- sending

/** Ask something, after the first `count` turns. */
async function ask(text, count = turns.length) {
  if (!settingsAreNumbers() || !(at("model").value || (await loadModels())) || running) return false;
  turns.length = count;
  turns.push({ role: "user", content: text });
  keep(count);
  show(turns.at(-1));
  answer();
  return true;
}

/** Have the last question answered. */
async function answer() {
  const control = new AbortController();
  const body = request();
  const turn = { role: "assistant", content: "" };
  turns.push(turn);
  const shown = show(turn);
  scrollToEnd();
  setRunning(control);
  say("announcement", "The model is answering.");
  shown.update();
  try {
    await receive(body, control.signal, turn, shown);
  } catch (error) {
    if (error.name === "AbortError") turn.ending = "stopped";
    else turn.problem = error.message;
    if (error.status === 401 && (await askForKey(error.message))) {
      if (running === control) again();
      return;
    }
    markSetting(error);
    if (error.status === 404) loadModels(); // the server may have another model by now
  }
  shown.finish();
  if (running !== control) return; // a new chat has begun
  setRunning(null);
  say("announcement", turn.problem ? "" : `The answer is complete${turn.ending ? `: ${turn.ending}` : ""}.`);
  save();
}

/** Add what arrives to the turn, with the times that this page saw. */
async function receive(body, signal, turn, shown) {
  const sent = performance.now();
  let first;
  let last;
  for await (const { choices, usage } of streamChat(body, signal)) {
    const choice = choices?.[0];
    if (choice?.delta?.content) {
      last = performance.now();
      first ??= last;
      turn.content += choice.delta.content;
      turn.first = (first - sent) / 1000;
    }
    if (choice?.finish_reason === "length") turn.ending = "cut off at the limit of tokens";
    if (usage) turn.tokens = usage.completion_tokens;
    if (turn.tokens > 1 && last > first) turn.rate = ((turn.tokens - 1) * 1000) / (last - first);
    shown.update();
  }
}

/** What to send for the turns so far. */
function request() {
  const system = at("system").value.trim();
  const settings = parameters.filter(({ value }) => value !== "").map(({ name, value }) => [name, Number(value)]);
  return {
    model: at("model").value,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...turns.map(({ role, content }) => ({ role, content })),
    ],
    ...Object.fromEntries(settings),
  };
}

/** Have the last answer made anew. */
function again() {
  turns.pop();
  keep(turns.length);
  answer();
}

function stop() {
  running?.abort();
}

function begin() {
  stop();
  setRunning(null);
  turns = [];
  keep(0);
  save();
  at("prompt").focus();
}

// ---- showing

function show(turn) {
  const place = turns.indexOf(turn);
  if (turn.role === "user") return addQuestion(turn, (text) => ask(text, place));
  return addAnswer(turn, again);
}

function setRunning(control) {
  const focused = document.activeElement;
  running = control;
  rest = 0;
  document.body.classList.toggle("answering", control !== null);
  at("send").hidden = control !== null;
  at("stop").hidden = control === null;
  if (focused?.getClientRects().length === 0) at("prompt").focus(); // what had the focus is hidden
}

function openSettings(open) {
  at("settings").hidden = !open;
  at("settings-button").ariaExpanded = String(open);
}

function settingsAreNumbers() {
  if (at("parameters").checkValidity()) return true;
  openSettings(true);
  at("parameters").reportValidity();
  return false;
}

/** Show which setting the server refused, and why. */
function markSetting({ param, message }) {
  const field = parameters.find((input) => input.name === param);
  if (!field) return;
  openSettings(true);
  field.ariaInvalid = "true";
  field.setAttribute("aria-describedby", "setting-problem");
  say("setting-problem", message);
}

function unmarkSettings() {
  for (const field of parameters) {
    field.ariaInvalid = null;
    field.removeAttribute("aria-describedby");
  }
  say("setting-problem", "");
}

// ---- the server

async function loadModels() {
  try {
    const names = await listModels();
    const chosen = at("model").value || stored.get("model");
    at("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    say("notice", "");
    watchLoad();
    return names.length > 0;
  } catch (error) {
    if (error.status === 401 && (await askForKey(error.message))) return loadModels();
    say("notice", error.message);
    return false;
  }
}

/** Ask for the API key; true if one was given. */
function askForKey(reason) {
  const dialog = at("key-dialog");
  say("key-reason", reason);
  at("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use";
      if (given) stored.set("key", at("key").value.trim());
      at("key").value = "";
      resolve(given);
    }, { once: true });
  });
}

/** Show the load, more often while an answer is under way; not where the server keeps no metrics. */
async function watchLoad() {
  if (watching) return;
  watching = true;
  for (;;) {
    if (!document.hidden && (running || rest <= 0)) {
      rest = 4;
      try {
        showLoad(await readLoad());
      } catch (error) {
        showLoad(null);
        if (error.status === 404 || error.status === 401) break;
      }
    }
    rest -= 1;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  watching = false;
}

function showLoad(load) {
  at("load").hidden = load === null;
  if (!load) return;
  const percent = load.kv * 100;
  say("kv", `${percent > 0 && percent < 1 ? "<1" : Math.round(percent)} %`);
  at("kv").value = load.kv;
  for (const name of ["running", "waiting"]) {
    say(name, load[name]);
    at(name).value = load[name];
  }
}

// ---- what outlives a reload

function save() {
  stored.set("turns", JSON.stringify(turns));
  stored.set("settings", JSON.stringify([at("system"), ...parameters].map(({ id, value }) => [id, value])));
  stored.set("model", at("model").value);
}

function restore() {
  for (const [id, value] of JSON.parse(stored.get("settings") ?? "[]")) {
    if (at(id)) at(id).value = value;
  }
  turns = JSON.parse(stored.get("turns") ?? "[]");
  for (const turn of turns) show(turn)?.finish();
  scrollToEnd();
}

// ---- controls

at("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("prompt").value;
  if (running || !text.trim() || !(await ask(text))) return;
  at("prompt").value = "";
  grow(at("prompt"));
});
at("prompt").addEventListener("input", () => grow(at("prompt")));
at("prompt").addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  at("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !at("key-dialog").open) stop();
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", begin);
at("settings-button").addEventListener("click", () => openSettings(at("settings").hidden));
at("parameters").addEventListener("submit", (event) => event.preventDefault());
for (const change of ["input", "reset"]) at("parameters").addEventListener(change, unmarkSettings);
at("key-button").addEventListener("click", async () => {
  if (await askForKey("The key that this server asks for, if any.")) loadModels();
});
addEventListener("pagehide", () => {
  if (running) turns.at(-1).ending = "stopped";
  save();
});

restore();
await untilReady((reason) => say("notice", reason));
await loadModels();
