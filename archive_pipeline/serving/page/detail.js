// One image: what it looks like, what it takes, where it is, what was seen in it.

import { json, thumbnail, url } from "./api.js";
import { $, el, icon, iconButton, say } from "./dom.js";
import { Download } from "./download.js";
import { bytes, count, lonLat, megapixels, moment, ratio } from "./format.js";

const GLANCE = 200; // pixels, as in the list
const PREVIEW = 800;
const STEPS = { 0: "Measured only", 1: "With invented detail" };
const POSITIONS = {
  camera: "camera's tags", point: "camera's place only", poses: "poses file", transform: "the file's transform", gcps: "the file's control points", rpcs: "the file's RPCs",
};

export class Detail {
  /** @param actions back(), step(±1), compare(), zoomTo(image), boxes(visible) */
  constructor(actions) {
    this.actions = actions;
    this.node = $("detail");
  }

  /** Load and show an image {flight, id}; resolves to its description, or null where there is none. */
  async show(name) {
    this.controller?.abort();
    this.controller = new AbortController();
    const { signal } = this.controller;
    this.download?.cancel();
    this.frame(el("div", {}, el("h2", { tabindex: -1 }, name.id), el("div", { class: "preview skeleton", style: { height: "220px" } })));
    try {
      const image = await json(url.image(name), { signal });
      signal.throwIfAborted();
      this.image = image;
      this.frame(this.content(image));
      this.picture(image, signal);
      say(`${image.id} is open`);
      return image;
    } catch (error) {
      if (error.name === "AbortError") return null;
      const missing = error.status === 404;
      const title = missing ? "This image is not in the archive" : "This image cannot be shown";
      this.frame(el("div", { class: "empty", role: "alert" }, el("b", {}, title), missing ? `${name.flight} / ${name.id}` : error.message, el("br"),
        missing ? null : el("button", { type: "button", class: "button", onclick: () => this.actions.again() }, "Try again")));
      return null;
    }
  }

  hide() {
    this.controller?.abort();
    this.download?.cancel();
    this.image = null;
  }

  frame(content) {
    const { back, step } = this.actions;
    const header = el("header", {},
      el("button", { type: "button", class: "plain", onclick: back }, icon("back"), "All images"), el("span", { class: "grow" }),
      iconButton("back", "Image before ([)", () => step(-1), { id: "before" }), iconButton("next", "Image after (])", () => step(1), { id: "after" }));
    const had = this.node.contains(document.activeElement) && document.activeElement.id;
    this.node.replaceChildren(header, el("div", { class: "scroll" }, content));
    if (had) $(had)?.focus();
    this.onFrame?.();
  }

  /** Which of the arrows lead somewhere. */
  ends(first, last) {
    if ($("before")) $("before").disabled = first;
    if ($("after")) $("after").disabled = last;
  }

  content(image) {
    const look = image.original ? "Compare with the original" : "Full resolution";
    this.canvas = el("canvas", { width: 16, height: Math.max(4, Math.round((16 * image.height) / image.width)), role: "img", "aria-label": `Picture of ${image.id}` });
    const preview = el("button", { type: "button", class: "preview skeleton", "aria-label": `${look} (c)`, onclick: this.actions.compare },
      this.canvas, el("span", {}, icon(image.original ? "swipe" : "image"), look));
    return el("div", {},
      el("h2", { tabindex: -1 }, image.id),
      el("p", { class: "quiet" }, `${image.flight} · ${moment(image.datetime)}`),
      preview,
      el("div", { class: "actions" },
        el("button", { type: "button", class: "button first", id: "compare-button", onclick: this.actions.compare }, icon(image.original ? "swipe" : "image"), look),
        image.bbox && el("button", { type: "button", class: "button", onclick: () => this.actions.zoomTo(image) }, icon("pin"), "On the map")),
      this.sizes(image),
      image.warnings?.length ? this.warnings(image) : null,
      this.detections(image),
      this.facts(image),
      this.downloads(image));
  }

  /** The smallest overview at once, then a picture as fine as the panel shows it. */
  async picture(image, signal) {
    const canvas = this.canvas;
    try {
      for (const size of [GLANCE, PREVIEW]) {
        const found = await thumbnail(url.window(image, "webp", { max_size: size }), signal);
        [canvas.width, canvas.height] = [found.width, found.height];
        canvas.getContext("2d").drawImage(found, 0, 0);
        canvas.parentElement.classList.remove("skeleton");
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      canvas.parentElement.replaceWith(el("p", { class: "problem", role: "alert" }, `Its pixels cannot be shown: ${error.message}`));
    }
  }

  sizes(image) {
    const part = (n) => `${Math.max(0.5, Math.min(100, (100 * n) / Math.max(image.source_bytes, image.archive_bytes)))}%`;
    const raw = image.width * image.height * (image.bands ?? 3) * bytesOf(image.dtype);
    return el("section", {}, el("h3", {}, "Size"),
      el("div", { class: "bars" },
        el("span", { class: "quiet" }, "File"), el("span", {}, el("i", { style: { "--part": part(image.source_bytes) } })), el("b", {}, bytes(image.source_bytes)),
        el("span", { class: "quiet" }, "Archive"), el("span", {}, el("i", { class: "ours", style: { "--part": part(image.archive_bytes) } })), el("b", {}, bytes(image.archive_bytes))),
      el("p", { class: "quiet" }, `${ratio(image.ratio)} smaller than the file, ${ratio(raw / image.archive_bytes)} smaller than its pixels`));
  }

  warnings(image) {
    return el("section", {}, el("h3", {}, "Warnings"), el("ul", { class: "warnings" }, image.warnings.map((text) => el("li", {}, icon("warn"), el("span", {}, text)))));
  }

  detections(image) {
    const found = image.detections ?? [];
    if (!found.length) return null;
    const labels = new Map();
    for (const { label } of found) labels.set(label, (labels.get(label) ?? 0) + 1);
    const most = [...labels].sort((a, b) => b[1] - a[1]).slice(0, 24);
    const detectors = [...new Set(found.map((one) => one.detector))].join(", ");
    return el("section", {}, el("h3", {}, "Stored detections"),
      el("ul", { class: "labels" }, most.map(([label, n]) => el("li", {}, `${label} `, el("b", {}, count(n))))),
      el("p", { class: "quiet" }, `Seen in the original by ${detectors} when it was archived.`),
      el("label", { class: "check" }, el("input", { type: "checkbox", checked: true, onchange: (event) => this.actions.boxes(event.target.checked) }), el("span", {}, "Draw their boxes")));
  }

  facts(image) {
    const { bbox } = image;
    const middle = bbox && [bbox[0] + (bbox[2] < bbox[0] ? bbox[2] + 360 - bbox[0] : bbox[2] - bbox[0]) / 2, (bbox[1] + bbox[3]) / 2];
    const method = image.position_source;
    const facts = [
      ["Pixels", `${count(image.width)} × ${count(image.height)}, ${megapixels(image.width, image.height)}${image.dtype && image.dtype !== "uint8" ? `, ${image.dtype}` : ""}`],
      ["Camera", image.camera],
      ["Place", middle ? lonLat(middle, 5) : "none: the file tells no position"],
      ["Placed by", bbox && method ? POSITIONS[method] ?? method : null],
      ["CRS", image.crs],
      ["Control points", image.gcps ? count(image.gcps) : null],
      ["Codec", image.codec === "pcdc" ? "pcdc" : `${image.codec}, lossless`],
      ["Model", image.model ? image.model.slice(0, 12) : null],
    ];
    return el("section", {}, el("h3", {}, "Details"),
      el("dl", { class: "facts" }, facts.filter(([, text]) => text).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)))));
  }

  downloads(image) {
    const host = el("div", { "aria-live": "polite" });
    this.download = new Download(host);
    let steps = 0;
    const get = (format) => () => this.download.start(url.file(image, format, steps ? { steps } : {}), `${image.id.split("/").pop()}.${format}`);
    const button = (format, name) => el("button", { type: "button", class: "button", onclick: get(format) }, icon("down"), name);
    const choose = (n) => {
      steps = n;
      warning.hidden = !n;
    };
    const warning = el("p", { class: "quiet", hidden: true }, "This invents detail that was not measured. It looks sharper; do not measure or decide by it.");
    return el("section", {}, el("h3", {}, "Download the restored image"),
      image.steps?.length > 1 ? el("div", { class: "row" }, choice("steps", image.steps.map((n) => [n, STEPS[n] ?? `Steps ${n}`]), choose)) : null, warning,
      el("div", { class: "actions", style: { margin: "8px 0" } }, button("tif", "GeoTIFF"), button("jpg", "JPEG"), button("png", "PNG")), host);
  }
}

const bytesOf = (dtype) => (Number(/\d+$/.exec(dtype ?? "uint8")?.[0]) || 8) / 8;

/** One of few, as radio buttons side by side; the first is chosen. */
function choice(name, options, onChoose) {
  return el("div", { class: "choice", role: "radiogroup", "aria-label": "Decoder" }, options.map(([value, text], n) =>
    el("label", {}, el("input", { type: "radio", name, value, checked: n === 0, onchange: () => onChoose(value) }), text)));
}
