/** Edits as the end of an address: what was written, and each delta, so that nothing is optimised. */

/** @typedef {{fact: import("./rows.js").Fact, relation: string, lam: number, delta: Float32Array}} Linked */

const KEY = "#edits=";

/** @param {Uint8Array} bytes */
const toText = (bytes) => btoa(String.fromCharCode(...bytes)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
/** @param {string} text */
const toBytes = (text) => Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (one) => one.charCodeAt(0));

/** @param {Linked[]} edits @returns {string} */
export function addressOf(edits) {
  if (!edits.length) return "";
  const each = edits.map(({ fact, relation, lam, delta }) => [
    fact.prompt, fact.subject, fact.target, relation, lam, toText(new Uint8Array(Float32Array.from(delta).buffer)),
  ]);
  return KEY + toText(new TextEncoder().encode(JSON.stringify(each)));
}

/** What an address holds: null where it speaks of no edits, an Error where it is rubbish.
 * @param {string} hash @returns {Linked[] | Error | null} */
export function editsOf(hash) {
  if (!hash.startsWith(KEY)) return null;
  try {
    const each = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(toBytes(hash.slice(KEY.length))));
    const found = each.map((/** @type {any[]} */ [prompt, subject, target, relation, lam, delta]) => {
      for (const one of [prompt, subject, target, relation]) if (typeof one !== "string") throw new Error("no text");
      if (typeof lam !== "number" || !(lam >= 0)) throw new Error("no lam");
      return { fact: { prompt, subject, target }, relation, lam, delta: new Float32Array(toBytes(delta).buffer) };
    });
    if (!found.length) throw new Error("nothing");
    return found;
  } catch {
    return new Error("The link does not hold edits: a part of it is missing or was changed.");
  }
}

/** @param {string} text */
const quoted = (text) => JSON.stringify(text);

/** The same edits with the library. @param {{fact: import("./rows.js").Fact, lam: number}[]} edits */
export function inPython(edits) {
  const lines = ["import unified_edit as ue", "", 'model, tokenizer = ue.load_model("atlas")'];
  edits.forEach(({ fact, lam }, i) => {
    const method = lam ? `, ue.EMMET.replace(ridge=${lam})` : "";
    lines.push(
      `fact = ue.Fact(${quoted(fact.prompt)},`,
      `               subject=${quoted(fact.subject)}, target_new=${quoted(fact.target.trim())})`,
      `edit_${i + 1} = ue.edit(model, tokenizer, fact${method})`,
      `print(edit_${i + 1}.outcomes[0].after)`,
    );
  });
  return lines.join("\n") + "\n";
}
