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
  /** @type {Grid<any> | undefined} */
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
  const last = (await weights.run("last", { above: state })).h.box(0, 0, rows, columns);
  const centre = linear.box(0, 0, rows, columns).data.map((/** @type {number} */ v) => v + 256);
  const h = emptyState(new Float32Array(0), rows, columns, last.channels + besideOf(weights.config));
  putPlanes(h, 0, [...range(last.channels)].map((c) => last.part(c, c + 1).data));
  const phase = new Phase(walk, "likelihood", h, last.channels, centre, 512);
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

/** @typedef {Grid<Uint8Array> | Grid<Float32Array>} State [rows + 2, columns, channels], zeros above and below: the
 *  channels of a sample lie together */

/** @param {Uint8Array | Float32Array} like @param {number} rows @param {number} columns @param {number} channels
 *  @returns {State} */
function emptyState(like, rows, columns, channels) {
  const data = new (/** @type {any} */ (like).constructor)((rows + 2) * columns * channels);
  return new Grid(data, columns, channels);
}

/** Puts planes [rows, columns] into channels of a state; gives the next channel. @param {State} state
 *  @param {number} channel @param {ArrayLike<number>[]} planes */
function putPlanes({ data, h, w }, channel, planes) {
  for (const plane of planes) {
    for (let i = 0, at = h * w + channel; i < plane.length; i++, at += w) data[at] = plane[i];
    channel++;
  }
  return channel;
}

/** Numbers in steps of an activation, limited; or three bytes for each: of its half what is above and what is below 0, and
 *  what is left. @param {Int32Array[]} planes @param {boolean} inBytes */
function coarse(planes, inBytes) {
  const limited = planes.map((plane) => plane.map((v) => clamp(v, -512, 512)));
  if (!inBytes) return limited;
  const halves = limited.map((plane) => plane.map((v) => v >> 1));
  return [...signs(halves, true), ...limited.map((plane) => plane.map((v) => v & 1))];
}

/** Numbers; or of each what is above and what is below 0. @param {Int32Array[]} planes @param {boolean} inBytes */
function signs(planes, inBytes) {
  if (!inBytes) return planes;
  return [1, -1].flatMap((sign) => planes.map((plane) => plane.map((v) => clamp(sign * v, 0, 255))));
}

/** Logarithms of numbers in eighths. @param {Int32Array} plane @param {boolean} inBytes */
function logarithm(plane, inBytes) {
  return plane.map((v) => Math.min(LOGARITHMS[Math.abs(v)], inBytes ? 255 : 511));
}

/** @param {number} channels */
const sixteens = (channels) => 16 * Math.ceil(channels / 16);

/** Channels beside a state, for what a head or an update sees besides. @param {Record<string, any>} config */
function besideOf({ activation_bits: bits, width }) {
  return bits === 8 ? sixteens(width + 15) - width : 9;
}

/** Some rows of a phase at a time, so that what lies between two layers stays in the caches.
 *  @param {number} h @param {number} w @param {(top: number, rows: number, index: number) => Promise<void>} f */
async function inStripes(h, w, f) {
  const rows = Math.max(1, Math.floor(STRIPE / w));
  for (let top = 0, i = 0; top < h; top += rows, i++) await f(top, Math.min(rows, h - top), i);
}

/** The colours of a phase, one after the other. state: with room beside its width; centre: where means start, in halves;
 *  span: the mean's change, in 2048ths, for an output's 256th; spread: how far known samples lie apart, in eighths;
 *  known: the known phases, with two samples more around; passes: of the level, where it has any. */
class Phase {
  /** @param {Walk} walk @param {string} graph @param {State} state @param {number} width
   *  @param {ArrayLike<number>} centre @param {number} span @param {Int32Array[]} [spread]
   *  @param {Grid<Uint8Array>} [known] @param {Passes} [passes] */
  constructor(walk, graph, state, width, centre, span, spread, known, passes) {
    this.walk = walk;
    this.graph = graph;
    this.state = state;
    this.width = width;
    this.centre = centre;
    this.span = span;
    this.known = known;
    this.passes = passes;
    this.inBytes = state.data instanceof Uint8Array;
    this.h = state.channels - 2;
    this.w = state.h;
    if (spread) putPlanes(state, width, spread.map((plane) => logarithm(plane, this.inBytes)));
    this.given = width + 3;
    // In coding order, as what follows.
    const size = 3 * this.h * this.w;
    this.x = new Uint8Array(size);
    this.residuals = new Int32Array(size);
    this.normal = new Int32Array(size);
    /** @type {Float32Array[]} */
    this.linear = [];
  }

  /** The samples, of which outside rows and columns those of `outside` are taken. @param {Grid<Uint8Array>} outside
   *  @param {number} rows @param {number} columns */
  async run(outside, rows, columns) {
    const { x, h, w } = this;
    const picture = new Grid(outside.data.slice(), h, w);
    for (let k = 0; k < 3; k++) {
      const prediction = new Grid(new Int32Array(3 * h * w), h, w);
      await inStripes(h, w, (top, count, i) => this.predict(k, top, count, i, prediction.data));
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
    if (passes) {
      const activations = (/** @type {number} */ n) => this.activations(Math.floor(n / w), n % w);
      return passes.pop(walk, this.graph.slice(-1), k, { mean, scale, shape, h, w }, activations);
    }
    const moved = popMoved(walk, scale);
    return popUnder(walk, mean, scale.map((i) => moved[i]), shape);
  }

  /** What the phase is predicted from. @param {number} row @param {number} column */
  activations(row, column) {
    const at = ((row + 1) * this.w + column) * this.state.w;
    return this.state.data.subarray(at, at + this.width);
  }

  /** @param {number} k @param {number} top @param {number} rows @param {number} index
   *  @param {Int32Array} prediction mean, scale and shape [3, h, w] */
  async predict(k, top, rows, index, prediction) {
    const { centre, span, residuals, h, w } = this;
    /** @type {Grids} */
    const inputs = { x: this.state.part(top + 1, top + rows + 1) };
    if (this.known && !k) inputs.known = this.known.rows(top, rows + 4);
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
    const [area, { inBytes }] = [this.h * this.w, this];
    const [residuals, normal] = [this.residuals, this.normal].map((all) => all.subarray(k * area, (k + 1) * area));
    for (let i = 0; i < area; i++) {
      residuals[i] = 8 * this.x[k * area + i] - prediction[i];
      normal[i] = clamp(rint((residuals[i] * INVERSES[prediction[area + i]]) / 64), -256, 256);
    }
    if (k === 2) return;
    const halves = residuals.map((residual) => rint(residual / 2));
    const told = [...coarse([halves], inBytes), ...signs([normal], inBytes), logarithm(residuals, inBytes)];
    this.given = putPlanes(this.state, this.given, told);
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
    this.bands = [0, 1, 2].map((band) => this.mean.map((m, i) => [4 * data[i] - m, m - 512, 2 * (m - rint(smooth[i] / 16))][band]));
  }

  /** @param {Grid<any>} [coarser] features of the level before
   *  @returns {Promise<{x: Grid<Uint8Array>, features: Grid<any> | undefined}>} */
  async run(coarser) {
    const { walk, name, rows, columns, x, x: { h, w } } = this;
    const { weights, weights: { graphs, config, config: { width } } } = walk;
    const [inBytes, area] = [config.activation_bits === 8, h * w];
    const planes = (/** @type {Int32Array} */ all) => [0, 1, 2].map((c) => all.subarray(c * area, (c + 1) * area));
    const told = coarse(this.bands.flatMap(planes), inBytes);
    const features = [...range(coarser?.channels ?? 0)].map((c) => coarser?.part(c, c + 1).data ?? told[0]);
    const channels = features.length + told.length;
    /** @type {Uint8Array | Float32Array} */
    const like = inBytes ? new Uint8Array(0) : new Float32Array(0);
    let state = emptyState(like, h, w, inBytes ? sixteens(channels) : channels);
    putPlanes(state, 0, inBytes ? [...features, ...told] : [...told, ...features]);
    const layers = ["entry"];
    while (`${name}.blocks.${layers.length - 1}` in graphs) layers.push(`blocks.${layers.length - 1}`);
    for (const layer of layers) state = await this.layer(state, layer, layer === layers[layers.length - 1]);
    const fine = new Grid(new Uint8Array(3 * rows * columns), rows, columns);
    place(fine, x, 0, 0);
    const known = [x.box(-2, -2, h + 4, w + 4)];
    const level = config.levels - this.depth;
    const passes = level <= (config.refined ?? 0) ? new Passes(level, x) : undefined;
    for (const [letter, row, column, four] of PHASES) {
      const { centre, spread } = nearest(known, four);
      const all = new Uint8Array(known.length * known[0].data.length);
      known.forEach(({ data }, i) => all.set(data, i * data.length));
      const seen = new Grid(all, h + 4, w + 4);
      const phase = new Phase(walk, `${name}.${letter}`, state, width, centre, 64, planes(spread), seen, passes);
      const picture = await phase.run(x, (rows + 1 - row) >> 1, (columns + 1 - column) >> 1);
      place(fine, picture, row, column);
      if (`${name}.updates.${letter}` in graphs) {
        const apart = planes(this.mean.map((m, i) => 4 * picture.data[i] - m));
        putPlanes(state, width, [...coarse(apart, inBytes), ...signs(planes(phase.normal), inBytes)]);
        state = await this.layer(state, `updates.${letter}`, letter !== "C");
      }
      known.push(picture.box(-2, -2, h + 4, w + 4));
    }
    return { x: fine, features: `${name}.features` in graphs ? await this.handOn(state) : undefined };
  }

  /** A 3x3 layer. more: whether its state has room beside. @param {State} before @param {string} graph
   *  @param {boolean} more @returns {Promise<State>} */
  async layer(before, graph, more) {
    const { config, config: { width } } = this.walk.weights;
    const [h, w] = [before.channels - 2, before.h];
    const state = emptyState(before.data, h, w, width + (more ? besideOf(config) : 0));
    await inStripes(h, w, async (top, rows) => {
      const { y } = await this.walk.weights.run(`${this.name}.${graph}`, { x: before.part(top, top + rows + 2) });
      for (let i = 0; i < rows * w; i++) {
        state.data.set(y.data.subarray(i * width, (i + 1) * width), ((top + 1) * w + i) * state.w);
      }
    });
    return state;
  }

  /** What the next level takes. @param {State} state */
  async handOn(state) {
    const { rows, columns, x: { h, w } } = this;
    const { y } = await this.walk.weights.run(`${this.name}.features`, { x: state.part(1, h + 1) });
    const data = new (/** @type {any} */ (y.data).constructor)(y.data.length);
    y.data.forEach((/** @type {number} */ v, /** @type {number} */ i) => {
      const [at, channel] = [Math.floor(i / y.w), i % y.w];
      const [row, column] = [2 * Math.floor(at / w) + ((channel >> 1) & 1), 2 * (at % w) + (channel & 1)];
      data[((channel >> 2) * 2 * h + row) * 2 * w + column] = v;
    });
    return new Grid(data, 2 * h, 2 * w).box(0, 0, rows, columns);
  }
}

/** Where means start, in halves, and how far the four nearest known samples lie apart, in eighths; of red and blue, less
 *  green.
 *  @param {Grid<Uint8Array>[]} known with two samples around @param {number[][]} four */
function nearest(known, four) {
  const [{ h, w }, size] = [known[0], known[0].h * known[0].w];
  const [rows, columns] = [h - 4, w - 4];
  const centre = new Int32Array(3 * rows * columns);
  const spread = new Int32Array(centre.length);
  for (let c = 0, n = 0; c < 3; c++) {
    for (let i = 2; i < rows + 2; i++) {
      for (let j = 2; j < columns + 2; j++, n++) {
        const [p, q, r, s] = four.map(([phase, down, right]) => {
          const [{ data }, at] = [known[phase], (i + down) * w + j + right];
          return data[c * size + at] - (c === 1 ? 0 : data[size + at]);
        });
        const low = Math.min(p, q), low2 = Math.min(r, s), high = Math.max(p, q), high2 = Math.max(r, s);
        centre[n] = Math.max(low, low2) + Math.min(high, high2);
        spread[n] = 8 * (Math.max(high, high2) - Math.min(low, low2));
      }
    }
  }
  return { centre, spread };
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
