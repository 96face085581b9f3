// The conversation: what was said, and the one answer that may be under way.

import { ApiError, ConnectionError, streamChat } from "./api.js";

/**
 * A message: { role, content } and, of the assistant:
 *   end: null while it is written, else "stop", "length", "stopped" (by the user) or "error";
 *   error: { code, text } with the end "error";
 *   figures: { tokens, seconds, first, context } once the server has counted.
 */
export class Conversation {
  /** `options()` gives { fields, system } of the next request; `onChange(message)` follows each change. */
  constructor(messages, options, onChange) {
    this.messages = messages;
    this.options = options;
    this.onChange = onChange;
    this.controller = null;
    // An answer that the page's end has cut off.
    for (const message of messages) if (message.role === "assistant" && !message.end) message.end = "stopped";
  }

  get busy() {
    return this.controller !== null;
  }

  /** Says something, and waits for the answer's end. */
  async send(text) {
    if (this.busy) return;
    this.messages.push({ role: "user", content: text });
    await this.#answer();
  }

  /** Answers the last question anew. */
  async again() {
    if (this.busy) return;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    if (this.messages.at(-1)?.role === "user") await this.#answer();
  }

  /** Leaves out the older half of the conversation, whole turns only, and answers the last question anew. */
  async forgetOldest() {
    if (this.busy) return;
    const questions = this.messages.flatMap((message, index) => (message.role === "user" ? [index] : []));
    this.messages.splice(0, questions[Math.ceil((questions.length - 1) / 2)] ?? 0);
    await this.again();
  }

  /** Whether there is an older part that `forgetOldest` could leave out. */
  get canForget() {
    return this.messages.filter((message) => message.role === "user").length > 1;
  }

  /** Ends the answer under way; what has come stays. */
  stop() {
    this.controller?.abort();
  }

  /** Forgets everything. */
  clear() {
    this.stop();
    this.messages.length = 0;
    this.onChange(null);
  }

  async #answer() {
    const answer = { role: "assistant", content: "", end: null, error: null, figures: null };
    const history = this.#history();
    this.messages.push(answer);
    const controller = new AbortController();
    this.controller = controller;
    this.onChange(answer);
    try {
      await this.#stream(answer, history, controller.signal);
    } catch (error) {
      this.#end(answer, error);
    } finally {
      if (this.controller === controller) this.controller = null;
      this.onChange(answer);
    }
  }

  async #stream(answer, messages, signal) {
    const { fields } = this.options();
    const sent = performance.now();
    let firstAt = null;
    let pieces = 0;
    for await (const chunk of streamChat({ messages, ...fields }, signal)) {
      const now = performance.now();
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        firstAt ??= now;
        pieces += 1;
        answer.content += choice.delta.content;
      }
      if (choice?.finish_reason) answer.end = choice.finish_reason;
      const seconds = firstAt === null ? 0 : (now - firstAt) / 1000;
      const first = ((firstAt ?? now) - sent) / 1000;
      if (chunk.usage) {
        const { completion_tokens: tokens, total_tokens: context } = chunk.usage;
        answer.figures = { tokens, seconds, first, context };
      } else if (pieces > 0) {
        answer.figures = { tokens: pieces, seconds, first, context: null };
      }
      this.onChange(answer);
    }
    answer.end ??= "stop";
  }

  #end(answer, error) {
    if (error.name === "AbortError") {
      answer.end = "stopped";
    } else if (error instanceof ApiError || error instanceof ConnectionError) {
      const code = error instanceof ApiError ? error.code : "unreachable";
      answer.end = "error";
      answer.error = { code, text: error.message };
    } else {
      answer.end = "error";
      answer.error = { code: null, text: "The page failed; reload it." };
      throw error;
    }
  }

  /** What the server is sent: the system prompt, and every message with content. */
  #history() {
    const { system } = this.options();
    const said = this.messages.filter(({ content }) => content !== "").map(({ role, content }) => ({ role, content }));
    return system.trim() ? [{ role: "system", content: system }, ...said] : said;
  }
}
