/** Tiles of lossy files under the networks. FORMAT.md specifies them. */

import { Coder } from "./ans.js";
import { box, clamp } from "./arrays.js";
import { VaeError, require } from "./container.js";
import { popPlain } from "./plain.js";
import { Answer, Weights, scrambled } from "./weights.js";

const STEPS = [0, 3, 1, 2];
const SYMBOL_MAX = 2 ** 17;
const STREAM_MAX = 2047;
const KNOWN_INPUTS = [[0, 64], [6180, 64], [10000, 2 ** 20]];

/** Ways to run g_s, the fastest first: graph, and whether biases are initializers in it. @type {[string, boolean][]} */
const KERNELS = [["synthesis", true], ["synthesis.float", false]];

export class Lossy {
  /** @param {Weights} weights */
  constructor(weights) {
    this.weights = weights;
    const { latent, hyper, hyper_latent, bits, blocks } = weights.config;
    this.latent = latent;
    this.hyper = hyper;
    this.hyperLatent = hyper_latent;
    this.bits = bits ?? 4;
    /** How many latents around a tile g_s sees. */
    this.margin = blocks[1] + Math.ceil(blocks[0] / 2);
    this.kernel = KERNELS[0];
  }

  /** Chooses the first kernel that gives the known answer. */
  async check() {
    for (this.kernel of KERNELS) if ((await this.knownAnswer()) === this.weights.metadata.self_test) return;
    throw new VaeError("weights", "these weights do not give their known answer in this browser");
  }

  async knownAnswer() {
    const answer = new Answer();
    for (const [quality, spread] of KNOWN_INPUTS) {
      const features = await this.features(scrambled(this.hyperLatent * 24, spread), 4, 6, quality);
      const y = scrambled(this.latent * 384, spread);
      answer.add(features);
      for (let step = 0; step < 4; step++) {
        const { mean, index } = await this.context(step, features, y, 16, 24, quality);
        answer.add(mean);
        answer.add(index);
      }
      answer.add(await this.synthesise(this.stream(y, quality), 16, 24, quality, null));
    }
    return answer.crc.toString(16).padStart(8, "0");
  }

  /** h_s: z [C_z, h, w] in sixteenths to features [hyper, 4 h, 4 w]. @param {Int32Array} z @param {number} h
   *  @param {number} w @param {number} quality @returns {Promise<Float32Array>} */
  async features(z, h, w, quality) {
    return (await this.weights.run("hyper_synthesis", { z: [z, [this.hyperLatent, h, w]] }, quality)).features.data;
  }

  /** Means and table numbers [M / 4, h, w] of a step. @param {number} step @param {Float32Array} features
   *  @param {Int32Array} y @param {number} h @param {number} w @param {number} quality
   *  @returns {Promise<{mean: Int32Array, index: Int32Array}>} */
  async context(step, features, y, h, w, quality) {
    /** @type {Record<string, [import("./weights.js").Numbers, number[]]>} */
    const inputs = { features: [features, [this.hyper, h, w]], y_hat: [y, [this.latent, h, w]] };
    const { mean, index } = await this.weights.run(`context.${step}`, inputs, quality);
    return { mean: mean.data, index: index.data };
  }

  /** g_s's input, in steps of 1/128, of latents [M, h, w]. @param {Int32Array} y @param {number} quality */
  stream(y, quality) {
    const gains = this.weights.at("decoder.inverse", quality);
    const [unit, area] = [2 ** (13 + this.bits), y.length / this.latent];
    const stream = new Int16Array(y.length);
    for (let c = 0, i = 0; c < this.latent; c++) {
      for (const end = i + area; i < end; i++) {
        stream[i] = clamp(Math.floor((y[i] * gains[c] + unit / 2) / unit), -STREAM_MAX, STREAM_MAX);
      }
    }
    return stream;
  }

  /** g_s: a stream [M, h, w] to [3, 16 h, 16 w] in sixteenths of a level. seen: 1 where there are latents, or null.
   *  @param {Int16Array} stream @param {number} h @param {number} w @param {number} quality
   *  @param {Float32Array | null} seen @returns {Promise<Int32Array>} */
  async synthesise(stream, h, w, quality, seen) {
    const [graph, initialized] = this.kernel;
    /** @type {Record<string, [import("./weights.js").Numbers, number[]]>} */
    const inputs = { stream: [stream, [this.latent, h, w]] };
    if (seen) {
      const fine = Float32Array.from({ length: 4 * h * w }, (_, i) => {
        const x = i % (2 * w);
        return seen[((i - x) / (2 * w) >> 1) * w + (x >> 1)];
      });
      inputs.seen = [seen, [1, h, w]];
      inputs.seen_fine = [fine, [1, 2 * h, 2 * w]];
    }
    return (await this.weights.run(graph + (seen ? ".seen" : ""), inputs, quality, initialized)).x_hat.data;
  }

  /** The stream of a tile of h x w latents, and its alpha of height x width, if it has any.
   *  @param {import("./container.js").Tile} tile @param {import("./container.js").Header} header @param {number} h
   *  @param {number} w @param {number} height @param {number} width */
  async pop(tile, header, h, w, height, width) {
    require(tile.method === 0, `unknown tile method ${tile.method}`, "version");
    const { weights, latent, bits } = this;
    const { quality, depth } = header;
    const [coder, answer, tables] = [new Coder(tile.data), new Answer(), weights.tables("decoder.tables")];
    /** @param {Int32Array} ids */
    const pop = (ids) => {
      const values = coder.values(tables, ids, true);
      for (let i = 0; i < values.length; i++) require(Math.abs(values[i]) <= SYMBOL_MAX, "a latent is out of range");
      answer.add(values);
      return values;
    };
    const [high, wide] = [Math.ceil(h / 4), Math.ceil(w / 4)];
    const [means, indices] = [weights.at("decoder.z_mean", quality), weights.at("decoder.z_index", quality)];
    const area = high * wide;
    const ids = new Int32Array(this.hyperLatent * area);
    for (let c = 0; c < means.length; c++) ids.fill(indices[c], c * area, (c + 1) * area);
    const z = pop(ids).map((v, i) => 16 * v + means[Math.floor(i / area)]);
    const features = box(await this.features(z, high, wide, quality), this.hyper, 4 * high, 4 * wide, 0, 0, h, w);
    const y = new Int32Array(latent * h * w);
    for (let step = 0; step < 4; step++) {
      const { mean, index } = await this.context(step, features, y, h, w, quality);
      const values = pop(index);
      for (let c = 0, n = 0; c < latent / 4; c++) {
        for (let i = 0; i < h; i++) {
          for (let j = 0; j < w; j++, n++) {
            const quarter = STEPS[step] ^ (2 * (i & 1) + (j & 1));
            y[((quarter * latent) / 4 + c) * h * w + i * w + j] = values[n] * 2 ** bits + mean[n];
          }
        }
      }
    }
    const clear = header.coded % 2 ? null : popPlain(coder, height, width, 1, depth);
    if (clear) answer.add(clear);
    require(coder.empty && answer.crc === tile.crc, "a tile fails its checksum");
    return { stream: this.stream(y, quality), alpha: clear };
  }
}
