/** The `.vae` file as bytes: header, sections, tiles. FORMAT.md specifies it. */

/** @import { Container, Header, Limits, Tile } from "./types" */

/** What is wrong with a file. kind: "corrupt", "truncated", "version", "limit", or "weights" where they are missing. */
export class VaeError extends Error {
  /** @param {string} kind @param {string} message */
  constructor(kind, message) {
    super(message);
    this.name = "VaeError";
    this.kind = kind;
  }
}

/** @param {unknown} condition @param {string} message @param {string} [kind] @returns {asserts condition} */
export function require(condition, message, kind = "corrupt") {
  if (!condition) throw new VaeError(kind, message);
}

/** What a reader accepts, checked before it allocates anything. @type {Limits} */
export const LIMITS = {
  maxPixels: 178_956_970,
  maxSide: 2 ** 17,
  maxTiles: 2 ** 16,
  maxMetadata: 2 ** 24,
  maxICC: 2 ** 22,
  maxSections: 64,
};

const MAGIC = [0x8b, 0x56, 0x41, 0x45, 0x0d, 0x0a, 0x1a, 0x0a];
const MINOR = 4;
const CHANNELS = [0, 1, 2, 3, 4, 1, 3, 4]; // by mode
const CRITICAL = new Set(["TILE", "PART"]);
const KNOWN = new Set(["EXIF", "ICCP", "XMP ", "IPTC", "PNG ", "GAIN"]);

const CRC = new Uint32Array(256).map((_, i) => {
  for (let bit = 0; bit < 8; bit++) i = i & 1 ? (i >>> 1) ^ 0xedb88320 : i >>> 1;
  return i;
});

/** CRC-32 of bytes, or of an array's little-endian bytes. @param {ArrayBufferView} data @param {number} [before] */
export function crc32(data, before = 0) {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  let crc = ~before;
  for (let i = 0; i < bytes.length; i++) crc = CRC[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** @param {Uint8Array} data @param {number} at @param {string} end what it is if the data end first
 *  @returns {[number, number]} the number, beyond 2^53 only nearly, and the place after it */
export function varint(data, at, end) {
  let value = 0;
  for (let i = 0; i < 10; i++) {
    require(at + i < data.length, "the file ends within a number", end);
    const byte = data[at + i];
    value += (byte & 127) * 2 ** (7 * i);
    if (byte < 128) {
      require((byte || !i) && (i < 9 || byte < 2), "a length is not in its shortest form or exceeds 64 bits");
      return [value, at + i + 1];
    }
  }
  throw new VaeError("corrupt", "a length exceeds 64 bits");
}

/** @param {Uint8Array} data */
const view = (data) => new DataView(data.buffer, data.byteOffset, data.byteLength);

/** @param {Uint8Array} data @returns {Header} */
export function readHeader(data) {
  require(MAGIC.every((byte, i) => i >= data.length || data[i] === byte), "this is not a .vae file");
  const [major, minor] = [data[8] ?? 0, data[9] ?? 0];
  require(major === 0 && minor <= MINOR, `format ${major}.${minor} is newer than this page`, "version");
  require(data.length >= 46, "the file ends within its header", "truncated");
  const v = view(data);
  require(minor && crc32(data.subarray(0, 42)) === v.getUint32(42, true), "the header fails its checksum");
  const [kind, mode, depth, colour] = data.subarray(10, 14);
  const [quality, tile, width, height] = [v.getUint16(14, true), v.getUint16(16, true), v.getUint32(18, true), v.getUint32(22, true)];
  require(kind >= 1 && kind <= 3 && mode >= 1 && mode <= 7, "unknown kind or mode", "version");
  require(mode <= 4 ? depth === 8 : depth >= 9 && depth <= 16, "a depth that the mode does not have");
  require(quality <= 10000 && tile && tile % 64 === 0 && width && height, "a field of the header is out of range");
  const model = Array.from(data.subarray(26, 42), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const channels = CHANNELS[mode];
  return { minor, kind, mode, depth, colour, quality, tile, width, height, model, channels, coded: channels - 2 * colour };
}

/** A whole file, not decoded. @param {Uint8Array} data @param {Limits} [limits] @returns {Container} */
export function readContainer(data, limits = LIMITS) {
  const header = readHeader(data);
  const { width, height, tile } = header;
  const count = Math.ceil(width / tile) * Math.ceil(height / tile);
  const small = width * height <= limits.maxPixels && Math.max(width, height) <= limits.maxSide && count <= limits.maxTiles;
  require(small, `a picture of ${width} x ${height} pixels exceeds the limits`, "limit");
  /** @type {Map<string, Uint8Array>} */
  const sections = new Map();
  let at = 46;
  /** @type {Uint8Array | undefined} */
  let parts;
  for (;;) {
    const start = at;
    require(data.length >= at + 5, "the file ends within a section", "truncated");
    const tag = String.fromCharCode(...data.subarray(at, at + 4));
    const [flags, isTile] = [data[at + 4], tag === "TILE"];
    const [length, body] = varint(data, at + 5, "truncated");
    const limit = isTile ? Infinity : tag === "ICCP" ? limits.maxICC : limits.maxMetadata;
    require(length <= limit, `section ${tag} of ${length} bytes exceeds the limit`, "limit");
    at = body + length + 4;
    require(data.length >= at, "the file ends within a section", "truncated");
    require(!isTile || (length >= 6 * count && length <= 15 * count), "the tile directory has a wrong length");
    const crc = view(data).getUint32(at - 4, true);
    require(crc32(data.subarray(start, at - 4)) === crc, `section ${tag} fails its checksum`);
    require(flags < 2, "a section has unknown flags", "version");
    require(flags || !CRITICAL.has(tag), `section ${tag} is not marked as critical`);
    require(/^[\x20-\x7e]{4}$/.test(tag), "a section's tag is not ASCII");
    const payload = data.subarray(body, at - 4);
    if (isTile) return { header, sections, tiles: readTiles(data, at, payload, parts, count) };
    require(!flags || KNOWN.has(tag) || CRITICAL.has(tag), `unknown critical section ${tag}`, "version");
    require(!parts, "the index of parts does not stand before the tile directory");
    if (tag === "PART") {
      parts = payload;
      continue;
    }
    require(!sections.has(tag), `section ${tag} occurs twice`);
    sections.set(tag, payload);
    require(sections.size <= limits.maxSections, "too many sections", "limit");
  }
}

/** @param {Uint8Array} data @param {number} at where the tiles begin @param {Uint8Array} directory
 *  @param {Uint8Array | undefined} index of parts @param {number} count @returns {Tile[]} */
function readTiles(data, at, directory, index, count) {
  let [place, end, next] = [0, at, 0];
  const entries = Array.from({ length: count }, () => {
    require(place < directory.length, "the tile directory is too short");
    const code = directory[place];
    require(code >> 4 <= 8, `a tile has 2^${code >> 4} lanes`, "version");
    const [length, after] = varint(directory, place + 1, "corrupt");
    place = after + 4;
    require(directory.length >= place, "the tile directory is too short");
    end += length;
    const crc = view(directory).getUint32(after, true);
    return { method: code & 15, lanes: 1 << (code >> 4), crc, length, words: /** @type {number[]} */ ([]) };
  });
  require(place === directory.length, "the tile directory is too long");
  require(end <= data.length, "the file ends within the tiles", "truncated");
  require(end === data.length, "bytes follow the last tile");
  const number = () => {
    const [value, after] = varint(index ?? data, next, "corrupt");
    next = after;
    return value;
  };
  for (const { words, length } of index ? entries : []) {
    const cuts = number();
    require(cuts < 128, "a tile has too many parts");
    for (let k = 0; k < cuts; k++) words.push(number());
    const sound = length % 4 === 0 && 4 * words.reduce((sum, n) => sum + n, 0) <= length;
    require(!cuts || sound, "the parts of a tile are longer than the tile");
  }
  require(!index || (next === index.length && entries.some(({ words }) => words.length)), "the index of parts is wrong");
  require(entries.every(({ lanes, words }) => lanes === 1 || !words.length), "a tile of several lanes in parts");
  /** @type {Uint8Array[][]} */
  const pieces = entries.map(() => []);
  const most = entries.reduce((most, { words }) => Math.max(most, words.length), 0);
  for (let part = 0; part <= most; part++) {
    entries.forEach(({ words, length }, i) => {
      if (part > words.length) return;
      const before = pieces[i].reduce((sum, piece) => sum + piece.length, 0);
      const size = part < words.length ? 4 * words[part] : length - before;
      pieces[i].push(data.subarray(at, at + size));
      at += size;
    });
  }
  return entries.map(({ method, lanes, crc, length, words }, i) => {
    if (!words.length) return { method, lanes, crc, data: pieces[i][0], inParts: false };
    // The last word comes first.
    const whole = new Uint8Array(length);
    let to = length;
    for (const piece of pieces[i]) for (let k = 0; k < piece.length; k += 4) whole.set(piece.subarray(k, k + 4), (to -= 4));
    return { method, lanes, crc, data: whole, inParts: true };
  });
}
