// What lies below everything: the user's background map, else coastlines and a graticule.

import { colour } from "./dom.js";

const LAND_UNTIL = 8; // zoom; it is too coarse further in
const LINES_UNTIL = 13; // zoom; there is imagery further in
const LAND = "page/vendor/land-110m.json"; // Natural Earth
const SOUTH = -89;

export function ground(background) {
  if (background) return [new ol.layer.Tile({ source: new ol.source.XYZ({ url: background, maxZoom: 22 }) })];
  return [land(), graticule()];
}

function land() {
  const fill = new ol.style.Fill();
  const style = new ol.style.Style({ fill });
  const source = new ol.source.Vector({
    loader: async () => {
      try {
        const found = new ol.format.TopoJSON().readFeatures(await (await fetch(LAND)).json());
        source.addFeatures(found.flatMap((feature) => pieces(feature.getGeometry())));
      } catch {
        // the map does without coastlines
      }
    },
  });
  return new ol.layer.Vector({
    source,
    maxZoom: LAND_UNTIL,
    style: () => {
      fill.setColor(colour("land"));
      return style;
    },
  });
}

/** Polygons in degrees as features of the map; those across the antimeridian are whole, twice. */
function pieces(geometry) {
  return geometry.getPolygons().flatMap((polygon) => {
    const rings = polygon.getCoordinates().map(unwrapped);
    const across = rings.some((ring) => ring.some(([lon]) => Math.abs(lon) > 180));
    return (across ? [-360, 0, 360] : [0]).map((shift) => {
      const moved = new ol.geom.Polygon(rings.map((ring) => ring.map(([lon, lat]) => [lon + shift, Math.max(SOUTH, lat)])));
      return new ol.Feature(moved.transform("EPSG:4326", "EPSG:3857"));
    });
  });
}

/** A ring whose longitudes count on past 180; one round the pole runs along the map's edge. */
function unwrapped(ring) {
  let shift = 0;
  const points = ring.map(([lon, lat], n) => {
    if (n && lon - ring[n - 1][0] > 180) shift -= 360;
    if (n && lon - ring[n - 1][0] < -180) shift += 360;
    return [lon + shift, lat];
  });
  return shift ? [...points, [points.at(-1)[0], SOUTH], [points[0][0], SOUTH], points[0]] : points;
}

function graticule() {
  return new ol.layer.Graticule({
    strokeStyle: new ol.style.Stroke({ color: colour("graticule"), width: 0.7 }),
    showLabels: true,
    lonLabelStyle: label({ textBaseline: "bottom" }),
    latLabelStyle: label({ textAlign: "end" }),
    lonLabelPosition: 0.02,
    latLabelPosition: 0.995,
    targetSize: 180,
    wrapX: true,
    maxZoom: LINES_UNTIL,
  });
}

const label = (place) => new ol.style.Text({
  ...place,
  font: "11px system-ui, sans-serif",
  fill: new ol.style.Fill({ color: colour("map-ink") }),
  stroke: new ol.style.Stroke({ color: colour("sea"), width: 3 }),
});
