/** Arrays [channels, h, w], flat, and exact arithmetic on them. */

const MIDDLE = 1.5 * 2 ** 52;

/** Rounded, half to even. @param {number} x */
export const rint = (x) => x + MIDDLE - MIDDLE;

/** @param {number} x @param {number} low @param {number} high */
export const clamp = (x, low, high) => (x < low ? low : x > high ? high : x);

/** @param {number} a @param {number} b */
export const mod = (a, b) => ((a % b) + b) % b;

/**
 * A box of an array: `rows` by `columns` from (top, left) on; beyond the edges the nearest value, or zeros.
 *
 * @template {import("./weights.js").Numbers | Uint16Array} T
 * @param {T} x @param {number} channels @param {number} h @param {number} w @param {number} top @param {number} left
 * @param {number} rows @param {number} columns @param {boolean} [zeros] @returns {T}
 */
export function box(x, channels, h, w, top, left, rows, columns, zeros = false) {
  if (top === 0 && left === 0 && rows === h && columns === w) return x;
  const part = new (/** @type {any} */ (x.constructor))(channels * rows * columns);
  const [first, last] = [Math.max(0, -left), Math.min(columns, w - left)];
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < rows; i++) {
      if (zeros && (top + i < 0 || top + i >= h)) continue;
      const from = (c * h + clamp(top + i, 0, h - 1)) * w;
      const to = (c * rows + i) * columns;
      part.set(x.subarray(from + left + first, from + left + last), to + first);
      if (zeros) continue;
      part.fill(x[from], to, to + first);
      part.fill(x[from + w - 1], to + last, to + columns);
    }
  }
  return part;
}
