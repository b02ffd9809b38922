/**
 * v*: the value that makes the model say the new object (the chapter on values; the same recipe,
 * order of steps and constants as the library's `editing/values.py`).
 */

import { logSoftmax, norm } from "./numbers.js";
import { Refused } from "./rows.js";

/** @typedef {{layer: number, steps: number, rate: number, kl: number, decay: number, clamp: number,
 *   stop: number}} Recipe */

/** A step that has been computed: what the page shows while it runs.
 * @typedef {{step: number, loss: number, probability: number}} Step */

/** What the optimisation needs and what does not depend on delta.
 * @param {import("./model.js").Model} model
 * @param {{behind: import("./rows.js").FactRow[], kl: import("./rows.js").FactRow}} rows
 * @param {number} layer */
export function prepare(model, rows, layer) {
  const d = model.config.n_embd, all = [...rows.behind, rows.kl];
  // of the KL prompt nothing behind the subject is needed
  const heads = all.map((row) => row.ids.slice(0, row.subject));
  const tails = all.map((row) =>
    row.target.length ? row.ids.slice(row.subject) : row.ids.slice(row.subject, row.subject + 1));
  const past = heads.map((ids) => {
    if (!ids.length) return null;
    const pack = model.pack([ids]);
    model.run(pack, model.embed(pack, [ids]), 0, model.config.n_layer);
    return { keys: pack.rows[0].keys, values: pack.rows[0].values, length: ids.length };
  });
  const pack = model.pack(tails, past);
  const starts = pack.rows.map((row) => row.first);
  let key = new Float64Array(model.config.n_inner);
  const stream = model.run(pack, model.embed(pack, tails), 0, layer + 1, {
    see: (l, what, X) => {
      if (l === layer && what === "key") key = keyOf(X, starts.slice(0, -1), model.config.n_inner);
    },
  });
  const targets = rows.behind.flatMap((row, r) => row.target.map((id, t) => ({
    place: starts[r] + tails[r].length - row.target.length + t,
    id,
    weight: 1 / (row.target.length * rows.behind.length),
    bare: r === 0,
  })));
  const first = starts[0] * d;
  return { pack, stream, starts, targets, key, init: Float64Array.from(stream.subarray(first, first + d)) };
}

/** k*: one half the bare prompt's key, the other half the mean of those behind a prefix.
 * @param {Float32Array} X @param {number[]} starts @param {number} inner */
function keyOf(X, starts, inner) {
  const key = new Float64Array(inner), others = starts.length - 1;
  starts.forEach((place, r) => {
    const weight = others ? (r ? 0.5 / others : 0.5) : 1;
    for (let i = 0; i < inner; i++) key[i] += weight * X[place * inner + i];
  });
  return key;
}

/** Loss and gradient at one delta.
 * @param {import("./model.js").Model} model @param {ReturnType<typeof prepare>} ready
 * @param {Recipe} recipe @param {Float64Array} delta @param {Float64Array | null} initial */
function lossAt(model, ready, recipe, delta, initial) {
  const { n_embd: d, n_layer: layers, vocab_size: V } = model.config;
  const { pack, starts, targets } = ready, from = recipe.layer + 1;
  const stream = ready.stream.slice();
  for (const start of starts) for (let i = 0; i < d; i++) stream[start * d + i] += delta[i];
  const kept = /** @type {import("./model.js").Kept[]} */ ([]);
  const last = model.run(pack, stream, from, layers, { kept });
  const places = [...targets.map((one) => one.place), starts[starts.length - 1]];
  const { logits, kept: ofHead } = model.logits(last, places, true);
  const G = new Float32Array(logits.length);
  let loss = 0, bare = 0;
  targets.forEach((one, t) => {
    const row = logSoftmax(logits.subarray(t * V, (t + 1) * V));
    loss -= one.weight * row[one.id];
    if (one.bare) bare += row[one.id];
    for (let j = 0; j < V; j++) G[t * V + j] = one.weight * Math.exp(row[j]);
    G[t * V + one.id] -= one.weight;
  });
  const at = targets.length * V, now = logSoftmax(logits.subarray(at, at + V));
  const then = initial ?? now;
  let divergence = 0;
  for (let j = 0; j < V; j++) divergence += Math.exp(now[j]) * (now[j] - then[j]);
  for (let j = 0; j < V; j++) {
    G[at + j] = recipe.kl * Math.exp(now[j]) * (now[j] - then[j] - divergence);
  }
  const size = norm(delta), square = norm(ready.init) ** 2;
  loss += recipe.kl * divergence + (recipe.decay * size) / square;
  const back = () => {
    if (!ofHead) throw new Error("nothing was kept");
    const top = model.logitsBack(G, places, pack.n, ofHead);
    const down = model.runBack(pack, top, from, layers, kept), gradient = new Float64Array(d);
    for (const start of starts) for (let i = 0; i < d; i++) gradient[i] += down[start * d + i];
    if (size) for (let i = 0; i < d; i++) gradient[i] += (recipe.decay * delta[i]) / (size * square);
    return gradient;
  };
  return { loss, probability: Math.exp(bare), now, back };
}

/** Adam, with delta kept short; yields each step, returns delta.
 * @param {import("./model.js").Model} model @param {ReturnType<typeof prepare>} ready
 * @param {Recipe} recipe @returns {Generator<Step, Float64Array>} */
export function* optimised(model, ready, recipe) {
  const d = model.config.n_embd, limit = recipe.clamp * norm(ready.init);
  const delta = new Float64Array(d), first = new Float64Array(d), second = new Float64Array(d);
  let initial = null;
  for (let step = 0; ; step++) {
    const found = lossAt(model, ready, recipe, delta, initial);
    initial ??= found.now;
    if (!Number.isFinite(found.loss)) throw new Refused("The loss is not finite; take other words.");
    yield { step, loss: found.loss, probability: found.probability };
    if (step === recipe.steps - 1 || found.loss < recipe.stop) return delta;
    const gradient = found.back(), t = step + 1;
    for (let i = 0; i < d; i++) {
      first[i] = 0.9 * first[i] + 0.1 * gradient[i];
      second[i] = 0.999 * second[i] + 0.001 * gradient[i] ** 2;
      const scaled = Math.sqrt(second[i] / (1 - 0.999 ** t)) + 1e-8;
      delta[i] -= (recipe.rate * first[i]) / (1 - 0.9 ** t) / scaled;
    }
    const size = norm(delta);
    if (size > limit) for (let i = 0; i < d; i++) delta[i] *= limit / size;
  }
}
