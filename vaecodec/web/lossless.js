/** Tiles of lossless files under the networks. FORMAT.md specifies them; numbers are in the integer steps that the graphs
 *  take and give: activations in 1/32, last layers in 1/256, means of pixels in 1/8, of latents in 1/64. */

/** @import { Grids, Tile, Walk } from "./types" */

import { Coder } from "./ans.js";
import { Grid, clamp, range, rint } from "./arrays.js";
import { crc32, require } from "./container.js";
import { popPlain } from "./plain.js";
import { Passes, popMoved, popUnder } from "./refine.js";
import { Weights } from "./weights.js";

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
const INVERSES = [
  1829, 1554, 1320, 1122, 954, 810, 689, 585, 497, 423, 359, 305, 259, 220, 187, 159, 135, 115, 98, 83, 71, 60, 51, 43,
  37, 31, 27, 23, 19, 16, 14, 12, 10, 8, 7, 6, 5, 4, 4, 3,
];
const LOGARITHMS = range(4096, (n) => rint(32 * Math.log2(1 + n / 8)));


/** The samples [h, w, channels] of a tile. @param {Weights} weights @param {Tile} tile @param {number} h
 *  @param {number} w @param {number} channels */
export async function popLossless(weights, tile, h, w, channels) {
  require(tile.method < 2, `unknown tile method ${tile.method}`, "version");
  const [coder, colours] = [new Coder(tile), channels > 2 ? 3 : 1];
  const walk = { weights, coder, colours };
  const { levels } = weights.config;
  let x = await coarsest(walk, Math.ceil(h / 2 ** levels), Math.ceil(w / 2 ** levels), tile.method === 1);
  /** @type {Grid<Float32Array> | undefined} */
  let features;
  for (let d = 0, step = 2 ** (levels - 1); d < levels; d++, step /= 2) {
    ({ x, features } = await new Level(walk, d, x, Math.ceil(h / step), Math.ceil(w / step)).run(features));
  }
  const samples = new Uint8Array(h * w * channels);
  for (let c = 0; c < colours; c++) {
    for (let i = 0; i < h * w; i++) samples[channels * i + c] = x.data[(colours === 1 ? 1 : c) * h * w + i];
  }
  if (channels % 2 === 0) popPlain(coder, h, w, 1, 8).forEach((a, i) => (samples[channels * (i + 1) - 1] = a));
  require(coder.empty && crc32(samples) === tile.crc, "a tile fails its checksum");
  return samples;
}


/** The coarsest picture, by bits-back. @param {Walk} walk @param {number} rows @param {number} columns
 *  @param {boolean} rounded @returns {Promise<Grid<Uint8Array>>} */
async function coarsest(walk, rows, columns, rounded) {
  const { weights, coder } = walk;
  const { latents } = weights.config;
  const [groups, block] = [latents.length, 2 ** latents.length];
  const [high, wide] = [Math.ceil(rows / block) * block, Math.ceil(columns / block) * block];
  /** Of each group its latents, and what is known after them. @type {{z: Int32Array, after: Grids}[]} */
  const found = [];
  for (let g = groups - 1; g >= 0; g--) {
    const [h, w, above] = [high >> (g + 1), wide >> (g + 1), found[g + 1]?.after];
    const { ids, floors } = above ? latentIds(above.mean.data, above.index.data) : top(weights, h * w);
    const z = coder.values(weights.tables("prior"), ids, true).map((v, i) => v + floors[i]);
    const after = await weights.run(`descend.${g}`, { z: new Grid(z, h, w), ...(above && { above: above.h }) });
    found[g] = { z, after };
  }
  const { h: state, linear } = found[0].after;
  const { h } = await weights.run("last", { above: state });
  const centre = linear.box(0, 0, rows, columns);
  const phase = new Phase(walk, "likelihood", Stripes.of(h.box(0, 0, rows, columns)), centre, 512);
  phase.centre.data = centre.data.map((/** @type {number} */ v) => v + 256);
  const x = await phase.run(new Grid(new Uint8Array(3 * rows * columns), rows, columns), rows, columns);
  if (rounded) return x;
  const padded = x.box(0, 0, high, wide);
  const features = await weights.run("inference", { x: padded });
  for (let g = 0; g < groups; g++) {
    const above = found[g + 1]?.after.h;
    const inputs = { features: features[`features.${g}`], x: padded, ...(above && { above }) };
    const { mean, index } = await weights.run(`posterior.${g}`, inputs);
    const { ids, floors } = latentIds(mean.data, index.data);
    coder.push(weights.tables("posterior"), ids, found[g].z.map((v, i) => v - floors[i]));
  }
  return x;
}

/** Table ids of latents and the integers below their means. @param {Int32Array} mean in quarters of a step
 *  @param {Int32Array} index */
function latentIds(mean, index) {
  return { ids: index.map((scale, i) => 4 * scale + (mean[i] & 3)), floors: mean.map((m) => m >> 2) };
}

/** Those of the coarsest group. @param {Weights} weights @param {number} area */
function top(weights, area) {
  const [mean, index] = ["mean", "index"].map((part) => weights.tensor(`decoder.top_${part}`));
  const count = mean.length * area;
  return latentIds(
    range(count, (i) => clamp(mean[Math.floor(i / area)], -2044, 2044)),
    range(count, (i) => clamp(index[Math.floor(i / area)], 0, 47)),
  );
}

/** A state [width, h, w], some rows at a time, so that what lies between two layers stays in the caches. */
class Stripes {
  /** @param {number} h @param {number} w */
  constructor(h, w) {
    this.h = h;
    this.w = w;
    /** @type {Grid<Float32Array>[]} */
    this.parts = [];
  }

  /** @param {Grid<Float32Array>} whole */
  static of(whole) {
    const stripes = new Stripes(whole.h, whole.w);
    stripes.each((top, rows) => stripes.parts.push(whole.rows(top, rows)));
    return stripes;
  }

  /** @param {(top: number, rows: number, index: number) => unknown} f */
  async each(f) {
    const rows = Math.max(1, Math.floor(STRIPE / this.w));
    for (let top = 0, i = 0; top < this.h; top += rows, i++) {
      const done = f(top, Math.min(rows, this.h - top), i);
      if (done instanceof Promise) await done;
    }
  }

  /** A stripe with the row above and the row below it. @param {number} i */
  around(i) {
    const { [i - 1]: above, [i]: part, [i + 1]: below } = this.parts;
    const whole = part.rows(0, part.h, 1);
    if (above) whole.put(above.rows(above.h - 1, 1), 0, 0);
    if (below) whole.put(below.rows(0, 1), part.h + 1, 0);
    return whole;
  }
}

/** The colours of a phase, one after the other. centre: where means start, in halves; span: the mean's change, in
 *  2048ths, for an output's 256th; spread: an activation; known: the known phases, with two samples more around;
 *  passes: of the level, where it has any. */
class Phase {
  /** @param {Walk} walk @param {string} graph @param {Stripes} state @param {Grid<any>} centre
   *  @param {number} span @param {Grid<Float32Array>} [spread] @param {Grid<Uint8Array>} [known]
   *  @param {Passes} [passes] */
  constructor(walk, graph, state, centre, span, spread, known, passes) {
    this.walk = walk;
    this.graph = graph;
    this.state = state;
    this.centre = centre;
    this.span = span;
    this.spread = spread;
    this.known = known;
    this.passes = passes;
    const { h, w } = state;
    // In coding order, as what follows.
    this.x = new Uint8Array(3 * h * w);
    this.residuals = new Int32Array(3 * h * w);
    this.normal = new Float32Array(3 * h * w);
    this.given = new Grid(new Float32Array(6 * h * w), h, w);
    /** @type {Float32Array[]} */
    this.linear = [];
  }

  /** The samples, of which outside rows and columns those of `outside` are taken. @param {Grid<Uint8Array>} outside
   *  @param {number} rows @param {number} columns */
  async run(outside, rows, columns) {
    const { x, state: { h, w } } = this;
    const picture = new Grid(outside.data.slice(), h, w);
    for (let k = 0; k < 3; k++) {
      const prediction = new Grid(new Int32Array(3 * h * w), h, w);
      await this.state.each((top, count, i) => this.predict(k, top, count, i, prediction.data));
      const plane = picture.part(ORDER[k], ORDER[k] + 1);
      if (k < this.walk.colours) {
        const inside = prediction.box(0, 0, rows, columns);
        const [mean, scale, shape] = [0, 1, 2].map((p) => inside.part(p, p + 1).data);
        plane.put(new Grid(this.pop(k, mean, scale, shape, rows, columns), rows, columns), 0, 0);
      } else {
        plane.data.set(x.subarray(0, h * w));
      }
      x.set(plane.data, k * h * w);
      this.see(k, prediction.data);
    }
    return picture;
  }

  /** @param {number} k @param {Int32Array} mean @param {Int32Array} scale @param {Int32Array} shape
   *  @param {number} h @param {number} w */
  pop(k, mean, scale, shape, h, w) {
    const { walk, passes } = this;
    if (passes) return passes.pop(walk, this.graph.slice(-1), k, { mean, scale, shape, h, w });
    const moved = popMoved(walk, scale);
    return popUnder(walk, mean, scale.map((i) => moved[i]), shape);
  }

  /** @param {number} k @param {number} top @param {number} rows @param {number} index
   *  @param {Int32Array} prediction mean, scale and shape [3, h, w] */
  async predict(k, top, rows, index, prediction) {
    const { centre: { data: centre }, span, residuals, state: { h, w, parts } } = this;
    /** @type {Grids} */
    const inputs = { h: parts[index] };
    if (this.spread) inputs.spread = this.spread.rows(top, rows);
    if (k) inputs.given = this.given.part(0, 3 * k).rows(top, rows);
    else if (this.known) inputs.known = this.known.rows(top, rows + 4);
    const { out, linear } = await this.walk.weights.run(`${this.graph}.${k}`, inputs);
    if (linear) this.linear[index] = linear.data;
    const [o, own, size, area] = [out.data, this.linear[index], rows * w, h * w];
    const filters = own ? own.length / size / 3 - 1 : 0;
    const [start, base] = [ORDER[k] * area, k * (1 + filters) * size];
    for (let i = 0, n = top * w; i < size; i++, n++) {
      const at = (/** @type {number} */ c) => clamp(o[c * size + i], -4096, 4096);
      let mean = centre[start + n] * 1024 + at(0) * span;
      if (own) {
        if (k) mean += this.x[n] * 2048;
        mean += own[base + i] * 256;
        for (let f = 1; f <= filters; f++) mean += own[base + f * size + i] * rint(at(2 + f) / 8);
      }
      for (let j = 0; j < k; j++) mean += residuals[j * area + n] * clamp(rint(at(3 + filters + j) / 2), -512, 512);
      prediction[n] = clamp(rint(mean / 256), 0, 2040);
      prediction[area + n] = clamp(rint(at(1) / 64 + 16), 0, SCALES - 1);
      prediction[2 * area + n] = clamp(rint(at(2) / 128 + 1), 0, 2);
    }
  }

  /** @param {number} k @param {Int32Array} prediction */
  see(k, prediction) {
    const { h, w } = this.state;
    const [area, given] = [h * w, this.given.data.subarray(3 * k * h * w)];
    for (let i = 0, n = k * area; i < area; i++, n++) {
      const residual = 8 * this.x[n] - prediction[i];
      this.residuals[n] = residual;
      this.normal[n] = clamp(rint((residual * INVERSES[prediction[area + i]]) / 64), -256, 256);
      if (k === 2) continue;
      given[i] = clamp(rint(residual / 2), -512, 512);
      given[area + i] = this.normal[n];
      given[2 * area + i] = LOGARITHMS[Math.abs(residual)];
    }
  }
}

/** 16 times the binomial 3x3 mean, the border being repeated. @param {Grid<Int32Array>} x */
function localMean({ data, h, w }) {
  const { data: around, w: wide } = new Grid(data, h, w).box(-1, -1, h + 2, w + 2);
  return new Grid(range(data.length, (n) => {
    const [j, i] = [n % w, Math.floor(n / w)];
    let sum = 0;
    for (let k = 0, at = (i + 2 * Math.floor(i / h)) * wide + j; k < 3; k++, at += wide) {
      sum += (k === 1 ? 2 : 1) * (around[at] + 2 * around[at + 1] + around[at + 2]);
    }
    return sum;
  }), h, w);
}

/** The phases of a level: from a picture x to one of rows x columns, and to what the next level takes. */
class Level {
  /** @param {Walk} walk @param {number} depth @param {Grid<Uint8Array>} x @param {number} rows
   *  @param {number} columns */
  constructor(walk, depth, x, rows, columns) {
    this.walk = walk;
    this.name = `levels.${depth}`;
    this.depth = depth;
    this.x = x;
    this.rows = rows;
    this.columns = columns;
    const [{ data, h, w }, size] = [x, x.data.length];
    /** In quarters. */
    this.mean = localMean(new Grid(Int32Array.from(data), h, w)).data.map((v) => rint(v / 4));
    const smooth = localMean(new Grid(this.mean, h, w)).data;
    this.bands = new Grid(new Float32Array(3 * size), h, w);
    this.mean.forEach((m, i) => {
      const bands = [4 * data[i] - m, m - 512, 2 * (m - rint(smooth[i] / 16))];
      bands.forEach((band, b) => (this.bands.data[b * size + i] = clamp(band, -512, 512)));
    });
  }

  /** @param {Grid<Float32Array>} [coarser] features of the level before
   *  @returns {Promise<{x: Grid<Uint8Array>, features: Grid<Float32Array> | undefined}>} */
  async run(coarser) {
    const { walk, name, rows, columns, x, x: { h, w } } = this;
    const { weights, weights: { graphs } } = walk;
    let state = new Stripes(h, w);
    await state.each(async (top, count) => {
      const inputs = { bands: this.bands.rows(top, count, 1), ...(coarser && { features: coarser.rows(top, count, 1) }) };
      state.parts.push((await weights.run(`${name}.entry`, inputs)).state);
    });
    for (let k = 0; `${name}.blocks.${k}` in graphs; k++) state = await this.layer(state, `${name}.blocks.${k}`);
    const fine = new Grid(new Uint8Array(3 * rows * columns), rows, columns);
    place(fine, x, 0, 0);
    const known = [x.box(-2, -2, h + 4, w + 4)];
    const level = weights.config.levels - this.depth;
    const passes = level <= (weights.config.refined ?? 0) ? new Passes(level, x) : undefined;
    for (const [letter, row, column, four] of PHASES) {
      const { centre, spread } = nearest(known, four);
      const all = new Uint8Array(known.length * known[0].data.length);
      known.forEach(({ data }, i) => all.set(data, i * data.length));
      const phase = new Phase(walk, `${name}.${letter}`, state, centre, 64, spread, new Grid(all, h + 4, w + 4), passes);
      const picture = await phase.run(x, (rows + 1 - row) >> 1, (columns + 1 - column) >> 1);
      place(fine, picture, row, column);
      if (`${name}.${letter}.update` in graphs) {
        const more = new Float32Array(6 * h * w);
        this.mean.forEach((m, i) => (more[i] = clamp(4 * picture.data[i] - m, -512, 512)));
        more.set(phase.normal, 3 * h * w);
        state = await this.layer(state, `${name}.${letter}.update`, new Grid(more, h, w));
      }
      known.push(picture.box(-2, -2, h + 4, w + 4));
    }
    if (!(`${name}.features` in graphs)) return { x: fine, features: undefined };
    /** @type {Grid<Float32Array> | undefined} */
    let whole;
    await state.each(async (top, _, i) => {
      const { features: part } = await weights.run(`${name}.features`, { h: state.parts[i] });
      whole ??= new Grid(new Float32Array(part.channels * 4 * h * w), 2 * h, 2 * w);
      whole.put(part, 2 * top, 0);
    });
    return { x: fine, features: whole?.box(0, 0, rows, columns) };
  }

  /** A residual layer. more: what it sees beside the state. @param {Stripes} state @param {string} graph
   *  @param {Grid<Float32Array>} [more] */
  async layer(state, graph, more) {
    const after = new Stripes(state.h, state.w);
    await state.each(async (top, rows, i) => {
      const inputs = { h: state.parts[i], around: state.around(i), ...(more && { more: more.rows(top, rows, 1) }) };
      after.parts.push((await this.walk.weights.run(graph, inputs)).state);
    });
    return after;
  }
}

/** Where means start, and how far the four nearest known samples lie apart; of red and blue, less green.
 *  @param {Grid<Uint8Array>[]} known with two samples around @param {number[][]} four */
function nearest(known, four) {
  const [{ h, w }, size] = [known[0], known[0].h * known[0].w];
  const [rows, columns] = [h - 4, w - 4];
  const centre = new Int32Array(3 * rows * columns);
  const spread = new Float32Array(centre.length);
  for (let c = 0, n = 0; c < 3; c++) {
    for (let i = 2; i < rows + 2; i++) {
      for (let j = 2; j < columns + 2; j++, n++) {
        const [p, q, r, s] = four.map(([phase, down, right]) => {
          const [{ data }, at] = [known[phase], (i + down) * w + j + right];
          return data[c * size + at] - (c === 1 ? 0 : data[size + at]);
        });
        const low = Math.min(p, q), low2 = Math.min(r, s), high = Math.max(p, q), high2 = Math.max(r, s);
        centre[n] = Math.max(low, low2) + Math.min(high, high2);
        spread[n] = LOGARITHMS[8 * (Math.max(high, high2) - Math.min(low, low2))];
      }
    }
  }
  return { centre: new Grid(centre, rows, columns), spread: new Grid(spread, rows, columns) };
}

/** Samples into every second row and column. @param {Grid<Uint8Array>} fine @param {Grid<Uint8Array>} x
 *  @param {number} row @param {number} column */
function place(fine, { data, h, w }, row, column) {
  for (let c = 0; c < 3; c++) {
    for (let i = 0; 2 * i + row < fine.h; i++) {
      const [from, to] = [(c * h + i) * w, (c * fine.h + 2 * i + row) * fine.w + column];
      for (let j = 0; 2 * j + column < fine.w; j++) fine.data[to + 2 * j] = data[from + j];
    }
  }
}
