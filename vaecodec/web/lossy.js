/** Tiles of lossy files under the networks. FORMAT.md specifies them. */

/** @import { Header, Tile } from "./types" */

import { Coder } from "./ans.js";
import { Grid, clamp, range } from "./arrays.js";
import { VaeError, crc32, require } from "./container.js";
import { popPlain } from "./plain.js";
import { Weights, scrambled } from "./weights.js";

const STEPS = [0, 3, 1, 2];
const SYMBOL_MAX = 2 ** 17;
const STREAM_MAX = 2047;
/** Quality and spread of the self-test's tiles. */
const KNOWN = [[0, 64], [6180, 64], [10000, 2 ** 20]];
/** Ways to run g_s, the fastest first: graph, and whether biases are initializers in it. @type {[string, boolean][]} */
const KERNELS = [["synthesis", true], ["synthesis.float", false]];

export class Lossy {
  /** @param {Weights} weights */
  constructor(weights) {
    this.weights = weights;
    const { latent, hyper_latent, bits = 4, blocks } = weights.config;
    this.latent = latent;
    this.hyperLatent = hyper_latent;
    this.bits = bits;
    /** How many latents around a tile g_s sees. */
    this.margin = blocks[1] + Math.ceil(blocks[0] / 2);
    this.kernel = KERNELS[0];
  }

  /** Chooses the first kernel that gives the known answer: no checksum of a file covers what g_s makes of it. */
  async check() {
    for (this.kernel of KERNELS) if ((await this.knownAnswer()) === this.weights.metadata.self_test) return this;
    throw new VaeError("weights", "the weights do not give their known answer in this browser");
  }

  async knownAnswer() {
    let crc = 0;
    for (const [quality, spread] of KNOWN) {
      const z = scrambled(this.hyperLatent, 4, 6, spread);
      const { features } = await this.weights.run("hyper_synthesis", { z }, quality);
      const y_hat = scrambled(this.latent, 16, 24, spread);
      crc = crc32(Int32Array.from(features.data), crc);
      for (let step = 0; step < 4; step++) {
        const { mean, index } = await this.weights.run(`context.${step}`, { features, y_hat }, quality);
        crc = crc32(index.data, crc32(mean.data, crc));
      }
      crc = crc32((await this.synthesised(this.stream(y_hat, quality), quality, null)).data, crc);
    }
    return crc.toString(16).padStart(8, "0");
  }

  /** g_s's input, in steps of 1/128, of latents. @param {Grid<Int32Array>} y @param {number} quality */
  stream({ data, h, w }, quality) {
    const [gains, unit] = [this.weights.at("decoder.inverse", quality), 2 ** (13 + this.bits)];
    const stream = new Int16Array(data.length);
    for (let i = 0; i < data.length; i++) {
      const gain = gains[Math.floor(i / (h * w))];
      stream[i] = clamp(Math.floor((data[i] * gain + unit / 2) / unit), -STREAM_MAX, STREAM_MAX);
    }
    return new Grid(stream, h, w);
  }

  /** g_s: a stream to [3, 16 h, 16 w] in sixteenths of a level. @param {Grid<Int16Array>} stream
   *  @param {number} quality @param {Grid<Float32Array> | null} seen 1 where there are latents; null if all are */
  async synthesised(stream, quality, seen) {
    const [graph, initialized] = this.kernel;
    /** @type {import("./types").Grids} */
    const inputs = { stream };
    if (seen) {
      const { data, h, w } = seen;
      const fine = range(4 * h * w, (i) => data[(Math.floor(i / (2 * w)) >> 1) * w + ((i % (2 * w)) >> 1)]);
      Object.assign(inputs, { seen, seen_fine: new Grid(Float32Array.from(fine), 2 * h, 2 * w) });
    }
    return (await this.weights.run(graph + (seen ? ".seen" : ""), inputs, quality, initialized)).x_hat;
  }

  /** The stream of a tile of h x w latents, and its alpha of height x width, if it has any. @param {Tile} tile
   *  @param {Header} header @param {number} h @param {number} w @param {number} height @param {number} width */
  async pop(tile, { quality, coded, depth }, h, w, height, width) {
    require(tile.method < 2, `unknown tile method ${tile.method}`, "version");
    const { weights, latent, bits } = this;
    const [coder, tables] = [new Coder(tile), weights.tables("tables")];
    // Of each table the value that method 1 does not code.
    const sure = Array.from({ length: tables.lows.length }, (_, t) => (tile.method ? tables.certain(t) : null));
    let crc = 0;
    /** @param {Int32Array} ids */
    const pop = (ids) => {
      const values = coder.values(tables, ids, true);
      require(values.every((v) => Math.abs(v) <= SYMBOL_MAX), "a latent is out of range");
      crc = crc32(values, crc);
      return values;
    };
    const [high, wide] = [Math.ceil(h / 4), Math.ceil(w / 4)];
    const [means, ids] = ["z_mean", "z_index"].map((name) => {
      const values = weights.at(`decoder.${name}`, quality);
      return range(values.length * high * wide, (i) => values[Math.floor(i / (high * wide))]);
    });
    const z = new Grid(pop(ids).map((v, i) => 16 * v + means[i]), high, wide);
    const features = (await weights.run("hyper_synthesis", { z }, quality)).features.box(0, 0, h, w);
    const y_hat = new Grid(new Int32Array(latent * h * w), h, w);
    for (let step = 0; step < 4; step++) {
      const { mean, index } = await weights.run(`context.${step}`, { features, y_hat }, quality);
      const numbers = Int32Array.from(index.data);
      const values = numbers.map((t) => sure[t] ?? 0);
      const places = range(numbers.length).filter((i) => sure[numbers[i]] === null);
      const coded = places.map((i) => numbers[i]);
      (tile.inParts ? inParts(coded, pop) : pop(coded)).forEach((v, n) => (values[places[n]] = v));
      for (let c = 0, n = 0; c < latent / 4; c++) {
        for (let i = 0; i < h; i++) {
          for (let j = 0; j < w; j++, n++) {
            const quarter = STEPS[step] ^ (2 * (i & 1) + (j & 1));
            y_hat.data[(((quarter * latent) / 4 + c) * h + i) * w + j] = values[n] * 2 ** bits + mean.data[n];
          }
        }
      }
    }
    const alpha = coded % 2 ? null : popPlain(coder, height, width, 1, depth);
    if (alpha) crc = crc32(Int32Array.from(alpha), crc);
    require(coder.empty && crc === tile.crc, "a tile fails its checksum");
    return { stream: this.stream(y_hat, quality), alpha };
  }
}

/** An array of a tile with parts, which is four: those with the largest scales first. @param {Int32Array} ids
 *  @param {(ids: Int32Array) => Int32Array} pop */
function inParts(ids, pop) {
  const count = ids.length;
  const order = range(count).sort((a, b) => ids[b] - ids[a] || a - b);
  const values = new Int32Array(count);
  let start = 0;
  for (const part of [64, 16, 4, 1]) {
    const places = order.subarray(start, (start = Math.floor(count / part)));
    pop(places.map((i) => ids[i])).forEach((v, n) => (values[places[n]] = v));
  }
  return values;
}
