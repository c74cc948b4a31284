// Everything put together: what the address says is shown, what is done goes into the address.

import { json, url, waiting } from "./api.js";
import { Box } from "./box.js";
import { Compare } from "./compare.js";
import { Dates } from "./dates.js";
import { Detail } from "./detail.js";
import { $, debounce, el, notify, say } from "./dom.js";
import { Footprints, key } from "./footprints.js";
import { bytes, count, images } from "./format.js";
import { tileLayer } from "./imagery.js";
import { listenToKeys } from "./keys.js";
import { List, open, opened } from "./list.js";
import { ArchiveMap } from "./map.js";
import { Selected } from "./selected.js";
import { makeSheet } from "./sheet.js";
import * as state from "./state.js";

const IMAGERY_FROM = 13.5; // zoom
const FILTERS = ["flight", "text", "from", "to", "in"];

class Viewer {
  constructor(about, flights) {
    Object.assign(this, { about, flights });
    this.archiveMap = new ArchiveMap(about);
    this.footprints = new Footprints(this.archiveMap, flights, { onOpen: open, onPoint: (image) => this.list.point(image) });
    this.list = new List({
      colourOf: (flight) => this.footprints.colourOf(flight),
      viewBox: () => this.archiveMap.bbox(),
      onPoint: (name) => this.footprints.point(name),
      onClear: () => this.clear(),
    });
    const onError = (error) => this.tileFailed(error);
    this.selected = new Selected(this.archiveMap, this.footprints, onError);
    this.detail = new Detail({
      back: () => this.back(),
      step: (by) => this.step(by),
      compare: () => state.set({ mode: "compare" }),
      zoomTo: (image) => this.selected.goTo(image, true),
      boxes: (visible) => this.selected.boxLayer.setVisible(visible),
      again: () => this.openImage(),
    });
    this.detail.onFrame = () => this.ends();
    this.list.onTake = () => this.ends();
    this.compare = new Compare(() => this.closeMode());
    const onClose = () => this.closeMode();
    this.dates = new Dates(this.archiveMap, flights, { onClose, onError });
    this.box = new Box(this.archiveMap, flights, { onClose });
    const tell = rarely((error) => notify(`Some imagery cannot be shown: ${error.message}`));
    this.tileFailed = (error) => {
      this.lost = true;
      tell(error);
    };
    this.imagery = true;
  }

  start() {
    this.describe();
    this.fillFilters();
    this.wire();
    this.layMosaic();
    this.list.load();
    if (opened()) this.openImage();
    this.showMode("");
    state.subscribe((now, changed) => this.follow(now, changed));
  }

  describe() {
    const { title, images: n, flights, bounds, damaged } = this.about;
    const [before, after] = ["source_bytes", "archive_bytes"].map((field) => this.flights.reduce((sum, flight) => sum + flight[field], 0));
    document.title = `${title} · archive`;
    $("title").textContent = title;
    const told = [`${images(n)} in ${count(flights)} ${flights === 1 ? "flight" : "flights"},`, `${bytes(before)} → ${bytes(after)}`];
    $("totals").replaceChildren(...(n ? told : ["empty"]).flatMap((text) => [el("span", { class: "piece" }, text), " "]));
    if (damaged) $("totals").append(el("br"), `${images(damaged)} cannot be read; run archive check`);
    if (n && !bounds) {
      $("map-note").replaceChildren(el("b", {}, "Nothing to show on the map"), "None of these images tells where it was taken. The list has them all, and each opens at full resolution.");
      $("map-note").hidden = false;
    }
    for (const id of ["box-button", "imagery"]) $(id).disabled = !bounds;
    $("dates-button").disabled = !this.dates.possible;
    $("in-view").closest("label").hidden = !bounds;
  }

  fillFilters() {
    $("flight").append(...this.flights.map(({ id, images: n }) => el("option", { value: id }, `${id} (${count(n)})`)));
    this.syncFilters();
  }

  syncFilters() {
    const now = state.get();
    for (const field of ["flight", "text", "from", "to"]) if ($(field).value !== now[field]) $(field).value = now[field];
    $("in-view").checked = Boolean(now.in);
    $("clear").hidden = !FILTERS.some((field) => now[field]);
  }

  wire() {
    const typed = debounce(() => state.set({ text: $("text").value.trim() }), 250);
    $("text").addEventListener("input", typed);
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const field of ["flight", "from", "to"]) $(field).addEventListener("change", (event) => state.set({ [field]: event.target.value }));
    $("in-view").addEventListener("change", (event) => state.set({ in: event.target.checked ? "map" : "" }));
    $("clear").addEventListener("click", () => this.clear());
    $("zoom-in").addEventListener("click", () => this.archiveMap.zoomBy(1));
    $("zoom-out").addEventListener("click", () => this.archiveMap.zoomBy(-1));
    $("zoom-all").addEventListener("click", () => this.archiveMap.showAll());
    $("imagery").addEventListener("click", () => this.toggleImagery());
    $("dates-button").addEventListener("click", () => this.toggleMode("dates"));
    $("box-button").addEventListener("click", () => this.toggleMode("box"));
    this.archiveMap.map.on("moveend", debounce(() => state.get().in && this.list.load(), 300));
    this.archiveMap.view.on("change:resolution", () => this.tellGround());
    waiting.addEventListener("waiting", ({ detail }) => {
      if (detail || !this.lost) return;
      this.lost = false;
      this.layMosaic(); // with the tiles that could not be had
    });
    listenToKeys(this);
  }

  follow(now, changed) {
    if (FILTERS.some((field) => changed.has(field))) {
      this.syncFilters();
      this.list.load();
    }
    if (changed.has("flight")) {
      this.layMosaic();
      const flight = this.flights.find(({ id }) => id === now.flight);
      if (flight?.bounds && !opened()) this.archiveMap.show(flight.bounds);
    }
    if (changed.has("image")) this.openImage();
    if (changed.has("mode")) this.showMode();
  }

  clear() {
    state.set(Object.fromEntries(FILTERS.map((field) => [field, ""])));
    $("text").focus();
  }

  /** Tiles of everything, or of the flight that is looked at. */
  layMosaic() {
    if (this.mosaic) this.archiveMap.map.removeLayer(this.mosaic);
    this.mosaic = null;
    if (!this.about.bounds) return;
    const { flight } = state.get();
    this.mosaic = this.archiveMap.add(tileLayer(url.tiles(flight && url.flight(flight)), { minZoom: IMAGERY_FROM, zIndex: 2, onError: (error) => this.tileFailed(error) }));
    this.dress();
  }

  /** What is drawn on the map, as the mode has it. */
  dress() {
    const { mode } = state.get();
    const dates = mode === "dates" && this.dates.possible;
    this.mosaic?.setVisible(this.imagery && !dates);
    this.mosaic?.setOpacity(this.selected.image ? 0.5 : 1);
    this.footprints.layer.setVisible(!dates);
    this.tellGround();
    this.footprints.silent = dates || mode === "box";
    for (const layer of [this.selected.tiles, this.selected.boxLayer]) layer?.setOpacity(dates ? 0 : 1);
    $("imagery").setAttribute("aria-pressed", String(this.imagery));
    $("dates-button").setAttribute("aria-pressed", String(dates));
    $("box-button").setAttribute("aria-pressed", String(mode === "box"));
  }

  /** Outlines are filled only where there is no imagery below them. */
  tellGround() {
    const plain = !this.imagery || this.archiveMap.view.getZoom() < IMAGERY_FROM;
    if (this.footprints.plain === plain) return;
    this.footprints.plain = plain;
    this.footprints.layer.changed();
  }

  toggleImagery() {
    this.imagery = !this.imagery;
    this.dress();
    say(this.imagery ? "Imagery is shown" : "Imagery is hidden");
  }

  toggleMode(mode) {
    if ($(`${mode}-button`).disabled) return;
    state.set({ mode: state.get().mode === mode ? "" : mode });
  }

  closeMode() {
    const { mode } = state.get();
    state.set({ mode: "", px: "", bbox: "", left: "", right: "" });
    $({ compare: "compare-button", dates: "dates-button", box: "box-button" }[mode])?.focus();
  }

  showMode() {
    const { mode } = state.get();
    if (mode !== "box") this.box.close();
    if (mode !== "dates") this.dates.close();
    if (mode !== "compare") this.compare.close();
    if (mode === "box" && this.about.bounds) this.box.open();
    if (mode === "dates" && this.dates.possible) this.dates.open();
    if (mode === "compare" && this.detail.image && key(this.detail.image) === key(opened() ?? {})) this.compare.open(this.detail.image);
    this.dress();
  }

  async openImage() {
    const name = opened();
    $("browse").hidden = Boolean(name);
    $("detail").hidden = !name;
    if (!name) {
      this.detail.hide();
      this.selected.show(null);
      this.compare.close();
      this.dress();
      const n = this.list.items.findIndex((item) => key(item) === this.last);
      if (n >= 0) this.list.focus(n);
      return;
    }
    this.last = key(name);
    const focused = document.activeElement;
    const image = await this.detail.show(name);
    if (opened() && key(opened()) !== key(name)) return;
    this.selected.show(image);
    this.dress();
    if (!image) return this.compare.close();
    if (state.get().mode === "compare") return this.compare.open(image);
    if (focused === document.body || $("list").contains(focused)) $("detail").querySelector("h2")?.focus({ preventScroll: true });
    this.selected.goTo(image);
  }

  back() {
    state.set({ image: "", mode: "", px: "" });
  }

  step(by) {
    const n = this.list.indexOf(opened() ?? {});
    const next = n < 0 ? null : this.list.items[n + by];
    if (next) open(next);
  }

  /** Nothing comes before the first image, or after the last. */
  ends() {
    const n = opened() ? this.list.indexOf(opened()) : -1;
    this.detail.ends(n <= 0, n < 0 || n >= this.list.items.length - 1);
    if (n >= this.list.items.length - 5) this.list.more();
  }
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.?!]$/.test(text) ? "" : "."}`;

/** Call `action` at most once in half a minute. */
function rarely(action) {
  let last = -Infinity;
  return (...given) => {
    if (performance.now() - last < 30_000) return;
    last = performance.now();
    action(...given);
  };
}

waiting.addEventListener("waiting", ({ detail }) => {
  notify(detail ? `${sentence(detail.text)} Trying again in ${Math.ceil(detail.pause)} s.` : "", 60);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  (opened() ? $("detail").querySelector("h2") ?? $("detail").querySelector("button") : $("text")).focus();
});
makeSheet();

async function start() {
  try {
    const [about, flights] = await Promise.all([json("api"), json("flights")]);
    const viewer = new Viewer(about, flights);
    viewer.start();
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    if (error.status === undefined) throw error;
    $("totals").textContent = "";
    $("list").replaceChildren(el("div", { class: "empty", role: "alert" }, el("b", {}, "The archive cannot be shown"), error.message, el("br"),
      el("button", { type: "button", class: "button", onclick: () => location.reload() }, "Try again")));
  }
}

start();
