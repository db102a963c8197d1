// A little Markdown, as elements: paragraphs, headings, lists, quotes, tables, rules, code; within a
// line bold, italics and code.  Text only ever becomes text nodes.  Links and images stay as they
// were written: what a model invents is not for clicking.  The time is linear in the text's length.

const FENCE = /^\s*(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DEEPEST = 6; // lists within lists

/** Shows `text` in `target`; blocks that have not changed since the last call are left alone. */
export function render(target, text) {
  const blocks = blocksOf(text);
  const before = target.blocks ?? [];
  blocks.forEach((block, n) => {
    const old = before[n];
    if (old && old.source === block.source && old.kind === block.kind) return;
    const node = target.childNodes[n];
    if (old?.kind === "code" && block.kind === "code" && old.language === block.language) {
      node.querySelector("code").textContent = block.text; // its button keeps the focus
    } else if (node) {
      node.replaceWith(elementOf(block));
    } else {
      target.append(elementOf(block));
    }
  });
  while (target.childNodes.length > blocks.length) target.lastChild.remove();
  target.blocks = blocks;
}

/** The blocks of a text, each with the lines that it was made of. */
export function blocksOf(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = read(lines, at);
    block.source = lines.slice(at, block.end).join("\n");
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

/** The block that begins at a line. */
function read(lines, at) {
  const fence = lines[at].match(FENCE);
  if (fence) return readCode(lines, at, fence);
  const heading = lines[at].match(HEADING);
  if (heading) return { kind: "heading", level: heading[1].length, text: heading[2], end: at + 1 };
  if (RULE.test(lines[at])) return { kind: "rule", end: at + 1 };
  if (ITEM.test(lines[at])) return readList(lines, at);
  let end = at + 1;
  if (QUOTE.test(lines[at])) {
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    return { kind: "quote", text: lines.slice(at, end).map((line) => line.match(QUOTE)[1]).join("\n"), end };
  }
  if (lines[at].includes("|") && isTableRule(lines[end] ?? "")) {
    while (end < lines.length && lines[end].includes("|")) end += 1;
    return { kind: "table", rows: [lines[at], ...lines.slice(at + 2, end)].map(cells), end };
  }
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end])) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).join("\n"), end };
}

function isTableRule(line) {
  return line.includes("|") && cells(line).every((cell) => /^:?-+:?$/.test(cell));
}

function beginsBlock(line) {
  return [FENCE, HEADING, RULE, ITEM, QUOTE].some((pattern) => pattern.test(line));
}

/** To the fence that closes it, or while there is none yet, to the end. */
function readCode(lines, at, [opening, marks, rest]) {
  const indent = opening.length - opening.trimStart().length;
  const language = rest.trim().split(/\s/, 1)[0];
  const text = [];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end].trim();
    if (line.length >= marks.length && line === marks[0].repeat(line.length)) break;
    text.push(lines[end].slice(Math.min(indent, lines[end].length - lines[end].trimStart().length)));
  }
  return { kind: "code", language, text: text.join("\n"), end: Math.min(end + 1, lines.length) };
}

/** Items with their depths; a line that is indented goes on with the item before it. */
function readList(lines, at) {
  const items = [];
  const indents = []; // of the lists that are open, outermost first
  let end = at;
  while (end < lines.length) {
    const item = lines[end].match(ITEM);
    if (item && !RULE.test(lines[end])) {
      const indent = item[1].length;
      while (indents.length && indent < indents.at(-1)) indents.pop();
      if (!indents.length || (indent > indents.at(-1) + 1 && indents.length < DEEPEST)) indents.push(indent);
      const tag = /\d/.test(item[2]) ? "OL" : "UL";
      const depth = indents.length;
      if (items.length && depth === 1 && tag !== items[0].tag) break;
      items.push({ depth, tag, number: parseInt(item[2], 10), text: item[3] });
    } else if (lines[end].trim()) {
      const goesOn = lines[end - 1].trim() || /^\s{2,}/.test(lines[end]);
      if (!goesOn || beginsBlock(lines[end])) break;
      items.at(-1).text += `\n${lines[end].trim()}`;
    }
    end += 1;
  }
  while (!lines[end - 1].trim()) end -= 1;
  return { kind: "list", items, end };
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function elementOf(block) {
  switch (block.kind) {
    case "code": return codeElement(block);
    case "heading": return filled(`h${Math.min(block.level + 2, 6)}`, block.text);
    case "rule": return document.createElement("hr");
    case "list": return listElement(block.items);
    case "quote": return filled("blockquote", block.text);
    case "table": return tableElement(block.rows);
    default: return filled("p", block.text);
  }
}

function filled(tag, text) {
  const element = document.createElement(tag);
  element.append(inline(text));
  return element;
}

function codeElement({ language, text }) {
  const element = document.getElementById("code").content.firstElementChild.cloneNode(true);
  element.querySelector(".language").textContent = language;
  element.querySelector("code").textContent = text;
  return element;
}

function listElement(items) {
  const lists = []; // the open ones, outermost first
  for (const { depth, tag, number, text } of items) {
    lists.length = Math.min(lists.length, depth);
    if (lists.length === depth && depth > 1 && lists.at(-1).tagName !== tag) lists.pop();
    if (lists.length < depth) {
      const list = document.createElement(tag);
      if (tag === "OL") list.start = number;
      lists.at(-1)?.lastChild.append(list);
      lists.push(list);
    }
    lists.at(-1).append(filled("li", text));
  }
  return lists[0];
}

function tableElement(rows) {
  const table = document.createElement("table");
  rows.forEach((row, n) => {
    const line = table.insertRow();
    for (const cell of row.slice(0, rows[0].length)) line.append(filled(n ? "td" : "th", cell));
  });
  const frame = document.createElement("div");
  frame.className = "scroll";
  frame.tabIndex = 0;
  frame.append(table);
  return frame;
}

const TAGS = { "***": ["strong", "em"], "**": ["strong"], "__": ["strong"], "*": ["em"], "_": ["em"] };

/** A fragment of a text with bold, italics and code. */
function inline(text) {
  const marks = [...text.matchAll(/`+|\*{1,3}|__?/g)];
  const closing = closingTicks(marks);
  const frames = [{ mark: "", content: document.createDocumentFragment() }]; // open, each mark once
  let done = 0; // characters of the text that are in a frame
  const take = (end, next) => {
    if (end > done) frames.at(-1).content.append(text.slice(done, end));
    done = next;
  };
  const giveUp = () => {
    const { mark, content } = frames.pop();
    frames.at(-1).content.append(mark, content);
  };
  marks.forEach(({ 0: mark, index }, n) => {
    if (index < done) return; // in a code span
    const after = index + mark.length;
    if (mark[0] === "`") {
      if (!closing.has(n)) return;
      const end = marks[closing.get(n)].index;
      take(index, end + mark.length);
      frames.at(-1).content.append(codeSpan(text.slice(after, end)));
      return;
    }
    const left = text[index - 1] ?? " ";
    const right = text[after] ?? " ";
    if (mark[0] === "_" && /\w/.test(left) && /\w/.test(right)) return; // snake_case
    const open = frames.findLastIndex((frame) => frame.mark === mark);
    if (open > 0 && /\S/.test(left)) {
      take(index, after);
      while (frames.length - 1 > open) giveUp();
      let content = frames.pop().content;
      for (const tag of TAGS[mark]) {
        const element = document.createElement(tag);
        element.append(content);
        content = element;
      }
      frames.at(-1).content.append(content);
    } else if (open < 0 && /\S/.test(right)) {
      take(index, after);
      frames.push({ mark, content: document.createDocumentFragment() });
    }
  });
  take(text.length);
  while (frames.length > 1) giveUp();
  return frames[0].content;
}

function codeSpan(text) {
  const element = document.createElement("code");
  const padded = text.startsWith(" ") && text.endsWith(" ") && text.trim();
  element.textContent = padded ? text.slice(1, -1) : text;
  return element;
}

/** For each run of backticks, the next one of its length. */
function closingTicks(marks) {
  const closing = new Map();
  const last = new Map(); // by length
  for (let n = marks.length - 1; n >= 0; n -= 1) {
    const mark = marks[n][0];
    if (mark[0] !== "`") continue;
    if (last.has(mark.length)) closing.set(n, last.get(mark.length));
    last.set(mark.length, n);
  }
  return closing;
}
