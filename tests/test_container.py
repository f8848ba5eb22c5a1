import struct
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bitstream import (
    EXIF,
    HEADER_SIZE,
    ICC,
    MAGIC,
    XMP,
    Container,
    CorruptError,
    Header,
    Kind,
    LimitError,
    Limits,
    Mode,
    Section,
    Tile,
    TruncatedError,
    VaeError,
    VersionError,
    pack,
    read_header,
    unpack,
)
from bitstream.container import LANES

HEADER = Header(Kind.LOSSY, Mode["RGB"], 100, 70, 8, 7500, 0, 64, bytes(range(16)))
TILES = (Tile(0, 1, b"abcd"), Tile(1, 2**32 - 1, b""), Tile(2, 3, b"x" * 200), Tile(15, 4, b"efgh", 256))
SECTIONS = (Section(EXIF, b"exif"), Section(b"what", b"?"), Section(XMP, b""))
FILE = pack(HEADER, TILES, SECTIONS)
TILE_BYTES = sum(len(tile.words) for tile in TILES)


def patched(offset: int, fmt: str, value: Any, file: bytes = FILE) -> bytes:
    """The file with another header field and a header CRC to match."""
    head = bytearray(file[: HEADER_SIZE - 4])
    struct.pack_into(fmt, head, offset, value)
    return bytes(head) + struct.pack("<I", zlib.crc32(head)) + file[HEADER_SIZE:]


def section(tag: bytes, payload: bytes, flags: int = 0, length: bytes | None = None) -> bytes:
    body = tag + bytes([flags]) + (bytes([len(payload)]) if length is None else length) + payload
    return body + struct.pack("<I", zlib.crc32(body))


@st.composite
def containers(draw: st.DrawFn) -> Container:
    mode = draw(st.sampled_from(Mode))
    header = Header(
        draw(st.sampled_from(Kind)),
        mode,
        draw(st.integers(1, 300)),
        draw(st.integers(1, 300)),
        draw(st.integers(9, 16)) if mode.name.endswith(";16") else 8,
        draw(st.integers(0, 10_000)),
        draw(st.integers(0, 255)),
        draw(st.integers(1, 1023)) * 64,
        draw(st.binary(min_size=16, max_size=16)),
    )
    tile = st.builds(
        Tile, st.integers(0, 15), st.integers(0, 2**32 - 1), st.binary(max_size=300), st.sampled_from(LANES)
    )
    tiles = draw(st.lists(tile, min_size=header.tile_count, max_size=header.tile_count))
    tags = draw(st.lists(st.sampled_from([EXIF, ICC, XMP, b"junk"]), unique=True))
    sections = [Section(tag, draw(st.binary(max_size=300))) for tag in tags]
    return Container(header, tuple(tiles), tuple(sections))


@settings(max_examples=60, deadline=None)
@given(containers())
def test_round_trip(container: Container) -> None:
    data = pack(container.header, container.tiles, container.sections)
    for form in (data, bytearray(data), memoryview(data)):
        read = unpack(form)
        assert read == container
        assert pack(read.header, read.tiles, read.sections) == data
    assert read_header(data[:HEADER_SIZE]) == container.header


def test_tiles_are_views() -> None:
    words = unpack(FILE).tiles[2].words
    assert isinstance(words, memoryview) and words.obj is FILE and words.readonly


def test_overhead_is_small() -> None:
    one = replace(HEADER, width=768, height=512, tile=1024)
    assert len(pack(one, [Tile(0, 0, bytes(30_000))])) - 30_000 == 64


def test_every_prefix_is_truncated() -> None:
    for end in range(len(FILE)):
        with pytest.raises(TruncatedError):
            unpack(FILE[:end])


def test_every_flip_is_found() -> None:
    for at in range(len(FILE) - TILE_BYTES):
        for bit in range(8):
            damaged = bytearray(FILE)
            damaged[at] ^= 1 << bit
            with pytest.raises(VaeError):
                unpack(damaged)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(FILE)))
def test_junk_is_refused(junk: bytes, at: int) -> None:
    for data in (junk, FILE[:at] + junk, FILE[:at] + junk + FILE[at:], FILE + junk):
        try:
            assert pack(*(lambda c: (c.header, c.tiles, c.sections))(unpack(data))) == data
        except VaeError:
            assert data != FILE


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b"", TruncatedError, "header"),
        (b"\x89PNG\r\n\x1a\n", CorruptError, "not a .vae file"),
        (FILE.replace(b"\r\n", b"\n", 1), CorruptError, "not a .vae file"),
        (MAGIC + b"\x00\x05", VersionError, "newer"),
        (patched(8, "B", 1), VersionError, "newer"),
        (patched(9, "B", 0), CorruptError, "checksum"),
        (patched(10, "B", 4), VersionError, "kind 4"),
        (patched(11, "B", 0), VersionError, "mode 0"),
        (patched(12, "B", 9), CorruptError, "depth 9"),
        (patched(14, "<H", 10_001), CorruptError, "quality 10001"),
        (patched(16, "<H", 0), CorruptError, "tile size 0"),
        (patched(16, "<H", 65), CorruptError, "tile size 65"),
        (patched(18, "<I", 0), CorruptError, "width 0"),
        (patched(22, "<I", 0), CorruptError, "height 0"),
        (patched(22, "<I", 129), CorruptError, "directory is too short"),
        (patched(22, "<I", 64), CorruptError, "follow"),
        (patched(18, "<I", 2**17 + 1), LimitError, "limits"),
        (patched(22, "<I", 2**32 - 1), LimitError, "limits"),
        (FILE + b"\0", CorruptError, "follow"),
    ],
)
def test_broken_files(data: bytes, error: type[VaeError], match: str) -> None:
    with pytest.raises(VaeError, match=match) as caught:
        unpack(data)
    assert caught.type is error


ONE = replace(HEADER, width=1, height=1)
TILE = b"\0\2" + b"crcs"


@pytest.mark.parametrize(
    ("rest", "error", "match"),
    [
        (section(b"NEW ", b"", 1), VersionError, "NEW"),
        (section(b"NEW ", b"", 2), VersionError, "flags 2"),
        (section(b"NEW\x7f", b""), CorruptError, "tag"),
        (section(b"EXIF", b"") * 2, CorruptError, "twice"),
        (section(b"EXIF", b"", 0, b"\x80\x00"), CorruptError, "shortest"),
        (section(b"EXIF", b"", 0, b"\xff" * 10 + b"\x01"), CorruptError, "64 bits"),
        (section(b"EXIF", b"", 0, b"\xff" * 9 + b"\x02"), CorruptError, "64 bits"),
        (section(b"EXIF", b"", 0, b"\xff" * 9 + b"\x01"), LimitError, "EXIF"),
        (section(b"ICCP", b"", 0, b"\x81\x80\x80\x02"), LimitError, "ICCP"),
        (section(b"TILE", b"", 0, b"\xff" * 9 + b"\x01"), TruncatedError, "TILE"),
        (b"".join(section(b"n%03d" % i, b"") for i in range(65)), LimitError, "64 sections"),
        (section(b"TILE", b"", 1), CorruptError, "too short"),
        (section(b"TILE", TILE[:-1], 1), CorruptError, "too short"),
        (section(b"TILE", b"\0\x80", 1), CorruptError, "too short"),
        (section(b"TILE", TILE + b"\0", 1) + b"ww", CorruptError, "follow"),
        (section(b"TILE", TILE + bytes(10), 1) + b"ww", CorruptError, "too long"),
        (section(b"TILE", TILE, 0) + b"ww", CorruptError, "not marked as critical"),
        (section(b"TILE", TILE, 1) + b"w", TruncatedError, "tiles"),
        (section(b"TILE", TILE, 1) + b"www", CorruptError, "follow"),
        (section(b"TILE", b"\0" + b"\xff" * 9 + b"\x01crcs", 1), TruncatedError, "tiles"),
        (section(b"NEW ", b"kept") + section(b"TILE", TILE, 1) + b"ww", None, ""),
    ],
)
def test_broken_sections(rest: bytes, error: type[VaeError] | None, match: str) -> None:
    data = pack(ONE, [Tile(0, 0, b"")])[:HEADER_SIZE] + rest
    if error is None:
        assert unpack(data).sections == (Section(b"NEW ", b"kept"),)
        return
    with pytest.raises(VaeError, match=match) as caught:
        unpack(data)
    assert caught.type is error


def test_limits_come_before_allocation() -> None:
    huge = patched(18, "<I", 2**17, patched(22, "<I", 1365))  # 45,056 tiles
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="too short"):
            unpack(huge)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    for limits in (
        Limits(max_pixels=6999),
        Limits(max_side=99),
        Limits(max_tiles=3),
        Limits(max_metadata=3),
        Limits(max_sections=2),
    ):
        with pytest.raises(LimitError):
            unpack(FILE, limits)
    assert unpack(FILE, Limits(max_pixels=7000, max_side=100, max_tiles=4, max_metadata=4, max_sections=3))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"height": 2**32},
        {"depth": 16},
        {"quality": -1},
        {"colour": 256},
        {"tile": 96},
        {"model": b""},
    ],
)
def test_header_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        replace(HEADER, **change)


def test_writer_refuses() -> None:
    with pytest.raises(ValueError, match="3 tiles"):
        pack(HEADER, TILES[:3])
    for sections in ([Section(b"TILE", b"")], [Section(EXIF, b"")] * 2):
        with pytest.raises(ValueError, match="tag"):
            pack(HEADER, TILES, sections)
    for tag in (b"abc", b"abcde", b"ab\nc"):
        with pytest.raises(ValueError, match="tag"):
            Section(tag, b"")
    for method, crc, lanes in ((16, 0, 1), (0, 2**32, 1), (-1, 0, 1), (0, 0, 3), (0, 0, 512)):
        with pytest.raises(ValueError, match="not allowed"):
            Tile(method, crc, b"", lanes)


def test_exit_codes() -> None:
    errors = (VaeError, CorruptError, TruncatedError, VersionError, LimitError)
    assert [error.exit_code for error in errors] == [1, 3, 3, 3, 5]
