// The open image on the map: its pixels turned into place, its outline, what detectors saw.

import { url } from "./api.js";
import { colour } from "./dom.js";
import { key } from "./footprints.js";
import { tileLayer } from "./imagery.js";
import { toExtent, toMap } from "./map.js";

export class Selected {
  /** @param onError told when a tile of the image cannot be shown */
  constructor(archiveMap, footprints, onError) {
    Object.assign(this, { archiveMap, footprints, onError });
    this.outline = new ol.source.Vector();
    this.boxes = new ol.source.Vector();
    archiveMap.add(new ol.layer.Vector({ source: this.outline, zIndex: 6, style: outlineStyle }));
    this.boxLayer = archiveMap.add(new ol.layer.Vector({ source: this.boxes, zIndex: 7, style: (f, r) => boxStyle(f, r), declutter: true }));
    addEventListener("themechange", () => this.outline.changed());
  }

  /** Show an image as /flights/…/images/… describes it; nothing of null. */
  show(image) {
    const before = this.image;
    this.image = image;
    if (before && image && key(before) === key(image)) return;
    if (this.tiles) this.archiveMap.map.removeLayer(this.tiles);
    this.tiles = null;
    this.outline.clear();
    this.boxes.clear();
    this.footprints.chosen = image ? key(image) : null;
    if (!image?.footprint) return;
    const shape = new ol.format.GeoJSON({ featureProjection: "EPSG:3857" }).readFeature({ type: "Feature", geometry: image.footprint, properties: {} });
    this.outline.addFeature(shape);
    if (image.footprint.type !== "Point") {
      this.tiles = tileLayer(url.tiles(url.image(image)), { zIndex: 4, extent: toExtent(image.bbox), onError: this.onError });
      this.archiveMap.add(this.tiles);
    }
    const place = pixelsToMap(image);
    if (place) this.boxes.addFeatures(image.detections.map((found) => boxFeature(found, place)));
  }

  /** Move there, unless the map shows it well already. */
  goTo(image, always = false) {
    if (!image.bbox) return;
    const { map, view } = this.archiveMap;
    const extent = toExtent(image.bbox);
    const seen = view.calculateExtent(map.getSize());
    const inside = ol.extent.containsExtent(seen, extent);
    const large = ol.extent.getWidth(extent) > 0.2 * ol.extent.getWidth(seen);
    if (always || !inside || !large) this.archiveMap.show(image.bbox, 350);
  }
}

function outlineStyle() {
  const line = colour("chosen");
  const casing = new ol.style.Stroke({ color: colour("casing"), width: 5 });
  const stroke = new ol.style.Stroke({ color: line, width: 2.5 });
  const dot = new ol.style.Circle({ radius: 8, fill: new ol.style.Fill({ color: line }), stroke: new ol.style.Stroke({ color: colour("casing"), width: 2.5 }) });
  return [new ol.style.Style({ stroke: casing }), new ol.style.Style({ stroke, image: dot })];
}

const frame = new ol.style.Stroke({ color: "#ffd23f", width: 2 });
const around = new ol.style.Stroke({ color: "rgb(0 0 0 / 65%)", width: 4 });

/** A detection's box, with its label where that has room. */
export function boxStyle(feature, resolution) {
  const extent = feature.getGeometry().getExtent();
  const styles = [new ol.style.Style({ stroke: around }), new ol.style.Style({ stroke: frame })];
  if (ol.extent.getWidth(extent) / resolution < 18) return styles;
  const text = new ol.style.Text({
    text: `${feature.get("label")} ${Math.round(feature.get("confidence") * 100)} %`,
    font: "600 12px system-ui, sans-serif",
    textBaseline: "bottom",
    fill: new ol.style.Fill({ color: "#141a18" }),
    backgroundFill: new ol.style.Fill({ color: "#ffd23f" }),
    padding: [2, 4, 0, 4],
    offsetY: -4,
  });
  const top = [(extent[0] + extent[2]) / 2, extent[3]];
  return [...styles, new ol.style.Style({ geometry: new ol.geom.Point(top), text })];
}

/** A detection as a feature, its corners placed by `place` (col, row → coordinate). */
export function boxFeature({ box: [x0, y0, x1, y1], label, confidence }, place) {
  const ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]].map(([x, y]) => place(x, y));
  return new ol.Feature({ geometry: new ol.geom.Polygon([ring]), label, confidence });
}

/**
 * Where an image's pixels lie on the map, from its four corners: a projective map, which frames
 * seen from above and at a slant both are. Null where the footprint has not four corners.
 */
export function pixelsToMap({ footprint, width, height }) {
  if (footprint?.type !== "Polygon" || footprint.coordinates[0].length !== 5) return null;
  const [a, b, c, d] = footprint.coordinates[0].map(toMap);
  // Heckbert, Fundamentals of Texture Mapping and Image Warping, 1989: unit square to quadrilateral.
  const sum = [a[0] - b[0] + c[0] - d[0], a[1] - b[1] + c[1] - d[1]];
  const [e, f] = [[b[0] - c[0], b[1] - c[1]], [d[0] - c[0], d[1] - c[1]]];
  const area = e[0] * f[1] - f[0] * e[1];
  if (!area) return null;
  const g = (sum[0] * f[1] - f[0] * sum[1]) / area;
  const h = (e[0] * sum[1] - sum[0] * e[1]) / area;
  return (col, row) => {
    const [u, v] = [col / width, row / height];
    const w = g * u + h * v + 1;
    return [0, 1].map((k) => ((b[k] - a[k] + g * b[k]) * u + (d[k] - a[k] + h * d[k]) * v + a[k]) / w);
  };
}
