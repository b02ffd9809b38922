/** A fact as rows of tokens, and what is wrong with one that cannot be edited. */

/** A fact: `prompt` has the subject's place as "{}"; targets without a leading blank.
 * @typedef {{prompt: string, subject: string, target: string}} Fact */

/** A row: what is fed, the subject's last place, and the tokens that should follow.
 * @typedef {{ids: number[], subject: number, target: number[]}} FactRow */

/** What a reader did that cannot be done, in a sentence for beside the field that it is about. */
export class Refused extends Error {
  /** @param {string} message @param {"subject" | "sentence" | "object"} [about] */
  constructor(message, about = "sentence") {
    super(message);
    this.about = about;
  }
}

/** @param {Fact} fact */
export const textOf = (fact) => fact.prompt.replace("{}", () => fact.subject);

/** The rows of a fact behind each prefix, the bare one first, and that of the KL term.
 * @param {import("./tokenizer.js").Tokenizer} tokenizer @param {Fact} fact
 * @param {string[]} prefixes @param {number} longest
 * @returns {{behind: FactRow[], kl: FactRow}} */
export function rowsOf(tokenizer, fact, prefixes, longest) {
  check(fact);
  const text = textOf(fact), from = fact.prompt.indexOf("{}"), to = from + fact.subject.length;
  const behind = prefixes.map((prefix) => {
    const head = tokenizer.encode(prefix + text);
    const both = tokenizer.encode(`${prefix + text} ${fact.target.trim()}`).ids;
    const target = both.slice(head.ids.length);
    if (!target.length || head.ids.some((id, i) => both[i] !== id)) {
      throw new Refused("The sentence must end with a whole word before the new object.");
    }
    const subject = lastOf(head, prefix.length + from, prefix.length + to);
    return fitting({ ids: both.slice(0, -1), subject, target }, longest);
  });
  const kl = tokenizer.encode(`${fact.subject} is a`);
  const subject = lastOf(kl, 0, fact.subject.length);
  return { behind, kl: fitting({ ids: kl.ids, subject, target: [] }, longest) };
}

/** @param {Fact} fact */
function check(fact) {
  if (!fact.subject.trim()) throw new Refused("Name a subject: the words that the fact is about.", "subject");
  if (fact.prompt.split("{}").length !== 2) {
    throw new Refused("The subject must stand in the sentence, once.");
  }
  if (!fact.target.trim()) throw new Refused("Name the new object.", "object");
}

/** @param {FactRow} row @param {number} longest */
function fitting(row, longest) {
  if (row.ids.length <= longest) return row;
  throw new Refused(`That makes ${row.ids.length} tokens; the model reads ${longest}. Shorten it.`);
}

/** The last token that overlaps some characters. @param {import("./tokenizer.js").Encoded} found
 * @param {number} start @param {number} end */
function lastOf(found, start, end) {
  let last = -1;
  found.spans.forEach(([a, b], i) => {
    if (a < end && b > start) last = i;
  });
  if (last < 0) throw new Refused("The tokenizer sees no word in this subject.", "subject");
  return last;
}
