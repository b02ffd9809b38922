/** An edit as the safetensors file that `unified_edit.Edit.load` reads. */

import { sha256 } from "./sha256.js";
import { norm } from "./numbers.js";

const FORMAT = "unified_edit.edit/2";

/** The bytes of numbers, as they lie. @param {ArrayBufferView} x */
const bytesOf = (x) => new Uint8Array(x.buffer, x.byteOffset, x.byteLength);

/** What the library's `tensor_hash` gives. @param {string} shape @param {string} type
 * @param {ArrayBufferView} x */
const hashOf = (shape, type, x) => sha256(`${shape} torch.${type}`, bytesOf(x));

/** The weight as it is stored (inner x d), float32, hashed: the base, and with one edit alone.
 * @param {import("./session.js").Session} session @param {import("./session.js").Edit} edit */
function touched(session, edit) {
  const { model, recipe } = session, { from, to } = model.blocks[recipe.layer].down;
  const base = model.baseOf(recipe.layer), before = new Float32Array(from * to), after = before.slice();
  const { left, right } = edit.update;
  for (let j = 0; j < to; j++) for (let i = 0; i < from; i++) {
    before[i * to + j] = base[j * from + i];
    after[i * to + j] = base[j * from + i] + left[j] * right[i];
  }
  const shape = `(${from}, ${to})`;
  return {
    layer: recipe.layer,
    before: hashOf(shape, "float32", before),
    after: hashOf(shape, "float32", after),
  };
}

/** The bytes of a file for one edit. `before` and `after` are the new object's probability behind the
 * bare prompt without any edit, and with this one.
 * @param {import("./session.js").Session} session @param {import("./session.js").Edit} edit
 * @param {{before: number, after: number, likeliest: boolean, others: number}} outcome */
export function edited(session, edit, outcome) {
  const { file, prefixes } = session.about, name = file.weight;
  const ratio = norm(edit.delta) / norm(edit.init);
  const description = JSON.stringify({
    facts: [{
      prompt: edit.fact.prompt, subject: edit.fact.subject, target_new: edit.fact.target.trim(),
      target_true: null,
    }],
    method: { ...file.method, ridge: edit.lam },
    outcomes: [{
      losses: edit.losses, relative_norm: ratio, clamped: ratio >= session.recipe.clamp * (1 - 1e-5),
      before: outcome.before, after: outcome.after, likeliest: outcome.likeliest,
    }],
    diagnosis: {
      [name]: {
        condition: 1, rank: 1, memorization_error: edit.update.missed,
        preservation_error: edit.update.cost, form: edit.lam ? "ridge" : "equality",
      },
    },
    provenance: {
      fingerprint: file.fingerprint,
      state: [file.fingerprint, ...Array(outcome.others).fill("page")].join("+"),
      model: "atlas", revision: null, library: file.library, seed: file.seed, prefixes,
      weights: { [name]: touched(session, edit) }, statistics: file.statistics,
      origin: "the living page of the book",
    },
    warnings: [],
  });
  const { left, right } = edit.update;
  /** @type {[string, [number, number], Float64Array][]} */
  const tensors = [
    [`keys.${name}`, [edit.key.length, 1], edit.key],
    [`left.${name}`, [left.length, 1], left],
    [`right.${name}`, [1, right.length], right],
  ];
  const hashes = tensors.map(([one, [a, b], x]) => `${one} ${hashOf(`(${a}, ${b})`, "float64", x)}`);
  /** @type {Record<string, object>} */
  const header = {
    __metadata__: { kind: FORMAT, description, sha256: sha256(description, ...hashes) },
  };
  let at = 0;
  for (const [one, shape, x] of tensors) {
    header[one] = { dtype: "F64", shape, data_offsets: [at, (at += x.byteLength)] };
  }
  let text = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(Math.ceil(text.length / 8) * 8).fill(32);
  padded.set(text);
  const out = new Uint8Array(8 + padded.length + at);
  new DataView(out.buffer).setBigUint64(0, BigInt(padded.length), true);
  out.set(padded, 8);
  let place = 8 + padded.length;
  for (const [, , x] of tensors) {
    out.set(bytesOf(x), place);
    place += x.byteLength;
  }
  return out;
}
