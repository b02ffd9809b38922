/**
 * What the engine makes of some cases, as JSON on standard output.
 *
 *     node agree.mjs SOURCES PACKED CASES [FILE]
 *
 * CASES: {texts, facts, hashes}: texts to tokenise and to go on from, facts to edit (each alone), texts
 * to hash. The last fact's edit is written to FILE. Run by tests/test_living.py.
 */

import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [sources, packed, cases, file] = process.argv.slice(2);
const from = (name) => import(pathToFileURL(`${sources}/${name}.js`).href);
const [{ Session }, { inJavaScript, inWebAssembly }, { edited }, { sha256 }, link, { direction, update }] =
  await Promise.all(["session", "kernel", "file", "sha256", "link", "solve"].map(from));

const asked = JSON.parse(readFileSync(cases, "utf8"));
const kernel = asked.kernel
  ? await inWebAssembly(Buffer.from(asked.kernel, "base64"), 12e6)
  : inJavaScript();
const raw = readFileSync(packed);
const session = new Session(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length), kernel);
const { layer } = session.recipe;
const before = sha256(new Uint8Array(session.model.baseOf(layer).slice().buffer));

const edits = asked.facts.map((fact, i) => {
  const steps = session.edit(fact);
  let last = steps.next();
  while (!last.done) last = steps.next();
  const edit = last.value, text = fact.prompt.replace("{}", fact.subject);
  if (file && i === asked.facts.length - 1) {
    const after = session.probability(text, fact.target);
    writeFileSync(file, edited(session, edit, { before: 0, after, likeliest: true, others: 0 }));
  }
  const found = {
    key: Array.from(edit.key), delta: Array.from(edit.delta), losses: edit.losses,
    left: Array.from(edit.update.left), right: Array.from(edit.update.right), cost: edit.update.cost,
    after: session.probability(text, fact.target), rarity: edit.to.rarity,
    soft: update(edit.delta, direction(session.factor, edit.key), asked.lam).right,
    lens: session.lens(text, fact.target).map((one) => one.own),
    address: link.editsOf(link.addressOf([{ fact, relation: "r", lam: 2, delta: edit.delta }])),
  };
  session.undo(edit.id);
  return found;
});
const after = sha256(new Uint8Array(session.model.blocks[layer].down.T.slice().buffer));
// up to three in force, taken out in another order than they were written
const ids = asked.facts.slice(0, 3).map((fact, i) => session.restore(fact, edits[i].delta, 0).id);
for (const id of [...ids.slice(1), ids[0]]) session.undo(id);
const mixed = sha256(new Uint8Array(session.model.blocks[layer].down.T.slice().buffer));

console.log(JSON.stringify({
  kernel: kernel.name,
  tokens: asked.texts.map((text) => session.tokenizer.encode(text)),
  logits: asked.logits.map((text) => Array.from(session.next(text))),
  rarities: session.rarities(asked.logits[0]).map((one) => one.rarity),
  hashes: asked.hashes.map((text) => sha256(text)),
  rubbish: asked.rubbish.map((hash) => link.editsOf(hash)?.message ?? null),
  python: link.inPython(asked.facts.map((fact) => ({ fact, lam: 0 }))),
  edits, before, after, mixed,
}));
