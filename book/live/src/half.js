/** Numbers of half precision as they lie in a file: 1 sign, 5 exponent and 10 fraction bits. */

/** @param {Uint16Array} bits @returns {Float32Array} */
export function fromHalf(bits) {
  const table = new Float32Array(65536), out = new Float32Array(bits.length);
  for (let h = 0; h < 65536; h++) {
    const exponent = (h >> 10) & 31, fraction = h & 1023, sign = h & 32768 ? -1 : 1;
    if (exponent === 31) table[h] = fraction ? NaN : sign * Infinity;
    else if (exponent) table[h] = sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
    else table[h] = sign * 2 ** -14 * (fraction / 1024);
  }
  for (let i = 0; i < bits.length; i++) out[i] = table[bits[i]];
  return out;
}
