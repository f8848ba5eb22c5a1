/** The `.vae` file as bytes: header, sections, tiles. FORMAT.md specifies it. */

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

/**
 * @typedef {object} Header kind: 1 lossy, 2 lossless, 3 PCA; channels: of the picture; coded: of its tiles, two fewer
 * where colours are equal; model: of the weights, hexadecimal.
 * @property {number} minor @property {number} kind @property {number} mode @property {number} depth
 * @property {number} colour @property {number} quality @property {number} tile @property {number} width
 * @property {number} height @property {string} model @property {number} channels @property {number} coded
 *
 * @typedef {{method: number, crc: number, data: Uint8Array}} Tile
 * @typedef {{header: Header, sections: Map<string, Uint8Array>, tiles: Tile[]}} Container
 * @typedef {{maxPixels: number, maxSide: number, maxTiles: number, maxMetadata: number, maxICC: number,
 *   maxSections: number}} Limits
 */

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
const MINOR = 2;
const CHANNELS = [0, 1, 2, 3, 4, 1, 3, 4]; // by mode
const KNOWN = new Set(["EXIF", "ICCP", "XMP ", "IPTC", "PNG "]);
const TILE_MAX = 2048;

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
function varint(data, at, end) {
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

/** A whole file; tiles are views into it, and not decoded. @param {Uint8Array} data @param {Limits} [limits]
 *  @returns {Container} */
export function readContainer(data, limits = LIMITS) {
  const header = readHeader(data);
  const { width, height, tile } = header;
  const count = Math.ceil(width / tile) * Math.ceil(height / tile);
  const small = width * height <= limits.maxPixels && Math.max(width, height) <= limits.maxSide && count <= limits.maxTiles;
  require(small, `a picture of ${width} x ${height} pixels exceeds the limits`, "limit");
  /** @type {Map<string, Uint8Array>} */
  const sections = new Map();
  const v = view(data);
  let at = 46;
  let directory = data;
  for (let tag = ""; tag !== "TILE"; ) {
    const start = at;
    require(data.length >= at + 5, "the file ends within a section", "truncated");
    tag = String.fromCharCode(...data.subarray(at, at + 4));
    const flags = data[at + 4];
    const [length, body] = varint(data, at + 5, "truncated");
    const limit = tag === "TILE" ? Infinity : tag === "ICCP" ? limits.maxICC : limits.maxMetadata;
    require(length <= limit, `section ${tag} of ${length} bytes exceeds the limit`, "limit");
    at = body + length + 4;
    require(data.length >= at, "the file ends within a section", "truncated");
    require(tag !== "TILE" || (length >= 6 * count && length <= 15 * count), "the tile directory has a wrong length");
    const sound = crc32(data.subarray(start, at - 4)) === v.getUint32(at - 4, true);
    require(sound, `section ${tag} fails its checksum`);
    require(flags < 2, "a section has unknown flags", "version");
    require(tag !== "TILE" || flags, "the tile directory is not marked as critical");
    require(/^[\x20-\x7e]{4}$/.test(tag), "a section's tag is not ASCII");
    if (tag === "TILE") {
      directory = data.subarray(body, at - 4);
      break;
    }
    require(!flags || KNOWN.has(tag), `unknown critical section ${tag}`, "version");
    require(!sections.has(tag), `section ${tag} occurs twice`);
    sections.set(tag, data.subarray(body, at - 4));
    require(sections.size <= limits.maxSections, "too many sections", "limit");
  }
  /** @type {Tile[]} */
  const tiles = [];
  let place = 0;
  for (let i = 0; i < count; i++) {
    require(place < directory.length, "the tile directory is too short");
    const [length, after] = varint(directory, place + 1, "corrupt");
    require(directory.length >= after + 4, "the tile directory is too short");
    require(data.length >= at + length, "the file ends within the tiles", "truncated");
    tiles.push({ method: directory[place], crc: view(directory).getUint32(after, true), data: data.subarray(at, at + length) });
    at += length;
    place = after + 4;
  }
  require(place === directory.length && at === data.length, "bytes follow the last tile");
  checkColours(header);
  return { header, sections, tiles };
}

/** @param {Header} header */
function checkColours(header) {
  const { kind, mode, colour, channels, tile } = header;
  require(colour < 2 && (kind < 3 || !colour), "unknown colour transform", "version");
  require(!colour || channels > 2, "equal colours in a picture without colours");
  require(kind < 3 || mode === 1 || mode === 3, "a mode that files of kind PCA do not have", "version");
  require(tile <= TILE_MAX, "tiles are too large");
}
