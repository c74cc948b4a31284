// Elements. Texts are always put in as text: whatever a file is called, it is shown, never run.

export const $ = (id) => document.getElementById(id);

/** An element with attributes, listeners (`onclick`, …) and children; null children are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, attributes = {}) {
  return el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

/** Tell screen readers what has just happened. */
export function say(text) {
  $("spoken").textContent = "";
  requestAnimationFrame(() => ($("spoken").textContent = text));
}

let noticed;

/** Tell everybody, for some seconds or until the next notice; nothing with an empty text. */
export function notify(text, seconds = 8) {
  clearTimeout(noticed);
  $("notice").textContent = text;
  if (text) noticed = setTimeout(() => ($("notice").textContent = ""), seconds * 1000);
}

/** Call `action` once, when it was asked for `ms` milliseconds ago and not since. */
export function debounce(action, ms) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), ms);
  };
}

/** A colour of the style sheet, for what is drawn on a canvas. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
