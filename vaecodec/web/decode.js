/** Decodes `.vae` files: tile by tile, or as a whole. */

import { box } from "./arrays.js";
import { LIMITS, VaeError, readContainer, require } from "./container.js";
import { Lossless } from "./lossless.js";
import { Lossy } from "./lossy.js";
import { popExact, samplesOf } from "./plain.js";
import { Weights } from "./weights.js";

/**
 * @typedef {import("./container.js").Container} Container
 * @typedef {import("./plain.js").Samples} Samples
 * @typedef {{x: number, y: number, width: number, height: number}} Region in pixels
 * @typedef {{x: number, y: number, width: number, height: number, samples: Samples}} Part samples [height, width,
 *   channels], row by row
 * @typedef {{top: number, left: number, rows: number, columns: number}} Box
 */

const PATCH = 16;

/** @param {Box} a @param {Box} b @returns {Box} what they share; it may have no rows or columns */
function shared(a, b) {
  const [top, left] = [Math.max(a.top, b.top), Math.max(a.left, b.left)];
  const rows = Math.min(a.top + a.rows, b.top + b.rows) - top;
  const columns = Math.min(a.left + a.columns, b.left + b.columns) - left;
  return { top, left, rows: Math.max(rows, 0), columns: Math.max(columns, 0) };
}

/** @param {Box} b @param {number} n */
const grown = (b, n) => ({ top: b.top - n, left: b.left - n, rows: b.rows + 2 * n, columns: b.columns + 2 * n });

/** @param {Box} b @param {number} n */
const times = (b, n) => ({ top: b.top * n, left: b.left * n, rows: b.rows * n, columns: b.columns * n });

/** The tiles of a grid, in raster order. @param {number} rows @param {number} columns @param {number} side */
function tilesOf(rows, columns, side) {
  /** @type {Box[]} */
  const boxes = [];
  for (let top = 0; top < rows; top += side) {
    for (let left = 0; left < columns; left += side) {
      boxes.push(shared({ top, left, rows: side, columns: side }, { top: 0, left: 0, rows, columns }));
    }
  }
  return boxes;
}

/** Of samples of a box those of a part of it. @param {Samples} samples @param {Box} whole @param {Box} part */
function cropped(samples, whole, part) {
  const channels = samples.length / whole.rows / whole.columns;
  const [left, width] = [channels * (part.left - whole.left), channels * part.columns];
  return box(samples, 1, whole.rows, channels * whole.columns, part.top - whole.top, left, part.rows, width);
}

export class Decoder {
  /** @param {import("./weights.js").Runtime} runtime ONNX Runtime Web
   *  @param {(model: string) => Promise<Uint8Array>} fetchWeights the weights file of a name, in hexadecimal */
  constructor(runtime, fetchWeights) {
    this.runtime = runtime;
    this.fetchWeights = fetchWeights;
    /** @type {Map<string, Promise<Lossy | Lossless>>} */
    this.networks = new Map();
  }

  /** @param {string} model @param {number} kind @returns {Promise<any>} */
  load(model, kind) {
    let found = this.networks.get(model);
    if (!found) {
      found = this.fetchWeights(model).then(async (data) => {
        const weights = new Weights(data, this.runtime);
        const name = kind === 1 ? "lossy" : "lossless";
        require(weights.metadata.kind === name, `these weights are not ${name}`, "weights");
        if (kind === 2) return new Lossless(weights);
        const lossy = new Lossy(weights);
        await lossy.check();
        return lossy;
      });
      found.catch(() => this.networks.delete(model));
      this.networks.set(model, found);
    }
    return found;
  }

  /**
   * The parts of a picture, each when it is decoded. Throws VaeError.
   *
   * @param {Container} file @param {Region} [region] @returns {AsyncGenerator<Part>}
   */
  async *parts(file, region) {
    const { width, height, colour, coded, channels, kind } = file.header;
    const { x, y, ...size } = region ?? { x: 0, y: 0, width, height };
    const wanted = { top: y, left: x, rows: size.height, columns: size.width };
    const inside = shared(wanted, { top: 0, left: 0, rows: height, columns: width });
    require(inside.rows === size.height && inside.columns === size.width && inside.rows && inside.columns, "the region is not inside the picture", "region");
    require(kind < 3, "this page does not show files of kind PCA", "version");
    for await (const [part, samples] of kind === 1 ? this.lossy(file, wanted) : this.lossless(file, wanted)) {
      let whole = samples;
      if (colour) {
        whole = samplesOf(file.header.depth, (samples.length / coded) * channels);
        for (let i = 0, n = 0; n < whole.length; i += coded) {
          for (let c = 0; c < channels; c++) whole[n++] = samples[i + (c < 3 ? 0 : 1)];
        }
      }
      yield { x: part.left, y: part.top, width: part.columns, height: part.rows, samples: whole };
    }
  }

  /** @param {Container} file @param {Box} wanted @returns {AsyncGenerator<[Box, Samples]>} */
  async *lossless({ header, tiles }, wanted) {
    for (const [i, whole] of tilesOf(header.height, header.width, header.tile).entries()) {
      const part = shared(whole, wanted);
      if (!part.rows || !part.columns) continue;
      const tile = tiles[i];
      require(tile.method > 1 || header.depth === 8, "a tile of 16-bit samples asks for the networks");
      const samples = tile.method > 1
        ? popExact(tile, whole.rows, whole.columns, header.coded, header.depth)
        : await (await this.load(header.model, 2)).pop(tile, whole.rows, whole.columns, header.coded);
      yield [part, cropped(samples, whole, part)];
    }
  }

  /** @param {Container} file @param {Box} wanted @returns {AsyncGenerator<[Box, Samples]>} */
  async *lossy({ header, tiles }, wanted) {
    const [rows, columns, side] = [Math.ceil(header.height / PATCH), Math.ceil(header.width / PATCH), header.tile / PATCH];
    const whole = { top: 0, left: 0, rows: header.height, columns: header.width };
    const exact = (/** @type {import("./container.js").Tile} */ tile) => tile.method === 2 || tile.method === 3;
    /** @type {Lossy | null} */
    const networks = tiles.every(exact) ? null : await this.load(header.model, 1);
    const margin = networks ? networks.margin : 0;
    const [top, left] = [Math.floor(wanted.top / PATCH), Math.floor(wanted.left / PATCH)];
    const inner = {
      top,
      left,
      rows: Math.ceil((wanted.top + wanted.rows) / PATCH) - top,
      columns: Math.ceil((wanted.left + wanted.columns) / PATCH) - left,
    };
    const outer = shared(grown(inner, margin), { top: 0, left: 0, rows, columns });
    const needed = tilesOf(rows, columns, side).map((place, i) => ({ place, tile: tiles[i] })).filter(({ place }) => {
      const { rows, columns } = shared(place, outer);
      return rows && columns;
    });
    /** What is decoded: of tiles with networks the stream. @type {{place: Box, stream: Int16Array | null}[]} */
    let streams = [];
    /** Tiles that wait for the latents below them. @type {{place: Box, tile: any, samples: Samples | null}[]} */
    const waiting = [];
    for (const [n, { place, tile }] of needed.entries()) {
      const covered = shared(times(place, PATCH), whole);
      /** @type {Samples | null} */
      let samples = null;
      /** @type {Int16Array | null} */
      let stream = null;
      const shown = shared(place, inner);
      if (exact(tile)) {
        if (shown.rows && shown.columns) samples = popExact(tile, covered.rows, covered.columns, header.coded, header.depth);
      } else {
        const popped = await /** @type {Lossy} */ (networks).pop(tile, header, place.rows, place.columns, covered.rows, covered.columns);
        samples = popped.alpha;
        stream = popped.stream;
      }
      streams.push({ place, stream });
      if (shown.rows && shown.columns) waiting.push({ place, tile, samples });
      const last = n + 1 === needed.length;
      if (!last && needed[n + 1].place.top === place.top) continue;
      const bottom = last ? Infinity : place.top + place.rows;
      while (waiting.length && waiting[0].place.top + waiting[0].place.rows + margin <= bottom) {
        const { place, tile, samples } = /** @type {any} */ (waiting.shift());
        const [part, all] = [shared(times(place, PATCH), whole), shared(times(shared(place, inner), PATCH), wanted)];
        const own = samples && cropped(samples, part, all);
        yield [all, exact(tile) ? own : await this.synthesised(/** @type {Lossy} */ (networks), header, streams, outer, all, own)];
      }
      const kept = (waiting[0]?.place.top ?? place.top) - margin;
      streams = streams.filter(({ place }) => place.top + place.rows > kept);
    }
  }

  /** The samples of a box of pixels, from the streams around it and its alpha.
   *  @param {Lossy} networks @param {import("./container.js").Header} header
   *  @param {{place: Box, stream: Int16Array | null}[]} streams @param {Box} outer of latents that there are
   *  @param {Box} all @param {Samples | null} alpha */
  async synthesised(networks, header, streams, outer, all, alpha) {
    const [top, left] = [Math.floor(all.top / PATCH), Math.floor(all.left / PATCH)];
    const [rows, columns] = [Math.ceil((all.top + all.rows) / PATCH) - top, Math.ceil((all.left + all.columns) / PATCH) - left];
    const seen = shared(grown({ top, left, rows, columns }, networks.margin), outer);
    const area = seen.rows * seen.columns;
    const stream = new Int16Array(networks.latent * area);
    const there = new Float32Array(area).fill(1);
    let missing = false;
    for (const { place, stream: from } of streams) {
      const part = shared(place, seen);
      for (let i = 0; i < part.rows && part.columns; i++) {
        const to = (part.top - seen.top + i) * seen.columns + part.left - seen.left;
        if (!from) {
          missing = true;
          there.fill(0, to, to + part.columns);
          continue;
        }
        const at = (part.top - place.top + i) * place.columns + part.left - place.left;
        for (let c = 0; c < networks.latent; c++) {
          const start = c * place.rows * place.columns + at;
          stream.set(from.subarray(start, start + part.columns), c * area + to);
        }
      }
    }
    const x = await networks.synthesise(stream, seen.rows, seen.columns, header.quality, missing ? there : null);
    const { depth, coded } = header;
    const most = 2 ** depth - 1;
    const levels = Uint16Array.from({ length: 4081 }, (_, n) => Math.floor((2 * n * most + 4080) / 8160));
    const samples = samplesOf(depth, all.rows * all.columns * coded);
    const [wide, plane] = [PATCH * seen.columns, 256 * area];
    for (let i = 0, n = 0, a = 0; i < all.rows; i++) {
      let at = (all.top + i - PATCH * seen.top) * wide + all.left - PATCH * seen.left;
      for (let j = 0; j < all.columns; j++, at++) {
        const [r, g, b] = [x[at], x[at + plane], x[at + 2 * plane]].map((v) => levels[v < 0 ? 0 : v > 4080 ? 4080 : v]);
        if (coded < 3) {
          samples[n++] = (r + g + b + 1) / 3;
        } else {
          samples[n++] = r;
          samples[n++] = g;
          samples[n++] = b;
        }
        if (alpha) samples[n++] = alpha[a++];
      }
    }
    return samples;
  }

  /** A whole picture, or a region of it, as raw samples. @param {Uint8Array} data @param {Region} [region]
   *  @param {import("./container.js").Limits} [limits] */
  async decode(data, region, limits = LIMITS) {
    const file = readContainer(data, limits);
    const { width, height, depth, channels } = file.header;
    const box = region ?? { x: 0, y: 0, width, height };
    const samples = samplesOf(depth, box.width * box.height * channels);
    for await (const part of this.parts(file, box)) {
      for (let i = 0; i < part.height; i++) {
        const row = part.samples.subarray(i * part.width * channels, (i + 1) * part.width * channels);
        samples.set(row, ((part.y - box.y + i) * box.width + part.x - box.x) * channels);
      }
    }
    return { file, ...box, channels, depth, samples };
  }
}

export { VaeError };
