// The console: binds the page's parts to each other and to what is remembered.

import { Conversation } from "./conversation.js";
import { Figures, count } from "./figures.js";
import { SettingsForm } from "./settings.js";
import { load, save } from "./store.js";
import { View } from "./view.js";

const $ = (id) => document.getElementById(id);
const WIDE = matchMedia("(min-width: 62rem)");
const state = load();
let maxModelLen = null;
let serverError = null;

// --- conversation ---

const settings = new SettingsForm($("settings"), state.settings, (values) => {
  state.settings = values;
  remember();
});
const conversation = new Conversation(
  state.messages,
  () => ({ fields: settings.requestFields(), system: settings.settings.system }),
  onConversationChange,
);
const view = new View($("messages"), conversation, {
  again: () => run(() => conversation.again()),
  forgetOldest: () => run(() => conversation.forgetOldest()),
  newChat,
});
const figures = new Figures(onServerState);
let wasBusy = false;

function onConversationChange() {
  view.update();
  showControls();
  if (conversation.busy !== wasBusy) {
    wasBusy = conversation.busy;
    const last = state.messages.at(-1);
    const ended = last?.error ? `Failed: ${last.error.text}` : "The answer is complete.";
    $("status").textContent = wasBusy ? "The model answers." : last ? ended : "New chat.";
    remember();
  }
}

async function run(action) {
  follow = true;
  await action();
  remember();
}

function sendDraft() {
  const text = $("prompt").value.trim();
  if (text === "" || conversation.busy) return;
  setDraft("");
  run(() => conversation.send(text));
}

function newChat() {
  conversation.clear();
  $("prompt").focus();
  remember();
}

function showControls() {
  const { busy } = conversation;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = $("prompt").value.trim() === "";
  $("welcome").hidden = state.messages.length > 0;
  $("new-chat").disabled = state.messages.length === 0;
  const used = state.messages.findLast((message) => message.figures?.context)?.figures.context;
  $("context").textContent = used && maxModelLen ? `${count(used)} of ${count(maxModelLen)} tokens of context` : "";
}

// --- composer ---

function setDraft(text) {
  $("prompt").value = text;
  state.draft = text;
  growComposer();
  showControls();
}

function growComposer() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight * 0.4)}px`;
}

$("prompt").addEventListener("input", () => {
  state.draft = $("prompt").value;
  growComposer();
  showControls();
  remember();
});
$("prompt").addEventListener("keydown", (event) => {
  // While an input method composes, Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    sendDraft();
  }
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  sendDraft();
});
$("stop").addEventListener("click", () => {
  conversation.stop();
  $("prompt").focus();
});
$("new-chat").addEventListener("click", newChat);
$("starters").addEventListener("click", (event) => {
  const starter = event.target.closest("button");
  if (starter === null) return;
  setDraft(starter.textContent);
  sendDraft();
});

// --- scrolling: follows the answer until the reader scrolls up ---

let follow = true;
const scroll = $("scroll");
const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;
scroll.addEventListener("scroll", () => {
  follow = atEnd();
  $("to-end").hidden = follow;
});
new ResizeObserver(() => {
  if (follow) scroll.scrollTop = scroll.scrollHeight;
  $("to-end").hidden = atEnd();
}).observe($("messages"));
$("to-end").addEventListener("click", () => {
  follow = true;
  scroll.scrollTo({ top: scroll.scrollHeight, behavior: "smooth" });
});

// --- the server's state ---

function onServerState({ figures: found, error }) {
  const text = error
    ? "The server does not answer. It may be stopped or restarting; this page keeps asking."
    : found.engine_dead;
  if (found) {
    maxModelLen = found.max_model_len;
    $("model").textContent = found.model;
    document.title = `${found.model} · Mainspring`;
    showControls();
  }
  if (text !== serverError) {
    serverError = text;
    $("banner").hidden = !text;
    $("banner-text").textContent = text ?? "";
    document.body.classList.toggle("offline", Boolean(text));
  }
}

// --- settings panel ---

function showPanel(open, { focus = true } = {}) {
  const panel = $("panel");
  panel.hidden = !open;
  $("veil").hidden = !open || WIDE.matches;
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  document.querySelector(".chat").inert = open && !WIDE.matches;
  if (focus) (open ? panel : $("panel-toggle")).focus();
}

function togglePanel(open = $("panel").hidden) {
  state.panel = open;
  showPanel(open);
  remember();
}

$("panel-toggle").addEventListener("click", () => togglePanel());
$("panel-close").addEventListener("click", () => togglePanel(false));
$("veil").addEventListener("click", () => togglePanel(false));
WIDE.addEventListener("change", () => showPanel(WIDE.matches && state.panel !== false, { focus: false }));

// --- theme ---

const THEMES = ["system", "light", "dark"];

function showTheme() {
  if (state.theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  $("theme-label").textContent = `Theme: ${state.theme}`;
  $("theme").title = `Theme: ${state.theme}`;
}

$("theme").addEventListener("click", () => {
  state.theme = THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length];
  showTheme();
  remember();
});

// --- keys ---

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (conversation.busy) conversation.stop();
    else if (!$("panel").hidden && !WIDE.matches) togglePanel(false);
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    newChat();
  } else if (event.altKey && event.code === "KeyS") {
    event.preventDefault();
    togglePanel();
  }
});

// --- memory ---

let saving = null;

function remember() {
  clearTimeout(saving);
  saving = setTimeout(writeState, 200);
}

function writeState() {
  if (!save(state)) $("status").textContent = "This browser keeps nothing: the chat will be lost with the page.";
}

addEventListener("pagehide", writeState);

// --- start ---

showTheme();
showPanel(WIDE.matches && state.panel !== false, { focus: false });
view.draw();
setDraft(state.draft);
figures.poll();
if (!matchMedia("(pointer: coarse)").matches) $("prompt").focus();
