/** Types that several modules share. Arrays are flat. */

import type { Coder } from "./ans.js";
import type { Grid } from "./arrays.js";
import type { Weights } from "./weights.js";

export type Numbers = Int8Array | Uint8Array | Int16Array | Uint16Array | Int32Array | Float32Array;
/** Row by row, pixel by pixel. */
export type Samples = Uint8Array | Uint16Array;

/** kind: 1 lossy, 2 lossless, 3 PCA. channels: of the picture. coded: of its tiles, two fewer where colours are equal.
 * quality: in hundredths. model: of the weights, in hexadecimal. */
export interface Header {
  minor: number; kind: number; mode: number; depth: number; colour: number; quality: number; tile: number;
  width: number; height: number; model: string; channels: number; coded: number;
}
/** lanes: of its words. inParts: in a progressive file. */
export interface Tile { method: number; lanes: number; crc: number; data: Uint8Array; inParts: boolean }
export interface Container { header: Header; sections: Map<string, Uint8Array>; tiles: Tile[] }
export interface Limits {
  maxPixels: number; maxSide: number; maxTiles: number; maxMetadata: number; maxICC: number; maxSections: number;
}

/** Of pixels. */
export interface Region { x: number; y: number; width: number; height: number }
/** samples: [height, width, channels]. */
export interface Part extends Region { samples: Samples }

/** A lossless tile on its way. */
export interface Walk { weights: Weights; coder: Coder; colours: number }

export type Grids = Record<string, Grid<any>>;

/** What is used of ONNX Runtime Web. */
export interface Session {
  inputNames: readonly string[];
  run(feeds: Record<string, unknown>): Promise<any>;
  release(): Promise<void>;
}
export interface Runtime {
  InferenceSession: { create(model: Uint8Array, options: object): Promise<Session> };
  Tensor: new (type: any, data: any, dims: number[]) => any;
}
