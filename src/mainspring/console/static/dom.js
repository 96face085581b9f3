// Building elements without ever parsing text as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text nodes. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** One of the page's icons. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon and a name that is read out, and shown where `visible`. */
export function button(label, iconName, onClick, { visible = false, className = "small" } = {}) {
  const text = element("span", { class: visible ? null : "hidden" }, label);
  const node = element("button", { type: "button", class: className, title: visible ? null : label });
  if (iconName) node.append(icon(iconName));
  node.append(text);
  node.addEventListener("click", onClick);
  return node;
}

/** Copies text and shows on the button that it did. */
export async function copyFrom(node, text) {
  const done = await copy(text);
  const label = node.querySelector("span");
  const use = node.querySelector("use");
  const before = label.textContent;
  label.textContent = done ? "Copied" : "Copying failed";
  if (done) use.setAttribute("href", "#i-check");
  node.disabled = true;
  setTimeout(() => {
    label.textContent = before;
    use.setAttribute("href", "#i-copy");
    node.disabled = false;
  }, 1400);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No clipboard API (plain HTTP from another machine) or no permission: the old way.
  }
  const area = element("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}
