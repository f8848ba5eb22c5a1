/** Plain pictures, without a network, and raw ones. FORMAT.md specifies them. */

import { Coder, Tables, UNIFORM, sums } from "./ans.js";
import { VaeError, crc32, require } from "./container.js";
import { isFitted, middle, popFitted } from "./fitted.js";

/** @import { Samples } from "./types" */

const NUMBERS = new Tables([0], false, () => sums([16515136, ...new Array(312).fill(840)]));
const CONTEXTS = 513;
const RUN = 2048;
const FIRST_FAR = 256;

const DIAGONAL = [[-1, -1], [1, 1], [-1, 1], [1, -1]];
const KNIGHT = [[-1, -2], [-1, 2], [1, -2], [1, 2], [-2, -1], [-2, 1], [2, -1], [2, 1]];
const BESIDE = [[0, -1], [0, 1], [-1, 0], [1, 0]];
/** Row and column of the first sample of each phase, and its neighbours. @type {[number, number, number[][]][]} */
const PHASES = [
  [1, 1, [...DIAGONAL, [-3, -1], [-3, 1], [-1, -3], [-1, 3], [1, -3], [1, 3], [3, -1], [3, 1]]],
  [0, 1, [...BESIDE, ...KNIGHT]],
  [1, 0, [...BESIDE.slice(2), ...BESIDE.slice(0, 2), ...DIAGONAL, ...KNIGHT.slice(0, 4)]],
];

/** @param {number} value */
const bitLength = (value) => 32 - Math.clz32(value);

/** The weight of rank r in tail a. @param {number} a @param {number} r */
function weight(a, r) {
  if (a < 9) return r < 2 ** [1, 2, 4, 6, 8, 10, 12, 14, 16][a] ? 1 : 0;
  if (a < 12) return Math.floor(2 ** 40 / (r + [0, 1, 16][a - 9]) ** 2);
  const c = 3 * 2 ** (a - 12);
  let t = Math.floor((2 ** 30 * c) / (c + ((r + 1) >> 1)));
  for (let i = 0; i < 3; i++) {
    const [high, low] = [Math.floor(t / 32768), t % 32768]; // t^2 / 2^30 without numbers beyond 2^53
    t = high * high + Math.floor((2 * high * low * 32768 + low * low) / 2 ** 30);
  }
  return t;
}

/** @type {number[][]} */
const tails = [];

/** Of a tail, the sum of weights of each entry. @param {number} a */
function tail(a) {
  if (!tails[a]) {
    const total = new Array(288).fill(0);
    for (let r = 1; r < 65536; r++) {
      const k = bitLength(r) - 1;
      total[r < FIRST_FAR ? r : 4 * k + (r >> (k - 2)) + 220] += weight(a, r);
    }
    tails[a] = total;
  }
  return tails[a];
}

/** The tables of ranks: 26 tails by 12 probabilities that the rank is not 0. */
export const RANKS = new Tables(new Uint8Array(312), false, (number) => {
  const [a, b] = [Math.floor(number / 12), number % 12];
  const missed = b < 8 ? 2 ** (9 + 2 * b) : 2 ** 24 - 2 ** [22, 21, 20, 18][b - 8];
  const weights = tail(a);
  const total = BigInt(weights.reduce((sum, w) => sum + w, 0));
  const counts = weights.map((w) => 1 + Number((BigInt(w) * BigInt(missed - 287)) / total));
  counts[0] = 2 ** 24 - counts.slice(1).reduce((sum, count) => sum + count, 0);
  return sums(counts);
});

/** @param {Coder} coder @param {Uint16Array} numbers of tables @param {number} limit */
function popRanks(coder, numbers, limit) {
  const ranks = coder.entries(RANKS, numbers);
  /** @type {number[]} */
  const far = [];
  for (let i = 0; i < ranks.length; i++) if (ranks[i] >= FIRST_FAR) far.push(i);
  if (far.length) {
    const open = far.map((i) => (ranks[i] >> 2) - 58);
    const low = coder.entries(UNIFORM, open.map((bits) => bits - 1));
    far.forEach((i, n) => (ranks[i] = (((ranks[i] & 3) + 4) << open[n]) + low[n]));
  }
  for (let i = 0; i < ranks.length; i++) require(ranks[i] < limit, "a rank is out of range");
  return ranks;
}

/** Where each row or column of a grid from -3 on is in a plane; beyond its edges the grid is mirrored.
 *  @param {number} size of the grid @param {number} step from one to the next */
function mirrored(size, step) {
  const period = Math.max(1, 2 * (size - 1));
  return Int32Array.from({ length: size + 6 }, (_, i) => {
    const at = (((i - 3) % period) + period) % period;
    return Math.min(at, 2 * (size - 1) - at) * step;
  });
}

/** What stood between the same neighbours before. A slot holds key, successes and value as one number. */
class Memory {
  /** @param {number} limit @param {number} first the value that is known */
  constructor(limit, first) {
    this.limit = limit;
    this.levels = [new Float64Array(65536), new Float64Array(65536)];
    this.seen = new Uint32Array(limit);
    this.seen[first] = 1;
    this.met = [first];
    this.order = new Uint16Array(limit);
    this.place = new Uint16Array(limit);
  }

  /** Values by how often they have occurred. */
  sort() {
    const { seen, met, order, place } = this;
    met.sort((a, b) => seen[b] - seen[a] || a - b);
    let n = 0;
    for (const value of met) order[n++] = value;
    for (let value = 0; n < this.limit; value++) if (!seen[value]) order[n++] = value;
    for (let i = 0; i < this.limit; i++) place[order[i]] = i;
  }

  /** The ranks and values of a phase. around: twelve neighbours of each sample.
   *  @param {Coder} coder @param {Uint16Array} chosen @param {number} phase @param {Uint16Array} around */
  pop(coder, chosen, phase, around) {
    const count = around.length / 12;
    const [ranks, values] = [new Int32Array(count), new Int32Array(count)];
    const [guesses, numbers] = [new Int32Array(RUN), new Uint16Array(RUN)];
    const places = [new Uint32Array(RUN), new Uint32Array(RUN)]; // of each level: the hashes
    this.sort();
    for (let start = 0; start < count; start += RUN) {
      const size = Math.min(RUN, count - start);
      for (let i = 0; i < size; i++) {
        const n = 12 * (start + i);
        let guess = around[n + 2] === around[n + 3] ? around[n + 2] : around[n];
        let [state, h] = [0, 0];
        for (let j = 0; j < 12; j++) {
          h = Math.imul(h + around[n + j], 0x9e3779b1);
          if (j === 3 || j === 11) {
            const level = j === 3 ? 0 : 1;
            places[level][i] = h;
            const held = this.levels[level][h >>> 16];
            if (Math.floor(held / 2 ** 18) === (h & 0xffff)) {
              const value = held % 65536;
              state = 1 + 6 * level + 2 * (Math.floor(held / 65536) % 4) + (value === guess ? 1 : 0);
              guess = value;
            }
          }
        }
        let near = 0;
        for (let j = 0; j < 4; j++) near += around[n + j] === guess ? 1 : 0;
        guesses[i] = guess;
        numbers[i] = chosen[3 * (5 * state + near) + phase];
      }
      ranks.set(popRanks(coder, numbers.subarray(0, size), this.limit), start);
      for (let i = 0; i < size; i++) {
        const rank = ranks[start + i];
        values[start + i] = rank ? this.order[rank - (rank <= this.place[guesses[i]] ? 1 : 0)] : guesses[i];
      }
      this.levels.forEach((level, number) => this.learn(level, places[number], values.subarray(start, start + size)));
    }
    for (let i = 0; i < count; i++) if (!this.seen[values[i]]++) this.met.push(values[i]);
    return { ranks, values };
  }

  /** @param {Float64Array} level @param {Uint32Array} places @param {Int32Array} values of a run */
  learn(level, places, values) {
    const entries = new Float64Array(values.length);
    for (let i = 0; i < values.length; i++) {
      const [held, key] = [level[places[i] >>> 16], places[i] & 0xffff];
      const same = Math.floor(held / 2 ** 18) === key && held % 65536 === values[i];
      const successes = same ? Math.min((Math.floor(held / 65536) % 4) + 1, 2) : 0;
      entries[i] = key * 2 ** 18 + successes * 65536 + values[i];
    }
    for (let i = 0; i < values.length; i++) level[places[i] >>> 16] = 0;
    for (let i = 0; i < values.length; i++) level[places[i] >>> 16] = Math.max(level[places[i] >>> 16], entries[i]);
  }
}

/** A group of planes. @param {Coder} coder @param {number} height @param {number} width @param {number} count
 *  @param {number} limit @returns {Uint16Array[]} */
function popGroup(coder, height, width, count, limit) {
  /** @type {import("./fitted.js").Known[]} */
  const known = [];
  const sizes = new Uint8Array(height * width); // classes of the ranks of the plane before
  for (let number = 0; number < count; number++) {
    const [plane, errors] = [new Uint16Array(height * width), new Int32Array(height * width)];
    const [kind, first] = [coder.fixed(2), coder.fixed(16)];
    require(!(kind === 1 && !number) && first < limit, "a plane begins with what it cannot");
    plane[0] = first;
    const stated = coder.entries(NUMBERS, new Uint8Array(CONTEXTS));
    let last = 0;
    const chosen = Uint16Array.from(stated, (t) => (last = t ? t - 1 : last));
    const guide = kind % 2 && number ? known[0].plane : null;
    const memory = kind === 2 ? new Memory(limit, first) : null;
    for (let s = 2 ** bitLength(Math.max(height, width) - 1) / 2; s >= 1; s /= 2) {
      const [rows, columns] = [Math.ceil(height / s), Math.ceil(width / s)];
      const [down, right] = [mirrored(rows, s * width), mirrored(columns, s)];
      PHASES.forEach(([top, left, twelve], phase) => {
        const [high, wide] = [(rows + 1 - top) >> 1, (columns + 1 - left) >> 1];
        if (high < 1 || wide < 1) return;
        const offsets = rows === 1 || columns === 1 ? twelve.map((_, i) => twelve[i % 2]) : twelve;
        const size = high * wide;
        /** Where the neighbours of a sample are, and after them itself. @param {number} n @param {number[]} places
         *  @param {number} most neighbours */
        const locate = (n, places, most) => {
          const j = n % wide;
          const [y, x] = [2 * ((n - j) / wide) + top + 3, 2 * j + left + 3];
          for (let k = 0; k < most; k++) places[k] = down[y + offsets[k][0]] + right[x + offsets[k][1]];
          places[most] = down[y] + right[x];
        };
        /** @type {number[]} */
        const places = [];
        if (kind === 3 && isFitted(rows, columns)) {
          popFitted(coder, size, (n) => (locate(n, places, 12), places), { plane, errors }, known, limit);
          return;
        }
        let ranks, values;
        if (memory) {
          const around = new Uint16Array(12 * size);
          for (let n = 0; n < size; n++) {
            locate(n, places, 12);
            for (let k = 0; k < 12; k++) around[12 * n + k] = plane[places[k]];
          }
          ({ ranks, values } = memory.pop(coder, chosen, phase, around));
        } else {
          const [numbers, predictions] = [new Uint16Array(size), new Int32Array(size)];
          for (let n = 0; n < size; n++) {
            locate(n, places, 4);
            const { sum, spread } = middle(plane, guide, places);
            const prediction = ((sum + 1) >> 1) + (guide ? guide[places[4]] : 0);
            predictions[n] = Math.min(Math.max(prediction, 0), limit - 1);
            numbers[n] = chosen[27 * bitLength(spread) + 3 * sizes[places[4]] + phase];
          }
          ranks = popRanks(coder, numbers, limit);
          values = ranks.map((rank, n) => {
            const value = predictions[n] + (rank & 1 ? -((rank + 1) >> 1) : rank >> 1);
            return value < 0 ? value + limit : value >= limit ? value - limit : value;
          });
        }
        for (let n = 0; n < size; n++) {
          locate(n, places, 0);
          plane[places[0]] = values[n];
          errors[places[0]] = 8 * ((ranks[n] + 1) >> 1);
          sizes[places[0]] = (bitLength(ranks[n]) + 1) >> 1;
        }
      });
    }
    known.push({ plane, errors });
  }
  return known.map(({ plane }) => plane);
}

/** @param {number} depth @param {number} count @returns {Samples} */
export const samplesOf = (depth, count) => (depth > 8 ? new Uint16Array(count) : new Uint8Array(count));

/** A plain picture. @param {Coder} coder @param {number} height @param {number} width @param {number} channels
 *  @param {number} depth @returns {Samples} */
export function popPlain(coder, height, width, channels, depth) {
  const layout = coder.fixed(2);
  require(layout < 3, "a plain picture has an unknown layout");
  let limit = 2 ** depth;
  /** @type {Uint16Array[]} */
  let lists = [];
  if (layout) {
    const count = coder.fixed(16) + 1;
    lists = popGroup(coder, 1, count, layout === 1 ? channels : 1, limit);
    limit = count;
  }
  const planes = popGroup(coder, height, width, layout === 1 ? 1 : channels, limit);
  const samples = samplesOf(depth, height * width * channels);
  for (let k = 0; k < channels; k++) {
    const c = channels > 2 && k < 2 ? 1 - k : k; // green comes first
    const [plane, list] = [planes[layout === 1 ? 0 : k], lists[layout === 1 ? k : 0]];
    for (let i = 0; i < plane.length; i++) samples[channels * i + c] = list ? list[plane[i]] : plane[i];
  }
  return samples;
}

/** The samples of a tile of method 2 or 3. @param {import("./types").Tile} tile @param {number} height
 *  @param {number} width @param {number} channels @param {number} depth @returns {Samples} */
export function popExact(tile, height, width, channels, depth) {
  let samples;
  if (tile.method === 3) {
    samples = samplesOf(depth, height * width * channels);
    require(tile.lanes === 1 && samples.byteLength === tile.data.length, "a raw tile has a wrong length");
    new Uint8Array(samples.buffer).set(tile.data);
  } else if (tile.method === 2) {
    const coder = new Coder(tile);
    samples = popPlain(coder, height, width, channels, depth);
    require(coder.empty, "a tile does not end where it should");
  } else {
    throw new VaeError("version", `unknown tile method ${tile.method}`);
  }
  require(crc32(samples) === tile.crc, "a tile fails its checksum");
  return samples;
}
