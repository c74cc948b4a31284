// On a phone the panel is a sheet below the map, which a tap or a drag makes lower or taller, and
// filters are folded away.

import { $ } from "./dom.js";

const SIZES = ["low", "half", "full"];

export function makeSheet() {
  const more = $("more-filters");
  $("filters").classList.add("closed");
  more.addEventListener("click", () => more.setAttribute("aria-expanded", String(!$("filters").classList.toggle("closed"))));

  const [panel, grip] = [$("panel"), $("grip")];
  const put = (size) => {
    panel.dataset.size = size;
    panel.style.removeProperty("height");
    grip.setAttribute("aria-expanded", String(size !== "low"));
  };
  put("half");
  let from = null;
  let moved = false;
  grip.addEventListener("pointerdown", (event) => {
    grip.setPointerCapture(event.pointerId);
    from = { y: event.clientY, height: panel.offsetHeight };
    moved = false;
  });
  grip.addEventListener("pointermove", (event) => {
    if (!from || Math.abs(event.clientY - from.y) < 6) return;
    moved = true;
    panel.style.height = `${Math.max(64, Math.min(innerHeight - 64, from.height + from.y - event.clientY))}px`;
  });
  grip.addEventListener("pointerup", () => {
    if (moved) {
      const share = panel.offsetHeight / innerHeight;
      put(share < 0.3 ? "low" : share < 0.72 ? "half" : "full");
    }
    from = null;
  });
  grip.addEventListener("click", () => {
    if (moved) moved = false;
    else put(SIZES[(SIZES.indexOf(panel.dataset.size) + 1) % SIZES.length]);
  });
}
