// What the server answers; a busy one is asked again, and everybody told why it takes long.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** `{detail: text | null}`: waiting for the server because of that; null when it answers again. */
export const waiting = new EventTarget();

const TRIES = 7;
const segments = (path) => path.split("/").map(encodeURIComponent).join("/");

function query(parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

/** Addresses, relative to the page's own. */
export const url = {
  flight: (flight) => `flights/${encodeURIComponent(flight)}`,
  image: ({ flight, id }) => `flights/${encodeURIComponent(flight)}/images/${segments(id)}`,
  images: (parameters) => `images${query(parameters)}`,
  footprints: (parameters) => `footprints${query(parameters)}`,
  window: (image, format, parameters = {}) => `${url.image(image)}/window.${format}${query(parameters)}`,
  original: (image, format, parameters = {}) => `${url.image(image)}/original.${format}${query(parameters)}`,
  file: (image, format, parameters = {}) => `${url.image(image)}/file.${format}${query(parameters)}`,
  tiles: (of, parameters = {}) => (z, x, y) => `${of ? `${of}/` : ""}tiles/${z}/${x}/${y}.webp${query(parameters)}`,
  mosaic: (parameters) => `mosaic.tif${query(parameters)}`,
  frames: (parameters) => `frames.zip${query(parameters)}`,
};

/**
 * A successful response. A busy server (503) is asked again after as long as it says, with ever
 * longer pauses; one that does not answer a few times.
 */
export async function request(address, { signal, quiet = false, tries = TRIES } = {}) {
  let told = false;
  for (let attempt = 0; ; attempt += 1) {
    let failure;
    let pause = Math.min(15, 0.5 * 2 ** attempt);
    try {
      const response = await fetch(address, { signal });
      if (response.status !== 503) {
        if (told) tell(null);
        if (!response.ok) throw new ApiError(response.status, await reason(response));
        return response;
      }
      failure = new ApiError(503, await reason(response));
      pause = Math.max(pause, Number(response.headers.get("Retry-After")) || 0);
    } catch (error) {
      if (error.name === "AbortError" || (error instanceof ApiError && error.status !== 503)) {
        if (told) tell(null);
        throw error;
      }
      failure = new ApiError(0, "The server does not answer. Is `archive serve` still running?");
    }
    if (attempt + 1 >= tries) {
      if (told) tell(null);
      throw failure;
    }
    if (!quiet && attempt > 0) {
      told = true;
      tell(failure.message, pause);
    }
    await sleep(pause * (0.8 + 0.4 * Math.random()), signal);
  }
}

export const json = async (address, options) => (await request(address, options)).json();

function tell(detail, pause = 0) {
  waiting.dispatchEvent(new CustomEvent("waiting", { detail: detail && { text: detail, pause } }));
}

async function reason(response) {
  try {
    const { detail } = await response.json();
    if (typeof detail === "string") return detail;
    if (Array.isArray(detail) && detail.length) return detail.map((d) => d.msg).join("; ");
  } catch {
    // no JSON: a proxy's page, say
  }
  return `the server answered ${response.status}`;
}

function sleep(pause, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, pause * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("given up", "AbortError"));
    }, { once: true });
  });
}

/** At most `width` requests at a time, so that pictures leave connections for answers. */
function gate(width) {
  let free = width;
  const queue = [];
  const leave = () => {
    const next = queue.shift();
    if (next) next();
    else free += 1;
  };
  return async (signal, work) => {
    if (free > 0) free -= 1;
    else await new Promise((resolve) => queue.push(resolve));
    try {
      signal?.throwIfAborted();
      return await work();
    } finally {
      leave();
    }
  };
}

const tileGate = gate(4);
const thumbnailGate = gate(2);

async function bitmap(through, address, signal) {
  return through(signal, async () => {
    const response = await request(address, { signal, quiet: true });
    return createImageBitmap(await response.blob());
  });
}

export const tile = (address, signal) => bitmap(tileGate, address, signal);
export const thumbnail = (address, signal) => bitmap(thumbnailGate, address, signal);
