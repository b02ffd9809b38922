/** Every `[data-living]` of the page comes alive when its button is pressed; until then it is what
 * the book's own run of the library printed there. */

import { client } from "./client.js";
import { h } from "./dom.js";
import { editor } from "./editor.js";
import { editsOf } from "./link.js";
import { pieces } from "./pieces.js";

/** What a piece is given: where it stands, and the model's description once it is there.
 * @typedef {{root: HTMLElement, say: (text: string) => void}} Place */
/** @typedef {{node: HTMLElement, started: (about: any) => void | Promise<any>}} Piece */
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
  const front = h("div", { class: "living-front", tabindex: -1 }, button, size, bar, status);
  root.prepend(front);
  const say = (/** @type {string} */ text) => {
    if (status.textContent !== text) status.textContent = text; // or it would be read out again
  };
  /** @type {Piece | undefined} */
  let piece;
  let loading = false;
  button.addEventListener("click", async () => {
    if (loading) return;
    loading = true;
    button.setAttribute("aria-disabled", "true"); // it keeps its focus, which a disabled one would lose
    bar.hidden = false;
    status.textContent = "";
    if (!piece) {
      const made = make({ root, say });
      piece = made;
      // its places are kept free from now on, so that nothing moves when numbers come
      for (const one of root.querySelectorAll(":scope > .living-baked")) one.setAttribute("hidden", "");
      root.append(made.node);
    }
    try {
      const about = await client.load((done, all) => (bar.value = done / all));
      bar.hidden = true;
      const held = document.activeElement === button;
      button.hidden = size.hidden = true;
      if (held) front.focus({ preventScroll: true }); // the next Tab goes on from here
      status.textContent = `The model is here (${about.kernel}).`;
      await piece.started(about);
    } catch (problem) {
      button.removeAttribute("aria-disabled");
      bar.hidden = true;
      button.textContent = "Try again";
      status.textContent = problem instanceof Error ? problem.message : String(problem);
    }
    loading = false;
  });
  const linked = () => {
    const found = button.hidden ? null : editsOf(location.hash);
    if (found) status.textContent = found instanceof Error ? found.message : "This link carries edits. Load the model to write them.";
  };
  if (root.dataset.living === "edit") {
    linked();
    window.addEventListener("hashchange", linked);
  }
}

const start = () => document.querySelectorAll("[data-living]").forEach((root) => alive(/** @type {HTMLElement} */ (root)));
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
