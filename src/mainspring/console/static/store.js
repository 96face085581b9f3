// What the page remembers between visits, in localStorage under one key.

const KEY = "mainspring.console.v1";

export const DEFAULT_SETTINGS = Object.freeze({
  system: "",
  temperature: 0.7,
  top_p: 0.95,
  min_p: 0,
  top_k: null,
  max_tokens: null,
  seed: null,
});

const EMPTY = { messages: [], settings: DEFAULT_SETTINGS, draft: "", theme: "system", panel: null };

/** The remembered state; parts that are missing or of a wrong shape are replaced by their defaults. */
export function load() {
  let saved = null;
  try {
    saved = JSON.parse(localStorage.getItem(KEY));
  } catch {
    // Unreadable, or storage is forbidden here: begin anew.
  }
  const state = { ...EMPTY, settings: { ...DEFAULT_SETTINGS } };
  if (saved === null || typeof saved !== "object") return state;
  if (Array.isArray(saved.messages)) state.messages = saved.messages.filter(isMessage);
  for (const name of Object.keys(DEFAULT_SETTINGS)) {
    const value = saved.settings?.[name];
    const wanted = name === "system" ? "string" : "number";
    if (typeof value === wanted) state.settings[name] = value;
  }
  if (typeof saved.draft === "string") state.draft = saved.draft;
  if (["system", "light", "dark"].includes(saved.theme)) state.theme = saved.theme;
  if (typeof saved.panel === "boolean") state.panel = saved.panel;
  return state;
}

/** Writes the state; false if the browser has no room for it or forbids it. */
export function save(state) {
  try {
    localStorage.setItem(KEY, JSON.stringify(state));
    return true;
  } catch {
    return false;
  }
}

function isMessage(value) {
  return (
    value !== null &&
    typeof value === "object" &&
    (value.role === "user" || value.role === "assistant") &&
    typeof value.content === "string"
  );
}
