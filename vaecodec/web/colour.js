/** From samples to what a canvas shows: colour spaces, depth, tone, orientation. */

/** @import { Container, Part, Region } from "./types" */

import { clamp } from "./arrays.js";

/** To linear sRGB, by primaries as cICP numbers them. @type {Record<number, number[]>} */
const TO_SRGB = {
  1: [1, 0, 0, 0, 1, 0, 0, 0, 1],
  9: [1.6605, -0.5876, -0.0728, -0.1246, 1.1329, -0.0083, -0.0182, -0.1006, 1.1187],
  12: [1.2249, -0.2247, 0, -0.0421, 1.0421, 0, -0.0196, -0.0786, 1.0979],
};
const [PQ, HLG] = [16, 18];
const WHITE = 203; // cd/m^2 of white paper
const KNEE = 0.5;

/** What PQ stands for, in cd/m^2. @param {number} v */
function fromPq(v) {
  const p = v ** (32 / 2523);
  return 10000 * (Math.max(p - 0.8359375, 0) / (18.8515625 - 18.6875 * p)) ** (16384 / 2610);
}

/** Scene light of HLG, 0 to 1. @param {number} v */
const fromHlg = (v) => (v <= 0.5 ? (v * v) / 3 : (Math.exp((v - 0.55991073) / 0.17883277) + 0.28466892) / 12);

/** @param {number} v linear */
const toSrgb = (v) => 255 * (v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055);

/** @param {Uint8Array} data */
const view = (data) => new DataView(data.buffer, data.byteOffset, data.byteLength);

/** The data of PNG's chunks, by type. @param {Uint8Array} payload */
function chunksOf(payload) {
  /** @type {Map<string, DataView>} */
  const chunks = new Map();
  for (let at = 0; at + 8 <= payload.length; ) {
    const end = at + 8 + view(payload).getUint32(at);
    if (end > payload.length) break;
    chunks.set(String.fromCharCode(...payload.subarray(at + 4, at + 8)), view(payload.subarray(at + 8, end)));
    at = end;
  }
  return chunks;
}

/** Which canvas's colour space a profile is: "srgb", "display-p3", or "" for others. @param {Uint8Array} profile */
export function spaceOf(profile) {
  try {
    const v = view(profile);
    /** @type {Map<string, number>} */
    const tags = new Map();
    for (let i = 0; i < Math.min(v.getUint32(128), 100); i++) {
      const at = 132 + 12 * i;
      tags.set(String.fromCharCode(...profile.subarray(at, at + 4)), v.getUint32(at + 4));
    }
    const grey = tags.has("kTRC");
    for (const tag of grey ? ["kTRC"] : ["rTRC", "gTRC", "bTRC"]) {
      const at = tags.get(tag) ?? NaN;
      const f = [0, 1, 2, 3, 4].map((i) => v.getInt32(at + 12 + 4 * i) / 65536);
      const count = v.getUint32(at + 8);
      /** @type {(x: number) => number} */
      let curve = (x) => (x >= f[4] ? (f[1] * x + f[2]) ** f[0] : f[3] * x);
      if (v.getUint32(at) === 0x63757276) { // "curv"
        curve = (x) => (count > 1 ? v.getUint16(at + 12 + 2 * Math.round(x * (count - 1))) / 65535
          : x ** (count ? v.getUint16(at + 12) / 256 : 1));
      } else if (v.getUint16(at + 8) !== 3) return "";
      if (Math.abs(curve(0.5) - 0.214) > 0.005 || Math.abs(curve(0.1) - 0.01) > 0.002) return "";
    }
    if (grey) return "srgb";
    const near = (/** @type {number[]} */ wanted) => ["rXYZ", "gXYZ"].every((tag, i) =>
      [0, 1].every((j) => Math.abs(v.getInt32((tags.get(tag) ?? NaN) + 8 + 4 * j) / 65536 - wanted[2 * i + j]) < 0.003));
    if (near([0.436, 0.2225, 0.3851, 0.7169])) return "srgb";
    return near([0.5151, 0.2412, 0.292, 0.6922]) ? "display-p3" : "";
  } catch {
    return "";
  }
}

/** Exif's orientation, 1 to 8. @param {Uint8Array} exif */
export function orientationOf(exif) {
  try {
    const v = view(exif.subarray(exif[0] === 0x45 ? 6 : 0)); // after "Exif\0\0"
    const little = v.getUint16(0) === 0x4949;
    const at = v.getUint32(4, little);
    for (let i = 0; i < v.getUint16(at, little); i++) {
      const entry = at + 2 + 12 * i;
      const value = v.getUint16(entry + 8, little);
      if (v.getUint16(entry, little) === 274) return value >= 1 && value <= 8 ? value : 1;
    }
  } catch {} // damaged
  return 1;
}

/** How a file is shown. notes: what is not shown as it is. */
export class Display {
  /** @param {Container} file */
  constructor({ header, sections }) {
    this.channels = header.channels;
    const [icc, chunks] = [sections.get("ICCP"), chunksOf(sections.get("PNG ") ?? new Uint8Array(0))];
    const orientation = orientationOf(sections.get("EXIF") ?? new Uint8Array(0));
    this.turned = orientation > 4;
    this.flipX = [2, 3, 7, 8].includes(orientation);
    this.flipY = [3, 4, 6, 7].includes(orientation);
    this.stored = header;
    this.white = header.depth > 8 && !chunks.has("sBIT") ? 65535 : 2 ** header.depth - 1;
    /** @type {PredefinedColorSpace} */
    this.colorSpace = "srgb";
    /** @type {string[]} */
    this.notes = [];
    /** @type {((rgb: number[]) => number[]) | null} */
    this.tone = null;
    const cicp = chunks.get("cICP");
    const [primaries, transfer] = cicp && cicp.byteLength === 4 ? [cicp.getUint8(0), cicp.getUint8(1)] : [0, 0];
    if ((transfer === PQ || transfer === HLG) && primaries in TO_SRGB && this.channels > 2) {
      this.tone = toneOf(primaries, transfer, chunks);
      this.notes.push(`${transfer === PQ ? "PQ" : "HLG"}, tone-mapped: a screen with high dynamic range would show more`);
    } else if (transfer) {
      if (primaries === 12 && transfer === 13) this.colorSpace = "display-p3";
      else if (primaries !== 1 || transfer !== 13) this.notes.push("the colours of its cICP chunk are shown as if they were sRGB");
    } else if (icc) {
      const space = spaceOf(icc);
      this.colorSpace = space === "display-p3" ? space : "srgb";
      if (!space) this.notes.push("its ICC profile is not one of sRGB or Display P3: the colours are shown as if they were sRGB");
    }
    if (header.depth > 8) this.notes.push(`${header.depth} bits a sample, of which 8 are shown`);
  }

  /** Where a region stands in the picture that is turned upright. @param {Region} region @returns {Region} */
  place({ x, y, width, height }) {
    const [left, top] = [this.flipX ? this.stored.width - x - width : x, this.flipY ? this.stored.height - y - height : y];
    return this.turned ? { x: top, y: left, width: height, height: width } : { x: left, y: top, width, height };
  }

  /** RGBA of a part, upright. @param {Part} part */
  convert({ width, height, samples }) {
    const { channels, turned, flipX, flipY, white, tone } = this;
    const rgba = new Uint8ClampedArray(4 * width * height); // which rounds
    const [green, blue] = channels > 2 ? [1, 2] : [0, 0];
    for (let i = 0, n = 0; i < height; i++) {
      for (let j = 0; j < width; j++, n += channels) {
        const [row, column] = [flipY ? height - 1 - i : i, flipX ? width - 1 - j : j];
        const at = 4 * (turned ? column * height + row : row * width + column);
        const [r, g, b] = [samples[n] / white, samples[n + green] / white, samples[n + blue] / white];
        rgba.set(tone ? tone([r, g, b]) : [255 * r, 255 * g, 255 * b], at);
        rgba[at + 3] = channels % 2 ? 255 : (255 * samples[n + channels - 1]) / white;
      }
    }
    return rgba;
  }
}

/** From colours of high dynamic range, 0 to 1, to sRGB, 0 to 255. @param {number} primaries
 *  @param {number} transfer @param {Map<string, DataView>} chunks */
function toneOf(primaries, transfer, chunks) {
  const m = TO_SRGB[primaries];
  const [light, master] = [chunks.get("cLLI"), chunks.get("mDCV")];
  let peak = transfer === HLG ? 1000 : 0;
  if (!peak && light && light.byteLength >= 4) peak = light.getUint32(0) / 10000;
  if (!peak && master && master.byteLength >= 20) peak = master.getUint32(16) / 10000;
  const most = Math.max((peak || 1000) / WHITE, 1);
  const top = (most - KNEE) / (1 - KNEE);
  /** Below the knee as it is, above it Reinhard's curve, which ends at white. @param {number} v */
  const mapped = (v) => {
    const t = (Math.min(v, most) - KNEE) / (1 - KNEE);
    return t <= 0 ? v : KNEE + ((1 - KNEE) * t * (1 + t / top ** 2)) / (1 + t);
  };
  return (/** @type {number[]} */ rgb) => {
    let linear;
    if (transfer === HLG) {
      const scene = rgb.map(fromHlg);
      const gain = (1000 / WHITE) * (0.2627 * scene[0] + 0.678 * scene[1] + 0.0593 * scene[2]) ** 0.2;
      linear = scene.map((v) => v * gain);
    } else {
      linear = rgb.map((v) => fromPq(v) / WHITE);
    }
    const highest = Math.max(...linear, 1e-6);
    const scale = mapped(highest) / highest;
    const [r, g, b] = linear.map((v) => v * scale);
    return [0, 3, 6].map((k) => toSrgb(clamp(m[k] * r + m[k + 1] * g + m[k + 2] * b, 0, 1)));
  };
}
