// Keys that work wherever the focus is, but in fields that take text.

import { $ } from "./dom.js";
import * as state from "./state.js";
import { opened } from "./list.js";

export function listenToKeys(viewer) {
  const help = $("help");
  $("help-button").addEventListener("click", () => help.showModal());
  help.querySelector("[data-close]").addEventListener("click", () => help.close());
  help.addEventListener("click", (event) => event.target === help && help.close());

  const comparing = () => state.get().mode === "compare" && viewer.compare.map;
  const keys = {
    "?": () => help.showModal(),
    "/": () => {
      if (opened()) viewer.back();
      $("text").focus();
    },
    "[": () => viewer.step(-1),
    "]": () => viewer.step(1),
    c: () => viewer.detail.image && state.set({ mode: comparing() ? "" : "compare" }),
    m: () => viewer.toggleImagery(),
    d: () => viewer.toggleMode("dates"),
    b: () => viewer.toggleMode("box"),
    "+": () => (comparing() ? viewer.compare.zoomBy(0.5) : viewer.archiveMap.zoomBy(1)),
    "-": () => (comparing() ? viewer.compare.zoomBy(2) : viewer.archiveMap.zoomBy(-1)),
    0: () => (comparing() ? viewer.compare.fit(200) : viewer.archiveMap.showAll()),
    1: () => comparing() && viewer.compare.zoomTo(devicePixelRatio),
    Escape: () => {
      if (state.get().mode) viewer.closeMode();
      else if (opened()) viewer.back();
    },
  };
  keys["="] = keys["+"];

  // Before the map's own keys, which would zoom a second time.
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const { target } = event;
    const typing = target.matches?.("input:not([type=checkbox]):not([type=radio]), select, textarea");
    if (typing && event.key !== "Escape") return;
    if (target.id === "text" && event.key === "Escape" && target.value) return; // clears it
    if (!(event.key in keys)) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  }, true);
}
