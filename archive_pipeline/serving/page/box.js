// A box on the map, downloaded as one mosaic or as the frames that show it.

import { json, url } from "./api.js";
import { $, colour, debounce, el, icon, iconButton } from "./dom.js";
import { Download } from "./download.js";
import { images } from "./format.js";
import { fade } from "./footprints.js";
import { sizeOf, toBbox, toExtent } from "./map.js";
import * as state from "./state.js";

const SIDES = ["West", "South", "East", "North"];

export class Box {
  /** @param onClose asked for when it is to be closed */
  constructor(archiveMap, flights, { onClose }) {
    Object.assign(this, { archiveMap, flights, onClose });
    this.source = new ol.source.Vector();
    this.layer = archiveMap.add(new ol.layer.Vector({ source: this.source, zIndex: 10, style: () => outline() }));
    this.drag = new ol.interaction.DragBox({ condition: (event) => ol.events.condition.primaryAction(event) });
    this.drag.on("boxend", () => this.set(toBbox(this.drag.getGeometry().getExtent())));
    this.drag.setActive(false);
    archiveMap.map.addInteraction(this.drag);
    this.count = debounce(() => this.tellCount(), 200);
    addEventListener("themechange", () => this.layer.changed());
  }

  open() {
    this.build();
    this.drag.setActive(true);
    $("map").classList.add("drawing");
    const given = state.numbers(state.get().bbox, 4);
    if (given) this.set(given);
  }

  close() {
    if (!this.drag.getActive()) return;
    this.download.cancel();
    this.drag.setActive(false);
    $("map").classList.remove("drawing");
    this.source.clear();
    this.bbox = null;
    $("card").hidden = true;
  }

  build() {
    const number = (n) => el("label", { class: "field" }, el("span", {}, SIDES[n]), el("input", { type: "number", step: "any", min: n % 2 ? -90 : -180, max: n % 2 ? 90 : 180, onchange: () => this.typed() }));
    this.fields = SIDES.map((_, n) => number(n));
    this.flight = el("select", { onchange: () => this.count() }, el("option", { value: "" }, "All flights"), this.flights.map(({ id }) => el("option", { value: id, selected: id === state.get().flight }, id)));
    this.resolution = el("input", { type: "number", min: 0, step: "any", placeholder: "as fine as the frames" });
    this.size = el("p", { class: "quiet", role: "status" }, "Drag a box on the map, or type its sides in degrees.");
    this.buttons = [
      el("button", { type: "button", class: "button first", disabled: true, onclick: () => this.get("mosaic") }, icon("down"), "Mosaic (GeoTIFF)"),
      el("button", { type: "button", class: "button", disabled: true, onclick: () => this.get("frames") }, icon("down"), "Frames (JPEGs in a zip)"),
    ];
    const progress = el("div", { "aria-live": "polite" });
    this.download = new Download(progress);
    $("card").replaceChildren(
      el("header", {}, el("h2", {}, "Download an area"), iconButton("close", "Close (Esc)", this.onClose)),
      this.size,
      el("div", { class: "four" }, this.fields),
      el("button", { type: "button", class: "plain", onclick: () => this.set(this.archiveMap.bbox()) }, "Use what the map shows"),
      el("label", { class: "field" }, el("span", {}, "Flight"), this.flight),
      el("label", { class: "field" }, el("span", {}, "Metres a pixel of the mosaic"), this.resolution),
      el("div", { class: "end" }, el("div", { class: "actions" }, this.buttons), progress));
    $("card").hidden = false;
  }

  typed() {
    const sides = this.fields.map((field) => field.querySelector("input").value);
    if (sides.every((side) => side !== "") && sides.map(Number).every(Number.isFinite)) this.set(sides.map(Number));
  }

  set(bbox) {
    const [west, south, east, north] = bbox;
    this.source.clear();
    const sound = south < north && west !== east && Math.abs(south) <= 90 && Math.abs(north) <= 90;
    for (const button of this.buttons) button.disabled = !sound;
    this.fields.forEach((field, n) => (field.querySelector("input").value = Number(bbox[n].toFixed(7))));
    if (!sound) {
      this.size.textContent = "South must be less than north, and west differ from east.";
      return;
    }
    this.bbox = bbox.map((side) => Number(side.toFixed(7)));
    state.set({ bbox: this.bbox.join(",") }, { replace: true });
    this.source.addFeature(new ol.Feature(ol.geom.Polygon.fromExtent(toExtent([west, south, east, north]))));
    this.size.textContent = sizeOf(this.bbox);
    this.count();
  }

  async tellCount() {
    if (!this.bbox) return;
    const bbox = this.bbox;
    try {
      const { matched } = await json(url.images({ bbox: bbox.join(","), flight: this.flight.value, limit: 1 }));
      if (bbox !== this.bbox) return;
      this.size.textContent = `${sizeOf(bbox)}, ${matched ? images(matched) : "no image shows it"}`;
      for (const button of this.buttons) button.disabled = !matched;
    } catch {
      // the size alone, then; the download will tell what is wrong
    }
  }

  get(what) {
    const given = { bbox: this.bbox.join(","), flight: this.flight.value };
    if (what === "mosaic") this.download.start(url.mosaic({ ...given, resolution: this.resolution.value }), "mosaic.tif");
    else this.download.start(url.frames(given), "frames.zip");
  }
}

function outline() {
  const line = colour("chosen");
  return new ol.style.Style({ stroke: new ol.style.Stroke({ color: line, width: 2.5, lineDash: [8, 5] }), fill: new ol.style.Fill({ color: fade(line, 0.1) }) });
}
