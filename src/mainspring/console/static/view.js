// Shows the conversation: one list item a message, changed in place while an answer is written.

import { button, copyFrom, element } from "./dom.js";
import { renderInto } from "./markdown.js";

const ENDS = {
  length: "Ended at the token limit",
  stopped: "Stopped",
};

/** Keeps the list `list` in step with a conversation. `actions`: { again, forgetOldest, newChat }. */
export class View {
  constructor(list, conversation, actions) {
    this.list = list;
    this.conversation = conversation;
    this.actions = actions;
    this.items = new Map();
    this.pending = false;
  }

  /** Draws at the next frame, however often it is asked to. */
  update() {
    if (this.pending) return;
    this.pending = true;
    // A hidden page has no frames, but its answers go on.
    const later = document.hidden ? (draw) => setTimeout(draw, 100) : requestAnimationFrame;
    later(() => {
      this.pending = false;
      this.draw();
    });
  }

  /** Draws now. */
  draw() {
    const { messages } = this.conversation;
    const kept = new Set(messages);
    for (const [message, item] of this.items) {
      if (kept.has(message)) continue;
      item.node.remove();
      this.items.delete(message);
    }
    for (const message of messages) {
      if (!this.items.has(message)) this.#add(message);
      const isLast = message === messages.at(-1);
      if (message.role === "assistant") this.#showAnswer(this.items.get(message), message, isLast);
    }
  }

  #add(message) {
    const who = message.role === "user" ? "You" : "Model";
    const text = element("div", { class: "text" });
    const body = element("article", { "aria-label": who }, text);
    const node = element("li", { class: `message ${message.role}` }, body);
    const item = { node, body, text, foot: null, shown: null };
    if (message.role === "user") {
      text.textContent = message.content;
    } else {
      item.foot = element("div", { class: "foot" });
      body.append(item.foot);
    }
    this.items.set(message, item);
    this.list.append(node);
  }

  #showAnswer(item, message, isLast) {
    const writing = message.end === null;
    item.node.classList.toggle("writing", writing);
    item.node.classList.toggle("thinking", writing && message.content === "");
    item.body.setAttribute("aria-busy", String(writing));
    renderInto(item.text, message.content);
    // The foot's buttons are not rebuilt while nothing about them changes, so that they keep the focus.
    const state = JSON.stringify([message.end, message.error, message.figures, isLast, this.conversation.canForget]);
    if (state === item.shown) return;
    item.shown = state;
    item.foot.replaceChildren(...this.#foot(item, message, isLast));
  }

  #foot(item, message, isLast) {
    if (message.end === null) return [];
    const parts = [];
    if (message.error) parts.push(this.#error(message.error, isLast));
    const line = element("div", { class: "line" });
    if (message.content) {
      const copy = button("Copy answer", "copy", () => copyFrom(copy, message.content));
      line.append(copy);
    }
    if (isLast && !message.error) line.append(button("Answer anew", "again", this.actions.again));
    const facts = [ENDS[message.end], ...figures(message.figures)].filter(Boolean);
    if (facts.length) line.append(element("span", { class: "facts-line" }, facts.join(" · ")));
    if (line.childNodes.length) parts.push(line);
    return parts;
  }

  #error(error, isLast) {
    const full = error.code === "context_length_exceeded";
    const title = full ? "This conversation is longer than the model’s context." : error.text;
    const box = element("div", { class: "error", role: "alert" }, element("p", {}, title));
    if (full) box.append(element("p", { class: "detail" }, error.text));
    if (!isLast) return box;
    const choices = element("div", { class: "choices" });
    if (full && this.conversation.canForget) {
      choices.append(button("Leave out the older half", null, this.actions.forgetOldest, shown));
    }
    if (full) choices.append(button("New chat", null, this.actions.newChat, shown));
    else choices.append(button("Try again", null, this.actions.again, shown));
    box.append(choices);
    return box;
  }
}

const shown = { visible: true, className: "quiet" };

function figures(found) {
  if (!found) return [];
  const parts = [`${found.tokens} ${found.tokens === 1 ? "token" : "tokens"}`];
  // The first token is the prompt's work, not the stream's.
  if (found.tokens > 1 && found.seconds > 0) {
    parts.push(`${((found.tokens - 1) / found.seconds).toFixed(1)} tokens/s`);
  }
  parts.push(`first after ${found.first.toFixed(2)} s`);
  return parts;
}

