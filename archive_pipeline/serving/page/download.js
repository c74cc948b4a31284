// A file from the server, with progress by bytes, and a way to stop.

import { request } from "./api.js";
import { el } from "./dom.js";
import { bytes, seconds } from "./format.js";

export class Download {
  /** @param host element that progress is shown in */
  constructor(host) {
    this.host = host;
  }

  get running() {
    return Boolean(this.controller);
  }

  cancel() {
    this.controller?.abort();
  }

  /** Fetch and save; resolves when that is done, failed or stopped. */
  async start(address, name) {
    this.cancel();
    const controller = new AbortController();
    this.controller = controller;
    const bar = el("progress", { "aria-label": "Download" });
    const text = el("p", { class: "quiet" });
    const stop = el("button", { type: "button", class: "plain", onclick: () => controller.abort() }, "Cancel");
    this.host.replaceChildren(bar, el("div", { class: "row" }, el("div", { class: "grow" }, text), stop));
    const began = performance.now();
    let received = 0;
    let total = 0;
    const tell = () => {
      if (!received) text.textContent = `Restoring pixels, ${seconds((performance.now() - began) / 1000)}`;
      else text.textContent = total ? `${bytes(received)} of ${bytes(total)}` : `${bytes(received)} received`;
    };
    const clock = setInterval(tell, 500);
    tell();
    try {
      const response = await request(address, { signal: controller.signal });
      total = response.headers.get("Content-Encoding") ? 0 : Number(response.headers.get("Content-Length")) || 0;
      const counted = response.body.pipeThrough(new TransformStream({
        transform(chunk, out) {
          received += chunk.byteLength;
          if (total) bar.value = received / total;
          out.enqueue(chunk);
        },
      }));
      const type = response.headers.get("Content-Type") ?? "";
      const blob = await new Response(counted, { headers: { "Content-Type": type } }).blob();
      name = nameOf(response) ?? name;
      save(blob, name);
      this.tell(`Saved ${name}, ${bytes(blob.size)}`);
    } catch (error) {
      if (this.controller === controller) this.tell(error.name === "AbortError" ? "Cancelled" : explain(error, received), error.name !== "AbortError");
    } finally {
      clearInterval(clock);
      if (this.controller === controller) this.controller = null;
    }
  }

  tell(text, failed = false) {
    this.host.replaceChildren(el("p", { class: failed ? "problem" : "quiet", role: failed ? "alert" : "status" }, text));
  }
}

function explain(error, received) {
  if (error.status !== undefined) return error.message;
  return received ? `The connection ended after ${bytes(received)}. Nothing was saved.` : error.message;
}

function nameOf(response) {
  const header = response.headers.get("Content-Disposition") ?? "";
  const coded = /filename\*=UTF-8''([^;]+)/i.exec(header)?.[1];
  try {
    if (coded) return decodeURIComponent(coded);
  } catch {
    // not coded as it says: the plain name then
  }
  return /filename="([^"]+)"/i.exec(header)?.[1] ?? null;
}

function save(blob, name) {
  const address = URL.createObjectURL(blob);
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
