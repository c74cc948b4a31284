// Two flights over the same ground, below a swipe on the map.

import { url } from "./api.js";
import { $, el, iconButton } from "./dom.js";
import { dates } from "./format.js";
import { tileLayer } from "./imagery.js";
import { toExtent } from "./map.js";
import * as state from "./state.js";
import { Swipe } from "./swipe.js";

export class Dates {
  /** @param onClose asked for when it is to be closed @param onError told when a tile cannot be shown */
  constructor(archiveMap, flights, { onClose, onError }) {
    Object.assign(this, { archiveMap, onClose, onError });
    this.flights = flights.filter((flight) => flight.bounds);
    this.layers = [];
  }

  get possible() {
    return this.flights.length > 1;
  }

  open() {
    if (!this.swipe) {
      this.swipe = new Swipe($("stage"), "Swipe between the two flights", () => this.archiveMap.map.render());
      this.build();
    }
    let { left, right } = state.get();
    if (!this.find(left) || !this.find(right)) [left, right] = this.suggested(left);
    this.show(left, right);
  }

  close() {
    if (!this.swipe) return;
    this.swipe.remove();
    this.swipe = null;
    for (const layer of this.layers) this.archiveMap.map.removeLayer(layer);
    this.layers = [];
    $("card").hidden = true;
  }

  build() {
    const select = (side) => el("select", { onchange: () => this.choose(), "data-side": side }, this.flights.map((flight) => el("option", { value: flight.id }, `${flight.id}, ${this.when(flight)}`)));
    this.selects = { left: select("left"), right: select("right") };
    this.problem = el("p", { class: "problem", role: "status", hidden: true });
    $("card").replaceChildren(
      el("header", {}, el("h2", {}, "Compare two flights"), iconButton("close", "Close (Esc)", this.onClose)),
      el("label", { class: "field" }, el("span", {}, "Left"), this.selects.left),
      el("label", { class: "field" }, el("span", {}, "Right"), this.selects.right),
      this.problem);
    $("card").hidden = false;
  }

  when(flight) {
    return flight.datetime ? dates(...flight.datetime) : "no date";
  }

  find(id) {
    return this.flights.find((flight) => flight.id === id);
  }

  choose() {
    const [left, right] = [this.selects.left.value, this.selects.right.value];
    state.set({ left, right }, { replace: true });
    this.show(left, right);
  }

  show(left, right) {
    for (const layer of this.layers) this.archiveMap.map.removeLayer(layer);
    this.layers = [];
    const [a, b] = [this.find(left), this.find(right)];
    this.selects.left.value = left;
    this.selects.right.value = right;
    state.set({ left, right }, { replace: true });
    this.layers = [a, b].map((flight, n) => {
      const layer = tileLayer(url.tiles(url.flight(flight.id)), { zIndex: 3, extent: toExtent(flight.bounds), onError: this.onError });
      this.swipe.clip(this.archiveMap.map, layer, n ? "right" : "left");
      return this.archiveMap.add(layer);
    });
    this.swipe.name(`${a.id} · ${this.when(a)}`, `${b.id} · ${this.when(b)}`);
    const common = ol.extent.getIntersection(toExtent(a.bounds), toExtent(b.bounds));
    if (ol.extent.isEmpty(common)) return this.tell("These two flights are not over the same ground.");
    this.tell(left === right ? "Both sides show the same flight." : "");
    const { map, view } = this.archiveMap;
    if (!ol.extent.intersects(common, view.calculateExtent(map.getSize()))) view.fit(common, { padding: [40, 60, 40, 40] });
  }

  tell(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
  }

  /** The pair of flights that have the most ground in common; `left` one of them, if it is given. */
  suggested(left) {
    let best = [this.flights[0].id, this.flights[1].id];
    let most = 0;
    const some = this.flights.slice(0, 300);
    for (const a of some) {
      if (left && this.find(left) && a.id !== left) continue;
      for (const b of some) {
        if (a === b || (a.datetime?.[0] ?? "") > (b.datetime?.[0] ?? "")) continue;
        const common = ol.extent.getArea(ol.extent.getIntersection(toExtent(a.bounds), toExtent(b.bounds)));
        if (common > most) [most, best] = [common, [a.id, b.id]];
      }
    }
    return best;
  }
}
