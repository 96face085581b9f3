// A small part of Markdown, rendered as DOM nodes. The model's text only ever becomes text nodes.

import { button, copyFrom, element } from "./dom.js";

const FENCE = /^(\s*)(```+|~~~+)\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Renders `text` into `parent`, keeping the nodes of the blocks that have not changed since the last time. */
export function renderInto(parent, text) {
  const blocks = splitBlocks(text);
  const known = parent.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < known.length && isSame(blocks[same], known[same])) same += 1;
  while (parent.childNodes.length > same) parent.lastChild.remove();
  for (const block of blocks.slice(same)) parent.append(render(block));
  parent.blocks = blocks;
}

function isSame(a, b) {
  return a.kind === b.kind && a.info === b.info && a.lines.join("\n") === b.lines.join("\n");
}

/** Cuts a text into blocks: { kind, lines, info }. */
export function splitBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let open = null;
  const begin = (kind, line, info = null) => blocks.push((open = { kind, lines: [line], info }));
  for (let at = 0; at < lines.length; at += 1) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (fence) {
      const [, space, mark, info] = fence;
      const end = endOfFence(lines, at + 1, mark);
      const code = lines.slice(at + 1, end).map((each) => withoutIndent(each, space.length));
      blocks.push({ kind: "code", lines: code, info });
      at = end;
      open = null;
    } else if (line.trim() === "") {
      // A list goes on after an empty line if another item or an indented line follows.
      const next = lines[at + 1] ?? "";
      if (!(open?.kind === "list" && (ITEM.test(next) || /^\s{2,}\S/.test(next)))) open = null;
    } else if (HEADING.test(line)) {
      begin("heading", line);
      open = null;
    } else if (RULE.test(line)) {
      begin("rule", line);
      open = null;
    } else if (open?.kind === "list" && (ITEM.test(line) || /^\s/.test(line))) {
      open.lines.push(line);
    } else if (ITEM.test(line)) {
      begin("list", line);
    } else if (QUOTE.test(line)) {
      if (open?.kind === "quote") open.lines.push(line);
      else begin("quote", line);
    } else if (open?.kind === "table") {
      open.lines.push(line);
    } else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && (lines[at + 1] ?? "").includes("|")) {
      begin("table", line);
    } else if (open !== null) {
      open.lines.push(line);
    } else {
      begin("text", line);
    }
  }
  return blocks;
}

function endOfFence(lines, from, mark) {
  for (let at = from; at < lines.length; at += 1) {
    const line = lines[at].trim();
    if (line.startsWith(mark) && line.replaceAll(mark[0], "") === "") return at;
  }
  return lines.length;
}

/** A line of code in a fence that is indented, as inside a list. */
function withoutIndent(line, width) {
  const space = line.length - line.trimStart().length;
  return line.slice(Math.min(width, space));
}

function render(block) {
  switch (block.kind) {
    case "code":
      return renderCode(block);
    case "heading": {
      const [, marks, text] = HEADING.exec(block.lines[0]);
      // The page's own headings are h1 and h2.
      return element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text));
    }
    case "rule":
      return element("hr");
    case "quote": {
      const quote = element("blockquote");
      renderInto(quote, block.lines.map((line) => QUOTE.exec(line)?.[1] ?? line).join("\n"));
      return quote;
    }
    case "list":
      return renderList(block.lines);
    case "table":
      return renderTable(block.lines);
    default:
      return element("p", {}, ...withBreaks(block.lines));
  }
}

function renderCode(block) {
  const text = block.lines.join("\n");
  const copy = button("Copy code", "copy", () => copyFrom(copy, text));
  const head = element("div", { class: "code-head" }, element("span", {}, block.info || "code"), copy);
  const code = element("code", {}, text);
  return element("div", { class: "code" }, head, element("pre", { tabindex: "0", "aria-label": "Code" }, code));
}

function renderList(lines) {
  const root = { indent: -1, node: null, item: null };
  const stack = [root];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) {
      const rest = line.trim();
      if (rest) stack.at(-1).item?.append(" ", ...inline(rest));
      continue;
    }
    const [, space, mark, text] = match;
    const indent = space.replaceAll("\t", "    ").length;
    while (stack.length > 2 && indent < stack.at(-1).indent) stack.pop();
    if (stack.length === 1 || indent > stack.at(-1).indent + 1) {
      const number = parseInt(mark, 10);
      const node = Number.isNaN(number)
        ? element("ul")
        : element("ol", { start: number === 1 ? null : String(number) });
      stack.at(-1).item?.append(node);
      stack.push({ indent, node, item: null });
    }
    const level = stack.at(-1);
    level.item = element("li", {}, ...inline(text));
    level.node.append(level.item);
  }
  return stack[1].node;
}

function renderTable(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const [head, , ...rows] = lines;
  const names = cells(head);
  const headRow = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, ...inline(name))));
  const body = rows.map((row) => {
    const values = cells(row).slice(0, names.length);
    return element("tr", {}, ...values.map((value) => element("td", {}, ...inline(value))));
  });
  const table = element("table", {}, element("thead", {}, headRow), element("tbody", {}, ...body));
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

function withBreaks(lines) {
  return lines.flatMap((line, index) => (index ? [element("br"), ...inline(line)] : inline(line)));
}

const INLINE = [
  { pattern: /^(`+)(.+?)\1(?!`)/, make: (m) => element("code", {}, m[2].trim()) },
  { pattern: /^(\*\*|__)(?=\S)(.+?\S|\S)\1(?![*_])/, make: (m, depth) => element("strong", {}, ...inline(m[2], depth)) },
  { pattern: /^\*(?=[^\s*])(.*?[^\s*])\*(?!\*)/, make: (m, depth) => element("em", {}, ...inline(m[1], depth)) },
  { pattern: /^_(?=[^\s_])(.*?[^\s_])_(?!\w)/, make: (m, depth) => element("em", {}, ...inline(m[1], depth)), word: true },
  { pattern: /^~~(?=\S)(.+?\S|\S)~~/, make: (m, depth) => element("del", {}, ...inline(m[1], depth)) },
  { pattern: /^\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/, make: (m, depth) => link(m[2], inline(m[1], depth)) },
  { pattern: /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]]/, make: (m) => link(m[0], [m[0]]), word: true },
];

/** The pieces of one line: strings and elements. Unclosed marks stay as they are. */
function inline(text, depth = 0) {
  const pieces = [];
  let plain = "";
  for (let at = 0; at < text.length; ) {
    if (text[at] === "\\" && /[\\`*_~[\]()#+\-.!|>]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const found = depth < 8 ? matchAt(text, at) : null;
    if (!found) {
      plain += text[at];
      at += 1;
      continue;
    }
    if (plain) pieces.push(plain);
    plain = "";
    pieces.push(found.rule.make(found.match, depth + 1));
    at += found.match[0].length;
  }
  if (plain) pieces.push(plain);
  return pieces;
}

function matchAt(text, at) {
  if (!/[`*_~[h]/.test(text[at])) return null;
  const rest = text.slice(at);
  for (const rule of INLINE) {
    if (rule.word && at > 0 && /\w/.test(text[at - 1])) continue;
    const match = rule.pattern.exec(rest);
    if (match) return { rule, match };
  }
  return null;
}

function link(address, children) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
