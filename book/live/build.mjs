/**
 * Builds the page's one script from the sources beside this file.
 *
 *     npm ci && node build.mjs [--check]
 *
 * The kernel is assembled, the worker is bundled into a string (a page that is opened from a folder
 * can start a worker from no other source), and the page's script takes both along. Its first line
 * names the hash of all sources, so that a test without Node can tell whether it was built from them.
 * With --check nothing is written, and the script that is there must be the same.
 */

import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import esbuild from "esbuild";
import wabt from "wabt";

const here = fileURLToPath(new URL(".", import.meta.url));
const target = `${here}../_static/living/living.js`;

const hash = createHash("sha256");
for (const name of readdirSync(`${here}src`).sort()) hash.update(name).update(readFileSync(`${here}src/${name}`));

const { parseWat } = await wabt();
const module = parseWat("kernel.wat", readFileSync(`${here}src/kernel.wat`, "utf8"), { simd: true });
module.validate();
const kernel = Buffer.from(module.toBinary({}).buffer).toString("base64");

const options = { bundle: true, format: "iife", minify: true, write: false, target: "es2022", charset: "utf8" };
const bundle = async (entry, more) =>
  (await esbuild.build({ ...options, entryPoints: [`${here}src/${entry}`], ...more })).outputFiles[0].text;
const worker = await bundle("worker.js", {});
const page = await bundle("page.js", {
  define: { WORKER: JSON.stringify(worker), KERNEL: JSON.stringify(kernel) },
});
const script = `/* made by book/live/build.mjs from sources ${hash.digest("hex")} */\n${page}`;
if (process.argv.includes("--check")) {
  if (readFileSync(target, "utf8") !== script) {
    console.error("book/_static/living/living.js is not what its sources make: npm run build");
    process.exit(1);
  }
} else {
  writeFileSync(target, script);
  console.log(`${script.length} bytes`);
}
