/** Fitted phases of plain pictures: linear predictions with weights that the file states. FORMAT.md specifies them. */

import { Coder, Tables, UNIFORM, sums } from "./ans.js";
import { clamp, range } from "./arrays.js";
import { require } from "./container.js";

/** @typedef {{plane: Uint16Array, errors: Int32Array}} Known samples, and errors in eighths */

const ESCAPED = 64;
const SCALES = 32;
const CONTEXTS = 80;
/** @param {number} table */
const reach = (table) => 8 + 2 ** Math.floor(table / 96);

/** Differences from a prediction: 32 scales by 3 shapes by 8 fractions. */
const FAMILY = new Tables(range(768, (t) => -reach(t)), true, (table) => {
  const [i, k, f, far] = [Math.floor(table / 24), (table >> 3) % 3, table % 8, reach(table)];
  const s = BigInt((2 ** (k + 2) - 1) * [41, 58][i % 2] * 2 ** (i >> 1));
  const weights = [...range(2 * far + 1)].map((n) => {
    let weight = 0n;
    for (let h = -7; h < 8; h += 2) {
      let t = (s << 30n) / (s + BigInt((4 * (16 * (n - far) + h - 2 * f)) ** 2));
      for (let times = 0; times <= k; times++) t = (t * t) >> 30n;
      weight += t;
    }
    return weight;
  });
  const [total, left] = [weights.reduce((sum, w) => sum + w), 2 ** 24 - ESCAPED];
  const counts = weights.map((w) => 1 + Number((w * BigInt(left - weights.length)) / total));
  counts[far] += left - counts.reduce((sum, count) => sum + count);
  return sums([...counts, ESCAPED]);
});
const MOVES = new Tables([0], false, () => {
  const counts = [...range(48, (m) => (m % 3 === 1 ? 2 : 1) * 2 ** (18 - Math.abs(Math.floor(m / 3) - 8)))];
  counts[25] += 2 ** 24 - counts.reduce((sum, count) => sum + count);
  return sums(counts);
});

/** Whether a grid is large enough. @param {number} rows @param {number} columns */
export const isFitted = (rows, columns) => rows >= 16 && columns >= 16 && rows * columns >= 2 ** 15;

/** Of a sample's four neighbours, less those in a guide: the sum of the two middle ones, and how far they lie apart.
 *  @param {Uint16Array} plane @param {Uint16Array | null} guide @param {number[]} places */
export function middle(plane, guide, places) {
  let [a, b, c, d] = [plane[places[0]], plane[places[1]], plane[places[2]], plane[places[3]]];
  if (guide) {
    a -= guide[places[0]];
    b -= guide[places[1]];
    c -= guide[places[2]];
    d -= guide[places[3]];
  }
  const [low, high, low2, high2] = [Math.min(a, b), Math.max(a, b), Math.min(c, d), Math.max(c, d)];
  const [one, two] = [Math.max(low, low2), Math.min(high, high2)];
  return { sum: one + two, spread: Math.max(high, high2) - Math.min(low, low2) + Math.abs(one - two) };
}

/** @param {Coder} coder @param {number} count @param {number} most the sum of their magnitudes */
function popWeights(coder, count, most) {
  const upper = coder.values(FAMILY, new Uint16Array(count).fill(760));
  const lower = coder.values(UNIFORM, new Uint8Array(count).fill(2));
  const weights = Array.from(upper, (u, i) => 8 * u + lower[i]);
  require(weights.reduce((sum, w) => sum + Math.abs(w), 0) <= most, "weights are too large");
  return weights;
}

/** Sets the samples of a phase, and their errors. locate: where the twelve neighbours of a sample are, and itself.
 *  @param {Coder} coder @param {number} size @param {(n: number) => number[]} locate @param {Known} own
 *  @param {Known[]} before @param {number} limit */
export function popFitted(coder, size, locate, { plane, errors }, before, limit) {
  let weights = popWeights(coder, 13 + 14 * before.length, 2 ** 14);
  const means = range(size, (n) => {
    const places = locate(n);
    let sum = weights[12] * middle(plane, null, places).sum;
    for (let k = 0; k < 12; k++) sum += weights[k] * plane[places[k]];
    before.forEach(({ plane: guide }, i) => {
      const first = 13 + 14 * i;
      for (let k = 0; k < 13; k++) sum += weights[first + k] * guide[places[k]];
      sum += weights[first + 13] * (middle(plane, guide, places).sum + 2 * guide[places[12]]);
    });
    return clamp(Math.floor(sum / 128 + 0.5), 0, 8 * (limit - 1));
  });
  weights = popWeights(coder, 3 + 2 * before.length, 2 ** 11);
  const contexts = range(size, (n) => {
    const places = locate(n);
    const near = (/** @type {Int32Array} */ e) => e[places[0]] + e[places[1]] + e[places[2]] + e[places[3]];
    let sum = weights[0] * middle(plane, null, places).spread + weights[1] * near(errors) + weights[2] * 8;
    before.forEach(({ errors: others }, i) => {
      sum += weights[3 + 2 * i] * others[places[12]] + weights[4 + 2 * i] * near(others);
    });
    sum = clamp(sum, 1, 2 ** 30);
    const e = 31 - Math.clz32(sum);
    return clamp(4 * e + Math.floor((4 * sum) / 2 ** e) - 34, 0, CONTEXTS - 1);
  });
  const [first, last] = coder.values(UNIFORM, [6, 6]);
  const sound = last < CONTEXTS && contexts.every((c) => c >= first && c <= last);
  require(sound && first <= last, "contexts are out of range");
  const moves = coder.values(MOVES, new Uint8Array(last - first + 1));
  const open = range(CONTEXTS, (c) => Math.max(0, (c - 28) >> 2));
  const upper = coder.values(FAMILY, contexts.map((c, n) => {
    const move = moves[c - first];
    const scale = clamp(c - 4 * open[c] + Math.floor(move / 3) - 8, 0, SCALES - 1);
    return 24 * scale + 8 * (move % 3) + (means[n] & 7);
  }));
  const far = contexts.filter((c) => open[c]);
  const lower = coder.values(UNIFORM, far.map((c) => open[c] - 1));
  for (let n = 0, next = 0; n < size; n++) {
    const bits = open[contexts[n]];
    const value = (means[n] >> 3) + upper[n] * 2 ** bits + (bits ? lower[next++] : 0);
    require(value >= 0 && value < limit, "a sample is out of range");
    const at = locate(n)[12];
    plane[at] = value;
    errors[at] = Math.abs(8 * value - means[n]);
  }
}
