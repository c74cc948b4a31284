// Pixels on the map: the mosaic, flights, one image, as tiles of the server.

import { tile } from "./api.js";

const MAX_ZOOM = 24;

/**
 * A layer of tiles in Web Mercator.
 * @param address (z, x, y) → URL
 * @param onError told the first error of a tile that is not an abort
 */
export function tileLayer(address, { opacity = 1, minZoom = 0, zIndex = 1, extent, onError = () => {} } = {}) {
  // Screens of more than one pixel a CSS pixel get tiles with as many.
  const fine = devicePixelRatio > 1.25;
  const source = new ol.source.ImageTile({
    loader: async (z, x, y, { signal }) => {
      try {
        return await tile(`${address(z, x, y)}?size=${fine ? 512 : 256}`, signal);
      } catch (error) {
        if (error.name !== "AbortError") onError(error);
        throw error;
      }
    },
    tileGrid: ol.tilegrid.createXYZ({ maxZoom: MAX_ZOOM, tileSize: 256 }),
    tileSize: fine ? 512 : 256,
    transition: 160,
  });
  return new ol.layer.Tile({ source, opacity, minZoom, zIndex, extent, preload: 0, cacheSize: 256 });
}
