// What the page shows, as it stands in the address: shared links, back and forward.

const FIELDS = ["flight", "text", "from", "to", "in", "image", "mode", "left", "right", "at", "px", "bbox"];
const REPLACED = new Set(["text", "from", "to", "at", "px", "bbox"]); // no step back for each of these

const listeners = [];
let state = read();

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(FIELDS.map((field) => [field, given.get(field) ?? ""]));
}

function write(next) {
  const given = FIELDS.filter((field) => next[field]).map((field) => [field, next[field]]);
  // commas and slashes stay legible
  return `#${new URLSearchParams(given).toString().replaceAll("%2C", ",").replaceAll("%2F", "/")}`;
}

export const get = () => state;

/** Change some fields; listeners are told which. */
export function set(patch, { replace = false } = {}) {
  const next = { ...state, ...patch };
  const changed = FIELDS.filter((field) => next[field] !== state[field]);
  if (!changed.length) return;
  state = next;
  const step = !replace && changed.some((field) => !REPLACED.has(field));
  history[step ? "pushState" : "replaceState"](null, "", write(state));
  tell(changed, false);
}

/** Call `listener(state, changed, travelled)`; `travelled` after back, forward, or a typed address. */
export const subscribe = (listener) => listeners.push(listener);

function tell(changed, travelled) {
  const has = new Set(changed);
  for (const listener of listeners) listener(state, has, travelled);
}

function travel() {
  const next = read();
  const changed = FIELDS.filter((field) => next[field] !== state[field]);
  state = next;
  if (changed.length) tell(changed, true);
}

addEventListener("popstate", travel);
addEventListener("hashchange", travel);

/** Numbers of a field, such as "lon,lat,zoom"; null where they are not `n` numbers. */
export function numbers(text, n) {
  const found = text.split(",").map(Number);
  return text && found.length === n && found.every(Number.isFinite) ? found : null;
}
