/** A model that is being edited: the facts written so far, and what can be asked of it. */

import { fromHalf } from "./half.js";
import { Model } from "./model.js";
import { logSoftmax, norm } from "./numbers.js";
import { Refused, rowsOf, textOf } from "./rows.js";
import { direction, update, whitened } from "./solve.js";
import { Tokenizer } from "./tokenizer.js";
import { optimised, prepare } from "./values.js";

/** A fact in force. `to` is what its key is in C0's metric.
 * @typedef {{id: number, fact: import("./rows.js").Fact, delta: Float64Array, key: Float64Array,
 *   init: Float64Array, to: {row: Float64Array, rarity: number}, lam: number, seconds: number,
 *   update: ReturnType<typeof update>, losses: number[]}} Edit */

/** @typedef {{word: string, probability: number}} Answer */

export class Session {
  /** @param {ArrayBuffer} bytes what the library packs (`teaching/living.py`)
   * @param {import("./kernel.js").Kernel} kernel */
  constructor(bytes, kernel) {
    const length = new DataView(bytes).getUint32(0, true), at = 4 + length;
    const about = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
    this.about = about;
    this.recipe = about.recipe;
    this.tokenizer = new Tokenizer(about.tokenizer.vocabulary, about.tokenizer.merges);
    this.model = new Model(about.config, (name) => {
      const [first, entries] = about.tensors[name];
      return fromHalf(new Uint16Array(bytes.slice(at + first, at + first + 2 * entries)));
    }, kernel);
    const [first, entries] = about.factor;
    this.factor = new Float32Array(bytes.slice(at + first, at + first + 4 * entries));
    /** @type {Edit[]} */
    this.edits = [];
    this.made = 0;
  }

  /** The last stream of a text, and what `see` was shown on the way. @param {string} text
   * @param {(layer: number, what: "key" | "stream", X: Float32Array) => void} [see] */
  read(text, see) {
    const { ids } = this.tokenizer.encode(text), { n_positions: longest, n_layer: all } = this.model.config;
    if (!ids.length) throw new Refused("Write the beginning of a sentence.");
    if (ids.length > longest) {
      throw new Refused(`That is ${ids.length} tokens; the model reads ${longest}. Shorten it.`);
    }
    const pack = this.model.pack([ids]);
    const stream = this.model.run(pack, this.model.embed(pack, [ids]), 0, all, { see });
    return { stream, last: ids.length - 1, ids };
  }

  /** Log-probabilities of the next token. @param {string} text */
  next(text) {
    const { stream, last } = this.read(text);
    return logSoftmax(this.model.logits(stream, [last]).logits);
  }

  /** The likeliest next words. @param {string} text @param {number} [many] @returns {Answer[]} */
  ask(text, many = 5) {
    return this.likeliest(this.next(text), many);
  }

  /** @param {Float64Array} logs @param {number} many @returns {Answer[]} */
  likeliest(logs, many) {
    const order = [...logs.keys()].sort((a, b) => logs[b] - logs[a]).slice(0, many);
    return order.map((id) => ({ word: this.tokenizer.decode([id]).trim(), probability: Math.exp(logs[id]) }));
  }

  /** How likely a text goes on with a word, all of its tokens. @param {string} text @param {string} word */
  probability(text, word) {
    const head = this.tokenizer.encode(text).ids.length;
    const both = `${text} ${word}`, { ids } = this.tokenizer.encode(both);
    const { stream } = this.read(this.tokenizer.decode(ids.slice(0, -1)).trimStart());
    const places = ids.slice(head).map((_, t) => head - 1 + t);
    const { logits } = this.model.logits(stream, places), V = this.model.config.vocab_size;
    let sum = 0;
    ids.slice(head).forEach((id, t) => (sum += logSoftmax(logits.subarray(t * V, (t + 1) * V))[id]));
    return Math.exp(sum);
  }

  /** What the model would say after each block, by the way out of the last one: the likeliest word,
   * and how likely a word of one's own is. @param {string} text @param {string} word */
  lens(text, word) {
    const { n_embd: d } = this.model.config, streams = /** @type {Float32Array[]} */ ([]);
    const { last } = this.read(text, (_, what, X) => what === "stream" && streams.push(X.slice()));
    const id = this.tokenizer.encode(word).ids[0];
    return streams.map((X) => {
      const logs = logSoftmax(this.model.logits(X, [last]).logits);
      return { ...this.likeliest(logs, 1)[0], own: Math.exp(logs[id]) };
    });
  }

  /** Optimise the value of a fact and write it. Yields the steps, returns the edit.
   * @param {import("./rows.js").Fact} fact @returns {Generator<import("./values.js").Step, Edit>} */
  *edit(fact) {
    const began = performance.now(), losses = [];
    if (this.probability(textOf(fact), fact.target) > 0.9) {
      throw new Refused(`The model says "${fact.target}" already. Choose another new object.`, "object");
    }
    const ready = this.prepared(fact), steps = optimised(this.model, ready, this.recipe);
    for (;;) {
      const { value, done } = steps.next();
      if (done) return this.write(fact, ready, value, 0, losses, (performance.now() - began) / 1000);
      losses.push(value.loss);
      yield value;
    }
  }

  /** @param {import("./rows.js").Fact} fact */
  prepared(fact) {
    const rows = rowsOf(this.tokenizer, fact, this.about.prefixes, this.model.config.n_positions);
    return prepare(this.model, rows, this.recipe.layer);
  }

  /** @param {import("./rows.js").Fact} fact @param {ReturnType<typeof prepare>} ready
   * @param {Float64Array} delta @param {number} lam @param {number[]} losses @param {number} seconds */
  write(fact, ready, delta, lam, losses, seconds) {
    const to = direction(this.factor, ready.key);
    const edit = {
      id: ++this.made, fact, delta, key: ready.key, init: ready.init, to, lam, seconds, losses,
      update: update(delta, to, lam),
    };
    this.edits.push(edit);
    this.rewrite();
    return edit;
  }

  /** Write a fact whose delta is known: what a link restores.
   * @param {import("./rows.js").Fact} fact @param {ArrayLike<number>} delta @param {number} lam */
  restore(fact, delta, lam) {
    if (delta.length !== this.model.config.n_embd || ![...Array.from(delta)].every(Number.isFinite)) {
      throw new Refused("This link does not hold an edit of this model.");
    }
    return this.write(fact, this.prepared(fact), Float64Array.from(delta), lam, [], 0);
  }

  /** Another lam for a fact: the closed form alone. @param {number} id @param {number} lam */
  soften(id, lam) {
    const edit = this.known(id);
    edit.lam = lam;
    edit.update = update(edit.delta, edit.to, lam);
    this.rewrite();
    return edit;
  }

  /** Take an edit out, whichever came after it. @param {number} id */
  undo(id) {
    this.known(id);
    this.keepOnly(this.edits.filter((one) => one.id !== id));
  }

  /** Exactly these edits are in force. @param {Edit[]} edits */
  keepOnly(edits) {
    this.edits = edits;
    this.rewrite();
  }

  /** @param {number} id */
  known(id) {
    const found = this.edits.find((one) => one.id === id);
    if (!found) throw new Refused("This edit is not in force any more.");
    return found;
  }

  rewrite() {
    this.model.rewrite(this.recipe.layer, this.edits.map((one) => one.update));
  }

  /** Cosines, in C0's metric, of a fact's key with those of other subjects: kᵀ C0⁻¹ k' over the
   * roots of both rarities, of which the others' are known. @param {number} id @param {number} many */
  near(id, many = 5) {
    const { to } = this.known(id), rarities = this.about.knowledge.rarities;
    const subjects = Object.keys(rarities), { n_inner: inner } = this.model.config;
    const found = /** @type {{subject: string, cosine: number}[]} */ ([]);
    for (let first = 0; first < subjects.length; first += 64) {
      const some = subjects.slice(first, first + 64);
      const tokens = some.map((subject) => this.tokenizer.encode(subject).ids);
      const pack = this.model.pack(tokens);
      this.model.run(pack, this.model.embed(pack, tokens), 0, this.recipe.layer + 1, {
        see: (layer, what, X) => {
          if (layer < this.recipe.layer || what !== "key") return;
          some.forEach((subject, r) => {
            const at = (pack.rows[r].first + pack.rows[r].count - 1) * inner;
            let dot = 0;
            for (let i = 0; i < inner; i++) dot += to.row[i] * X[at + i];
            found.push({ subject, cosine: dot / Math.sqrt(to.rarity * rarities[subject]) });
          });
        },
      });
    }
    return found.sort((a, b) => b.cosine - a.cosine).slice(0, many);
  }

  /** The key at a text's last token, and how rare it is: kᵀ C0⁻¹ k. @param {string} text */
  keyOf(text) {
    const { n_inner: inner } = this.model.config;
    let key = new Float64Array(inner);
    this.read(text, (layer, what, X) => {
      if (layer === this.recipe.layer && what === "key") {
        key = Float64Array.from(X.subarray(X.length - inner));
      }
    });
    return key;
  }

  /** How rare the key of each token of a text is: kᵀ C0⁻¹ k. @param {string} text */
  rarities(text) {
    const { n_inner: inner } = this.model.config, { ids, spans } = this.tokenizer.encode(text);
    const keys = /** @type {Float64Array[]} */ ([]);
    this.read(text, (layer, what, X) => {
      if (layer !== this.recipe.layer || what !== "key") return;
      ids.forEach((_, t) => keys.push(Float64Array.from(X.subarray(t * inner, (t + 1) * inner))));
    });
    return keys.map((key, t) => ({
      text: text.slice(...spans[t]), rarity: norm(whitened(this.factor, key)) ** 2,
    }));
  }

  /** Probability of a word when the subject's embeddings are blurred, with one state put back as it
   * was: that before block `layer` at token `place`. The mean over some draws of the noise.
   * @param {string} text @param {string} word @param {[number, number]} span the subject's characters
   * @param {number} noise its standard deviation @param {{layer: number, place: number} | null} back */
  blurred(text, word, span, noise, back, draws = 4) {
    const { n_embd: d, n_layer: all } = this.model.config, { ids, spans } = this.tokenizer.encode(text);
    const id = this.tokenizer.encode(`${text} ${word}`).ids[ids.length];
    const clean = /** @type {Float32Array[]} */ ([]), pack = this.model.pack([ids]);
    const start = this.model.embed(pack, [ids]);
    clean.push(start);
    this.model.run(pack, start, 0, all, { see: (_, what, X) => what === "stream" && clean.push(X.slice()) });
    let sum = 0;
    for (let draw = 0; draw < draws; draw++) {
      const random = normal(draw + 1);
      let X = /** @type {Float32Array} */ (start.slice());
      spans.forEach(([a, b], t) => {
        if (a < span[1] && b > span[0]) for (let i = 0; i < d; i++) X[t * d + i] += noise * random();
      });
      for (let l = 0; l <= all; l++) {
        if (back && back.layer === l) {
          X = X.slice();
          X.set(clean[l].subarray(back.place * d, (back.place + 1) * d), back.place * d);
        }
        if (l < all) X = this.model.run(this.model.pack([ids]), X, l, l + 1, {});
      }
      sum += Math.exp(logSoftmax(this.model.logits(X, [ids.length - 1]).logits)[id]);
    }
    return sum / draws;
  }
}

/** Standard normal numbers, the same for a seed (mulberry32, Box and Muller). @param {number} seed */
function normal(seed) {
  let state = seed * 0x9e3779b9;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}
