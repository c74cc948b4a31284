// One image in its own pixels: the original against what was restored, below a swipe.

import { tile, url } from "./api.js";
import { $, debounce, el, icon, iconButton } from "./dom.js";
import { ratio } from "./format.js";
import { boxFeature, boxStyle } from "./selected.js";
import * as state from "./state.js";
import { Swipe } from "./swipe.js";

const TILE = 480; // pixels of the image, or of what it is reduced to; divisible by 2, 3 and 4
const CLOSEST = 16; // screen pixels a pixel of the image
const SOURCES = {
  original: { name: "Original", address: url.original },
  restored: { name: "Restored", address: url.window },
  invented: { name: "Restored, with invented detail", address: (image, format, window) => url.window(image, format, { ...window, steps: 1 }) },
};
const INVENTED = "“Invented detail” (steps 1) was not measured: it looks sharper, but nothing may be measured or decided by it.";
const GONE = "The original is not where it was archived from any more, so there is nothing to compare with.";

export class Compare {
  /** @param onClose asked for when the view is to be closed */
  constructor(onClose) {
    this.onClose = onClose;
    this.node = $("compare");
    // Pixels that are enlarged keep their edges.
    this.pixelated = (event) => (event.context.imageSmoothingEnabled = event.frameState.viewState.resolution / devicePixelRatio > 0.99);
  }

  /** Show an image as /flights/…/images/… describes it. */
  open(image) {
    this.close();
    this.image = image;
    this.names = [image.original && "original", "restored", image.steps?.includes(1) && "invented"].filter(Boolean);
    this.chosen = image.original ? ["original", "restored"] : ["restored", ""];
    this.ratio = Math.max(1, Math.min(4, Math.round(devicePixelRatio)));
    this.build();
    this.node.hidden = false;
    this.makeMap();
    this.choose();
    (this.pair.length > 1 ? this.swipe.handle : this.target).focus({ preventScroll: true });
  }

  close() {
    this.map?.setTarget(null);
    this.map?.dispose();
    this.map = null;
    this.node.hidden = true;
    this.node.replaceChildren();
  }

  build() {
    const { image } = this;
    const select = (side) => el("label", {}, el("span", { class: "hidden" }, side ? "Right side" : "Left side"),
      el("select", { onchange: (event) => this.choose(side, event.target.value) },
        [...this.names, side ? "" : null].filter((name) => name !== null).map((name) => el("option", { value: name, selected: name === this.chosen[side] }, SOURCES[name]?.name ?? "nothing else"))));
    this.percent = el("button", { type: "button", class: "plain", title: "One pixel of the image for one of the screen (1)", onclick: () => this.zoomTo(devicePixelRatio) });
    this.target = el("div", { class: "canvas", tabindex: 0, role: "application", "aria-label": "Pixels of the image. Arrow keys move, plus and minus zoom." });
    this.pixels = el("div", { class: "pixels" }, this.target);
    this.busy = el("div", { class: "busy", hidden: true });
    this.foot = el("div", { class: "foot" });
    this.note = el("p", { class: "note", role: "status", hidden: true });
    const boxes = image.detections?.length
      ? el("label", { class: "check" }, el("input", { type: "checkbox", checked: true, onchange: (event) => this.boxes.setVisible(event.target.checked) }), el("span", {}, `Detections (${image.detections.length})`))
      : null;
    this.pixels.append(this.busy, this.foot);
    this.node.replaceChildren(
      el("header", {},
        el("h2", { class: "grow" }, image.id),
        this.names.length > 1 ? el("div", { class: "pair" }, select(0), icon("swipe"), select(1)) : null,
        boxes,
        el("div", { class: "group" }, iconButton("minus", "Zoom out", () => this.zoomBy(2)), this.percent, iconButton("plus", "Zoom in", () => this.zoomBy(0.5)), iconButton("home", "Show all of it", () => this.fit(200))),
        iconButton("close", "Close (Esc)", this.onClose)),
      this.note, this.pixels);
    this.swipe = new Swipe(this.pixels, "Swipe between the two pictures", () => this.map?.render());
  }

  makeMap() {
    const { width, height, detections } = this.image;
    const extent = [0, 0, width, height];
    this.projection = new ol.proj.Projection({ code: "pixels", units: "pixels", extent });
    this.view = new ol.View({
      projection: this.projection, extent, constrainOnlyCenter: true, center: [width / 2, height / 2], resolution: 1,
      minResolution: devicePixelRatio / CLOSEST, maxResolution: Math.max(width, height) / 100, enableRotation: false, smoothResolutionConstraint: false,
    });
    const place = (col, row) => [col, height - row];
    this.boxes = new ol.layer.Vector({ source: new ol.source.Vector({ features: (detections ?? []).map((found) => boxFeature(found, place)) }), style: boxStyle, declutter: true, zIndex: 9 });
    this.map = new ol.Map({
      target: this.target, view: this.view, controls: [], layers: [this.boxes],
      interactions: ol.interaction.defaults.defaults({ altShiftDragRotate: false, pinchRotate: false }),
    });
    this.map.on("loadstart", () => (this.busy.hidden = false));
    this.map.on("loadend", () => (this.busy.hidden = true));
    this.map.on("pointermove", ({ coordinate: [x, y] }) => {
      const [col, row] = [Math.floor(x), Math.floor(height - y)];
      const inside = col >= 0 && row >= 0 && col < width && row < height;
      this.foot.textContent = inside ? `column ${col}   row ${row}` : `${width} × ${height}`;
    });
    this.foot.textContent = `${width} × ${height}`;
    this.view.on("change:resolution", () => this.tellZoom());
    this.map.on("moveend", debounce(() => this.remember(), 250));
    const place3 = state.numbers(state.get().px, 3);
    if (place3 && place3[2] > 0) {
      this.view.setCenter([place3[0], height - place3[1]]);
      this.view.setResolution(1 / place3[2]);
    } else this.fit(0);
    this.tellZoom();
  }

  /** The pictures that are shown: the left one, and the right one if there is one. */
  get pair() {
    return this.chosen.filter(Boolean);
  }

  /** Show another picture on a side, or the chosen ones. */
  choose(side, name) {
    if (side !== undefined) this.chosen[side] = name;
    this.swipe.hidden = this.pair.length < 2;
    for (const layer of this.layers ?? []) this.map.removeLayer(layer);
    this.failed = false;
    this.layers = this.pair.map((name) => this.layer(SOURCES[name].address));
    this.layers.forEach((layer, n) => {
      this.map.addLayer(layer);
      if (this.pair.length > 1) this.swipe.clip(this.map, layer, n ? "right" : "left");
    });
    const named = this.pair.map((name) => (name === "original" ? "Original" : `${SOURCES[name].name}, ${ratio(this.image.ratio)} smaller`));
    this.swipe.name(named[0], named[1] ?? "");
    const note = this.pair.includes("invented") ? INVENTED : this.image.original ? "" : GONE;
    this.tell(note);
  }

  tell(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
  }

  layer(address) {
    const { image, ratio: fine } = this;
    const { width, height } = image;
    const levels = Math.max(0, Math.ceil(Math.log2(Math.max(width, height) / TILE)));
    const steps = Array.from({ length: levels + 1 }, (_, z) => 2 ** (levels - z));
    const source = new ol.source.ImageTile({
      projection: this.projection,
      tileGrid: new ol.tilegrid.TileGrid({ extent: [0, 0, width, height], origin: [0, height], resolutions: steps.map((step) => step * fine), tileSize: TILE / fine }),
      tileSize: TILE,
      wrapX: false,
      transition: 120,
      loader: async (z, x, y, { signal }) => {
        const step = steps[z];
        const [col, row] = [x * TILE * step, y * TILE * step];
        const [w, h] = [Math.min(TILE * step, width - col), Math.min(TILE * step, height - row)];
        try {
          // At full size nothing may be lost on the way here.
          const format = step === 1 ? "png" : "jpg";
          const window = { window: [col, row, w, h].join(","), max_size: Math.ceil(Math.max(w, h) / step) };
          const found = await tile(address(image, format, window), signal);
          return padded(found, w / step, h / step);
        } catch (error) {
          if (error.name !== "AbortError") this.fail(error);
          throw error;
        }
      },
    });
    const layer = new ol.layer.Tile({ source, extent: [0, 0, width, height], cacheSize: 128 });
    layer.on("prerender", this.pixelated);
    return layer;
  }

  fail(error) {
    if (this.failed) return;
    this.failed = true;
    this.tell(`Some pixels cannot be shown: ${error.message}`);
  }

  fit(duration) {
    this.view.fit([0, 0, this.image.width, this.image.height], { padding: [12, 12, 12, 12], duration });
  }

  zoomBy(factor) {
    this.zoomTo(this.view.getResolution() * factor);
  }

  zoomTo(resolution) {
    this.view.animate({ resolution, duration: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 180 });
  }

  tellZoom() {
    const scale = (100 * devicePixelRatio) / this.view.getResolution();
    this.percent.textContent = `${scale < 9.95 ? scale.toFixed(1) : Math.round(scale)} %`;
    this.percent.setAttribute("aria-label", `${this.percent.textContent}: show at 100 %`);
  }

  remember() {
    if (!this.map) return;
    const [x, y] = this.view.getCenter();
    const scale = 1 / this.view.getResolution();
    state.set({ px: `${x.toFixed(1)},${(this.image.height - y).toFixed(1)},${scale.toPrecision(4)}` }, { replace: true });
  }
}

/** A picture of an image's edge, on a whole tile. */
function padded(picture, width, height) {
  if (width === TILE && height === TILE && picture.width === TILE && picture.height === TILE) return picture;
  const canvas = el("canvas", { width: TILE, height: TILE });
  canvas.getContext("2d").drawImage(picture, 0, 0, width, height);
  return canvas;
}
