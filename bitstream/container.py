"""The `.vae` file as bytes: header, sections, tiles. Standard library only; FORMAT.md specifies it."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from .errors import CorruptError, LimitError, TruncatedError, VersionError

MAGIC = b"\x8bVAE\r\n\x1a\n"
VERSION = (0, 3)
OLDEST = (0, 1)

BytesLike = bytes | bytearray | memoryview

# magic, major, minor, kind, mode, depth, colour, quality, tile, width, height, model; then its CRC-32
_HEADER = struct.Struct("<8s6B2H2I16s")
HEADER_SIZE = _HEADER.size + 4
_CRC = struct.Struct("<I")
_TILES = b"TILE"
_ENTRY = (6, 15)  # the fewest and the most bytes of a tile in the directory

NETWORK, PLAIN, RAW = 0, 2, 3
"""Tile methods of lossy files; lossless ones have PLAIN and RAW, too."""
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

    After `unpack`, `words` is a read-only view into the file. Raises ValueError if a number is not allowed.
    """

    method: int
    crc: int
    words: bytes | memoryview
    lanes: int = 1

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
    """A whole file: tiles in raster order, and the sections beside them, in the order of the file."""

    header: Header
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]


def pack(header: Header, tiles: Sequence[Tile], sections: Sequence[Section] = ()) -> bytes:
    """The bytes of a file. Raises ValueError for a wrong number of tiles and a repeated or reserved tag."""
    if len(tiles) != header.tile_count:
        raise ValueError(f"{len(tiles)} tiles for a picture of {header.tile_count}")
    tags = {_TILES, *(section.tag for section in sections)}
    if len(tags) != len(sections) + 1:
        raise ValueError("a section tag occurs twice or is reserved")
    h = header
    sizes = (h.depth, h.colour, h.quality, h.tile, h.width, h.height)
    head = _HEADER.pack(MAGIC, *VERSION, h.kind, h.mode, *sizes, h.model)
    directory = b"".join(
        bytes([t.method | LANES.index(t.lanes) << 4]) + varint(len(t.words)) + _CRC.pack(t.crc) for t in tiles
    )
    framed = [_frame(section) for section in (*sections, Section(_TILES, directory, critical=True))]
    return b"".join([head, _CRC.pack(zlib.crc32(head)), *framed, *(tile.words for tile in tiles)])


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


def unpack(data: BytesLike, limits: Limits = Limits(), *, partial: bool = False) -> Container:
    """Read a file; the tiles are views into `data`, not decoded and their CRCs not verified.

    partial: the file may end within the tiles; they then have fewer bytes than they should, or none.

    Raises what `read_header` raises, and: LimitError beyond `limits`, TruncatedError if bytes are missing,
    VersionError for an unknown critical section, CorruptError for any other broken rule.
    """
    view = memoryview(data).toreadonly().cast("B")
    header = read_header(view)
    limits.check(header)
    sections: dict[bytes, Section] = {}
    start = HEADER_SIZE
    while True:
        section, start = _read_section(view, start, header, limits)
        if section.tag == _TILES:
            break
        if section.critical and section.tag not in (EXIF, ICC, XMP, IPTC, PNG, GAIN):
            raise VersionError(f"unknown critical section {section.tag!r}")
        if section.tag in sections:
            raise CorruptError(f"section {section.tag!r} occurs twice")
        sections[section.tag] = section
        if len(sections) > limits.max_sections:
            raise LimitError(f"more than {limits.max_sections} sections")
    return Container(header, _read_tiles(view, start, header, section.payload, partial), tuple(sections.values()))


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
    if tag == _TILES and not flags:
        raise CorruptError("the tile directory is not marked as critical")
    try:
        return Section(tag, bytes(view[body:end]), bool(flags)), end + 4
    except ValueError as error:
        raise CorruptError(str(error)) from None


def _read_tiles(view: memoryview, start: int, header: Header, directory: bytes, partial: bool) -> tuple[Tile, ...]:
    """The tiles, whose bytes follow from `start` to the end of the file."""
    tiles, at, entries = [], 0, memoryview(directory)
    try:
        for _ in range(header.tile_count):
            lanes, method = divmod(entries[at], 16)
            if lanes >= len(LANES):
                raise VersionError(f"a tile has 2**{lanes} lanes")
            length, at = read_varint(entries, at + 1)
            (crc,) = _CRC.unpack_from(entries, at)
            at += 4
            if length > len(view) - start and not partial:
                raise TruncatedError("file ends within the tiles")
            tiles.append(Tile(method, crc, view[start : start + length], LANES[lanes]))
            start = min(start + length, len(view))
    except (IndexError, struct.error):
        raise CorruptError("tile directory is too short") from None
    if at != len(entries) or start != len(view):
        raise CorruptError("bytes follow the last tile or the last entry of its directory")
    return tuple(tiles)


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
