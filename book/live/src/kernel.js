/** The product of `numbers.js` as WebAssembly with SIMD, and memory that it can read in place. */

import { product as plain } from "./numbers.js";

/** Where numbers lie, and what multiplies them.
 * @typedef {{room: (length: number) => Float32Array, multiply: import("./numbers.js").Product,
 *   name: "WebAssembly" | "JavaScript"}} Kernel */

/** @returns {Kernel} */
export const inJavaScript = () => ({
  room: (length) => new Float32Array(length), multiply: plain, name: "JavaScript",
});

/** The fast kernel; the plain one where the browser has no WebAssembly with SIMD.
 * @param {BufferSource} code @param {number} floats room for so many weights
 * @returns {Promise<Kernel>} */
export async function inWebAssembly(code, floats) {
  let instance;
  try {
    ({ instance } = await WebAssembly.instantiate(code));
  } catch {
    return inJavaScript();
  }
  const { memory, product } = /** @type {any} */ (instance.exports);
  const scratch = 1 << 21; // floats for rows that are multiplied, and for what comes of it
  memory.grow(Math.ceil(((floats + scratch) * 4) / 65536));
  const all = new Float32Array(memory.buffer);
  let used = scratch;
  /** @type {import("./numbers.js").Product} */
  const multiply = (out, X, n, k, W, m, bias = null) => {
    const rows = Math.ceil(n / 4) * 4;
    if (m % 2 || W.buffer !== memory.buffer || rows * (k + m) > scratch) {
      plain(out, X, n, k, W, m, bias);
      return;
    }
    all.set(X.subarray(0, n * k));
    all.fill(0, n * k, rows * k);
    const to = rows * k;
    product(to * 4, 0, rows, k, W.byteOffset, m);
    out.set(all.subarray(to, to + n * m));
    if (bias) for (let t = 0; t < n; t++) for (let j = 0; j < m; j++) out[t * m + j] += bias[j];
  };
  const room = (/** @type {number} */ length) => {
    if (used + length > all.length) throw new Error("the kernel's memory is full");
    used += length;
    return all.subarray(used - length, used);
  };
  return { room, multiply, name: "WebAssembly" };
}
