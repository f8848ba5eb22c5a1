/** Tiles of lossless files under the networks. FORMAT.md specifies them; numbers are in the integer steps that the graphs
 *  take and give: activations in 1/32, last layers in 1/256, pixels' means in 1/8, latents' means in 1/64. */

import { Coder, Tables, sums } from "./ans.js";
import { box, clamp, mod, rint } from "./arrays.js";
import { crc32, require } from "./container.js";
import { popPlain } from "./plain.js";
import { Weights } from "./weights.js";

/** @typedef {[import("./weights.js").Numbers, number[]]} Input an array and its shape */

const ORDER = [1, 0, 2]; // green, red, blue
/** Row and column of each phase, and its four nearest known samples: of which phase, row, column.
 *  @type {[string, number, number, number[][]][]} */
const PHASES = [
  ["D", 1, 1, [[0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 1, 0]]],
  ["B", 0, 1, [[0, 0, 0], [0, 0, 1], [1, -1, 0], [1, 0, 0]]],
  ["C", 1, 0, [[0, 0, 0], [0, 1, 0], [1, 0, -1], [1, 0, 0]]],
];
const STRIPE = 4096; // pixels that are computed together
const SCALES = 40;
const OFTEN = 64;
const INVERSES = [
  1829, 1554, 1320, 1122, 954, 810, 689, 585, 497, 423, 359, 305, 259, 220, 187, 159, 135, 115, 98, 83, 71, 60, 51, 43,
  37, 31, 27, 23, 19, 16, 14, 12, 10, 8, 7, 6, 5, 4, 4, 3,
];
const LOGARITHMS = Float32Array.from({ length: 4096 }, (_, n) => rint(32 * Math.log2(1 + n / 8)));
const OFFSETS = new Tables([-4], false, () =>
  sums(Array.from({ length: 9 }, (_, i) => (i === 4 ? 2 ** 23 + 2 ** 19 : 2 ** (22 - Math.abs(i - 4))))));

/** 16 times the binomial 3x3 mean of x [3, h, w]; the border is repeated. @param {Int32Array} x @param {number} h
 *  @param {number} w */
function localMean(x, h, w) {
  const around = box(x, 3, h, w, -1, -1, h + 2, w + 2);
  const [mean, wide] = [new Int32Array(x.length), w + 2];
  for (let i = 0, n = 0; i < 3 * h; i++) {
    const row = (i + 2 * Math.floor(i / h)) * wide;
    for (let j = 0; j < w; j++) {
      let sum = 0;
      for (let k = 0; k < 3; k++) {
        const at = row + k * wide + j;
        sum += (k === 1 ? 2 : 1) * (around[at] + 2 * around[at + 1] + around[at + 2]);
      }
      mean[n++] = sum;
    }
  }
  return mean;
}

/** A state [width, h, w], some rows at a time. */
class Stripes {
  /** @param {number} width @param {number} h @param {number} w @param {Float32Array[]} parts */
  constructor(width, h, w, parts) {
    Object.assign(this, { width, h, w, parts });
    this.width = width;
    this.h = h;
    this.w = w;
    this.parts = parts;
  }

  /** @param {number} h @param {number} w @returns {[number, number][]} first row and rows of each */
  static of(h, w) {
    const rows = Math.max(1, Math.floor(STRIPE / w));
    return Array.from({ length: Math.ceil(h / rows) }, (_, i) => [i * rows, Math.min(rows, h - i * rows)]);
  }

  /** @param {(part: Float32Array, top: number, rows: number, index: number) => Promise<void>} f */
  async each(f) {
    const places = Stripes.of(this.h, this.w);
    for (let i = 0; i < places.length; i++) await f(this.parts[i], ...places[i], i);
  }

  /** A stripe with the row above and the row below it. @param {number} index @param {number} rows */
  around(index, rows) {
    const { width, w, parts } = this;
    const whole = box(parts[index], width, rows, w, -1, 0, rows + 2, w, true);
    for (const [other, to] of [[parts[index - 1], 0], [parts[index + 1], rows + 1]]) {
      if (!(other instanceof Float32Array)) continue;
      const size = other.length / width;
      for (let c = 0; c < width; c++) {
        const from = to ? c * size : (c + 1) * size - w;
        whole.set(other.subarray(from, from + w), (c * (rows + 2) + Number(to)) * w);
      }
    }
    return whole;
  }
}

export class Lossless {
  /** @param {Weights} weights */
  constructor(weights) {
    this.weights = weights;
    this.config = weights.config;
    /** @type {number} */
    this.groups = weights.config.latents.length;
  }

  /** The samples [h, w, channels] of a tile. @param {import("./container.js").Tile} tile @param {number} h
   *  @param {number} w @param {number} channels */
  async pop(tile, h, w, channels) {
    require(tile.method < 2, `unknown tile method ${tile.method}`, "version");
    const walk = new Walk(this, new Coder(tile.data), channels > 2 ? 3 : 1);
    const picture = await walk.picture(h, w, tile.method === 1);
    const samples = new Uint8Array(h * w * channels);
    for (let c = 0; c < walk.colours; c++) {
      const plane = picture.subarray((walk.colours === 1 ? 1 : c) * h * w);
      for (let i = 0; i < h * w; i++) samples[channels * i + c] = plane[i];
    }
    if (channels % 2 === 0) {
      const alpha = popPlain(walk.coder, h, w, 1, 8);
      for (let i = 0; i < h * w; i++) samples[channels * (i + 1) - 1] = alpha[i];
    }
    require(walk.coder.empty && crc32(samples) === tile.crc, "a tile fails its checksum");
    return samples;
  }
}

/** One tile on its way. */
class Walk {
  /** @param {Lossless} networks @param {Coder} coder @param {number} colours */
  constructor(networks, coder, colours) {
    this.weights = networks.weights;
    this.config = networks.config;
    this.groups = networks.groups;
    this.coder = coder;
    this.colours = colours;
  }

  /** The picture [3, h, w]. @param {number} h @param {number} w @param {boolean} rounded */
  async picture(h, w, rounded) {
    const { levels } = this.config;
    const size = 2 ** levels;
    let x = await this.coarsest(Math.ceil(h / size), Math.ceil(w / size), rounded);
    /** @type {Float32Array | null} */
    let features = null;
    for (let d = 0, step = size / 2; d < levels; d++, step /= 2) {
      const level = await new Level(this, d, x, Math.ceil(h / step), Math.ceil(w / step)).run(features);
      ({ x, features } = level);
    }
    return x;
  }

  /** The coarsest picture [3, rows, columns], by bits-back. @param {number} rows @param {number} columns
   *  @param {boolean} rounded */
  async coarsest(rows, columns, rounded) {
    const { groups, weights, coder } = this;
    const block = 2 ** groups;
    const [high, wide] = [Math.ceil(rows / block) * block, Math.ceil(columns / block) * block];
    const width = this.config.vae_width;
    /** Of each group: its latents, and what is known after them. @type {{z: Int32Array, above: any}[]} */
    const found = [];
    for (let g = groups - 1; g >= 0; g--) {
      const [h, w, channels] = [high >> (g + 1), wide >> (g + 1), this.config.latents[g]];
      const above = found[g + 1]?.above;
      const [mean, index] = above ? [above.mean.data, above.index.data] : this.top(channels, h * w);
      const { ids, floors } = latentIds(mean, index);
      const z = coder.values(weights.tables("decoder.prior"), ids, true);
      for (let i = 0; i < z.length; i++) z[i] += floors[i];
      /** @type {Record<string, Input>} */
      const inputs = { z: [z, [channels, h, w]] };
      if (above) inputs.above = [above.h.data, [width, h, w]];
      found[g] = { z, above: await weights.run(`descend.${g}`, inputs) };
    }
    const { h: state, linear } = found[0].above;
    const { h: last } = await weights.run("last", { above: [state.data, [width, high, wide]] });
    const centre = box(/** @type {Float32Array} */ (linear.data), 3, high, wide, 0, 0, rows, columns).map((v) => v + 256);
    const cut = box(/** @type {Float32Array} */ (last.data), width, high, wide, 0, 0, rows, columns);
    const parts = Stripes.of(rows, columns).map(([top, count]) => box(cut, width, rows, columns, top, 0, count, columns));
    const phase = new Phase(this, "likelihood", new Stripes(width, rows, columns, parts), centre, 512);
    await phase.run(new Uint8Array(3 * rows * columns), rows, columns);
    const x = phase.picture();
    if (rounded) return x;
    /** @type {Input} */
    const padded = [box(x, 3, rows, columns, 0, 0, high, wide), [3, high, wide]];
    const features = await weights.run("inference", { x: padded });
    for (let g = 0; g < groups; g++) {
      const shape = [width, high >> (g + 1), wide >> (g + 1)];
      /** @type {Record<string, Input>} */
      const inputs = { features: [features[`features.${g}`].data, shape], x: padded };
      if (g < groups - 1) inputs.above = [found[g + 1].above.h.data, shape];
      const { mean, index } = await weights.run(`posterior.${g}`, inputs);
      const { ids, floors } = latentIds(mean.data, index.data);
      coder.push(weights.tables("decoder.posterior"), ids, found[g].z.map((v, i) => v - floors[i]));
    }
    return x;
  }

  /** The prior of the coarsest latents. @param {number} channels @param {number} area */
  top(channels, area) {
    return [["mean", -2044, 2044], ["index", 0, 47]].map(([part, low, high]) => {
      const values = this.weights.tensor(`decoder.top_${part}`);
      return Int32Array.from({ length: channels * area }, (_, i) => clamp(values[Math.floor(i / area)], +low, +high));
    });
  }

  /** Samples under means in eighths, scales and shapes. @param {Int32Array} mean @param {Int32Array} scale
   *  @param {Int32Array} shape */
  samples(mean, scale, shape) {
    const groups = this.config.groups ?? 0;
    const moved = Int32Array.from({ length: SCALES }, (_, i) => i);
    if (groups) {
      const counts = new Uint32Array(groups);
      for (let i = 0; i < scale.length; i++) counts[Math.floor((scale[i] * groups) / SCALES)]++;
      const often = [...counts.keys()].filter((group) => counts[group] >= OFTEN);
      const offsets = this.coder.values(OFFSETS, new Uint8Array(often.length));
      often.forEach((group, n) => {
        for (let i = 0; i < SCALES; i++) {
          if (Math.floor((i * groups) / SCALES) === group) moved[i] = clamp(i + offsets[n], 0, SCALES - 1);
        }
      });
    }
    const ids = mean.map((m, i) => (moved[scale[i]] * 3 + shape[i]) * 8 + (m & 7));
    const values = this.coder.values(this.weights.tables("decoder.pixels"), ids, true);
    return values.map((v, i) => {
      const sample = v + (mean[i] >> 3);
      require(sample === (sample & 255), "a tile fails its checksum");
      return sample;
    });
  }
}

/** @param {Int32Array} mean in quarters of a step @param {Int32Array} index */
function latentIds(mean, index) {
  return { ids: index.map((i, n) => 4 * i + mod(mean[n], 4)), floors: mean.map((m) => Math.floor(m / 4)) };
}

/** The colours of a phase, one after the other. centre: where means start, in halves, [3, h, w]; span: the mean's change,
 *  in 2048ths, for an output's 256th; spread: an activation [3, h, w]; known: the known phases, with 2 samples around. */
class Phase {
  /** @param {Walk} walk @param {string} graph @param {Stripes} state @param {Float32Array | Int32Array} centre
   *  @param {number} span @param {Float32Array} [spread] @param {Uint8Array[]} [known] */
  constructor(walk, graph, state, centre, span, spread, known) {
    Object.assign(this, { walk, graph, state, centre, span, spread, known });
    this.walk = walk;
    this.graph = graph;
    this.state = state;
    this.centre = centre;
    this.span = span;
    this.spread = spread;
    this.known = known;
    this.area = state.h * state.w;
    this.x = new Uint8Array(3 * this.area); // in coding order, as what follows
    this.residuals = new Int32Array(3 * this.area);
    this.normal = new Float32Array(3 * this.area);
    this.given = new Float32Array(6 * this.area);
    /** @type {Float32Array[]} */
    this.linear = [];
  }

  /** outside: samples [3, h, w] for those that are not among the rows and columns inside.
   *  @param {Uint8Array} outside @param {number} rows @param {number} columns */
  async run(outside, rows, columns) {
    const { area, walk } = this;
    const { h, w } = this.state;
    for (let k = 0; k < 3; k++) {
      const prediction = [0, 1, 2].map(() => new Int32Array(area));
      await this.state.each((part, top, count, i) => this.predict(k, part, top, count, i, prediction));
      const x = this.x.subarray(k * area, (k + 1) * area);
      if (k < walk.colours) {
        x.set(outside.subarray(ORDER[k] * area, (ORDER[k] + 1) * area));
        const [mean, scale, shape] = prediction.map((p) => box(p, 1, h, w, 0, 0, rows, columns));
        const values = walk.samples(mean, scale, shape);
        for (let i = 0; i < rows; i++) x.set(values.subarray(i * columns, (i + 1) * columns), i * w);
      } else {
        x.set(this.x.subarray(0, area));
      }
      this.see(k, prediction[0], prediction[1]);
    }
  }

  /** @param {number} k @param {Float32Array} part @param {number} top @param {number} rows @param {number} index
   *  @param {Int32Array[]} prediction */
  async predict(k, part, top, rows, index, prediction) {
    const { area, centre, span, known, residuals } = this;
    const { h, w, width } = this.state;
    /** @type {Record<string, Input>} */
    const inputs = { h: [part, [width, rows, w]] };
    if (this.spread) inputs.spread = [box(this.spread, 3, h, w, top, 0, rows, w), [3, rows, w]];
    if (k) inputs.given = [box(this.given.subarray(0, 3 * k * area), 3 * k, h, w, top, 0, rows, w), [3 * k, rows, w]];
    if (known && !k) {
      const whole = new Uint8Array(known.length * known[0].length);
      known.forEach((phase, i) => whole.set(phase, i * phase.length));
      const channels = 3 * known.length;
      inputs.known = [box(whole, channels, h + 4, w + 4, top, 0, rows + 4, w + 4), [channels, rows + 4, w + 4]];
    }
    const { out, linear } = await this.walk.weights.run(`${this.graph}.${k}`, inputs);
    if (linear) this.linear[index] = linear.data;
    const [o, own, size] = [out.data, this.linear[index], rows * w];
    const filters = own ? own.length / size / 3 - 1 : 0;
    const [start, base] = [ORDER[k] * area + top * w, k * (1 + filters) * size];
    for (let i = 0, n = top * w; i < size; i++, n++) {
      const at = (/** @type {number} */ c) => clamp(o[c * size + i], -4096, 4096);
      let mean = centre[start + i] * 1024 + at(0) * span;
      if (own) {
        if (k) mean += this.x[n] * 2048;
        mean += own[base + i] * 256;
        for (let f = 1; f <= filters; f++) mean += own[base + f * size + i] * rint(at(2 + f) / 8);
      }
      for (let j = 0; j < k; j++) {
        mean += residuals[j * area + n] * clamp(rint(at(3 + filters + j) / 2), -512, 512);
      }
      prediction[0][n] = clamp(rint(mean / 256), 0, 2040);
      prediction[1][n] = clamp(rint(at(1) / 64 + 16), 0, SCALES - 1);
      prediction[2][n] = clamp(rint(at(2) / 128 + 1), 0, 2);
    }
  }

  /** @param {number} k @param {Int32Array} mean @param {Int32Array} scale */
  see(k, mean, scale) {
    const { area } = this;
    for (let i = 0, n = k * area; i < area; i++, n++) {
      const residual = 8 * this.x[n] - mean[i];
      this.residuals[n] = residual;
      this.normal[n] = clamp(rint((residual * INVERSES[scale[i]]) / 64), -256, 256);
      if (k === 2) continue;
      this.given[3 * k * area + i] = clamp(rint(residual / 2), -512, 512);
      this.given[(3 * k + 1) * area + i] = this.normal[n];
      this.given[(3 * k + 2) * area + i] = LOGARITHMS[Math.abs(residual)];
    }
  }

  /** The samples [3, h, w] in the order red, green, blue. */
  picture() {
    const picture = new Uint8Array(this.x.length);
    ORDER.forEach((c, k) => picture.set(this.x.subarray(k * this.area, (k + 1) * this.area), c * this.area));
    return picture;
  }
}

/** The phases of a level: from a picture x to one of rows x columns, and to what the next level takes. */
class Level {
  /** @param {Walk} walk @param {number} depth @param {Uint8Array} x @param {number} rows @param {number} columns */
  constructor(walk, depth, x, rows, columns) {
    this.walk = walk;
    this.name = `levels.${depth}`;
    this.x = x;
    this.rows = rows;
    this.columns = columns;
    this.h = (rows + 1) >> 1;
    this.w = (columns + 1) >> 1;
    /** @type {Float32Array | null} */
    this.features = null;
    const steps = Int32Array.from(x);
    this.mean = localMean(steps, this.h, this.w).map((v) => rint(v / 4)); // quarters
    const smooth = localMean(this.mean, this.h, this.w);
    this.bands = new Float32Array(3 * x.length);
    for (let i = 0; i < x.length; i++) {
      this.bands[i] = clamp(4 * x[i] - this.mean[i], -512, 512);
      this.bands[x.length + i] = clamp(this.mean[i] - 512, -512, 512);
      this.bands[2 * x.length + i] = clamp(2 * (this.mean[i] - rint(smooth[i] / 16)), -512, 512);
    }
  }

  /** @param {Float32Array | null} features of the level before */
  async run(features) {
    const { walk, name, h, w, rows, columns, x } = this;
    const { graphs } = walk.weights;
    const { width } = walk.config;
    let state = new Stripes(width, h, w, []);
    for (const [top, count] of Stripes.of(h, w)) {
      /** @type {Record<string, Input>} */
      const inputs = { bands: this.taller(this.bands, 9, top, count) };
      if (features) inputs.features = this.taller(features, features.length / h / w, top, count);
      state.parts.push((await walk.weights.run(`${name}.entry`, inputs)).state.data);
    }
    for (let block = 0; `${name}.blocks.${block}` in graphs; block++) state = await this.layer(state, `${name}.blocks.${block}`);
    const fine = new Uint8Array(3 * rows * columns);
    this.place(fine, x, 0, 0);
    const known = [box(x, 3, h, w, -2, -2, h + 4, w + 4)];
    for (const [letter, row, column, four] of PHASES) {
      const { centre, spread } = this.nearest(known, four);
      const phase = new Phase(walk, `${name}.${letter}`, state, centre, 64, spread, known);
      await phase.run(x, (rows + 1 - row) >> 1, (columns + 1 - column) >> 1);
      const picture = phase.picture();
      this.place(fine, picture, row, column);
      if (`${name}.${letter}.update` in graphs) {
        const more = new Float32Array(2 * x.length);
        for (let i = 0; i < x.length; i++) more[i] = clamp(4 * picture[i] - this.mean[i], -512, 512);
        more.set(phase.normal, x.length);
        state = await this.layer(state, `${name}.${letter}.update`, more);
      }
      known.push(box(picture, 3, h, w, -2, -2, h + 4, w + 4));
    }
    this.x = fine;
    if (`${name}.features` in graphs) await this.handOn(state);
    return this;
  }

  /** Rows of an array with one more above and below. @param {Float32Array} x @param {number} channels
   *  @param {number} top @param {number} rows @returns {Input} */
  taller(x, channels, top, rows) {
    return [box(x, channels, this.h, this.w, top - 1, 0, rows + 2, this.w, true), [channels, rows + 2, this.w]];
  }

  /** A residual layer. more: channels that it sees beside the state. @param {Stripes} state @param {string} graph
   *  @param {Float32Array} [more] */
  async layer(state, graph, more) {
    const { width, h, w } = state;
    const after = new Stripes(width, h, w, []);
    await state.each(async (part, top, rows, i) => {
      /** @type {Record<string, Input>} */
      const inputs = { h: [part, [width, rows, w]], around: [state.around(i, rows), [width, rows + 2, w]] };
      if (more) inputs.more = this.taller(more, 6, top, rows);
      after.parts.push((await this.walk.weights.run(graph, inputs)).state.data);
    });
    return after;
  }

  /** Where means start and how far the four nearest known samples lie apart; of red and blue, less green.
   *  @param {Uint8Array[]} known @param {number[][]} four */
  nearest(known, four) {
    const { h, w } = this;
    const [area, wide] = [h * w, w + 4];
    const [size, centre, spread] = [(h + 4) * wide, new Int32Array(3 * area), new Float32Array(3 * area)];
    for (let c = 0, n = 0; c < 3; c++) {
      for (let i = 0; i < h; i++) {
        for (let j = 0; j < w; j++, n++) {
          const [p, q, r, s] = four.map(([phase, down, right]) => {
            const at = (i + 2 + down) * wide + j + 2 + right;
            return known[phase][c * size + at] - (c === 1 ? 0 : known[phase][size + at]);
          });
          const low = Math.min(p, q), low2 = Math.min(r, s), high = Math.max(p, q), high2 = Math.max(r, s);
          centre[n] = Math.max(low, low2) + Math.min(high, high2);
          spread[n] = LOGARITHMS[8 * (Math.max(high, high2) - Math.min(low, low2))];
        }
      }
    }
    return { centre, spread };
  }

  /** @param {Uint8Array} fine @param {Uint8Array} x [3, h, w] @param {number} row @param {number} column */
  place(fine, x, row, column) {
    const { h, w, rows, columns } = this;
    for (let c = 0; c < 3; c++) {
      for (let i = 0; 2 * i + row < rows; i++) {
        const [from, to] = [(c * h + i) * w, (c * rows + 2 * i + row) * columns + column];
        for (let j = 0; 2 * j + column < columns; j++) fine[to + 2 * j] = x[from + j];
      }
    }
  }

  /** @param {Stripes} state */
  async handOn(state) {
    const { rows, columns, h, w } = this;
    /** @type {Float32Array} */
    let whole = new Float32Array(0);
    let channels = 0;
    await state.each(async (part, top, count) => {
      const { features } = await this.walk.weights.run(`${this.name}.features`, { h: [part, [state.width, count, w]] });
      channels = features.dims[1];
      if (!whole.length) whole = new Float32Array(channels * 4 * h * w);
      for (let c = 0; c < channels; c++) {
        whole.set(features.data.subarray(4 * c * count * w, 4 * (c + 1) * count * w), 4 * (c * h + top) * w);
      }
    });
    this.features = box(whole, channels, 2 * h, 2 * w, 0, 0, rows, columns);
  }
}
