/** Weights files, and the networks in them, which ONNX Runtime Web runs. */

import { Tables } from "./ans.js";
import { VaeError, crc32, require } from "./container.js";

/**
 * @typedef {Int8Array | Uint8Array | Int16Array | Int32Array | Float32Array} Numbers
 * @typedef {Record<string, {type: string, data: Numbers, dims: number[]}>} Feeds
 * @typedef {{inputNames: readonly string[], outputNames: readonly string[],
 *   run(feeds: any): Promise<any>, release(): Promise<void>}} Session
 * @typedef {{InferenceSession: {create(model: Uint8Array, options: any): Promise<Session>},
 *   Tensor: new (type: any, data: any, dims: number[]) => any}} Runtime
 */

/** @type {Record<string, {new (buffer: ArrayBuffer): Numbers}>} */
const TYPES = { I8: Int8Array, U8: Uint8Array, I16: Int16Array, I32: Int32Array, F32: Float32Array, U32: Int32Array };
const NAMES = new Map([[Uint8Array, "uint8"], [Int16Array, "int16"], [Int32Array, "int32"], [Float32Array, "float32"]]);
const QUALITY_MAX = 10000;
const KEPT = 2; // sessions of a graph, for as many qualities
const OPTIONS = {
  executionProviders: ["wasm"],
  logSeverityLevel: 3,
  enableCpuMemArena: false, // one for each session would take several times the memory
  // It would fold the scale of a row into its weights, which are then no integers.
  extra: { optimization: { disable_specified_optimizers: "ConvMulFusion" } },
};

export class Weights {
  /** @param {Uint8Array} data a safetensors file @param {Runtime} runtime */
  constructor(data, runtime) {
    try {
      const size = Number(new DataView(data.buffer, data.byteOffset).getBigUint64(0, true));
      /** @type {Record<string, any>} */
      this.entries = JSON.parse(new TextDecoder().decode(data.subarray(8, 8 + size)));
      this.body = data.subarray(8 + size);
      /** @type {Record<string, string>} */
      this.metadata = this.entries.__metadata__ ?? {};
      /** @type {Record<string, any>} */
      this.config = JSON.parse(this.metadata.config ?? "{}");
      /** @type {Record<string, string[]>} */
      this.graphs = "graphs" in this.entries ? JSON.parse(new TextDecoder().decode(this.bytes("graphs"))) : {};
    } catch (error) {
      throw new VaeError("weights", `a weights file is damaged: ${error}`);
    }
    this.runtime = runtime;
    /** @type {Map<string, Promise<Session>>} */
    this.sessions = new Map();
    /** @type {Map<string, Tables>} */
    this.sets = new Map();
    /** @type {Promise<unknown>} */
    this.last = Promise.resolve();
  }

  /** @param {string} name of a tensor */
  bytes(name) {
    const entry = this.entries[name];
    if (!entry) throw new VaeError("weights", `the weights lack ${name}`);
    return this.body.slice(...entry.data_offsets);
  }

  /** @param {string} name @returns {number[]} */
  shape(name) {
    return this.entries[name].shape;
  }

  /** @param {string} name */
  tensor(name) {
    return new TYPES[this.entries[name]?.dtype ?? "U8"](this.bytes(name).buffer);
  }

  /** A set of tables. @param {string} name */
  tables(name) {
    let set = this.sets.get(name);
    if (!set) {
      const [lows, sizes, counts, escape] = ["lows", "sizes", "counts", "escape"].map((part) => this.tensor(`${name}.${part}`));
      this.sets.set(name, (set = Tables.of(lows, sizes, counts, escape[0] > 0)));
    }
    return set;
  }

  /** Integers with knots at a quality in hundredths. @param {string} name @param {number} quality */
  at(name, quality) {
    const knots = this.shape(name)[0];
    const all = this.tensor(name);
    const row = all.length / knots;
    const Row = /** @type {any} */ (all.constructor);
    if (knots === 1) return all;
    const p = quality * (knots - 1);
    const l = Math.min(Math.floor(p / QUALITY_MAX), knots - 2);
    const r = p - QUALITY_MAX * l;
    /** @type {Numbers} */
    const values = new Row(row);
    for (let i = 0; i < row; i++) {
      const sum = all[l * row + i] * (QUALITY_MAX - r) + all[(l + 1) * row + i] * r;
      values[i] = Math.floor((sum + QUALITY_MAX / 2) / QUALITY_MAX);
    }
    return values;
  }

  /** The session of a graph, of which no two are opened at once. quality: of biases that are initializers in it, -1
   *  without any. @param {string} graph @param {number} quality @returns {Promise<Session>} */
  session(graph, quality) {
    const key = `${graph} ${quality}`;
    let found = this.sessions.get(key);
    if (!found) {
      found = /** @type {Promise<Session>} */ (this.last.then(() => this.open(graph, quality)));
      this.last = found.catch(() => {});
      const others = [...this.sessions.keys()].filter((other) => other.startsWith(`${graph} `));
      for (const other of others.slice(0, Math.max(0, others.length - KEPT + 1))) {
        this.sessions.get(other)?.then((session) => session.release());
        this.sessions.delete(other);
      }
      this.sessions.set(key, found);
    }
    return found;
  }

  /** @param {string} graph @param {number} quality */
  open(graph, quality) {
    require(graph in this.graphs, `the weights lack the graph ${graph}`, "weights");
    const externalData = this.graphs[graph].map((name) => {
      const knots = quality >= 0 && name.endsWith(".bias") && this.shape(name)[0] > 1;
      return { path: name, data: knots ? new Uint8Array(this.at(name, quality).buffer) : this.bytes(name) };
    });
    return this.runtime.InferenceSession.create(this.bytes(`graph.${graph}`), { ...OPTIONS, externalData });
  }

  /**
   * The outputs of a graph, by name. Inputs have a shape without the batch's dimension; biases that depend on the
   * quality are given where the graph asks for them.
   *
   * @param {string} graph @param {Record<string, [Numbers, number[]]>} inputs @param {number} [quality]
   * @param {boolean} [initialized] whether such biases are initializers
   * @returns {Promise<Record<string, {data: any, dims: readonly number[]}>>}
   */
  async run(graph, inputs, quality = 0, initialized = false) {
    const session = await this.session(graph, initialized ? quality : -1);
    const { Tensor } = this.runtime;
    /** @type {Record<string, any>} */
    const feeds = {};
    for (const name of session.inputNames) {
      const [data, shape] = inputs[name] ?? [Float32Array.from(this.at(name, quality)), [this.shape(name)[1], 1, 1]];
      feeds[name] = new Tensor(NAMES.get(/** @type {any} */ (data.constructor)), data, [1, ...shape]);
    }
    return session.run(feeds);
  }

  async release() {
    for (const session of this.sessions.values()) await (await session).release();
    this.sessions.clear();
  }
}

/** Fixed integers [count] in -spread to spread, for self-tests. @param {number} count @param {number} spread */
export function scrambled(count, spread) {
  const values = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    const state = BigInt.asUintN(64, BigInt(i + 1) * 6364136223846793005n) >> 33n;
    values[i] = (Number(state) % (2 * spread + 1)) - spread;
  }
  return values;
}

/** CRC-32 of integers, as i32, one array after the other. */
export class Answer {
  crc = 0;

  /** @param {ArrayLike<number>} values */
  add(values) {
    this.crc = crc32(values instanceof Int32Array ? values : Int32Array.from(values), this.crc);
  }
}
