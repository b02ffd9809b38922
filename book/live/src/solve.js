/**
 * The closed form for one fact: Delta = r aᵀ L⁻¹ / (aᵀa + lam) with a = L⁻¹ k, C0 = L Lᵀ.
 *
 * lam = 0 is the equality, Delta k = r. L is a packed lower triangle, row by row, in single precision:
 * its condition is the root of C0's.
 */

/** L⁻¹ k. @param {Float32Array} L @param {Float64Array} k */
export function whitened(L, k) {
  const a = new Float64Array(k.length);
  for (let i = 0, row = 0; i < a.length; row += ++i) {
    let sum = k[i];
    for (let j = 0; j < i; j++) sum -= L[row + j] * a[j];
    a[i] = sum / L[row + i];
  }
  return a;
}

/** L⁻ᵀ a. @param {Float32Array} L @param {Float64Array} a */
export function unwhitened(L, a) {
  const x = Float64Array.from(a), n = x.length;
  for (let i = n - 1, row = (n * (n - 1)) / 2; i >= 0; row -= i--) {
    x[i] /= L[row + i];
    for (let j = 0; j < i; j++) x[j] -= L[row + j] * x[i];
  }
  return x;
}

/** What one fact needs of C0, whatever lam is: its direction, and how rare its key is.
 * @param {Float32Array} L @param {Float64Array} k */
export function direction(L, k) {
  const a = whitened(L, k);
  let rarity = 0;
  for (const one of a) rarity += one * one;
  return { row: unwhitened(L, a), rarity };
}

/** The update left rightᵀ, what it misses of r, and what it costs: tr(Delta C0 Deltaᵀ).
 * @param {ArrayLike<number>} r @param {{row: Float64Array, rarity: number}} to @param {number} lam */
export function update(r, to, lam = 0) {
  const share = to.rarity / (to.rarity + lam);
  let square = 0;
  for (let i = 0; i < r.length; i++) square += r[i] * r[i];
  const right = to.row.map((x) => x / (to.rarity + lam));
  return {
    left: Float64Array.from(r),
    right,
    missed: 1 - share,
    cost: (square * to.rarity) / (to.rarity + lam) ** 2,
  };
}
