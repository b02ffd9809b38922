/** Smaller pieces of the same model, in the chapters where they teach most. */

import { client } from "./client.js";
import { chance, chart, field, h, later, number, Told, trying } from "./dom.js";

/** @typedef {import("./page.js").Place} Place @typedef {import("./page.js").Piece} Piece */

/** How rare are the keys of a text? @returns {Piece} */
function rarities() {
  const text = field("A text", "The Eiffel Tower is located in the city of", "each bar is k′C₀⁻¹k of one token, on a scale of tens");
  const bars = Array.from({ length: 16 }, () => {
    const word = h("span", { class: "living-word" }, "–"), fill = h("span", { class: "living-fill" }), value = h("span", { class: "living-chance" }, "");
    return { row: h("li", {}, word, h("span", { class: "living-bar", "aria-hidden": "true" }, fill), value), word, fill, value };
  });
  const show = () => trying(text, async () => {
    const found = await client.ask("rarities", { text: text.input.value });
    bars.forEach(({ word, fill, value }, i) => {
      const one = found[i];
      word.textContent = one ? one.text : "–";
      fill.style.width = one ? `${Math.min(100, 20 * Math.log10(1 + one.rarity))}%` : "0";
      value.textContent = one ? number(one.rarity) : "";
    });
    if (found.length > bars.length) throw new Told(`The first ${bars.length} of ${found.length} tokens are shown.`);
  });
  text.input.addEventListener("input", later(show, 200));
  return { node: h("div", { class: "living-app" }, text.node, h("ol", { class: "living-bars" }, ...bars.map((one) => one.row))), started: show };
}

/** Blur the subject, put one state back, and see the answer come back. @param {Place} place @returns {Piece} */
function restoring({ root }) {
  const text = root.dataset.text ?? "The Eiffel Tower is located in the city of", word = root.dataset.word ?? "Paris";
  const subject = root.dataset.subject ?? "The Eiffel Tower", noise = Number(root.dataset.noise ?? 0.2);
  const at = text.indexOf(subject), span = [at, at + subject.length];
  const told = h("p", { class: "living-told", role: "status" }, "…"), table = h("table", { class: "living-table living-states" });
  const frame = h("div", { class: "living-frame" }, table);
  /** @type {HTMLElement | null} */
  let pressed = null;
  const ask = async (/** @type {any} */ back) => client.ask("blurred", { text, word, span, noise, back });
  return {
    node: h("div", { class: "living-app" }, h("p", {}, `“${text}” … ${word}?`), told, frame),
    async started(about) {
      const { spans } = await client.ask("tokens", { text }), layers = about.config.n_layer;
      const [[whole], none] = [await client.ask("probabilities", { pairs: [[text, word]] }), await ask(null)];
      const start = `With all states: ${chance(whole.probability)}. With the subject blurred: ${chance(none)}.`;
      told.textContent = `${start} Press a state to put it back.`;
      const cell = (/** @type {number} */ place, /** @type {number} */ layer, /** @type {string} */ token) => {
        const name = layer ? `behind block ${layer - 1}` : "the embedding";
        const button = h("button", { type: "button", class: "living-state", "aria-label": `${token}, ${name}` }, "·");
        button.addEventListener("click", async () => {
          const p = await ask({ layer, place });
          pressed?.classList.remove("living-pressed");
          pressed = button;
          button.classList.add("living-pressed");
          button.textContent = chance(p);
          button.style.setProperty("--living-share", String(Math.max(0, Math.min(1, p))));
          told.textContent = `${start} With “${token}” put back, ${name}: ${chance(p)}.`;
        });
        return h("td", {}, button);
      };
      table.replaceChildren(
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "token"), h("th", { scope: "col" }, "emb."), ...Array.from({ length: layers }, (_, l) => h("th", { scope: "col" }, String(l))))),
        h("tbody", {}, ...spans.map((/** @type {[number, number]} */ [a, b], /** @type {number} */ place) => {
          const token = text.slice(a, b);
          return h("tr", {}, h("th", { scope: "row" }, token), ...Array.from({ length: layers + 1 }, (_, layer) => cell(place, layer, token)));
        })));
    },
  };
}

/** Ten edits one after another, and what the first one's answer is after each. @returns {Piece} */
function again() {
  const go = h("button", { type: "button", disabled: true }, "Write ten edits, one after another");
  const told = h("p", { class: "living-told", role: "status" }, "Nothing is written yet.");
  const line = chart("the probability of the first edit's object after each edit");
  const rows = Array.from({ length: 10 }, () => {
    const cells = Array.from({ length: 3 }, () => h("td", {}, "–"));
    return { row: h("tr", {}, ...cells), cells };
  });
  /** @type {any} */
  let about = null;
  go.addEventListener("click", async () => {
    if (go.getAttribute("aria-disabled") === "true") return;
    go.setAttribute("aria-disabled", "true"); // it keeps its focus
    told.setAttribute("aria-live", "off"); // ten edits are heard once, at the end
    await client.ask("reset");
    const edits = chosenOf(about.knowledge), first = edits[0], points = /** @type {number[][]} */ ([]);
    for (const [i, fact] of edits.entries()) {
      const text = fact.prompt.replace("{}", () => fact.subject);
      await client.ask("edit", { fact });
      const pairs = [[text, fact.target], [first.prompt.replace("{}", () => first.subject), first.target]];
      const [own, of] = (await client.ask("probabilities", { pairs })).map((/** @type {any} */ one) => one.probability);
      points.push([i / 9, of]);
      const shown = [`${text} ${fact.target}`, chance(own), chance(of)];
      rows[i].cells.forEach((/** @type {HTMLElement} */ cell, /** @type {number} */ j) => (cell.textContent = shown[j]));
      line.draw(points, points[points.length - 1]);
      if (i === 9) told.removeAttribute("aria-live");
      told.textContent = `${i + 1} of 10. The first one has ${chance(of)} now.`;
    }
    go.removeAttribute("aria-disabled");
    go.textContent = "Once more from the beginning";
  });
  const table = h("table", { class: "living-table" },
    h("thead", {}, h("tr", {}, ...["edit", "its own probability then", "the first one's then"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, ...rows.map((one) => one.row)));
  return {
    node: h("div", { class: "living-app" }, go, told, h("figure", {}, line.box, h("figcaption", {}, "the first edit's probability, edit by edit")), table),
    started(found) {
      about = found;
      go.disabled = false;
    },
  };
}

/** Ten facts of different subjects, each with an object of its relation that is not its own.
 * @param {import("./controls.js").Knowledge} knowledge */
function chosenOf({ triples, wordings, held_out }) {
  const held = new Set(held_out), seen = new Set(), found = [];
  const step = Math.floor(triples.length / 37);
  for (let i = 0; found.length < 10; i += step) {
    const [subject, relation, object] = triples[i % triples.length];
    const others = [...new Set(triples.filter(([, name]) => name === relation).map(([, , value]) => value))].filter((value) => value !== object);
    if (held.has(subject) || seen.has(subject) || !others.length) continue;
    seen.add(subject);
    found.push({ prompt: wordings[relation][0], subject, target: others[i % others.length] });
  }
  return found;
}

/** @type {Record<string, (place: Place) => Piece>} */
export const pieces = { rarities, restoring, again };
