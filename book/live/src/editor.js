/** The first page: ask, edit, soften, look inside, undo, carry away. */

import { client } from "./client.js";
import { controlsOf, MOST } from "./controls.js";
import { chance, chart, field, h, later, number, Told, trying } from "./dom.js";
import { addressOf, editsOf, inPython } from "./link.js";

/** Where a number is explained: the section, and what it is called in a list of links. */
const WHY = /** @type {const} */ ({
  probability: ["a_fact.html#the-answer", "the probability of the next word"],
  loss: ["values.html#the-loss", "the loss"],
  chance: ["values.html#the-steps", "the probability, step by step"],
  value: ["values.html#what-is-being-looked-for", "the length of δ"],
  size: ["emmet.html#one-column-of-multipliers-a-fact", "the length of Δ"],
  missed: ["objective.html#two-problems-one-objective", "what is missed"],
  cost: ["preserving.html#counting-what-changes", "the preservation cost"],
  lam: ["objective.html#is-an-exchange-rate", "λ"],
  frontier: ["bridge.html#turn-the-knob", "the frontier"],
  rarity: ["preserving.html#which-keys-are-cheap", "the rarity of the key"],
  near: ["emmet.html#names-that-are-alike", "keys that are near"],
  lens: ["a_fact.html#when-does-the-answer-arise", "what the stream would say"],
  controls: ["judging.html#what-the-scores-hide", "what else changed"],
});
/** A link to it, in another tab: the model and the edits stay where they are. */
const why = (/** @type {keyof typeof WHY} */ name) =>
  h("a", { class: "living-why", href: WHY[name][0], target: "_blank", rel: "noopener", "aria-label": `why? ${WHY[name][1]} (opens another tab)` }, "why?");

/** The share of the equality that a step of the slider leaves, as lam: rarity (1 - s) / s.
 * @param {number} share @param {number} rarity */
const lamOf = (share, rarity) => (share >= 1 ? 0 : share <= 0 ? 1e9 * rarity : (rarity * (1 - share)) / share);
const STEPS = 40;

/** An edit as the page keeps it: what the worker told, and what it was made from.
 * @typedef {{id: number, fact: any, relation: string, lam: number, rarity: number, missed: number,
 *   cost: number, size: number, delta: Float32Array, losses: number[], seconds: number}} Shown */

/** The whole page; `small` is the edit and its slider alone, for a chapter.
 * @param {import("./page.js").Place} place @param {boolean} [small] @returns {import("./page.js").Piece} */
export function editor({ say }, small = false) {
  /** @type {any} */
  let about = null;
  /** @type {Shown[]} */
  let edits = [];
  /** @type {Shown | null} */
  let chosen = null;
  let busy = false;

  // --- ask ---------------------------------------------------------------------------------------
  const bars = Array.from({ length: 5 }, () => {
    const word = h("span", { class: "living-word" }, "–"), fill = h("span", { class: "living-fill" });
    const value = h("span", { class: "living-chance" }, "");
    return { row: h("li", {}, word, h("span", { class: "living-bar", "aria-hidden": "true" }, fill), value), word, fill, value };
  });
  const asked = field("Ask the model", "The Eiffel Tower is located in the city of", "its five likeliest next words move as you type");
  const answer = async () => {
    const answered = await trying(asked, async () => {
      // a blank at the end is that of the word to come, which the model writes itself
      const found = await client.ask("ask", { text: asked.input.value.trimEnd(), many: 5 });
      bars.forEach(({ word, fill, value }, i) => {
        word.textContent = found[i].word || "(a blank)";
        fill.style.width = `${100 * found[i].probability}%`;
        value.textContent = chance(found[i].probability);
      });
    });
    if (answered) return;
    for (const { word, fill, value } of bars) [word.textContent, value.textContent, fill.style.width] = ["–", "", "0"];
  };
  // who hears the page is told the likeliest word, once the typing has come to rest
  const heard = h("p", { class: "living-unseen", role: "status" });
  const read = later(() => (heard.textContent = bars[0].value.textContent && `Next word: ${bars[0].word.textContent}, ${bars[0].value.textContent}`), 1200);
  asked.input.addEventListener("input", later(answer, 120));
  asked.input.addEventListener("input", read);

  // --- edit --------------------------------------------------------------------------------------
  const subjects = h("datalist", { id: "living-subjects" }), objects = h("datalist", { id: "living-objects" });
  const subject = field("Subject", "The Eiffel Tower", "one of atlas's, or your own", { list: "living-subjects" });
  const relation = h("select", { id: "living-relation" });
  const sentence = field("Sentence, up to the word that is to change", "The Eiffel Tower is located in the city of", "the subject stands in it");
  const object = field("New object", "Rome", "what the model is to say", { list: "living-objects" });
  const fields = { subject, sentence, object };
  const go = h("button", { type: "submit", class: "living-go", disabled: true }, "Edit");
  const loss = chart("the loss, step by step"), chances = chart("the probability of the new object, step by step");
  const told = h("p", { class: "living-told", role: "status" }, "Nothing is written yet.");
  const form = h("form", { class: "living-form", novalidate: true },
    subject.node,
    h("p", { class: "living-field" }, h("label", { for: "living-relation" }, "What about it?"), relation),
    sentence.node, object.node, go);

  const relations = () => {
    const triples = /** @type {[string, string, string][]} */ (about.knowledge.triples);
    return triples.filter(([one]) => one === subject.input.value);
  };
  /** The relations of the subject, and a sentence for the one that is chosen. */
  const offer = () => {
    const before = relation.value, own = relations();
    relation.replaceChildren(...own.map(([, name, value]) =>
      h("option", { value: name }, `${name.split(".")[1]} (now: ${value})`)),
      h("option", { value: "" }, "my own sentence"));
    relation.value = own.some(([, name]) => name === before) ? before : (own[0]?.[1] ?? "");
  };
  const objectsOf = (/** @type {string} */ name) => {
    const all = /** @type {[string, string, string][]} */ (about.knowledge.triples);
    return [...new Set(all.filter(([, one]) => one === name).map(([, , value]) => value))].sort();
  };
  let named = subject.input.value, spoken = ""; // the subject and the relation of the last suggestion
  const suggest = () => {
    const wording = about.knowledge.wordings[relation.value]?.[0], name = subject.input.value.trim();
    if (wording) sentence.input.value = wording.replace("{}", () => name);
    else if (name && named) sentence.input.value = sentence.input.value.replace(named, () => name);
    const values = objectsOf(relation.value), now = relations().find(([, one]) => one === relation.value)?.[2];
    objects.replaceChildren(...values.map((value) => h("option", { value })));
    // an object of the relation before fits no more (a country is no city); the reader's own one stays
    if (wording && !values.includes(object.input.value) && objectsOf(spoken).includes(object.input.value)) {
      object.input.value = values.find((value) => value !== now) ?? object.input.value;
    }
    [named, spoken] = [name || named, relation.value];
    for (const one of Object.values(fields)) one.complain("");
  };
  subject.input.addEventListener("change", () => {
    if (!about) return;
    offer();
    suggest();
  });
  relation.addEventListener("change", suggest);

  /** The fact in the fields; a complaint stands beside the field that it is about. */
  const fact = () => {
    const [s, text, target] = [subject, sentence, object].map((one) => one.input.value.trim());
    if (!s) throw new Told("Name a subject: the words that the fact is about.", "subject");
    const at = text.indexOf(s);
    if (at < 0) throw new Told(`"${s}" does not stand in this sentence, letter by letter.`, "sentence");
    if (text.indexOf(s, at + 1) >= 0) throw new Told(`"${s}" stands in this sentence twice.`, "sentence");
    if (!target) throw new Told("Name the new object.", "object");
    return { prompt: `${text.slice(0, at)}{}${text.slice(at + s.length)}`, subject: s, target };
  };
  /** The button keeps its focus meanwhile, which one that is disabled would lose. */
  const working = (/** @type {boolean} */ now) => {
    busy = now;
    go.setAttribute("aria-disabled", String(now));
  };
  form.addEventListener("submit", async (/** @type {Event} */ event) => {
    event.preventDefault();
    if (busy || !about) return;
    await trying(sentence, async () => {
      const wanted = fact(), steps = /** @type {{loss: number, probability: number}[]} */ ([]);
      working(true);
      well();
      told.textContent = "Looking for a value that makes the model say it …";
      const draw = () => {
        const top = steps[0].loss, last = about.recipe.steps - 1;
        const now = steps[steps.length - 1];
        loss.draw(steps.map((one, i) => [i / last, one.loss / top]), null, `the loss fell from ${number(top)} to ${number(now.loss)} in ${steps.length} steps`);
        chances.draw(steps.map((one, i) => [i / last, one.probability]), null, `the probability of ${wanted.target} rose to ${chance(now.probability)}`);
      };
      try {
        const made = await client.ask("edit", { fact: wanted }, (step) => {
          steps.push(step);
          draw();
        });
        edits.push({ ...made, relation: relation.value });
        await show(edits[edits.length - 1]);
        const text = wanted.prompt.replace("{}", () => wanted.subject);
        const [now] = await client.ask("probabilities", { pairs: [[text, wanted.target]] });
        const says = wanted.target.startsWith(now.first.word) ? "" : ` It did not take: likelier still is “${now.first.word || "a blank"}” (${chance(now.first.probability)}). Sentences that the model ends with such an answer take better.`;
        told.textContent = `Written in ${made.seconds.toFixed(1)} s. “${wanted.target}” has a probability of ${chance(now.probability)} now.${says}`;
      } finally {
        working(false);
        if (told.textContent.endsWith("…")) told.textContent = "Nothing was written.";
      }
    }, fields);
  });

  // --- what is in force --------------------------------------------------------------------------
  const list = h("ol", { class: "living-edits" });
  const listed = () => {
    // the list is made anew, and what had the focus in it has it again (or its neighbour, or the way on)
    const kept = [...list.querySelectorAll("button")].indexOf(/** @type {any} */ (document.activeElement));
    list.replaceChildren(...edits.map((edit) => h("li", { class: edit === chosen ? "living-chosen" : null },
      h("button", { type: "button", class: "living-pick", "aria-pressed": String(edit === chosen), onclick: () => show(edit).catch(problem) },
        `${edit.fact.prompt.replace("{}", () => edit.fact.subject)} ${edit.fact.target}`),
      h("button", { type: "button", class: "living-undo", "aria-label": `undo: ${edit.fact.subject}, ${edit.fact.target}`, onclick: () => undo(edit).catch(problem) }, "undo"))));
    const all = list.querySelectorAll("button");
    if (kept >= 0) (all[Math.min(kept, all.length - 1)] ?? go).focus();
  };
  const undo = async (/** @type {Shown} */ edit) => {
    if (busy || !edits.includes(edit)) return;
    well();
    edits = edits.filter((one) => one !== edit); // at once: a second press finds it gone
    await client.ask("undo", { id: edit.id });
    if (chosen === edit) chosen = edits[edits.length - 1] ?? null;
    told.textContent = `Taken out: ${edit.fact.subject}, ${edit.fact.target}.`;
    await refresh();
  };

  // --- the chosen one ----------------------------------------------------------------------------
  const slider = h("input", { type: "range", min: 0, max: STEPS, value: 0, id: "living-lam", disabled: true });
  const lamNow = h("output", { for: "living-lam", "aria-live": "off" }, "no edit yet");
  const values = Object.fromEntries(["lam", "size", "missed", "cost", "rarity", "value"].map((name) => [name, h("dd", {}, "–")]));
  const entry = (/** @type {string} */ name, /** @type {string} */ text, /** @type {keyof typeof WHY} */ reason) =>
    h("div", {}, h("dt", {}, `${text}\u00a0`, why(reason)), values[name]);
  const numbers = h("dl", { class: "living-numbers" },
    entry("size", "length of Δ", "size"), entry("missed", "missed: ‖Δk − r‖ / ‖r‖", "missed"),
    entry("cost", "preservation cost: tr(Δ C₀ Δᵀ)", "cost"), entry("lam", "λ", "lam"),
    entry("rarity", "rarity of the key: kᵀC₀⁻¹k", "rarity"), entry("value", "length of δ", "value"));
  const frontier = chart("what is missed against what it costs");
  const facts = Object.fromEntries(Array.from({ length: MOST }, (_, i) => {
    const cells = Array.from({ length: 4 }, () => h("td", {}, "–"));
    return [i, { row: h("tr", {}, ...cells), cells }];
  }));
  const table = h("table", { class: "living-table" },
    h("caption", {}, "What the edits changed: the probability of the expected word, before all edits and now ", why("controls")),
    h("thead", {}, h("tr", {}, ...["sentence", "expected", "before → now", "now says"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, ...Object.values(facts).map((one) => one.row)));
  const lens = Array.from({ length: 6 }, (_, i) => {
    const cells = Array.from({ length: 3 }, () => h("td", {}, "–"));
    return { row: h("tr", {}, h("th", { scope: "row" }, String(i)), ...cells), cells };
  });
  const lensTable = h("table", { class: "living-table" },
    h("caption", {}, "What the stream would say after each block, before all edits and now ", why("lens")),
    h("thead", {}, h("tr", {}, ...["block", "before", "now", "new object, now"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, ...lens.map((one) => one.row)));
  const near = Array.from({ length: 5 }, () => h("li", {}, "–"));

  const write = () => {
    if (!chosen) {
      for (const one of Object.values(values)) one.textContent = "–";
      frontier.draw([]);
      lamNow.textContent = "no edit yet";
      slider.setAttribute("aria-valuetext", "no edit yet");
      return;
    }
    values.lam.textContent = number(chosen.lam);
    values.size.textContent = number(chosen.size);
    values.missed.textContent = number(chosen.missed);
    values.cost.textContent = number(chosen.cost);
    values.rarity.textContent = number(chosen.rarity);
    values.value.textContent = number(Math.hypot(...chosen.delta));
    const kept = 1 - chosen.missed;
    lamNow.textContent = kept > 0.9999 ? "equality: all of it is written" : kept < 1e-6 ? "nothing is written" : `${Math.round(100 * kept)} % of it is written`;
    slider.setAttribute("aria-valuetext", lamNow.textContent); // a share, not the number of a step
    const line = Array.from({ length: 41 }, (_, i) => [1 - i / 40, (i / 40) ** 2]);
    frontier.draw(line, [chosen.missed, kept ** 2], `${lamNow.textContent}, at ${Math.round(100 * kept ** 2)} % of the cost of the equality`);
  };
  const soften = async () => {
    if (!chosen || busy) return;
    const share = 1 - Number(slider.value) / STEPS, edit = chosen;
    Object.assign(edit, await client.ask("soften", { id: edit.id, lam: lamOf(share, edit.rarity) }), { relation: edit.relation });
    write();
    settled();
  };
  slider.addEventListener("input", () => soften().catch(problem));

  let turn = 0;
  /** All that is told about the chosen edit, and the answers above. A later call ends an earlier one,
   * which would ask about an edit that may be gone. */
  const refresh = async () => {
    const mine = ++turn;
    listed();
    write();
    slider.disabled = !chosen;
    slider.value = String(chosen ? Math.round(STEPS * chosen.missed) : 0);
    if (!small) history.replaceState(null, "", addressOf(edits) || location.pathname + location.search);
    python.textContent = edits.length ? inPython(edits) : "# no edit yet\n";
    save.disabled = copy.disabled = lines.disabled = !edits.length;
    await answer();
    const here = chosen;
    if (small || mine !== turn) return;
    if (!here) {
      for (const { row, cells } of [...Object.values(facts), ...lens]) {
        row.classList.remove("living-spare");
        cells.forEach((/** @type {Node} */ one) => (one.textContent = "–"));
      }
      near.forEach((one) => (one.textContent = "–"));
      return;
    }
    const controls = controlsOf(about.knowledge, here.fact, here.relation);
    const pairs = controls.map(({ text, word }) => [text, word]);
    const [before, now] = [await client.ask("probabilities", { pairs, base: true }), await client.ask("probabilities", { pairs })];
    if (mine !== turn) return;
    const rows = controls.map((one, i) => ({ ...one, was: before[i].probability, is: now[i].probability, says: now[i].first.word }))
      .sort((a, b) => Math.abs(b.is - b.was) - Math.abs(a.is - a.was));
    Object.values(facts).forEach(({ row, cells }, i) => {
      const one = rows[i];
      row.classList.toggle("living-spare", !one);
      const shown = one ? [`${one.text} …`, one.word, `${chance(one.was)} → ${chance(one.is)}`, one.says] : ["", "", "", ""];
      cells.forEach((/** @type {HTMLElement} */ cell, /** @type {number} */ j) => (cell.textContent = shown[j]));
      if (one) cells[0].append(" ", h("span", { class: "living-kind" }, one.kind));
    });
    const ask = { text: here.fact.prompt.replace("{}", () => here.fact.subject), word: here.fact.target };
    const [then, after] = [await client.ask("lens", { ...ask, base: true }), await client.ask("lens", ask)];
    if (mine !== turn) return;
    lens.forEach(({ cells }, i) => {
      cells[0].textContent = `${then[i].word} ${chance(then[i].probability)}`;
      cells[1].textContent = `${after[i].word} ${chance(after[i].probability)}`;
      cells[2].textContent = chance(after[i].own);
    });
    const found = await client.ask("near", { id: here.id, many: 5 });
    if (mine !== turn) return;
    near.forEach((one, i) => (one.textContent = `${found[i].subject}: ${found[i].cosine.toFixed(2)}`));
  };
  const settled = later(() => refresh().catch(problem), 250);
  /** What was wrong before is over. */
  const well = () => say(`The model is here (${about.kernel}).`);
  const problem = (/** @type {unknown} */ what) => say(what instanceof Error ? what.message : String(what));
  const show = async (/** @type {Shown} */ edit) => {
    chosen = edit;
    asked.input.value = edit.fact.prompt.replace("{}", () => edit.fact.subject);
    await refresh();
  };

  // --- further -----------------------------------------------------------------------------------
  const python = h("code", {}, "# no edit yet\n");
  const copy = h("button", { type: "button", disabled: true }, "Copy the link"), save = h("button", { type: "button", disabled: true }, "Download the edit");
  const lines = h("button", { type: "button", disabled: true }, "Copy these lines"), carried = h("p", { class: "living-told", role: "status" });
  const copied = async (/** @type {string} */ text, /** @type {string} */ well, /** @type {string} */ ill) => {
    try {
      await navigator.clipboard.writeText(text);
      carried.textContent = well;
    } catch {
      carried.textContent = ill;
    }
  };
  copy.addEventListener("click", () => {
    // a heading's own address may stand in the bar by now: the edits come back into it
    history.replaceState(null, "", addressOf(edits));
    copied(location.href, "The link is copied.", "The address of this page is the link: copy it from the browser's bar.");
  });
  lines.addEventListener("click", () => copied(python.textContent, "The lines are copied.", "This browser does not let the page copy: mark the lines and copy them."));
  save.addEventListener("click", async () => {
    if (!chosen) return;
    const bytes = await client.ask("file", { id: chosen.id });
    const url = URL.createObjectURL(new Blob([bytes], { type: "application/octet-stream" }));
    h("a", { href: url, download: `${chosen.fact.subject} - ${chosen.fact.target}.safetensors`.replace(/[^\w. -]/g, "_") }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });

  const node = h("div", { class: "living-app" },
    h("section", { "aria-label": "ask" }, asked.node, h("ol", { class: "living-bars" }, ...bars.map((one) => one.row)), heard, h("p", { class: "living-note" }, "probability of the next word ", why("probability"))),
    h("section", { "aria-label": "edit" }, form, subjects, objects,
      h("div", { class: "living-charts" },
        h("figure", {}, loss.box, h("figcaption", {}, "loss ", why("loss"))),
        h("figure", {}, chances.box, h("figcaption", {}, "probability of the new object ", why("chance")))),
      told, h("div", { class: "living-force" }, h("p", { class: "living-heading" }, "In force"), list)),
    h("section", { "aria-label": "how much of it is written" },
      h("p", { class: "living-field" }, h("label", { for: "living-lam" }, "How much of it: λ, from equality (left) to nothing (right)"), lamNow, slider),
      h("div", { class: "living-charts" }, numbers,
        h("figure", {}, frontier.box, h("figcaption", {}, "cost (up) against what is missed (right) ", why("frontier"))))),
    small ? null : h("section", { "aria-label": "what it changed" }, table),
    small ? null : h("section", { "aria-label": "look inside" }, h("details", {}, h("summary", {}, "Look inside"), lensTable,
      h("p", { class: "living-heading" }, "Subjects whose keys lie nearest, by the cosine in C₀'s metric ", why("near")), h("ol", { class: "living-near" }, ...near))),
    small ? null : h("section", { "aria-label": "further" }, copy, " ", save, carried,
      h("details", {}, h("summary", {}, "Open this in Python"), h("pre", { tabindex: 0, "aria-label": "the same edits in Python" }, python), lines)));

  /** Write what an address holds, in place of what is in force. */
  const linked = async () => {
    const found = small ? null : editsOf(location.hash);
    if (found instanceof Error) say(found.message);
    if (!Array.isArray(found) || busy || location.hash === addressOf(edits)) return;
    working(true);
    well();
    try {
      for (const one of edits) await client.ask("undo", { id: one.id });
      [edits, chosen] = [[], null];
      for (const one of found) edits.push({ ...await client.ask("restore", one), relation: one.relation });
    } catch (what) {
      problem(what);
    } finally {
      working(false);
    }
    if (!edits.length) return refresh();
    await show(edits[edits.length - 1]);
    told.textContent = `Written from the link, with nothing optimised again: ${edits.length === 1 ? "one edit" : `${edits.length} edits`}.`;
  };

  return {
    node,
    async started(found) {
      about = found;
      const names = [...new Set(about.knowledge.triples.map((/** @type {string[]} */ one) => one[0]))];
      subjects.replaceChildren(...names.map((value) => h("option", { value })));
      offer();
      // the sentence stays that of the example above, which is not the relation's first wording
      relation.value = relations().some(([, name]) => name === "places.city") ? "places.city" : relation.value;
      spoken = relation.value;
      objects.replaceChildren(...objectsOf(spoken).map((value) => h("option", { value })));
      go.disabled = false;
      await answer();
      await linked();
      window.addEventListener("hashchange", () => linked().catch(problem)); // a link put into this tab
    },
  };
}
