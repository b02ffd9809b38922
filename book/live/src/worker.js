/** The worker: one session, asked by messages. Each has a number, and gets an answer with it. */

import { edited } from "./file.js";
import { inWebAssembly } from "./kernel.js";
import { Refused, textOf } from "./rows.js";
import { Session } from "./session.js";

/** @type {Session | undefined} */
let session;
/** @type {Uint8Array[]} */
const pieces = [];

/** @param {string} text */
const bytesOf = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));

/** What of an edit the page shows. @param {import("./session.js").Edit} edit */
const shown = (edit) => ({
  id: edit.id, fact: edit.fact, lam: edit.lam, rarity: edit.to.rarity, missed: edit.update.missed,
  cost: edit.update.cost, delta: Float32Array.from(edit.delta), seconds: edit.seconds,
  losses: edit.losses, size: size(edit.update), left: edit.update.left, right: edit.update.right,
  key: edit.key,
});

/** @param {{left: ArrayLike<number>, right: ArrayLike<number>}} one */
const size = ({ left, right }) => {
  const square = (/** @type {ArrayLike<number>} */ x) => {
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += x[i] * x[i];
    return sum;
  };
  return Math.sqrt(square(left) * square(right));
};

/** @returns {Session} */
const ready = () => {
  if (!session) throw new Refused("The model is not here yet.");
  return session;
};

/** Do something on the model without its edits, if that is asked for.
 * @template T @param {boolean} base @param {() => T} what @returns {T} */
function unedited(base, what) {
  if (!base) return what();
  const { edits } = ready();
  ready().keepOnly([]);
  try {
    return what();
  } finally {
    ready().keepOnly(edits);
  }
}

/** @param {Session} session @param {number} id */
function fileOf(session, id) {
  const edit = session.known(id), text = textOf(edit.fact), all = session.edits;
  const [before, after] = [[], [edit]].map((some) => {
    session.keepOnly(some);
    return { p: session.probability(text, edit.fact.target), says: session.ask(text, 1)[0].word };
  });
  session.keepOnly(all);
  const likeliest = edit.fact.target.startsWith(after.says);
  return edited(session, edit, { before: before.p, after: after.p, likeliest, others: all.indexOf(edit) });
}

/** What can be asked; each gets the message, and `say` for what comes on the way.
 * @type {Record<string, (ask: any, say: (news: object) => void) => any>} */
const answers = {
  piece: ({ number, text }) => void (pieces[number] = bytesOf(text)),
  start: async ({ kernel, plain }) => {
    const bytes = new Uint8Array(pieces.reduce((sum, one) => sum + one.length, 0));
    pieces.reduce((at, one) => (bytes.set(one, at), at + one.length), 0);
    pieces.length = 0;
    const code = plain ? new Uint8Array() : bytesOf(kernel);
    const made = await inWebAssembly(code, 12e6);
    session = new Session(bytes.buffer, made);
    const { config, knowledge, recipe, fingerprint } = session.about;
    return { config, knowledge, recipe, fingerprint, kernel: made.name };
  },
  ask: ({ text, many }) => ready().ask(text, many),
  tokens: ({ text }) => ready().tokenizer.encode(text),
  probabilities: ({ pairs, base }) => unedited(base, () =>
    pairs.map((/** @type {[string, string]} */ [text, word]) => ({
      probability: ready().probability(text, word), first: ready().ask(text, 1)[0],
    }))),
  edit: ({ fact }, say) => {
    const steps = ready().edit(fact);
    for (;;) {
      const { value, done } = steps.next();
      if (done) return shown(value);
      say(value);
    }
  },
  restore: ({ fact, delta, lam }) => shown(ready().restore(fact, delta, lam)),
  soften: ({ id, lam }) => shown(ready().soften(id, lam)),
  undo: ({ id }) => ready().undo(id),
  lens: ({ text, word, base }) => unedited(base, () => ready().lens(text, word)),
  near: ({ id, many }) => ready().near(id, many),
  file: ({ id }) => fileOf(ready(), id),
  rarities: ({ text }) => ready().rarities(text),
  blurred: ({ text, word, span, noise, back }) => ready().blurred(text, word, span, noise, back),
  reset: () => ready().keepOnly([]),
};

self.onmessage = async ({ data }) => {
  const { number, what, ask } = data;
  const say = (/** @type {object} */ news) => self.postMessage({ number, news });
  try {
    self.postMessage({ number, found: await answers[what](ask, say) });
  } catch (problem) {
    const told = problem instanceof Error ? problem.message : String(problem);
    self.postMessage({ number, problem: told, refused: problem instanceof Refused && problem.about });
  }
};
