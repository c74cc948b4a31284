// Numbers, dates and places as people read them.

const whole = new Intl.NumberFormat("en");

export const count = (n) => whole.format(n);

export const images = (n) => `${count(n)} ${n === 1 ? "image" : "images"}`;

/** Bytes in decimal units, as `archive info` tells them. */
export function bytes(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return "–";
  const units = ["bytes", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (n >= 999.5 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return `${unit === 0 || n >= 99.5 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
}

export function ratio(n) {
  return Number.isFinite(n) && n !== null ? `${n >= 9.95 ? Math.round(n) : n.toFixed(1)}×` : "–";
}

export const megapixels = (width, height) => {
  const n = (width * height) / 1e6;
  return `${n >= 9.95 ? Math.round(n) : n.toFixed(1)} MP`;
};

// Cameras write local time without a zone: it is shown as it was written.
const day = new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", day: "numeric", month: "short", year: "numeric" });

function instant(text) {
  const date = text ? new Date(/[Zz]|[+-]\d\d:?\d\d$/.test(text) || text.length <= 10 ? text : `${text}Z`) : null;
  return date && !Number.isNaN(date.getTime()) ? date : null;
}

export function date(text) {
  const at = instant(text);
  return at ? day.format(at) : "no date";
}

export function moment(text) {
  const at = instant(text);
  return at ? `${day.format(at)}, ${at.toISOString().slice(11, 19)}` : "not recorded";
}

export function dates(first, last) {
  const [a, b] = [date(first), date(last)];
  return a === b ? a : `${a} – ${b}`;
}

/** Longitude and latitude with as many digits as a pixel of the map has. */
export function lonLat([lon, lat], digits = 6) {
  const part = (n, plus, minus) => `${Math.abs(n).toFixed(digits)}° ${n < 0 ? minus : plus}`;
  return `${part(lat, "N", "S")}  ${part(lon, "E", "W")}`;
}

/** EPSG code of the UTM zone; none near the poles. */
export function utmZone([lon, lat]) {
  if (lat > 84 || lat < -80) return null;
  const zone = Math.min(60, Math.floor((lon + 180) / 6) + 1);
  return { code: `EPSG:${(lat < 0 ? 32700 : 32600) + zone}`, name: `UTM ${zone}${lat < 0 ? "S" : "N"}` };
}

export function metres(n) {
  if (n >= 9950) return `${(n / 1000).toFixed(n >= 99500 ? 0 : 1)} km`;
  if (n >= 1) return `${n >= 99.5 ? whole.format(Math.round(n)) : n.toFixed(1)} m`;
  return `${(n * 100).toPrecision(2)} cm`;
}

export const seconds = (n) => (n < 90 ? `${Math.round(n)} s` : `${Math.floor(n / 60)} min ${Math.round(n % 60)} s`);
