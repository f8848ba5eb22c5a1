/** Decodes `.vae` files: tile by tile, or as a whole. */

/** @import { Container, Header, Part, Region, Runtime, Samples, Tile } from "./types" */

import { Grid, clamp, range } from "./arrays.js";
import { require } from "./container.js";
import { popLossless } from "./lossless.js";
import { Lossy } from "./lossy.js";
import { popExact, samplesOf } from "./plain.js";
import { Weights } from "./weights.js";

const PATCH = 16;
const TILE_MAX = 2048;

/** Some rows and columns, of pixels or of latents. */
class Box {
  /** @param {number} top @param {number} left @param {number} rows @param {number} columns */
  constructor(top, left, rows, columns) {
    this.top = top;
    this.left = left;
    this.rows = rows;
    this.columns = columns;
  }

  get area() {
    return Math.max(this.rows, 0) * Math.max(this.columns, 0);
  }

  /** @param {Box} b */
  and(b) {
    const [top, left] = [Math.max(this.top, b.top), Math.max(this.left, b.left)];
    const bottom = Math.min(this.top + this.rows, b.top + b.rows);
    return new Box(top, left, bottom - top, Math.min(this.left + this.columns, b.left + b.columns) - left);
  }

  /** @param {number} n */
  grown(n) {
    return new Box(this.top - n, this.left - n, this.rows + 2 * n, this.columns + 2 * n);
  }

  /** In units n times as large, or small. @param {number} n */
  times(n) {
    const [top, left] = [Math.floor(this.top * n), Math.floor(this.left * n)];
    const [bottom, right] = [Math.ceil((this.top + this.rows) * n), Math.ceil((this.left + this.columns) * n)];
    return new Box(top, left, bottom - top, right - left);
  }

  /** Of samples of this box those of a part of it. @param {Samples} samples @param {Box} part */
  crop(samples, part) {
    const channels = samples.length / this.area;
    const rows = new Grid(samples, this.rows, channels * this.columns);
    return rows.box(part.top - this.top, channels * (part.left - this.left), part.rows, channels * part.columns).data;
  }
}

/** @param {Tile} tile */
const isExact = (tile) => tile.method === 2 || tile.method === 3;

export class Decoder {
  /** @param {Runtime} runtime ONNX Runtime Web
   *  @param {(model: string) => Promise<Uint8Array>} fetchWeights the weights file of a name, in hexadecimal */
  constructor(runtime, fetchWeights) {
    this.runtime = runtime;
    this.fetchWeights = fetchWeights;
    /** @type {Map<string, Promise<any>>} */
    this.loaded = new Map();
  }

  /** The networks of a file. @param {Header} header @returns {Promise<any>} */
  networks({ model, kind }) {
    const name = kind === 1 ? "lossy" : "lossless";
    const key = `${name} ${model}`;
    /** @type {Promise<any>} */
    const found = this.loaded.get(key) ?? this.fetchWeights(model).then(async (data) => {
      const weights = new Weights(data, this.runtime);
      require(weights.metadata.kind === name, `the weights are not ${name}`, "weights");
      return kind === 1 ? new Lossy(weights).check() : weights;
    });
    this.loaded.set(key, found);
    found.catch(() => this.loaded.delete(key));
    return found;
  }

  /** The parts of a picture, each when it is decoded. Throws VaeError. @param {Container} file
   *  @param {Region} [region] @returns {AsyncGenerator<Part>} */
  async *parts({ header, tiles }, region) {
    const { width, height, tile: side, colour, coded, channels, kind, depth } = header;
    const whole = new Box(0, 0, height, width);
    const wanted = region ? new Box(region.y, region.x, region.height, region.width) : whole;
    require(wanted.area && wanted.and(whole).area === wanted.area, "the region is not inside the picture", "region");
    require(kind < 3, "this page does not show files of kind PCA", "version");
    require(colour < 2, "unknown colour transform", "version");
    require(!colour || channels > 2, "equal colours in a picture without colours");
    require(side <= TILE_MAX, "the tiles are too large");
    const places = tiles.map((tile, i) => {
      const across = Math.ceil(width / side);
      return { tile, place: new Box(Math.floor(i / across) * side, (i % across) * side, side, side).and(whole) };
    });
    const latents = new Latents(places, header, whole);
    for (const { tile, place } of places) {
      const part = place.and(wanted);
      if (part.rows < 1 || part.columns < 1) continue;
      let samples;
      if (isExact(tile)) {
        samples = place.crop(popExact(tile, place.rows, place.columns, coded, depth), part);
      } else if (kind === 1) {
        samples = await latents.samples(await this.networks(header), part, place);
      } else {
        require(depth === 8, "a tile of 16-bit samples asks for the networks");
        samples = await popLossless(await this.networks(header), tile, place.rows, place.columns, coded);
        samples = place.crop(samples, part);
      }
      if (colour) { // equal colours, of which one is coded
        const one = samples;
        samples = samplesOf(depth, part.area * channels);
        samples.forEach((_, i, all) => {
          const [pixel, c] = [Math.floor(i / channels), i % channels];
          all[i] = one[pixel * coded + (c < 3 ? 0 : 1)];
        });
      }
      yield { x: part.left, y: part.top, width: part.columns, height: part.rows, samples };
    }
  }

  /** A picture, or a region of it, as raw samples [height, width, channels]. @param {Container} file
   *  @param {Region} [region] */
  async decode(file, region) {
    const { width, height, depth, channels } = file.header;
    const box = region ?? { x: 0, y: 0, width, height };
    const whole = new Grid(samplesOf(depth, box.width * box.height * channels), box.height, box.width * channels);
    for await (const part of this.parts(file, box)) {
      const rows = new Grid(part.samples, part.height, part.width * channels);
      whole.put(rows, part.y - box.y, (part.x - box.x) * channels);
    }
    return { ...box, channels, depth, samples: whole.data };
  }
}

/** The latents of a lossy file, as long as they are needed: for a tile, those of the tiles around it, too. */
class Latents {
  /** @param {{tile: Tile, place: Box}[]} places @param {Header} header @param {Box} whole */
  constructor(places, header, whole) {
    this.places = places;
    this.header = header;
    this.grid = whole.times(1 / PATCH);
    /** @type {Map<Tile, {stream: Grid<Int16Array>, alpha: Samples | null, bottom: number}>} */
    this.known = new Map();
  }

  /** The samples of a part of a tile. @param {Lossy} networks @param {Box} part @param {Box} place */
  async samples(networks, part, place) {
    const { depth, coded, quality, width, tile: side } = this.header;
    const outer = part.times(1 / PATCH).grown(networks.margin).and(this.grid);
    const stream = new Grid(new Int16Array(networks.latent * outer.area), outer.rows, outer.columns);
    const seen = new Grid(new Float32Array(outer.area), outer.rows, outer.columns);
    /** @type {Samples | null} */
    let alpha = null;
    for (const [tile, { bottom }] of this.known) if (bottom <= outer.top) this.known.delete(tile);
    const near = outer.times(PATCH / side);
    for (let n = 0; n < near.area; n++) {
      const [row, column] = [near.top + Math.floor(n / near.columns), near.left + (n % near.columns)];
      const { tile, place: other } = this.places[row * Math.ceil(width / side) + column];
      if (isExact(tile)) continue;
      const box = other.times(1 / PATCH);
      const common = box.and(outer);
      const known = this.known.get(tile) ?? {
        ...(await networks.pop(tile, this.header, box.rows, box.columns, other.rows, other.columns)),
        bottom: box.top + box.rows,
      };
      this.known.set(tile, known);
      if (other === place && known.alpha) alpha = place.crop(known.alpha, part);
      const [top, left] = [common.top - outer.top, common.left - outer.left];
      stream.put(known.stream.box(common.top - box.top, common.left - box.left, common.rows, common.columns), top, left);
      seen.put(new Grid(new Float32Array(common.area).fill(1), common.rows, common.columns), top, left);
    }
    const x = await networks.synthesised(stream, quality, seen.data.every(Boolean) ? null : seen);
    const inside = x.box(part.top - PATCH * outer.top, part.left - PATCH * outer.left, part.rows, part.columns).data;
    const levels = range(4081, (n) => Math.floor((2 * n * (2 ** depth - 1) + 4080) / 8160));
    const samples = samplesOf(depth, part.area * coded);
    for (let i = 0, n = 0; i < part.area; i++) {
      const level = (/** @type {number} */ c) => levels[clamp(inside[c * part.area + i], 0, 4080)];
      if (coded < 3) samples[n++] = (level(0) + level(1) + level(2) + 1) / 3;
      else for (let c = 0; c < 3; c++) samples[n++] = level(c);
      if (alpha) samples[n++] = alpha[i];
    }
    return samples;
  }
}
