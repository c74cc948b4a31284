// The map: its ground, its place in the address, the coordinates below the cursor.

import { $, debounce } from "./dom.js";
import { lonLat, metres, utmZone } from "./format.js";
import { ground } from "./ground.js";
import * as state from "./state.js";

const MERCATOR = "EPSG:3857";
const PADDING = [56, 88, 56, 56];

export const toMap = (lonLat) => ol.proj.fromLonLat(lonLat);
export const toLonLat = (coordinate) => ol.proj.toLonLat(coordinate);

/** West, south, east, north in degrees as an extent of the map; Mercator ends before the poles. */
export function toExtent([west, south, east, north]) {
  const clip = (lat) => Math.max(-85.05, Math.min(85.05, lat));
  return ol.proj.transformExtent([west, clip(south), east < west ? east + 360 : east, clip(north)], "EPSG:4326", MERCATOR);
}

/** The same back, in longitudes of -180 to 180; the whole globe where the map shows all of it. */
export function toBbox(extent) {
  const [west, south, east, north] = ol.proj.transformExtent(extent, MERCATOR, "EPSG:4326");
  const within = (lon) => ((((lon + 180) % 360) + 360) % 360) - 180;
  const lats = [Math.max(-90, south), Math.min(90, north)];
  if (east - west >= 360) return [-180, lats[0], 180, lats[1]];
  return west >= -180 && east <= 180 ? [west, lats[0], east, lats[1]] : [within(west), lats[0], within(east), lats[1]];
}

export class ArchiveMap {
  /** @param about answer of /api */
  constructor(about) {
    this.about = about;
    this.view = new ol.View({ center: [0, 0], zoom: 1.5, maxZoom: 26, constrainRotation: false, enableRotation: false });
    this.ground = new ol.layer.Group({ layers: ground(about.background) });
    this.map = new ol.Map({
      target: "map",
      view: this.view,
      layers: [this.ground],
      controls: [],
      interactions: ol.interaction.defaults.defaults({ altShiftDragRotate: false, pinchRotate: false, shiftDragZoom: true }),
      moveTolerance: 3,
    });
    this.map.addControl(new ol.control.ScaleLine({ target: $("scale"), className: "scale", minWidth: 72 }));
    if (about.background) $("attribution").textContent = `Background: ${host(about.background)}`;
    this.map.on("moveend", debounce(() => this.remember(), 250));
    this.map.on("pointermove", (event) => this.tellPlace(event.coordinate));
    $("map").addEventListener("pointerleave", () => ($("position").textContent = ""));
    this.map.on("loadstart", () => ($("busy").hidden = false));
    this.map.on("loadend", () => ($("busy").hidden = true));
    addEventListener("themechange", () => this.ground.setLayers(new ol.Collection(ground(about.background))));
    state.subscribe((now, changed, travelled) => {
      if (travelled && changed.has("at")) this.goTo(now.at);
    });
    if (!this.goTo(state.get().at)) this.showAll(0);
  }

  add(layer) {
    this.map.addLayer(layer);
    return layer;
  }

  goTo(at) {
    const place = state.numbers(at, 3);
    if (!place || Math.abs(place[1]) > 85.06) return false;
    this.view.setCenter(toMap([place[0], place[1]]));
    this.view.setZoom(place[2]);
    return true;
  }

  remember() {
    const [lon, lat] = toLonLat(this.view.getCenter());
    state.set({ at: `${lon.toFixed(6)},${lat.toFixed(6)},${this.view.getZoom().toFixed(2)}` }, { replace: true });
  }

  bbox() {
    return toBbox(this.view.calculateExtent(this.map.getSize()));
  }

  showAll(duration = 300) {
    if (this.about.bounds) this.show(this.about.bounds, duration);
    else this.view.animate({ center: [0, 0], zoom: 1.5, duration: calm(duration) });
  }

  /** Move to a box in degrees; `maxZoom` where that is a point. */
  show(bounds, duration = 300, maxZoom = 21) {
    const [width, height] = this.map.getSize() ?? [800, 600];
    const tight = width < 500 || height < 400;
    this.view.fit(toExtent(bounds), { padding: tight ? [20, 60, 40, 20] : PADDING, duration: calm(duration), maxZoom });
  }

  zoomBy(step) {
    this.view.animate({ zoom: this.view.getZoom() + step, duration: calm(180) });
  }

  tellPlace(coordinate) {
    const place = toLonLat(coordinate);
    place[0] = ((((place[0] + 180) % 360) + 360) % 360) - 180;
    const zone = utmZone(place);
    const digits = this.view.getZoom() > 16 ? 6 : this.view.getZoom() > 9 ? 4 : 2;
    const node = $("position");
    node.textContent = lonLat(place, digits);
    if (!zone || this.view.getZoom() < 9 || !ol.proj.get(zone.code)) return;
    const [east, north] = ol.proj.transform(place, "EPSG:4326", zone.code);
    const utm = document.createElement("span");
    utm.className = "utm";
    utm.textContent = `   ${zone.name}  ${Math.round(east)} ${Math.round(north)}`;
    node.append(utm);
  }
}

/** Width and height of a box in degrees, in words. */
export function sizeOf([west, south, east, north]) {
  const middle = (south + north) / 2;
  const width = ol.sphere.getDistance([west, middle], [east < west ? east + 360 : east, middle]);
  return `${metres(width)} × ${metres(ol.sphere.getDistance([west, south], [west, north]))}`;
}

const calm = (duration) => (matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : duration);

function host(address) {
  try {
    return new URL(address.replace(/[{}]/g, ""), location.href).host;
  } catch {
    return address;
  }
}
