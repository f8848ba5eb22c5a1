/** Samples of lossless tiles under what the networks give; and passes: a phase and colour in four, each of which knows the
 *  samples of those before it. */

/** @import { Walk } from "./types" */

import { Tables, sums } from "./ans.js";
import { Grid, clamp, range, rint } from "./arrays.js";
import { require } from "./container.js";

/** First row and column of each pass, the others being two apart, and the neighbours of a sample that are known. */
const SIDES = [[-1, 0], [1, 0], [0, -1], [0, 1]];
const CORNERS = [[-1, -1], [-1, 1], [1, -1], [1, 1]];
/** @type {[number, number, number[][]][]} */
const PASSES = [[0, 0, []], [1, 1, CORNERS], [0, 1, SIDES], [1, 0, [...SIDES, ...CORNERS]]];
/** By phase: of the phases before it, the samples that touch one. @type {Record<string, [string, number[][]][]>} */
const BESIDE = {
  D: [],
  B: [["D", [[-1, 0], [0, 0]]]],
  C: [["D", [[0, -1], [0, 0]]], ["B", [[0, 0], [0, 1], [1, 0], [1, 1]]]],
};
const ORDER = [1, 0, 2]; // green, red, blue
const SCALES = Array.from({ length: 40 }, (_, i) => 0.07 * (40 / 0.07) ** (i / 39));
const UNITS = SCALES.map((scale) => Math.round(128 * scale));
const INVERSES = SCALES.map((scale) => Math.round(2048 / scale));
const OFTEN = 64;
const OFFSETS = new Tables([-4], false, () =>
  sums([...range(9, (i) => (i === 4 ? 2 ** 23 + 2 ** 19 : 2 ** (22 - Math.abs(i - 4))))]));
const MODES = new Tables([0], false, () => sums([2 ** 21, 2 ** 22, 2 ** 24 - 2 ** 22 - 2 ** 21]));
const WEIGHTS = new Tables([-16], false, () => {
  const counts = [...range(33, (i) => 2 ** (21 - (Math.abs(i - 16) >> 1)))];
  counts[16] += 2 ** 24 - counts.reduce((sum, count) => sum + count);
  return sums(counts);
});

/** Samples under means in eighths, scales and shapes. @param {Walk} walk @param {Int32Array} mean
 *  @param {Int32Array} scale @param {Int32Array} shape */
export function popUnder({ weights, coder }, mean, scale, shape) {
  const ids = mean.map((m, i) => (scale[i] * 3 + shape[i]) * 8 + (m & 7));
  return coder.values(weights.tables("pixels"), ids, true).map((v, i) => {
    const sample = v + (mean[i] >> 3);
    require(sample === (sample & 255), "a tile fails its checksum");
    return sample;
  });
}

/** What becomes of each scale in a tile that moves those which occur often. @param {Walk} walk
 *  @param {Int32Array} scale */
export function popMoved({ weights, coder }, scale) {
  const [groups, moved] = [weights.config.groups ?? 0, range(SCALES.length)];
  if (!groups) return moved;
  const groupOf = (/** @type {number} */ i) => Math.floor((i * groups) / SCALES.length);
  const counts = new Uint32Array(groups);
  for (let i = 0; i < scale.length; i++) counts[groupOf(scale[i])]++;
  const often = [...counts.keys()].filter((group) => counts[group] >= OFTEN);
  const offsets = coder.values(OFFSETS, new Uint8Array(often.length));
  return moved.map((i) => {
    const n = often.indexOf(groupOf(i));
    return n >= 0 ? clamp(i + offsets[n], 0, SCALES.length - 1) : i;
  });
}

/** @typedef {{mean: Int32Array, scale: Int32Array, shape: Int32Array, h: number, w: number}} Given by the networks for a
 *  phase and colour, of h x w samples */

/** The passes of a level, 1 being the finest. */
export class Passes {
  /** @param {number} level @param {Grid<Uint8Array>} a what is known of it */
  constructor(level, a) {
    this.level = level;
    this.a = a;
    /** By phase and colour, with one more around: in sixteenths of a scale, 0 where there is no sample or it is not known.
     *  @type {Map<string, Int16Array>} */
    this.errors = new Map();
    this.wide = a.w + 2;
  }

  /** The samples of a phase and colour. @param {Walk} walk @param {string} letter @param {number} colour
   *  @param {Given} given @param {(n: number) => ArrayLike<number>} activations of the n-th sample */
  pop(walk, letter, colour, { mean, scale, shape, h, w }, activations) {
    const errors = new Int16Array((this.a.h + 2) * this.wide);
    this.errors.set(letter + colour, errors);
    /** Samples, or their means, in eighths. */
    const steps = h && w ? new Grid(mean, h, w).box(-1, -1, h + 2, w + 2) : new Grid(mean, 0, 0);
    const [often, values] = [this.often(colour), new Int32Array(h * w)];
    PASSES.forEach(([top, left, neighbours], pass) => {
      const [high, wide] = [(h + 1 - top) >> 1, (w + 1 - left) >> 1];
      const places = range(high * wide, (n) => (2 * Math.floor(n / wide) + top) * w + 2 * (n % wide) + left);
      if (!pass) {
        const moved = popMoved(walk, places.map((n) => scale[n]));
        scale = scale.map((i) => moved[i]);
      }
      const [m, i, k] = [mean, scale, shape].map((all) => places.map((n) => all[n]));
      const [mode] = walk.coder.values(MODES, [0]);
      if (mode) {
        const count = neighbours.length / 4 + colour + BESIDE[letter].length;
        const stated = mode === 2 ? walk.coder.values(WEIGHTS, new Uint8Array(count)) : null;
        const name = `decoder.refine.${this.level}.${letter}.${colour}.${pass}`;
        const refined = refinerOf(walk, name);
        places.forEach((n, at) => {
          const place = { n, row: Math.floor(n / w) + 1, column: (n % w) + 1, mean: m[at], scale: i[at], shape: k[at] };
          const { inputs, weighed } = this.around(letter, colour, neighbours, place, steps, often);
          const o = refined(inputs, activations(n));
          if (stated) o[0] += 32 * weighed.reduce((sum, f, j) => sum + f * stated[j], 0);
          m[at] = clamp(m[at] + ((clamp((o[0] + 32) >> 6, -1024, 1024) * UNITS[i[at]] + 2048) >> 12), 0, 2040);
          i[at] = clamp(i[at] + ((o[1] + 2048) >> 12), 0, 39);
          k[at] = clamp(k[at] + ((o[2] + 8192) >> 14), 0, 2);
        });
      }
      const rounded = m.map((mean, at) => {
        const step = i[at] < 16 ? 1 : i[at] < 24 ? 2 : 4;
        return (mean + (step >> 1)) & -step;
      });
      popUnder(walk, rounded, i, k).forEach((value, at) => {
        const n = places[at];
        const [row, column] = [Math.floor(n / w) + 1, (n % w) + 1];
        values[n] = value;
        errors[row * this.wide + column] = clamp(((8 * value - mean[n]) * INVERSES[scale[n]] + 512) >> 10, -80, 80);
        steps.data[row * steps.w + column] = 8 * value;
      });
    });
    return values;
  }

  /** How much more often a value occurs than the one below it, from value 0 on. @param {number} colour */
  often(colour) {
    const counts = new Uint32Array(256);
    for (const value of this.a.part(ORDER[colour], ORDER[colour] + 1).data) counts[value]++;
    const t = (/** @type {number} */ value) => rint(16 * Math.log2(8 + counts[clamp(value, 0, 255)]));
    return range(258, (value) => clamp(t(value) - t(value - 1), -64, 64));
  }

  /** What is known around a sample: inputs of the small network, and errors that a tile can weigh.
   *  @param {string} letter @param {number} colour @param {number[][]} neighbours
   *  @param {{row: number, column: number, mean: number, scale: number, shape: number}} place
   *  @param {Grid<Int32Array>} steps @param {Int32Array} often */
  around(letter, colour, neighbours, { row, column, mean, scale, shape }, steps, often) {
    const at = (/** @type {string} */ phase, /** @type {number[]} */ [down, right]) =>
      /** @type {Int16Array} */ (this.errors.get(phase))[(row + down) * this.wide + column + right];
    const inputs = neighbours.map((place) => at(letter + colour, place));
    /** @type {number[]} */
    const weighed = [];
    const fours = [];
    for (let j = 0; j < inputs.length; j += 4) {
      const [a, b, c, d] = inputs.slice(j, j + 4);
      fours.push(((Math.abs(a) + Math.abs(b) + Math.abs(c) + Math.abs(d)) >> 2) - 16);
      weighed.push((a + b + c + d + 2) >> 2);
    }
    if (letter === "D") {
      for (const [down, right] of neighbours) {
        const apart = steps.data[(row + down) * steps.w + column + right] - mean;
        inputs.push(clamp((apart * INVERSES[scale] + 2048) >> 12, -64, 64));
      }
    }
    inputs.push(...fours);
    for (let k = 0; k < colour; k++) {
      const e = at(letter + k, [0, 0]);
      inputs.push(e, Math.abs(e));
      weighed.push(e);
    }
    for (const [phase, places] of BESIDE[letter]) {
      const touching = places.map((place) => at(phase + colour, place));
      inputs.push(...touching);
      weighed.push(Math.floor(touching.reduce((sum, e) => sum + e) / touching.length));
    }
    const floor = mean >> 3;
    inputs.push(2 * scale - 32, 16 * shape - 16, often[floor], often[floor + 1], often[floor + 2], 4 * (mean & 7) - 16);
    return { inputs, weighed };
  }
}

/** A network of two hidden layers. All samples use the same arrays: here most of a picture's time is spent.
 *  @param {Walk} walk @param {string} name */
function refinerOf({ weights }, name) {
  const layers = [1, 2, 3].map((n) => ["w", "b"].map((part) => Int32Array.from(weights.tensor(`${name}.${part}_${n}`))));
  const values = [layers[0][0].length / layers[0][1].length, ...layers.map(([, b]) => b.length)].map((n) => new Int32Array(n));
  return (/** @type {number[]} */ inputs, /** @type {ArrayLike<number>} */ activations) => {
    values[0].set(inputs);
    values[0].set(activations, inputs.length);
    for (let i = inputs.length; i < values[0].length; i++) if (values[0][i] > 255) values[0][i] = 255;
    layers.forEach(([w, b], layer) => {
      const [from, to] = [values[layer], values[layer + 1]];
      for (let j = 0, at = 0; j < b.length; j++) {
        let sum = b[j];
        for (let i = 0; i < from.length; i++) sum = (sum + Math.imul(w[at++], from[i])) | 0;
        to[j] = layer < 2 ? clamp(sum >> (8 + layer), 0, 255) : sum;
      }
    });
    return values[3];
  };
}
