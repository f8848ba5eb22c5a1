/** ANS words, probability tables and arrays of integers. FORMAT.md specifies them. */

import { VaeError, require, varint } from "./container.js";

const WORD = 2 ** 32;
const TOTAL = 2 ** 24;
const BUCKETS = 1024;
const BUCKET_BITS = 14; // of a slot, below its bucket
const STRETCH = 128; // entries of a lane, before the next one's follow

/** Probability tables. Of table t: lows[t] is its smallest value, left(t) the sums of the counts before each entry and,
 *  at the end, 2^24. */
export class Tables {
  /** @param {ArrayLike<number>} lows @param {boolean} escape @param {(t: number) => Uint32Array} left */
  constructor(lows, escape, left) {
    this.lows = lows;
    this.escape = escape;
    this._left = left;
    /** @type {{left: Uint32Array, first: Uint16Array}[]} */
    this._made = [];
  }

  /** Of counts one table after the other, as weights files hold them.
   *  @param {ArrayLike<number>} lows @param {ArrayLike<number>} sizes @param {ArrayLike<number>} counts
   *  @param {boolean} escape */
  static of(lows, sizes, counts, escape) {
    const starts = [0];
    for (let t = 0; t < sizes.length; t++) starts.push(starts[t] + sizes[t]);
    return new Tables(lows, escape, (t) => sums(Array.prototype.slice.call(counts, starts[t], starts[t + 1])));
  }

  /** A table's sums, and for each bucket of slots the entry in which it begins. @param {number} t */
  table(t) {
    let made = this._made[t];
    if (!made) {
      const left = this._left(t);
      const first = new Uint16Array(BUCKETS);
      for (let bucket = 0, i = 0; bucket < BUCKETS; bucket++) {
        while (left[i + 1] <= bucket << BUCKET_BITS) i++;
        first[bucket] = i;
      }
      made = this._made[t] = { left, first };
    }
    return made;
  }

  /** The value that a table is all but certain of, if there is one. @param {number} t */
  certain(t) {
    const { left } = this.table(t);
    for (let i = 0; i < left.length - 1 - Number(this.escape); i++) {
      if (left[i + 1] - left[i] >= 2 ** 24 - 2 ** 16) return this.lows[t] + i;
    }
    return null;
  }
}

/** @param {number[]} counts */
export function sums(counts) {
  const left = new Uint32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) left[i + 1] = left[i] + counts[i];
  return left;
}

/** Table id w - 1: the uniform table of 2^w entries. */
export const UNIFORM = new Tables(new Uint8Array(13), false, (t) =>
  new Uint32Array((1 << (t + 1)) + 1).map((_, i) => i * 2 ** (23 - t)));
const PREFIX = new Tables([0], false, () =>
  sums(Array.from({ length: 64 }, (_, i) => Math.max(1, 2 ** 22 >> (i >> 1)) - (i < 2 ? 8 : 0))));

/** So many values are not popped from an empty coder, where networks give the tables. */
export const MANY = 4096;

/** A stack of words and a state of 64 bits, in two halves. */
class Lane {
  /** @param {Uint8Array} data */
  constructor(data) {
    this.words = new Uint32Array(data.slice().buffer);
    this.top = this.words.length;
    require(!this.top || this.words[this.top - 1], "the last word of a lane is zero");
    this.high = this.top > 1 ? this.words[--this.top] : 0;
    this.low = this.top ? this.words[--this.top] : 0;
  }

  /** Pops entries of one table. @param {Int32Array} entries @param {Uint32Array} order places in it
   *  @param {number} start @param {number} stop in the order @param {{left: Uint32Array, first: Uint16Array}} table */
  pop(entries, order, start, stop, { left, first }) {
    let { high, low, top } = this;
    for (let k = start; k < stop; k++) {
      const slot = low & 0xffffff;
      let i = first[slot >>> BUCKET_BITS];
      while (left[i + 1] <= slot) i++;
      entries[order[k]] = i;
      // count * (state >> 24) + slot - left, exactly: no number here reaches 2^53.
      const count = left[i + 1] - left[i];
      const upper = count * (high >>> 16);
      const lower = count * (((high & 0xffff) << 8) | (low >>> 24)) + slot - left[i] + (upper % 256) * TOTAL;
      low = lower >>> 0;
      high = Math.floor(upper / 256) + Math.floor(lower / WORD);
      if (high === 0 && top > 0) {
        high = low;
        low = this.words[--top];
      }
    }
    this.high = high;
    this.low = low;
    this.top = top;
  }

  /** @param {number} count @param {number} left */
  push(count, left) {
    if (Math.floor(this.high / 256) >= count) {
      if (this.top === this.words.length) {
        const grown = new Uint32Array(2 * this.top + 64);
        grown.set(this.words);
        this.words = grown;
      }
      this.words[this.top++] = this.low;
      this.low = this.high;
      this.high = 0;
    }
    // A division of 64 bits, 16 at a time; the quotient is below 2^40.
    let quotient = Math.floor(this.high / count);
    let rest = this.high % count;
    for (const part of [this.low >>> 16, this.low & 0xffff]) {
      const number = rest * 65536 + part;
      quotient = quotient * 65536 + Math.floor(number / count);
      rest = number % count;
    }
    this.high = Math.floor(quotient / 256);
    this.low = (quotient % 256) * TOTAL + rest + left;
  }
}

/** The words of a tile, in one lane or several. */
export class Coder {
  /** @param {import("./types").Tile} tile */
  constructor({ data, lanes }) {
    const sizes = [];
    let at = 0;
    for (let i = 0; i < lanes && lanes > 1; i++) {
      const [words, after] = varint(data, at, "corrupt");
      sizes.push(4 * words);
      at = after;
    }
    if (lanes === 1) sizes.push(data.length);
    const end = sizes.reduce((sum, size) => sum + size, at);
    require(end === data.length && (end - at) % 4 === 0, "the words of a tile have a wrong length");
    this.lanes = sizes.map((size) => new Lane(data.subarray(at, (at += size))));
  }

  get empty() {
    return this.lanes.every(({ top, high, low }) => !(top || high || low));
  }

  /** Which lane entries are in: calls f with a lane and a stretch of them.
   *  @param {number} start @param {number} stop @param {(lane: Lane, start: number, stop: number) => void} f */
  each(start, stop, f) {
    const { lanes } = this;
    if (lanes.length === 1) f(lanes[0], start, stop);
    else {
      for (let end; start < stop; start = end) {
        end = Math.min(stop, start - (start % STRETCH) + STRETCH);
        f(lanes[Math.floor(start / STRETCH) % lanes.length], start, end);
      }
    }
  }

  /** The entries of an array. They are popped in the order of their tables' ids. @param {Tables} tables
   *  @param {ArrayLike<number>} ids @returns {Int32Array} */
  entries(tables, ids) {
    const entries = new Int32Array(ids.length);
    const { order, groups } = grouped(ids);
    for (const [id, first, last] of groups) {
      const table = tables.table(id);
      this.each(first, last, (lane, start, stop) => lane.pop(entries, order, start, stop, table));
    }
    return entries;
  }

  /** An array of values. many: whether to refuse an empty coder for MANY. @param {Tables} tables
   *  @param {ArrayLike<number>} ids @param {boolean} [many] @returns {Int32Array} */
  values(tables, ids, many = false) {
    require(!(many && ids.length >= MANY && this.empty), "a tile has fewer bytes than its values need");
    const values = this.entries(tables, ids);
    const { lows } = tables;
    /** @type {number[]} */
    const outside = [];
    for (let i = 0; i < values.length; i++) {
      if (tables.escape && values[i] === tables.table(ids[i]).left.length - 2) outside.push(i);
      values[i] += lows[ids[i]];
    }
    if (!outside.length) return values;
    const prefixes = this.entries(PREFIX, new Uint8Array(outside.length));
    /** @type {number[]} */
    const widths = [];
    for (const prefix of prefixes) for (let k = prefix >> 1; k > 0; k -= 8) widths.push(Math.min(k, 8) - 1);
    const chunks = this.entries(UNIFORM, widths);
    let next = 0;
    outside.forEach((i, n) => {
      const k = prefixes[n] >> 1;
      let e = 2 ** k;
      for (let bits = 0; bits < k; bits += 8) e += chunks[next++] * 2 ** bits;
      const value = prefixes[n] & 1 ? values[i] - 1 + e : lows[ids[i]] - e;
      require(value === (value | 0), "a value is out of range");
      values[i] = value;
    });
    return values;
  }

  /** A number of up to 8 bits, or of 16. @param {number} bits */
  fixed(bits) {
    if (bits < 16) return this.entries(UNIFORM, [bits - 1])[0];
    const [upper, lower] = this.entries(UNIFORM, [7, 7]);
    return 256 * upper + lower;
  }

  /** Pushes an array under tables without escape. @param {Tables} tables @param {ArrayLike<number>} ids
   *  @param {ArrayLike<number>} values */
  push(tables, ids, values) {
    const { order } = grouped(ids);
    for (let k = order.length - 1; k >= 0; k--) {
      const id = ids[order[k]];
      const { left } = tables.table(id);
      const i = values[order[k]] - tables.lows[id];
      require(i >= 0 && i < left.length - 1, "a tile fails its checksum");
      this.each(k, k + 1, (lane) => lane.push(left[i + 1] - left[i], left[i]));
    }
  }
}

/** The order in which an array is coded, and of each table that occurs its id, start and stop in it.
 *  @param {ArrayLike<number>} ids */
function grouped(ids) {
  const stops = new Uint32Array(1025);
  for (let i = 0; i < ids.length; i++) {
    if (!(ids[i] >= 0 && ids[i] < 1024)) throw new VaeError("corrupt", `table ${ids[i]} is none`);
    stops[ids[i] + 1]++;
  }
  /** @type {[number, number, number][]} */
  const groups = [];
  for (let id = 0; id < 1024; id++) {
    stops[id + 1] += stops[id];
    if (stops[id + 1] > stops[id]) groups.push([id, stops[id], stops[id + 1]]);
  }
  const order = new Uint32Array(ids.length);
  for (let i = 0; i < ids.length; i++) order[stops[ids[i]]++] = i;
  return { order, groups };
}
