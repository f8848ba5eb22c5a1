"""The `.vae` file as bytes: header, sections, tiles. Standard library only; FORMAT.md specifies it."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from .errors import CorruptError, LimitError, TruncatedError, VersionError
from .progressive import PARTS, ordered, read_index, reversed_words, write_index

MAGIC = b"\x8bVAE\r\n\x1a\n"
VERSION = (0, 4)
OLDEST = (0, 1)

BytesLike = bytes | bytearray | memoryview
Entry = tuple[int, int, int, int]
"""Of the tile directory: method, lanes, length and CRC-32 of a tile."""

# magic, major, minor, kind, mode, depth, colour, quality, tile, width, height, model; then its CRC-32
_HEADER = struct.Struct("<8s6B2H2I16s")
HEADER_SIZE = _HEADER.size + 4
_CRC = struct.Struct("<I")
_TILES = b"TILE"
_ENTRY = (6, 15)  # the fewest and the most bytes of a tile in the directory

NETWORK, SPARSE, PLAIN, RAW = range(4)
"""Tile methods of lossy files; lossless ones have PLAIN and RAW, too. SPARSE: by networks as well, without what is all
but certain."""
BITS_BACK, ROUNDED = 0, 1
"""Of lossless files. ROUNDED: too few bits to pop latents from, so that their rounded means are sent."""
LANES = tuple(1 << k for k in range(9))
"""How many lanes the words of a tile may have."""
TILE_MAX = 2048
"""It bounds the memory and the work that a tile costs before its checksum is known."""

EXIF, ICC, XMP, IPTC, PNG, GAIN = b"EXIF", b"ICCP", b"XMP ", b"IPTC", b"PNG ", b"GAIN"


class Kind(IntEnum):
    """What the tiles hold."""

    LOSSY = 1
    LOSSLESS = 2
    PCA = 3


# Pillow's names, which is why this is no class statement: Mode["I;16"].
Mode = IntEnum("Mode", {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 5, "RGB;16": 6, "RGBA;16": 7})

_KINDS, _MODES = frozenset(Kind), frozenset(Mode)


@dataclass(frozen=True, slots=True)
class Header:
    """What is known before any section is read. Raises ValueError for fields out of range.

    width, height: 1 to 2**32 - 1. depth: bits a sample, 8, or 9 to 16 in the 16-bit modes. quality: in
    hundredths, 0 to 10,000. colour: id of the colour transform, 0 for none. tile: side of a tile in pixels, a
    multiple of 64 below 65,536. model: the first 16 bytes of the hash of the weights that decode the file.
    """

    kind: Kind
    mode: Mode
    width: int
    height: int
    depth: int
    quality: int
    colour: int
    tile: int
    model: bytes

    def __post_init__(self) -> None:
        depths = range(9, 17) if self.mode.name.endswith(";16") else range(8, 9)
        for name, value, valid in (
            ("width", self.width, range(1, 2**32)),
            ("height", self.height, range(1, 2**32)),
            ("depth", self.depth, depths),
            ("quality", self.quality, range(10_001)),
            ("colour transform", self.colour, range(256)),
            ("tile size", self.tile, range(64, 2**16, 64)),
            ("model hash length", len(self.model), range(16, 17)),
        ):
            if value not in valid:
                raise ValueError(f"{name} {value} is not allowed")

    @property
    def tile_count(self) -> int:
        """How many tiles cover the picture, in raster order, those at the right and lower edges cut off."""
        return -(-self.width // self.tile) * -(-self.height // self.tile)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile: method (0 to 15), CRC-32 of the integers it decodes to, its coded bytes, and their number of lanes.

    lanes: 1, 2, 4 ... 256. parts: in a progressive file, from the top of the stack, so many words as each part needs
    beyond those before it, without the last part; else empty. held: of a tile that is cut off, how many of its parts
    are there, which then are all that `words` has. After `unpack`, `words` may be a read-only view into the file.
    Raises ValueError if a number is not allowed.
    """

    method: int
    crc: int
    words: bytes | memoryview
    lanes: int = 1
    parts: tuple[int, ...] = ()
    held: int | None = None

    def __post_init__(self) -> None:
        if self.method not in range(16) or self.crc not in range(2**32) or self.lanes not in LANES:
            raise ValueError(f"tile method {self.method}, CRC {self.crc} or {self.lanes} lanes are not allowed")


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes carried verbatim beside the picture; tag: four printable ASCII bytes.

    A reader that does not know the tag of a critical section refuses the file. ValueError for a bad tag.
    """

    tag: bytes
    payload: bytes
    critical: bool = False

    def __post_init__(self) -> None:
        if len(self.tag) != 4 or not all(0x20 <= byte <= 0x7E for byte in self.tag):
            raise ValueError(f"section tag {self.tag!r} is not allowed")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts, checked before it allocates anything; metadata is in bytes a section.

    No picture within the other default limits has more than 45,655 tiles.
    """

    max_pixels: int = 178_956_970
    max_side: int = 2**17
    max_tiles: int = 2**16
    max_metadata: int = 2**24
    max_icc: int = 2**22
    max_sections: int = 64

    def check_size(self, width: int, height: int) -> None:
        """Raises LimitError if the picture has too many pixels."""
        if width * height > self.max_pixels or max(width, height) > self.max_side:
            raise LimitError(f"picture of {width} x {height} pixels exceeds the limits")

    def check(self, header: Header) -> None:
        """Raises LimitError if the picture is too large."""
        self.check_size(header.width, header.height)
        if header.tile_count > self.max_tiles:
            raise LimitError(f"picture of {header.tile_count} tiles exceeds the limit of {self.max_tiles}")


@dataclass(frozen=True, slots=True)
class Container:
    """A whole file: tiles in raster order, and the sections beside them, in the order of the file.

    ends: how many bytes of the file there must be to have the first parts of all tiles, the second ones and so on; the
    last is its size.
    """

    header: Header
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    ends: tuple[int, ...] = field(default=(), compare=False)


def pack(header: Header, tiles: Sequence[Tile], sections: Sequence[Section] = ()) -> bytes:
    """The bytes of a file, a progressive one if any tile has parts.

    Raises ValueError for a wrong number of tiles or of words in parts and a repeated or reserved tag.
    """
    if len(tiles) != header.tile_count:
        raise ValueError(f"{len(tiles)} tiles for a picture of {header.tile_count}")
    tags = {_TILES, PARTS, *(section.tag for section in sections)}
    if len(tags) != len(sections) + 2:
        raise ValueError("a section tag occurs twice or is reserved")
    h = header
    sizes = (h.depth, h.colour, h.quality, h.tile, h.width, h.height)
    head = _HEADER.pack(MAGIC, *VERSION, h.kind, h.mode, *sizes, h.model)
    directory = b"".join(
        bytes([t.method | LANES.index(t.lanes) << 4]) + varint(len(t.words)) + _CRC.pack(t.crc) for t in tiles
    )
    last, coded = [Section(_TILES, directory, critical=True)], [tile.words for tile in tiles]
    if any(tile.parts for tile in tiles):
        parts = [tile.parts for tile in tiles]
        index = write_index(parts, varint)
        last.insert(0, Section(PARTS, index, critical=True))
        coded = _spread(coded, parts)
    framed = [_frame(section) for section in (*sections, *last)]
    return b"".join([head, _CRC.pack(zlib.crc32(head)), *framed, *coded])


def _spread(tiles: list[bytes | memoryview], parts: list[tuple[int, ...]]) -> list[bytes | memoryview]:
    """The bytes of tiles in the order of a progressive file. Raises ValueError if parts have too many words."""
    lengths, starts, spread = [len(words) for words in tiles], [0] * len(tiles), list[bytes | memoryview]()
    tiles = [reversed_words(words) if own else words for words, own in zip(tiles, parts, strict=True)]
    for group in ordered(lengths, parts):
        for tile, size in group:
            if size < 0:
                raise ValueError("the parts of a tile are longer than the tile")
            spread.append(tiles[tile][starts[tile] : starts[tile] + size])
            starts[tile] += size
    return spread


def read_header(data: BytesLike) -> Header:
    """The header alone, from the first HEADER_SIZE bytes or more.

    Raises CorruptError if this is no .vae file or a field is wrong, TruncatedError if it is too short and
    VersionError if its version, kind or mode is unknown.
    """
    head = bytes(data[:HEADER_SIZE])
    if head[:8] != MAGIC[: len(head)]:
        raise CorruptError("not a .vae file")
    # The version comes before the checksum: a newer header may be of another size.
    version = tuple(head[8:10])
    if version > VERSION:
        raise VersionError(f"format version (major, minor) {version} is newer than {VERSION}")
    if len(head) < HEADER_SIZE:
        raise TruncatedError(f"header of {len(head)} bytes, {HEADER_SIZE} expected")
    fields, crc = head[: _HEADER.size], _CRC.unpack_from(head, _HEADER.size)[0]
    if version < OLDEST or crc != zlib.crc32(fields):
        raise CorruptError("header fails its checksum")
    kind, mode, depth, colour, quality, tile, width, height, model = _HEADER.unpack(fields)[3:]
    if kind not in _KINDS or mode not in _MODES:
        raise VersionError(f"unknown kind {kind} or mode {mode}")
    try:
        return Header(Kind(kind), Mode(mode), width, height, depth, quality, colour, tile, model)
    except ValueError as error:
        raise CorruptError(f"header: {error}") from None


def unpack(data: BytesLike, limits: Limits = Limits(), *, partial: bool = False, preview: bool = False) -> Container:
    """Read a file; the tiles are views into `data`, not decoded and their CRCs not verified.

    partial: the file may end within the tiles; they then have fewer bytes than they should, or none. preview: the same,
    but they have whole parts only and say how many, see `Tile`.

    Raises what `read_header` raises, and: LimitError beyond `limits`, TruncatedError if bytes are missing,
    VersionError for an unknown critical section, CorruptError for any other broken rule.
    """
    view = memoryview(data).toreadonly().cast("B")
    header = read_header(view)
    limits.check(header)
    sections: dict[bytes, Section] = {}
    start, index = HEADER_SIZE, None
    while True:
        section, start = _read_section(view, start, header, limits)
        if section.tag == _TILES:
            break
        if section.critical and section.tag not in (EXIF, ICC, XMP, IPTC, PNG, GAIN, PARTS):
            raise VersionError(f"unknown critical section {section.tag!r}")
        if index is not None:
            raise CorruptError("the index of parts does not stand before the tile directory")
        if section.tag == PARTS:
            index = section.payload
            continue
        if section.tag in sections:
            raise CorruptError(f"section {section.tag!r} occurs twice")
        sections[section.tag] = section
        if len(sections) > limits.max_sections:
            raise LimitError(f"more than {limits.max_sections} sections")
    entries = _read_directory(section.payload, header)
    lengths = [length for _, _, length, _ in entries]
    missing = start + sum(lengths) - len(view)
    if missing > 0 and not (partial or preview):
        raise TruncatedError("file ends within the tiles")
    if missing < 0:
        raise CorruptError("bytes follow the last tile")
    parts = [()] * len(entries) if index is None else read_index(index, lengths, read_varint)
    tiles, ends = _read_tiles(view, start, entries, parts, preview)
    return Container(header, tiles, tuple(sections.values()), ends)


def _read_tiles(
    view: memoryview, start: int, entries: list[Entry], parts: Sequence[tuple[int, ...]], preview: bool
) -> tuple[tuple[Tile, ...], tuple[int, ...]]:
    """The tiles, whose bytes begin at `start`, and where their first parts end, their second parts, and so on."""
    ends, pieces, held = list[int](), [list[memoryview]() for _ in entries], [0] * len(entries)
    for number, group in enumerate(ordered([length for _, _, length, _ in entries], parts)):
        for tile, size in group:
            pieces[tile].append(view[start : start + size])
            start += size
            held[tile] += start <= len(view) and held[tile] == number
        ends.append(start)
    tiles = list[Tile]()
    for (method, lanes, _, crc), own, there, count in zip(entries, parts, pieces, held, strict=True):
        if own and lanes > 1:
            raise CorruptError(f"a tile of {lanes} lanes in parts")
        cut = count if preview and count <= len(own) else None
        kept = there[:cut]
        words = reversed_words(b"".join(kept)) if own else kept[0] if kept else b""
        tiles.append(Tile(method, crc, words, lanes, own, cut))
    return tuple(tiles), tuple(ends)


def _read_section(view: memoryview, start: int, header: Header, limits: Limits) -> tuple[Section, int]:
    """The section at `start` and where the next one begins."""
    try:
        tag, flags = bytes(view[start : start + 4]), view[start + 4]
        length, body = read_varint(view, start + 5)
    except IndexError:
        raise TruncatedError("file ends within a section") from None
    limit = limits.max_icc if tag == ICC else limits.max_metadata
    if length > limit and tag != _TILES:
        raise LimitError(f"section {tag!r} of {length} bytes exceeds the limit of {limit}")
    end = body + length
    if len(view) < end + 4:
        raise TruncatedError(f"file ends within section {tag!r}")
    if tag == _TILES:
        least, most = (size * header.tile_count for size in _ENTRY)
        if not least <= length <= most:
            raise CorruptError(f"tile directory is too {'short' if length < least else 'long'}")
    if zlib.crc32(view[start:end]) != _CRC.unpack_from(view, end)[0]:
        raise CorruptError(f"section {tag!r} fails its checksum")
    if flags > 1:
        raise VersionError(f"section {tag!r} has unknown flags {flags}")
    if tag in (_TILES, PARTS) and not flags:
        raise CorruptError(f"section {tag!r} is not marked as critical")
    try:
        return Section(tag, bytes(view[body:end]), bool(flags)), end + 4
    except ValueError as error:
        raise CorruptError(str(error)) from None


def _read_directory(directory: bytes, header: Header) -> list[Entry]:
    entries, at, view = list[Entry](), 0, memoryview(directory)
    try:
        for _ in range(header.tile_count):
            lanes, method = divmod(view[at], 16)
            if lanes >= len(LANES):
                raise VersionError(f"a tile has 2**{lanes} lanes")
            length, at = read_varint(view, at + 1)
            entries.append((method, LANES[lanes], length, _CRC.unpack_from(view, at)[0]))
            at += _CRC.size
    except (IndexError, struct.error):
        raise CorruptError("tile directory is too short") from None
    if at != len(view):
        raise CorruptError("bytes follow the last entry of the tile directory")
    return entries


def _frame(section: Section) -> bytes:
    body = section.tag + bytes([section.critical]) + varint(len(section.payload)) + section.payload
    return body + _CRC.pack(zlib.crc32(body))


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, lowest first, the high bit set on all but the last byte."""
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_varint(view: memoryview, start: int) -> tuple[int, int]:
    """The integer at `start` and where it ends. Raises IndexError if the view ends first."""
    value = 0
    for i in range(10):
        byte = view[start + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if (i and not byte) or value >= 2**64:
                break
            return value, start + i + 1
    raise CorruptError("length is not in its shortest form or exceeds 64 bits")
