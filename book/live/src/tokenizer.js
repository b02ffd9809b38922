/**
 * GPT-2's byte-level BPE, as atlas's tokenizer.json describes it: a blank is put in front of a text
 * that has none, words are cut by one regular expression, and pairs are merged by rank.
 */

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** Bytes as letters that can be seen: what is printable stands for itself, the rest comes behind.
 * @returns {string[]} */
function letters() {
  const shown = (/** @type {number} */ b) =>
    (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  const out = [];
  let more = 256;
  for (let b = 0; b < 256; b++) out.push(String.fromCodePoint(shown(b) ? b : more++));
  return out;
}

/** A text's tokens, and the characters [start, end) that each stands for, blanks left out.
 * @typedef {{ids: number[], spans: [number, number][]}} Encoded */

export class Tokenizer {
  /** @param {Record<string, number>} vocabulary @param {[string, string][]} merges */
  constructor(vocabulary, merges) {
    this.vocabulary = new Map(Object.entries(vocabulary));
    this.ranks = new Map(merges.map(([a, b], rank) => [`${a} ${b}`, rank]));
    this.letters = letters();
    this.bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
    this.pieces = new Map([...this.vocabulary].map(([piece, id]) => [id, piece]));
    /** @type {Map<string, string[]>} */
    this.known = new Map();
  }

  /** @param {string} word in letters @returns {string[]} */
  merged(word) {
    const found = this.known.get(word);
    if (found) return found;
    let parts = [...word];
    while (parts.length > 1) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      const [a, b] = [parts[at], parts[at + 1]], next = [];
      for (let i = 0; i < parts.length; i++) {
        if (parts[i] === a && parts[i + 1] === b) next.push(a + b), i++;
        else next.push(parts[i]);
      }
      parts = next;
    }
    this.known.set(word, parts);
    return parts;
  }

  /** @param {string} text @returns {Encoded} */
  encode(text) {
    const ids = [], spans = /** @type {[number, number][]} */ ([]);
    const before = text && !/^\s/u.test(text) ? 1 : 0;
    const coder = new TextEncoder();
    for (const match of (before ? " " + text : text).matchAll(WORDS)) {
      // of each byte of the word, the character it belongs to
      const first = match.index - before, owner = [], word = [];
      let at = first;
      for (const character of match[0]) {
        for (const byte of coder.encode(character)) {
          word.push(this.letters[byte]);
          owner.push([at, at + character.length, character]);
        }
        at += character.length;
      }
      let place = 0;
      for (const piece of this.merged(word.join(""))) {
        const id = this.vocabulary.get(piece);
        if (id === undefined) throw new Error(`the tokenizer has no token for ${match[0]}`);
        const own = owner.slice(place, (place += [...piece].length));
        while (own.length > 1 && /\s/u.test(/** @type {string} */ (own[0][2]))) own.shift();
        ids.push(id);
        const start = /** @type {number} */ (own[0][0]), end = own[own.length - 1][1];
        spans.push([Math.max(0, start), /** @type {number} */ (end)]);
      }
    }
    return { ids, spans };
  }

  /** @param {number[]} ids */
  decode(ids) {
    const bytes = [];
    for (const id of ids) for (const one of this.pieces.get(id) ?? "") bytes.push(this.bytes.get(one) ?? 63);
    return new TextDecoder().decode(new Uint8Array(bytes));
  }
}
