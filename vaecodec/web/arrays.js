/** Arrays [channels, h, w], boxes of them, and exact arithmetic. */

/** @import { Numbers } from "./types" */

const MIDDLE = 1.5 * 2 ** 52;

/** Rounded, half to even. @param {number} x */
export const rint = (x) => x + MIDDLE - MIDDLE;

/** @param {number} x @param {number} low @param {number} high */
export const clamp = (x, low, high) => (x < low ? low : x > high ? high : x);

/** Integers 0 to count - 1, or f of them. @param {number} count @param {(i: number) => number} [f] */
export const range = (count, f = (i) => i) => Int32Array.from({ length: count }, (_, i) => f(i));

/** @template {Numbers} T */
export class Grid {
  /** @param {T} data @param {number} h @param {number} w */
  constructor(data, h, w) {
    this.data = data;
    this.h = h;
    this.w = w;
    this.channels = h && w ? data.length / h / w : 0;
  }

  /** Some channels. @param {number} first @param {number} end @returns {Grid<T>} */
  part(first, end) {
    const { h, w } = this;
    return new Grid(/** @type {T} */ (this.data.subarray(first * h * w, end * h * w)), h, w);
  }

  /** Rows and columns from (top, left) on; beyond the edges the nearest value, or zeros.
   *  @param {number} top @param {number} left @param {number} rows @param {number} columns @param {boolean} [zeros]
   *  @returns {Grid<T>} */
  box(top, left, rows, columns, zeros = false) {
    const { data, channels, h, w } = this;
    if (top === 0 && left === 0 && rows === h && columns === w) return this;
    const box = new (/** @type {any} */ (data).constructor)(channels * rows * columns);
    const [first, last] = [Math.max(0, -left), Math.min(columns, w - left)];
    for (let c = 0; c < channels; c++) {
      for (let i = 0; i < rows; i++) {
        if (zeros && (top + i < 0 || top + i >= h)) continue;
        const from = (c * h + clamp(top + i, 0, h - 1)) * w;
        const to = (c * rows + i) * columns;
        box.set(data.subarray(from + left + first, from + left + last), to + first);
        if (zeros) continue;
        box.fill(data[from], to, to + first);
        box.fill(data[from + w - 1], to + last, to + columns);
      }
    }
    return new Grid(box, rows, columns);
  }

  /** Some rows. @param {number} top @param {number} rows @param {number} [more] above and below, zeros at the edges */
  rows(top, rows, more = 0) {
    return this.box(top - more, 0, rows + 2 * more, this.w, true);
  }

  /** Put another array into this one. @param {Grid<any>} other @param {number} top @param {number} left */
  put(other, top, left) {
    const { h, w } = other;
    for (let i = 0; i < this.channels * h; i++) {
      const to = (Math.floor(i / h) * this.h + top + (i % h)) * this.w + left;
      this.data.set(other.data.subarray(i * w, (i + 1) * w), to);
    }
  }
}
