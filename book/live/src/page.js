/** Every `[data-living]` of the page comes alive when its button is pressed; until then it is what
 * the book's own run of the library printed there. */

import { client } from "./client.js";
import { h } from "./dom.js";
import { editor } from "./editor.js";
import { pieces } from "./pieces.js";

/** What a piece is given: where it stands, and the model's description once it is there.
 * @typedef {{root: HTMLElement, say: (text: string) => void}} Place */
/** @typedef {{node: HTMLElement, started: (about: any) => void | Promise<void>}} Piece */
/** @type {Record<string, (place: Place) => Piece>} */
const KINDS = { edit: editor, soften: (place) => editor(place, true), ...pieces };

/** @param {HTMLElement} root */
function alive(root) {
  const make = KINDS[root.dataset.living ?? ""];
  if (!make) return;
  const megabytes = root.dataset.megabytes ?? "23";
  const status = h("p", { class: "living-status", role: "status" });
  const bar = h("progress", { class: "living-progress", max: 1, value: 0, hidden: true, "aria-label": "loading the model" });
  const button = h("button", { type: "button", class: "living-load" }, root.dataset.invitation ?? "Try it here");
  const size = h("span", { class: "living-size" }, `loads ${megabytes} MB from the book's own folder, no network`);
  const front = h("div", { class: "living-front" }, button, size, bar, status);
  root.prepend(front);
  /** @type {Piece | undefined} */
  let piece;
  button.addEventListener("click", async () => {
    button.disabled = true;
    bar.hidden = false;
    status.textContent = "";
    if (!piece) {
      const made = make({ root, say: (text) => (status.textContent = text) });
      piece = made;
      // its places are kept free from now on, so that nothing moves when numbers come
      for (const one of root.querySelectorAll(":scope > .living-baked")) one.setAttribute("hidden", "");
      root.append(made.node);
    }
    try {
      const about = await client.load((done, all) => (bar.value = done / all));
      bar.hidden = true;
      button.hidden = size.hidden = true;
      status.textContent = `The model is here (${about.kernel}).`;
      await piece.started(about);
    } catch (problem) {
      button.disabled = false;
      bar.hidden = true;
      button.textContent = "Try again";
      status.textContent = problem instanceof Error ? problem.message : String(problem);
    }
  });
  if (root.dataset.living === "edit" && location.hash.startsWith("#edits=")) {
    status.textContent = "This link carries edits. Load the model to write them.";
  }
}

const start = () => document.querySelectorAll("[data-living]").forEach((root) => alive(/** @type {HTMLElement} */ (root)));
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
