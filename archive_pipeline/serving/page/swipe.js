// Two pictures of the same place with a handle between them.

import { el, icon } from "./dom.js";

const STEP = 0.01;

export class Swipe {
  /**
   * @param host element that the handle spans
   * @param label what the handle is called
   * @param onChange called when it was moved
   */
  constructor(host, label, onChange) {
    this.host = host;
    this.onChange = onChange;
    this.handle = el("button", { type: "button", role: "slider", "aria-label": label, "aria-orientation": "horizontal", "aria-valuemin": 0, "aria-valuemax": 100 }, icon("swipe"));
    this.left = el("span", { class: "side left" });
    this.right = el("span", { class: "side right" });
    this.bar = el("div", { class: "swipe" }, this.handle);
    host.append(this.bar, this.left, this.right);
    this.handle.addEventListener("pointerdown", (event) => this.handle.setPointerCapture(event.pointerId));
    this.handle.addEventListener("pointermove", (event) => {
      if (!this.handle.hasPointerCapture(event.pointerId)) return;
      const { left, width } = host.getBoundingClientRect();
      this.set((event.clientX - left) / width);
    });
    this.handle.addEventListener("keydown", (event) => this.key(event));
    this.set(0.5);
  }

  key(event) {
    const step = event.shiftKey ? 10 * STEP : STEP;
    const places = {
      ArrowLeft: this.value - step, ArrowDown: this.value - step, ArrowRight: this.value + step, ArrowUp: this.value + step,
      PageDown: this.value - 0.1, PageUp: this.value + 0.1, Home: 0, End: 1,
    };
    if (!(event.key in places)) return;
    event.preventDefault();
    event.stopPropagation();
    this.set(places[event.key]);
  }

  set(value) {
    this.value = Math.max(0, Math.min(1, value));
    this.bar.style.left = `${this.value * 100}%`;
    const percent = Math.round(this.value * 100);
    this.handle.setAttribute("aria-valuenow", percent);
    this.handle.setAttribute("aria-valuetext", `${percent} % ${this.left.textContent}, ${100 - percent} % ${this.right.textContent}`);
    this.onChange();
  }

  name(left, right) {
    this.left.textContent = this.left.title = left;
    this.right.textContent = this.right.title = right;
    this.set(this.value);
  }

  set hidden(hidden) {
    for (const node of [this.bar, this.left, this.right]) node.hidden = hidden;
    this.off = hidden;
  }

  remove() {
    for (const node of [this.bar, this.left, this.right]) node.remove();
  }

  /** Draw a layer of a map only on one side of the handle. */
  clip(map, layer, side) {
    layer.on("prerender", (event) => {
      const context = event.context;
      context.save();
      if (this.off) return;
      const [width, height] = map.getSize();
      const [from, to] = side === "left" ? [0, width * this.value] : [width * this.value, width];
      const corners = [[from, 0], [to, 0], [to, height], [from, height]].map((p) => ol.render.getRenderPixel(event, p));
      context.beginPath();
      corners.forEach(([x, y], n) => (n ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.clip();
    });
    layer.on("postrender", (event) => event.context.restore());
  }
}
