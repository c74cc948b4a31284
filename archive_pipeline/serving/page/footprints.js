// Outlines of the images that the map shows; clusters where they are too many.

import { json, url } from "./api.js";
import { $, colour, debounce } from "./dom.js";
import { count, images } from "./format.js";
import { toBbox, toExtent } from "./map.js";
import * as state from "./state.js";

const LIMIT = 1000;
const COLOURS = 8;
const APART = 88; // pixels between clusters
const SMALL = 10; // pixels of an outline's larger side
const AHEAD = 0.15; // of the map's size, loaded beyond its edges

export class Footprints {
  /**
   * @param onOpen called with an image {flight, id}
   * @param onPoint called with the image below the cursor, or null
   */
  constructor(archiveMap, flights, { onOpen, onPoint }) {
    this.archiveMap = archiveMap;
    this.order = new Map(flights.map((flight, n) => [flight.id, n]));
    this.pointed = null;
    this.plain = true; // no imagery below
    this.source = new ol.source.Vector({ wrapX: true });
    this.layer = archiveMap.add(new ol.layer.Vector({ source: this.source, zIndex: 5, style: (f) => this.style(f) }));
    this.load = debounce(() => this.loadNow(), 120);
    const { map } = archiveMap;
    map.on("moveend", () => this.load());
    map.on("pointermove", (event) => {
      if (event.dragging || this.silent) return;
      this.hover(this.at(event.pixel), event.pixel, onPoint);
    });
    $("map").addEventListener("pointerleave", () => this.hover(null, null, onPoint));
    map.on("singleclick", (event) => {
      if (this.silent) return;
      const feature = this.at(event.pixel);
      if (!feature) return;
      if (feature.get("count")) this.into(feature);
      else onOpen({ flight: feature.get("flight"), id: feature.get("id") });
    });
    addEventListener("themechange", () => this.layer.changed());
    state.subscribe((now, changed) => {
      if (["flight", "text", "from", "to"].some((field) => changed.has(field))) this.load();
    });
  }

  /** Outlines, those that are too small to be seen together as one point. */
  draw(features) {
    const resolution = this.archiveMap.view.getResolution();
    const large = features.filter((feature) => span(feature) >= SMALL * resolution);
    const small = features.filter((feature) => span(feature) < SMALL * resolution && feature.getGeometry().getType() !== "Point" || feature.get("count"));
    const points = features.filter((feature) => !large.includes(feature) && !small.includes(feature));
    this.source.clear(true);
    this.source.addFeatures([...large, ...points, ...gathered(small, APART * resolution)]);
  }

  colourOf(flight) {
    return `f${(this.order.get(flight) ?? 0) % COLOURS}`;
  }

  async loadNow() {
    this.controller?.abort();
    this.controller = new AbortController();
    const { map, view } = this.archiveMap;
    const extent = view.calculateExtent(map.getSize());
    const wide = ol.extent.buffer(extent, AHEAD * Math.max(ol.extent.getWidth(extent), ol.extent.getHeight(extent)));
    const { flight, text, from, to } = state.get();
    const filter = { flight, text, datetime: interval(from, to) };
    const key = JSON.stringify(filter);
    if (this.whole?.key === key && ol.extent.containsExtent(this.whole.extent, extent)) {
      this.draw(this.whole.features);
      return;
    }
    try {
      const found = await json(url.footprints({ bbox: toBbox(wide).join(","), limit: LIMIT, ...filter }), { signal: this.controller.signal });
      const features = new ol.format.GeoJSON({ featureProjection: "EPSG:3857" }).readFeatures(found);
      const clustered = features.some((feature) => feature.get("count"));
      this.whole = clustered ? null : { key, extent: wide, features };
      this.draw(features);
      this.onLoad?.(features.length);
    } catch (error) {
      if (error.name !== "AbortError") this.onError?.(error);
    }
  }

  /** The outline at a pixel whose middle is nearest, of those that are not much larger than the smallest. */
  at(pixel) {
    const { map } = this.archiveMap;
    const found = map.getFeaturesAtPixel(pixel, { layerFilter: (layer) => layer === this.layer, hitTolerance: 3 });
    const point = found.find((feature) => feature.getGeometry().getType() === "Point");
    if (point || !found.length) return point ?? null;
    const here = map.getCoordinateFromPixel(pixel);
    const shapes = found.map((feature) => {
      const extent = feature.getGeometry().getExtent();
      const [x, y] = ol.extent.getCenter(extent);
      return { feature, area: ol.extent.getArea(extent), far: Math.hypot(x - here[0], y - here[1]) };
    });
    const smallest = Math.min(...shapes.map(({ area }) => area));
    return shapes.filter(({ area }) => area <= 1.6 * smallest).sort((a, b) => a.far - b.far)[0].feature;
  }

  into(cluster) {
    const [west, south, east, north] = cluster.get("bbox") ?? [];
    const { view } = this.archiveMap;
    if (west === east && south === north) view.animate({ center: toExtent([west, south, east, north]).slice(0, 2), zoom: view.getZoom() + 3, duration: 250 });
    else this.archiveMap.show([west, south, east, north]);
  }

  hover(feature, pixel, onPoint) {
    $("map").classList.toggle("pointing", feature !== null);
    const tip = $("tip");
    tip.hidden = !feature;
    if (feature) {
      tip.textContent = feature.get("count") ? images(feature.get("count")) : feature.get("id");
      const left = Math.min(pixel[0] + 14, this.archiveMap.map.getSize()[0] - tip.offsetWidth - 8);
      tip.style.transform = `translate(${left}px, ${Math.max(8, pixel[1] - tip.offsetHeight - 10)}px)`;
    }
    const name = feature && !feature.get("count") ? key(feature.getProperties()) : null;
    if (name === this.pointed) return;
    this.point(name);
    onPoint(name ? { flight: feature.get("flight"), id: feature.get("id") } : null);
  }

  /** Draw an image's outline more strongly. */
  point(name) {
    this.pointed = name;
    this.layer.changed();
  }

  /** Draw the open image's outline elsewhere, by `Selected`. */
  set chosen(name) {
    this.opened = name;
    this.layer.changed();
  }

  style(feature) {
    if (feature.get("count")) return cluster(feature.get("count"));
    const name = key(feature.getProperties());
    if (name === this.opened) return null;
    const strong = name === this.pointed;
    // Others stand back while one is open.
    const back = Boolean(this.opened) && !strong;
    const line = fade(colour(this.colourOf(feature.get("flight"))), back ? 0.55 : 1);
    const casing = new ol.style.Stroke({ color: fade(colour("casing"), back ? 0 : 0.75), width: strong ? 5.5 : 3 });
    const stroke = new ol.style.Stroke({ color: line, width: strong ? 3 : 1.4 });
    if (feature.getGeometry().getType() === "Point") {
      const image = new ol.style.Circle({ radius: strong ? 8 : 6, fill: new ol.style.Fill({ color: line }), stroke: new ol.style.Stroke({ color: colour("casing"), width: 2 }) });
      return new ol.style.Style({ image, zIndex: strong ? 9 : 2 });
    }
    const fill = new ol.style.Fill({ color: fade(line.slice(0, 7), strong ? 0.22 : this.plain ? 0.07 : 0.01) });
    return [new ol.style.Style({ stroke: casing, zIndex: strong ? 8 : 0 }), new ol.style.Style({ stroke, fill, zIndex: strong ? 9 : 1 })];
  }
}

export const key = ({ flight, id }) => `${flight}/${id}`;

/** Interval as requests have it; null without one. */
export const interval = (from, to) => (from || to ? `${from || ".."}/${to || ".."}` : null);

/** A colour #rrggbb with an opacity. */
export const fade = (hex, opacity) => `${hex}${Math.round(opacity * 255).toString(16).padStart(2, "0")}`;

/** Larger side of a feature's extent; none of a point's. */
function span(feature) {
  const extent = feature.getGeometry().getExtent();
  return Math.max(ol.extent.getWidth(extent), ol.extent.getHeight(extent));
}

/** Clusters and outlines that are less than `side` apart, as one cluster each. */
function gathered(features, side) {
  const cells = new Map();
  for (const feature of features) {
    const [x, y] = ol.extent.getCenter(feature.getGeometry().getExtent());
    const n = feature.get("count") ?? 1;
    const box = feature.get("bbox") ?? toBbox(feature.getGeometry().getExtent());
    const cell = `${Math.floor(x / side)} ${Math.floor(y / side)}`;
    const before = cells.get(cell) ?? { n: 0, x: 0, y: 0, box };
    const all = [0, 1].map((k) => Math.min(before.box[k], box[k])).concat([2, 3].map((k) => Math.max(before.box[k], box[k])));
    cells.set(cell, { n: before.n + n, x: before.x + x * n, y: before.y + y * n, box: all });
  }
  return [...cells.values()].map(({ n, x, y, box }) => new ol.Feature({ geometry: new ol.geom.Point([x / n, y / n]), count: n, bbox: box }));
}

function cluster(n) {
  const radius = 12 + 3.2 * Math.log10(n) ** 1.5;
  return new ol.style.Style({
    image: new ol.style.Circle({
      radius,
      fill: new ol.style.Fill({ color: fade(colour("accent"), 0.92) }),
      stroke: new ol.style.Stroke({ color: fade(colour("accent"), 0.28), width: 6 }),
    }),
    text: new ol.style.Text({
      text: n >= 10000 ? `${Math.round(n / 1000)}k` : count(n),
      font: "600 12px system-ui, sans-serif",
      fill: new ol.style.Fill({ color: colour("on-accent") }),
      offsetY: 1,
    }),
    zIndex: n,
  });
}
