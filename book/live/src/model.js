/**
 * GPT-2: forward with kept attention keys and values, and backward to the stream behind one block.
 *
 * Tokens of several rows lie packed one behind the other, so that each linear map is one product and
 * nothing is padded. No gradient of a weight is ever needed: values are optimised, weights solved for.
 */

import { inJavaScript } from "./kernel.js";
import { gelu, geluBack, layerNorm, layerNormBack, transposed } from "./numbers.js";

/** A row of a pack: `count` tokens from `first` on, behind `past` tokens whose keys are known.
 * @typedef {{first: number, count: number, past: number, keys: Float32Array[],
 *   values: Float32Array[]}} Row */

/** @typedef {{n: number, rows: Row[]}} Pack */

/** What a block's backward needs of its forward.
 * @typedef {{one: {hat: Float32Array, inverse: Float32Array}, two: {hat: Float32Array,
 *   inverse: Float32Array}, qkv: Float32Array, weights: Float32Array[], before: Float32Array}} Kept */

/** @typedef {{n_layer: number, n_head: number, n_embd: number, n_inner: number,
 *   vocab_size: number, n_positions: number}} Config */

export class Model {
  /** @param {Config} config @param {(name: string) => Float32Array} tensor
   * @param {import("./kernel.js").Kernel} [kernel] */
  constructor(config, tensor, kernel = inJavaScript()) {
    const { n_embd: d, n_inner: inner, vocab_size: vocabulary } = config;
    this.config = config;
    this.multiply = kernel.multiply;
    /** @type {Float32Array | undefined} the edited weight before all edits */
    this.base = undefined;
    /** A matrix as it is and turned over, both where the kernel can read them.
     * @param {string} name @param {number} rows @param {number} columns */
    const bothWays = (name, rows, columns) => {
      const W = kernel.room(rows * columns);
      W.set(tensor(name));
      return { W, T: transposed(W, rows, columns, kernel.room(rows * columns)) };
    };
    const table = bothWays("transformer.wte.weight", vocabulary, d);
    this.words = table.W;
    this.wordsT = table.T;
    this.places = tensor("transformer.wpe.weight");
    this.gain = tensor("transformer.ln_f.weight");
    this.shift = tensor("transformer.ln_f.bias");
    /** A linear map of a block: its matrix both ways, and its bias.
     * @param {string} name @param {number} from @param {number} to */
    const linear = (name, from, to) => (
      { ...bothWays(name + ".weight", from, to), b: tensor(name + ".bias"), from, to }
    );
    this.blocks = Array.from({ length: config.n_layer }, (_, l) => {
      const h = `transformer.h.${l}.`;
      return {
        ln1: { gain: tensor(h + "ln_1.weight"), shift: tensor(h + "ln_1.bias") },
        ln2: { gain: tensor(h + "ln_2.weight"), shift: tensor(h + "ln_2.bias") },
        qkv: linear(h + "attn.c_attn", d, 3 * d),
        out: linear(h + "attn.c_proj", d, d),
        up: linear(h + "mlp.c_fc", d, inner),
        down: linear(h + "mlp.c_proj", inner, d),
      };
    });
  }

  /** X (n x from) through a linear map. @param {Float32Array} X @param {number} n
   * @param {{T: Float32Array, b: Float32Array, from: number, to: number}} map */
  through(X, n, map) {
    const out = new Float32Array(n * map.to);
    this.multiply(out, X, n, map.from, map.T, map.to, map.b);
    return out;
  }

  /** The gradient at a linear map's input. @param {Float32Array} G @param {number} n
   * @param {{W: Float32Array, from: number, to: number}} map */
  back(G, n, map) {
    const out = new Float32Array(n * map.from);
    this.multiply(out, G, n, map.to, map.W, map.from);
    return out;
  }

  /** Rows of tokens that begin behind `past` (their kept keys and values), packed.
   * @param {number[][]} tokens @param {({keys: Float32Array[], values: Float32Array[],
   *   length: number} | null)[]} past @returns {Pack} */
  pack(tokens, past = tokens.map(() => null)) {
    const { n_embd: d, n_layer: layers } = this.config;
    let n = 0;
    const rows = tokens.map((ids, r) => {
      const before = past[r], m = before ? before.length : 0, first = n;
      n += ids.length;
      const room = (/** @type {Float32Array[] | undefined} */ old) =>
        Array.from({ length: layers }, (_, l) => {
          const made = new Float32Array((m + ids.length) * d);
          if (old) made.set(old[l].subarray(0, m * d));
          return made;
        });
      return { first, count: ids.length, past: m, keys: room(before?.keys), values: room(before?.values) };
    });
    return { n, rows };
  }

  /** The stream before the first block (n x d). @param {Pack} pack @param {number[][]} tokens */
  embed(pack, tokens) {
    const { n_embd: d } = this.config, out = new Float32Array(pack.n * d);
    pack.rows.forEach((row, r) => tokens[r].forEach((id, t) => {
      const at = (row.first + t) * d, word = id * d, place = (row.past + t) * d;
      for (let i = 0; i < d; i++) out[at + i] = this.words[word + i] + this.places[place + i];
    }));
    return out;
  }

  /** Blocks from..to-1 of a stream (n x d), which stays as it is.
   * @param {Pack} pack @param {Float32Array} stream @param {number} from @param {number} to
   * @param {{kept?: Kept[], see?: (layer: number, what: "key" | "stream", X: Float32Array) => void}} ask */
  run(pack, stream, from, to, { kept, see } = {}) {
    const { n_embd: d } = this.config, n = pack.n;
    let X = stream;
    const room = () => ({ hat: new Float32Array(n * d), inverse: new Float32Array(n) });
    for (let l = from; l < to; l++) {
      const block = this.blocks[l];
      const one = kept ? room() : null, two = kept ? room() : null;
      const qkv = this.through(layerNorm(X, n, d, block.ln1.gain, block.ln1.shift, one), n, block.qkv);
      const weights = /** @type {Float32Array[]} */ ([]);
      const mixed = this.attend(pack, l, qkv, kept ? weights : null);
      const middle = this.through(mixed, n, block.out);
      for (let i = 0; i < middle.length; i++) middle[i] += X[i];
      const before = this.through(layerNorm(middle, n, d, block.ln2.gain, block.ln2.shift, two), n, block.up);
      const key = gelu(before);
      see?.(l, "key", key);
      const after = this.through(key, n, block.down);
      for (let i = 0; i < after.length; i++) after[i] += middle[i];
      see?.(l, "stream", after);
      if (kept && one && two) kept[l] = { one, two, qkv, weights, before };
      X = after;
    }
    return X;
  }

  /** Attention of each row over its own tokens; keys and values are kept in the rows.
   * @param {Pack} pack @param {number} layer @param {Float32Array} qkv
   * @param {Float32Array[] | null} kept one (heads x count x seen) a row */
  attend(pack, layer, qkv, kept) {
    const { n_embd: d, n_head: heads } = this.config, width = d / heads;
    const scale = 1 / Math.sqrt(width), out = new Float32Array(pack.n * d);
    for (const row of pack.rows) {
      const keys = row.keys[layer], values = row.values[layer], seen = row.past + row.count;
      for (let t = 0; t < row.count; t++) {
        const at = (row.first + t) * 3 * d, to = (row.past + t) * d;
        keys.set(qkv.subarray(at + d, at + 2 * d), to);
        values.set(qkv.subarray(at + 2 * d, at + 3 * d), to);
      }
      const all = new Float32Array(heads * row.count * seen);
      const scores = new Float64Array(seen);
      for (let h = 0; h < heads; h++) for (let t = 0; t < row.count; t++) {
        const q = (row.first + t) * 3 * d + h * width, last = row.past + t;
        let top = -Infinity, sum = 0;
        for (let s = 0; s <= last; s++) {
          const k = s * d + h * width;
          let dot = 0;
          for (let i = 0; i < width; i++) dot += qkv[q + i] * keys[k + i];
          scores[s] = dot * scale;
          if (scores[s] > top) top = scores[s];
        }
        for (let s = 0; s <= last; s++) sum += scores[s] = Math.exp(scores[s] - top);
        const to = (row.first + t) * d + h * width, place = (h * row.count + t) * seen;
        for (let s = 0; s <= last; s++) {
          const weight = scores[s] / sum, v = s * d + h * width;
          all[place + s] = weight;
          for (let i = 0; i < width; i++) out[to + i] += weight * values[v + i];
        }
      }
      kept?.push(all);
    }
    return out;
  }

  /** Logits at some places of a pack's last stream: one row a place.
   * @param {Float32Array} stream @param {number[]} places */
  logits(stream, places, keep = false) {
    const { n_embd: d, vocab_size: V } = this.config, n = places.length;
    const X = new Float32Array(n * d);
    places.forEach((place, t) => X.set(stream.subarray(place * d, (place + 1) * d), t * d));
    const kept = keep ? { hat: new Float32Array(n * d), inverse: new Float32Array(n) } : null;
    const out = new Float32Array(n * V);
    this.multiply(out, layerNorm(X, n, d, this.gain, this.shift, kept), n, d, this.words, V);
    return { logits: out, kept };
  }

  /** The gradient at a pack's last stream from that at logits of some places.
   * @param {Float32Array} G (places x vocabulary) @param {number[]} places @param {number} n
   * @param {{hat: Float32Array, inverse: Float32Array}} kept */
  logitsBack(G, places, n, kept) {
    const { n_embd: d, vocab_size: V } = this.config, many = places.length;
    const inner = new Float32Array(many * d), out = new Float32Array(n * d);
    this.multiply(inner, G, many, V, this.wordsT, d);
    const each = layerNormBack(inner, many, d, this.gain, kept);
    places.forEach((place, t) => {
      for (let i = 0; i < d; i++) out[place * d + i] += each[t * d + i];
    });
    return out;
  }

  /** The gradient at the stream before block `from`, from that behind block `to` - 1.
   * @param {Pack} pack @param {Float32Array} G @param {number} from @param {number} to
   * @param {Kept[]} kept */
  runBack(pack, G, from, to, kept) {
    const { n_embd: d } = this.config, n = pack.n;
    let out = G;
    for (let l = to - 1; l >= from; l--) {
      const block = this.blocks[l], had = kept[l];
      const inner = this.back(out, n, block.down);
      geluBack(inner, had.before);
      const middle = layerNormBack(this.back(inner, n, block.up), n, d, block.ln2.gain, had.two);
      for (let i = 0; i < middle.length; i++) middle[i] += out[i];
      const mixed = this.attendBack(pack, l, this.back(middle, n, block.out), had);
      out = layerNormBack(this.back(mixed, n, block.qkv), n, d, block.ln1.gain, had.one);
      for (let i = 0; i < out.length; i++) out[i] += middle[i];
    }
    return out;
  }

  /** The gradient at queries, keys and values of the pack's tokens; what lies before is constant.
   * @param {Pack} pack @param {number} layer @param {Float32Array} G (n x d) @param {Kept} had */
  attendBack(pack, layer, G, had) {
    const { n_embd: d, n_head: heads } = this.config, width = d / heads;
    const scale = 1 / Math.sqrt(width), out = new Float32Array(pack.n * 3 * d);
    pack.rows.forEach((row, r) => {
      const keys = row.keys[layer], values = row.values[layer], seen = row.past + row.count;
      const back = new Float64Array(seen);
      for (let h = 0; h < heads; h++) for (let t = 0; t < row.count; t++) {
        const g = (row.first + t) * d + h * width, place = (h * row.count + t) * seen;
        const q = (row.first + t) * 3 * d + h * width, last = row.past + t;
        let mean = 0;
        for (let s = 0; s <= last; s++) {
          const v = s * d + h * width, weight = had.weights[r][place + s];
          let dot = 0;
          for (let i = 0; i < width; i++) dot += G[g + i] * values[v + i];
          back[s] = dot;
          mean += weight * dot;
        }
        for (let s = 0; s <= last; s++) {
          const weight = had.weights[r][place + s], slope = weight * (back[s] - mean) * scale;
          const k = s * d + h * width;
          for (let i = 0; i < width; i++) out[q + i] += slope * keys[k + i];
          if (s < row.past) continue;
          const own = (row.first + s - row.past) * 3 * d + h * width;
          for (let i = 0; i < width; i++) {
            out[own + d + i] += slope * had.qkv[q + i];
            out[own + 2 * d + i] += weight * G[g + i];
          }
        }
      }
    });
    return out;
  }

  /** The weight that is edited, block `layer`'s way down, becomes its base and some updates
   * left rightᵀ (d x inner), added up in double precision and rounded once, as the library does.
   * @param {number} layer @param {{left: ArrayLike<number>, right: ArrayLike<number>}[]} updates */
  rewrite(layer, updates) {
    const { W, T, from, to } = this.blocks[layer].down, base = this.baseOf(layer);
    for (let j = 0; j < to; j++) for (let i = 0; i < from; i++) {
      let sum = base[j * from + i];
      for (const one of updates) sum += one.left[j] * one.right[i];
      T[j * from + i] = sum;
      W[i * to + j] = T[j * from + i];
    }
  }

  /** The weight that is edited as it was before all edits (d x inner). @param {number} layer */
  baseOf(layer) {
    return (this.base ??= this.blocks[layer].down.T.slice());
  }
}
