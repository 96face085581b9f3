// Live figures: asks the server once a second while the page is visible, and shows what it says.

import { fetchFigures } from "./api.js";

const PERIOD_MS = 1000;
const KEPT = 60;

/** Shows the figures; calls `onState({ figures })` or `onState({ error })` after each answer. */
export class Figures {
  constructor(onState) {
    this.onState = onState;
    this.last = null;
    this.rates = [];
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.poll());
  }

  /** Asks now, and then every second until the page is hidden. */
  async poll() {
    clearTimeout(this.timer);
    if (document.visibilityState !== "visible") return;
    try {
      const figures = await fetchFigures();
      this.#take(figures);
      this.onState({ figures });
    } catch (error) {
      this.last = null;
      this.rates = [];
      this.#blank();
      this.onState({ error });
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), PERIOD_MS);
  }

  #take(figures) {
    if (this.last !== null && figures.seconds > this.last.seconds) {
      const tokens = figures.generation_tokens_total - this.last.generation_tokens_total;
      this.rates.push(Math.max(0, tokens / (figures.seconds - this.last.seconds)));
      if (this.rates.length > KEPT) this.rates.shift();
    }
    this.last = figures;
    const kv = figures.kv_blocks_used / Math.max(1, figures.kv_blocks_total);
    const rate = this.rates.at(-1) ?? 0;
    show("figure-rate", rate >= 10 ? rate.toFixed(0) : rate.toFixed(1));
    show("figure-running", figures.running);
    show("figure-waiting", figures.waiting);
    show("figure-kv", percent(kv));
    show("fact-requests", `${figures.running} running, ${figures.waiting} waiting`);
    show("fact-kv", `${percent(kv)} of ${count(figures.kv_blocks_total * figures.block_size)}`);
    document.getElementById("fact-kv-meter").value = kv;
    show("fact-read", `${count(figures.prompt_tokens_total)} tokens`);
    show("fact-written", `${count(figures.generation_tokens_total)} tokens`);
    show("fact-context", `${count(figures.max_model_len)} tokens`);
    this.#draw();
  }

  #draw() {
    const highest = Math.max(1, ...this.rates);
    const points = this.rates.map((rate, index) => {
      const x = 120 - ((this.rates.length - 1 - index) * 120) / (KEPT - 1);
      return `${x.toFixed(1)},${(31 - (rate / highest) * 29).toFixed(1)}`;
    });
    const [area, line] = document.querySelectorAll("#spark path");
    const drawn = points.length > 1;
    line.setAttribute("d", drawn ? `M${points.join("L")}` : "");
    area.setAttribute("d", drawn ? `M${points[0].split(",")[0]},32L${points.join("L")}L120,32Z` : "");
    show("spark-max", drawn ? `peak ${highest.toFixed(0)}` : "");
  }

  #blank() {
    for (const id of ["figure-rate", "figure-running", "figure-waiting", "figure-kv"]) show(id, "–");
  }
}

function show(id, value) {
  const node = document.getElementById(id);
  const text = String(value);
  if (node.textContent !== text) node.textContent = text;
}

/** A share as a percentage; a small share in use is not shown as none. */
function percent(share) {
  const value = share * 100;
  return value > 0 && value < 1 ? "<1%" : `${Math.round(value)}%`;
}

export function count(value) {
  return value.toLocaleString("en");
}
