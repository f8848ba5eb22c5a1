/** Weights files, and the networks in them, which ONNX Runtime Web runs. */

/** @import { Grids, Numbers, Runtime, Session } from "./types" */

import { Tables } from "./ans.js";
import { Grid, range } from "./arrays.js";
import { require } from "./container.js";

/** @type {Record<string, any>} */
const TYPES = { I8: Int8Array, U8: Uint8Array, I16: Int16Array, I32: Int32Array, F32: Float32Array };
const NAMES = new Map(Object.entries({ uint8: Uint8Array, int16: Int16Array, int32: Int32Array, float32: Float32Array })
  .map(([name, type]) => /** @type {[unknown, string]} */ ([type, name])));
const QUALITY_MAX = 10000;
const OPTIONS = {
  logSeverityLevel: 3,
  enableCpuMemArena: false, // one for each session would take several times the memory
  // It would fold the scale of a row into its weights, which are then no integers.
  extra: { optimization: { disable_specified_optimizers: "ConvMulFusion" } },
};

export class Weights {
  /** @param {Uint8Array} data a safetensors file @param {Runtime} runtime */
  constructor(data, runtime) {
    const size = Number(new DataView(data.buffer, data.byteOffset).getBigUint64(0, true));
    /** @type {Record<string, {dtype: string, shape: number[], data_offsets: [number, number]}>} */
    this.entries = JSON.parse(new TextDecoder().decode(data.subarray(8, 8 + size)));
    this.body = data.subarray(8 + size);
    this.runtime = runtime;
    this.metadata = /** @type {Record<string, string>} */ (/** @type {unknown} */ (this.entries.__metadata__));
    /** @type {Record<string, any>} */
    this.config = JSON.parse(this.metadata.config);
    /** The tensors that each graph wants. @type {Record<string, string[]>} */
    this.graphs = JSON.parse(new TextDecoder().decode(this.bytes("graphs")));
    /** @type {Map<string, Promise<Session>>} */
    this.sessions = new Map();
    /** @type {Map<string, Tables>} */
    this.sets = new Map();
    /** @type {Promise<unknown>} */
    this.last = Promise.resolve();
  }

  /** @param {string} name of a tensor */
  bytes(name) {
    require(name in this.entries, `the weights lack ${name}`, "weights");
    return this.body.slice(...this.entries[name].data_offsets);
  }

  /** @param {string} name @returns {Numbers} */
  tensor(name) {
    return new TYPES[this.entries[name]?.dtype](this.bytes(name).buffer);
  }

  /** A set of tables of the decoder. @param {string} name */
  tables(name) {
    let set = this.sets.get(name);
    if (!set) {
      const [lows, sizes, counts, escape] = ["lows", "sizes", "counts", "escape"].map((part) =>
        this.tensor(`decoder.${name}.${part}`));
      this.sets.set(name, (set = Tables.of(lows, sizes, counts, escape[0] > 0)));
    }
    return set;
  }

  /** Integers with knots, of the decoder, at a quality in hundredths. @param {string} name @param {number} quality
   *  @returns {Numbers} */
  at(name, quality) {
    const [all, knots] = [this.tensor(name), this.entries[name].shape[0]];
    if (knots === 1) return all;
    const p = quality * (knots - 1);
    const l = Math.min(Math.floor(p / QUALITY_MAX), knots - 2);
    const [r, row] = [p - QUALITY_MAX * l, all.length / knots];
    return all.slice(0, row).map((_, i) => {
      const sum = all[l * row + i] * (QUALITY_MAX - r) + all[(l + 1) * row + i] * r;
      return Math.floor((sum + QUALITY_MAX / 2) / QUALITY_MAX);
    });
  }

  /** The session of a graph; no two are opened at once, and of each graph one is kept. quality: of biases that are
   *  initializers in it, -1 without any. @param {string} graph @param {number} quality @returns {Promise<Session>} */
  session(graph, quality) {
    const key = `${graph} ${quality}`;
    let found = this.sessions.get(key);
    if (!found) {
      found = /** @type {Promise<Session>} */ (this.last.then(() => this.open(graph, quality)));
      this.last = found.catch(() => {});
      for (const [other, session] of this.sessions) {
        if (!other.startsWith(`${graph} `)) continue;
        session.then((each) => each.release());
        this.sessions.delete(other);
      }
      this.sessions.set(key, found);
    }
    return found;
  }

  /** @param {string} graph @param {number} quality */
  open(graph, quality) {
    const externalData = this.graphs[graph].map((path) => {
      const knots = quality >= 0 && path.endsWith(".bias") && this.entries[path].shape[0] > 1;
      return { path, data: knots ? new Uint8Array(this.at(path, quality).buffer) : this.bytes(path) };
    });
    return this.runtime.InferenceSession.create(this.bytes(`graph.${graph}`), { ...OPTIONS, externalData });
  }

  /** The outputs of a graph, by name. Biases that depend on the quality are given where the graph asks for them.
   *  @param {string} graph @param {Grids} inputs @param {number} [quality]
   *  @param {boolean} [initialized] whether such biases are initializers @returns {Promise<Grids>} */
  async run(graph, inputs, quality = 0, initialized = false) {
    const session = await this.session(graph, initialized ? quality : -1);
    /** @type {Record<string, unknown>} */
    const feeds = {};
    for (const name of session.inputNames) {
      const { data, channels, h, w } = inputs[name] ?? new Grid(Float32Array.from(this.at(name, quality)), 1, 1);
      feeds[name] = new this.runtime.Tensor(NAMES.get(data.constructor), data, [1, channels, h, w]);
    }
    const outputs = Object.entries(await session.run(feeds));
    return Object.fromEntries(outputs.map(([name, { data, dims }]) => [name, new Grid(data, dims[2], dims[3])]));
  }
}

/** Fixed integers [channels, h, w] in -spread to spread, for self-tests. @param {number} channels @param {number} h
 *  @param {number} w @param {number} spread */
export function scrambled(channels, h, w, spread) {
  // The upper 31 bits of n * 6364136223846793005 in 64 bits.
  const values = range(channels * h * w, (i) => {
    const upper = (i + 1) * 0x5851f42d + Math.floor(((i + 1) * 0x4c957f2d) / 2 ** 32);
    return (Math.floor(upper / 2) % 2 ** 31) % (2 * spread + 1) - spread;
  });
  return new Grid(values, h, w);
}
