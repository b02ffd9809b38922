/** What is looked at beside the fact itself: other words, the subject's other facts, neighbours. */

/** @typedef {{triples: [string, string, string][], wordings: Record<string, string[]>,
 *   held_out: string[]}} Knowledge */

/** A question with the answer that should be given after the edit.
 * @typedef {{kind: string, text: string, word: string}} Control */

const fill = (/** @type {string} */ wording, /** @type {string} */ subject) => wording.replace("{}", () => subject);

/** @param {Knowledge} knowledge @param {import("./rows.js").Fact} fact @param {string} relation
 * @returns {Control[]} */
export function controlsOf(knowledge, fact, relation) {
  const { triples, wordings } = knowledge, held = new Set(knowledge.held_out);
  const known = triples.filter(([subject]) => subject === fact.subject);
  const old = known.find(([, name]) => name === relation)?.[2];
  /** @type {Control[]} */
  const found = [{ kind: "the fact", text: fill(fact.prompt, fact.subject), word: fact.target }];
  for (const other of (wordings[relation] ?? []).filter((one) => one !== fact.prompt).slice(0, 3)) {
    found.push({ kind: "in other words", text: fill(other, fact.subject), word: fact.target });
  }
  for (const [subject, name, object] of known.filter(([, name]) => name !== relation).slice(0, 3)) {
    found.push({ kind: "same subject", text: fill(wordings[name][0], subject), word: object });
  }
  const others = triples.filter(([subject]) => held.has(subject) && subject !== fact.subject);
  const alike = others.filter(([, name]) => name === relation);
  const sharing = alike.filter(([, , object]) => object === old);
  const near = sharing.length ? sharing : alike.length ? alike : others;
  const step = Math.max(1, Math.floor(near.length / 4));
  for (const [subject, name, object] of near.filter((_, i) => i % step === 0).slice(0, 4)) {
    const same = name === relation && wordings[name].includes(fact.prompt);
    found.push({ kind: "neighbour", text: fill(same ? fact.prompt : wordings[name][0], subject), word: object });
  }
  for (const [subject, name] of [["Italy", "countries.capital"], ["Big Ben", "places.city"]]) {
    const one = triples.find(([s, r]) => s === subject && r === name);
    if (one && subject !== fact.subject) {
      found.push({ kind: "elsewhere", text: fill(wordings[one[1]][0], subject), word: one[2] });
    }
  }
  return found;
}

/** As many controls as a fact can have: rows that the page keeps free. */
export const MOST = 13;
