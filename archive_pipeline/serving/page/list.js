// The list of images: pages of it are loaded as it is scrolled, and only visible rows exist.

import { json, thumbnail, url } from "./api.js";
import { $, el } from "./dom.js";
import { bytes, date, images, megapixels, ratio } from "./format.js";
import { interval, key } from "./footprints.js";
import * as state from "./state.js";

const ROW = 76; // pixels, as in panel.css
const PAGE = 200;
const BEYOND = 4; // rows above and below what is seen
const SETTLE = 120; // ms that a row is seen before its picture is asked for

export class List {
  /** @param colourOf name of a flight's colour @param viewBox the map's bbox */
  constructor({ colourOf, viewBox, onPoint, onClear }) {
    Object.assign(this, { colourOf, viewBox, onPoint, onClear });
    this.node = $("list");
    this.rows = new Map(); // index → element
    this.items = [];
    this.current = 0; // the row that the Tab key comes to; arrows lead to the others
    this.node.addEventListener("scroll", () => this.draw(), { passive: true });
    this.node.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  /** Load the list anew for the filters as they are. */
  async load() {
    this.controller?.abort();
    this.controller = new AbortController();
    const { signal } = this.controller;
    const { flight, text, from, to, in: inView } = state.get();
    this.query = { flight, text, datetime: interval(from, to), limit: PAGE, bbox: inView ? this.viewBox().join(",") : null };
    this.waitingTimer = setTimeout(() => this.wait(), this.items.length ? 400 : 0);
    try {
      const page = await json(url.images(this.query), { signal });
      this.begin();
      this.take(page);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    } finally {
      clearTimeout(this.waitingTimer);
    }
  }

  begin() {
    for (const row of this.rows.values()) this.drop(row);
    this.rows.clear();
    this.items = [];
    this.current = 0;
    this.body = el("ul", { "aria-label": "Images; arrow keys move through them" });
    this.node.replaceChildren(this.body);
    this.node.scrollTop = 0;
  }

  take(page) {
    this.items.push(...page.images);
    this.next = page.next;
    this.matched = page.matched;
    this.body.style.height = `${this.items.length * ROW + (this.next ? ROW : 0)}px`;
    const { flight, text, from, to, in: inView } = state.get();
    const filtered = Boolean(flight || text || from || to || inView);
    $("count").textContent = this.matched ? `${images(this.matched)}${filtered ? " found" : ""}` : "";
    if (!this.items.length) this.node.replaceChildren(this.nothing(filtered));
    this.draw();
    this.onTake?.();
  }

  nothing(filtered) {
    if (!filtered) {
      return el("div", { class: "empty" }, el("b", {}, "This archive holds no images yet"), "Put a flight into it: ", el("code", {}, "archive ingest FLIGHT"));
    }
    return el("div", { class: "empty" }, el("b", {}, "No image is like that"), "Try another name, flight, date or place.", el("br"),
      el("button", { type: "button", class: "button", onclick: this.onClear }, "Clear filters"));
  }

  wait() {
    $("count").textContent = "";
    this.node.replaceChildren(el("div", { class: "waiting", "aria-hidden": "true" }, ...Array.from({ length: 7 }, () => el("div", { class: "skeleton" }))));
    this.rows.clear();
    this.items = [];
  }

  fail(error) {
    $("count").textContent = "";
    const again = el("button", { type: "button", class: "button", onclick: () => this.load() }, "Try again");
    this.node.replaceChildren(el("div", { class: "empty", role: "alert" }, el("b", {}, "The list cannot be shown"), error.message, el("br"), again));
    this.rows.clear();
    this.items = [];
  }

  /** Load the page after the last, if there is one. */
  async more() {
    if (!this.next || this.loading === this.next) return;
    this.loading = this.next;
    try {
      this.take(await json(url.images({ ...this.query, after: this.next }), { signal: this.controller.signal }));
    } catch (error) {
      if (error.name !== "AbortError") $("count").textContent = `${images(this.matched)}; the next ones cannot be shown: ${error.message}`;
    } finally {
      this.loading = null;
    }
  }

  draw() {
    if (!this.items.length) return;
    const { scrollTop, clientHeight } = this.node;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - BEYOND);
    const last = Math.min(this.items.length, Math.ceil((scrollTop + clientHeight) / ROW) + BEYOND);
    for (const [n, row] of this.rows) {
      if ((n < first || n >= last) && !row.contains(document.activeElement)) {
        this.drop(row);
        this.rows.delete(n);
      }
    }
    // In the order of the list, as screen readers go through them.
    let before = null;
    for (let n = first; n < last; n += 1) {
      let row = this.rows.get(n);
      if (!row) {
        row = this.row(n);
        this.rows.set(n, row);
        if (before) before.after(row);
        else this.body.prepend(row);
      }
      before = row;
    }
    if (!this.rows.has(this.current)) this.current = Math.min(last - 1, Math.ceil(scrollTop / ROW));
    for (const [n, row] of this.rows) row.firstChild.tabIndex = n === this.current ? 0 : -1;
    if (last > this.items.length - 20) this.more();
  }

  row(n) {
    const image = this.items[n];
    const canvas = el("canvas", { class: "thumb", width: 160, height: 112, "aria-hidden": "true" });
    const link = el("a", { href: linkTo(image), "data-n": n },
      canvas,
      el("span", {},
        el("span", { class: "name", title: image.id }, image.id),
        el("span", { class: "meta" }, el("span", { class: "dot", style: { "--dot": `var(--${this.colourOf(image.flight)})` } }), image.flight),
        el("span", { class: "meta" }, `${date(image.datetime)} · ${megapixels(image.width, image.height)}${image.bbox ? "" : " · no position"}`)),
      el("span", { class: "size" }, el("b", {}, bytes(image.archive_bytes)), ratio(image.ratio)));
    link.addEventListener("mouseenter", () => this.onPoint(key(image)));
    link.addEventListener("mouseleave", () => this.onPoint(null));
    link.addEventListener("focus", () => this.onPoint(key(image)));
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      open(image);
    });
    const row = el("li", { style: { transform: `translateY(${n * ROW}px)` }, "aria-setsize": this.matched, "aria-posinset": n + 1 }, link);
    row.controller = new AbortController();
    row.timer = setTimeout(() => picture(canvas, image, row.controller.signal), SETTLE);
    return row;
  }

  drop(row) {
    clearTimeout(row.timer);
    row.controller.abort();
    row.remove();
  }

  move(event) {
    const here = Number(event.target.closest?.("a")?.dataset.n);
    const page = Math.max(1, Math.floor(this.node.clientHeight / ROW) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (Number.isNaN(here) || !(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.focus(Math.max(0, Math.min(this.items.length - 1, here + steps[event.key])));
  }

  focus(n) {
    const { clientHeight, scrollTop } = this.node;
    if (n * ROW < scrollTop) this.node.scrollTop = n * ROW;
    if ((n + 1) * ROW > scrollTop + clientHeight) this.node.scrollTop = (n + 1) * ROW - clientHeight;
    this.current = n;
    this.draw();
    this.rows.get(n)?.querySelector("a").focus({ preventScroll: true });
  }

  /** Number of an image among those that are loaded; -1 where it is not. */
  indexOf(image) {
    return this.items.findIndex((item) => key(item) === key(image));
  }

  /** Mark the row of the image below the cursor. */
  point(image) {
    const name = image && key(image);
    for (const [n, row] of this.rows) row.firstChild.classList.toggle("pointed", key(this.items[n]) === name);
  }
}

export const open = ({ flight, id }) => state.set({ image: `${encodeURIComponent(flight)}/${id}`, mode: state.get().mode === "compare" ? "compare" : "", px: "" });

/** The open image {flight, id}, from the address; null without one. */
export function opened({ image } = state.get()) {
  const cut = image.indexOf("/");
  if (cut < 1 || cut === image.length - 1) return null;
  try {
    return { flight: decodeURIComponent(image.slice(0, cut)), id: image.slice(cut + 1) };
  } catch {
    return null;
  }
}

function linkTo({ flight, id }) {
  return `#${new URLSearchParams({ image: `${encodeURIComponent(flight)}/${id}` })}`;
}

async function picture(canvas, image, signal) {
  try {
    const found = await thumbnail(url.window(image, "webp", { max_size: 200 }), signal);
    const scale = Math.max(canvas.width / found.width, canvas.height / found.height);
    const [width, height] = [found.width * scale, found.height * scale];
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(found, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  } catch {
    // a row without picture says enough; opening the image tells why
  }
}
