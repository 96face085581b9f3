// The sampling controls: a form bound to the settings that are remembered.

import { DEFAULT_SETTINGS } from "./store.js";

/** Binds the form; calls `onChange(settings)` after each valid change. */
export class SettingsForm {
  constructor(form, settings, onChange) {
    this.form = form;
    this.settings = { ...settings };
    this.onChange = onChange;
    form.addEventListener("input", (event) => this.#take(event.target));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.querySelector("#reset").addEventListener("click", () => this.#reset());
    this.#show();
  }

  /** The fields of a chat completion that differ from the server's own defaults. */
  requestFields() {
    const { system, ...fields } = this.settings;
    return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
  }

  #take(input) {
    if (!(input.name in DEFAULT_SETTINGS)) return;
    const valid = input.checkValidity();
    input.setAttribute("aria-invalid", String(!valid));
    if (!valid) {
      input.reportValidity();
      return;
    }
    if (input.name === "system") this.settings.system = input.value;
    else this.settings[input.name] = input.value === "" ? null : Number(input.value);
    this.#label(input);
    this.onChange(this.settings);
  }

  #reset() {
    const { system } = this.settings;
    this.settings = { ...DEFAULT_SETTINGS, system };
    this.#show();
    this.onChange(this.settings);
  }

  #show() {
    for (const [name, value] of Object.entries(this.settings)) {
      const input = this.form.elements[name];
      input.value = value ?? "";
      input.setAttribute("aria-invalid", "false");
      this.#label(input);
    }
  }

  #label(input) {
    const output = this.form.querySelector(`output[for="${input.id}"]`);
    if (output) output.textContent = Number(input.value).toFixed(2);
  }
}
