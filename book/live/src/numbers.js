/**
 * The arithmetic: plain loops over Float32Array, sums in double precision.
 *
 * There is one product, X Wᵀ with the rows of both lying in memory one behind the other: every
 * linear map, forward and backward, is written as one, and a faster kernel needs to replace no more.
 */

/** The linear product in plain JavaScript; `kernel.js` has the same for WebAssembly.
 * @typedef {(out: Float32Array, X: Float32Array, n: number, k: number, W: Float32Array, m: number,
 *   bias?: Float32Array | null) => void} Product */

/** out (n x m) = X (n x k) Wᵀ + bias, W being (m x k). Four rows of X share each load of W.
 * @type {Product} */
export function product(out, X, n, k, W, m, bias = null) {
  let t = 0;
  for (; t + 4 <= n; t += 4) {
    const x0 = t * k, x1 = x0 + k, x2 = x1 + k, x3 = x2 + k;
    for (let j = 0; j < m; j++) {
      const w = j * k;
      let a = 0, b = 0, c = 0, d = 0;
      for (let i = 0; i < k; i++) {
        const v = W[w + i];
        a += X[x0 + i] * v;
        b += X[x1 + i] * v;
        c += X[x2 + i] * v;
        d += X[x3 + i] * v;
      }
      const add = bias ? bias[j] : 0;
      out[t * m + j] = a + add;
      out[(t + 1) * m + j] = b + add;
      out[(t + 2) * m + j] = c + add;
      out[(t + 3) * m + j] = d + add;
    }
  }
  for (; t < n; t++) {
    const x = t * k;
    for (let j = 0; j < m; j++) {
      const w = j * k;
      let a = 0, b = 0, c = 0, d = 0, i = 0;
      for (; i + 4 <= k; i += 4) {
        a += X[x + i] * W[w + i];
        b += X[x + i + 1] * W[w + i + 1];
        c += X[x + i + 2] * W[w + i + 2];
        d += X[x + i + 3] * W[w + i + 3];
      }
      for (; i < k; i++) a += X[x + i] * W[w + i];
      out[t * m + j] = a + b + c + d + (bias ? bias[j] : 0);
    }
  }
}

/** W (rows x columns) as (columns x rows), in `out`.
 * @param {Float32Array} W @param {number} rows @param {number} columns @param {Float32Array} out */
export function transposed(W, rows, columns, out) {
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) out[j * rows + i] = W[i * columns + j];
  }
  return out;
}

const EPS = 1e-5;

/** Layer norm of each row of X (n x d). `kept`, if given, gets what its backward needs.
 * @param {Float32Array} X @param {number} n @param {number} d
 * @param {Float32Array} gain @param {Float32Array} shift
 * @param {{hat: Float32Array, inverse: Float32Array} | null} kept */
export function layerNorm(X, n, d, gain, shift, kept = null) {
  const out = new Float32Array(n * d);
  for (let t = 0; t < n; t++) {
    const at = t * d;
    let mean = 0, square = 0;
    for (let i = 0; i < d; i++) mean += X[at + i];
    mean /= d;
    for (let i = 0; i < d; i++) square += (X[at + i] - mean) ** 2;
    const inverse = 1 / Math.sqrt(square / d + EPS);
    if (kept) kept.inverse[t] = inverse;
    for (let i = 0; i < d; i++) {
      const hat = (X[at + i] - mean) * inverse;
      if (kept) kept.hat[at + i] = hat;
      out[at + i] = hat * gain[i] + shift[i];
    }
  }
  return out;
}

/** The gradient at the input of a layer norm, from that at its output.
 * @param {Float32Array} G @param {number} n @param {number} d @param {Float32Array} gain
 * @param {{hat: Float32Array, inverse: Float32Array}} kept */
export function layerNormBack(G, n, d, gain, kept) {
  const out = new Float32Array(n * d);
  for (let t = 0; t < n; t++) {
    const at = t * d;
    let mean = 0, along = 0;
    for (let i = 0; i < d; i++) {
      const g = G[at + i] * gain[i];
      mean += g;
      along += g * kept.hat[at + i];
    }
    mean /= d;
    along /= d;
    for (let i = 0; i < d; i++) {
      out[at + i] = kept.inverse[t] * (G[at + i] * gain[i] - mean - kept.hat[at + i] * along);
    }
  }
  return out;
}

const ROOT = Math.sqrt(2 / Math.PI), CUBE = 0.044715;

/** GPT-2's GELU of each entry. @param {Float32Array} X */
export function gelu(X) {
  const out = new Float32Array(X.length);
  for (let i = 0; i < X.length; i++) {
    const x = X[i];
    out[i] = 0.5 * x * (1 + Math.tanh(ROOT * (x + CUBE * x * x * x)));
  }
  return out;
}

/** G, the gradient at GELU's output, becomes that at its input X.
 * @param {Float32Array} G @param {Float32Array} X */
export function geluBack(G, X) {
  for (let i = 0; i < X.length; i++) {
    const x = X[i], t = Math.tanh(ROOT * (x + CUBE * x * x * x));
    const slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * ROOT * (1 + 3 * CUBE * x * x);
    G[i] *= slope;
  }
}

/** Log-probabilities of one row of logits. @param {Float32Array} logits @returns {Float64Array} */
export function logSoftmax(logits) {
  let top = -Infinity, sum = 0;
  for (const one of logits) if (one > top) top = one;
  for (const one of logits) sum += Math.exp(one - top);
  const out = new Float64Array(logits.length), norm = top + Math.log(sum);
  for (let i = 0; i < out.length; i++) out[i] = logits[i] - norm;
  return out;
}

/** @param {ArrayLike<number>} x */
export function norm(x) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * x[i];
  return Math.sqrt(sum);
}
