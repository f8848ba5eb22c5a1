"""What the library writes, a decoder written from FORMAT.md alone reads, and both refuse the same files."""

import hashlib
import json
import re
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder as second
from conftest import picture
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import bitstream
from bitstream import (
    EXIF,
    ICC,
    AnsStack,
    CorruptError,
    LimitError,
    Section,
    TruncatedError,
    VaeError,
    VersionError,
    pack,
    push_plain,
    unpack,
)
from vaecodec import Codec
from vaecodec.lossy import misfits

GOLDEN = Path(__file__).parent / "golden"
TEXT = (Path(bitstream.__file__).parent / "FORMAT.md").read_text("utf-8")
NAMES = {CorruptError: "corrupt", TruncatedError: "truncated", VersionError: "version", LimitError: "limit"}


def lettering(mode: str, size: tuple[int, int] = (90, 40)) -> NDArray[np.uint8]:
    image = Image.new("RGBA", size, (250, 250, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.text((4, 3), "plain text\nand more", (10, 10, 60, 255))
    draw.rectangle((60, 20, size[0] - 5, size[1] - 3), (200, 30, 30, 128), (0, 0, 0, 255))
    return np.asarray(image.convert(mode))


def deep(channels: int) -> NDArray[np.uint16]:
    y, x, c = np.mgrid[:30, :40, :channels]
    return ((x * 400 + y * 300 + c * 77) % 65536).astype(np.uint16)


PICTURES: dict[str, Any] = {
    "L": lettering("L"),
    "LA": lettering("LA"),
    "RGB": lettering("RGB"),
    "RGBA": lettering("RGBA"),
    "flat": np.full((50, 30, 3), (1, 2, 3), np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8),
    "one pixel": np.array([[[7, 8]]], np.uint8),
    "column": np.arange(100, dtype=np.uint8)[:, None],
    "16-bit grey": deep(1),
    "16-bit colour": deep(3),
    "16-bit colour and alpha": deep(4),
    "16-bit noise": np.random.default_rng(0).integers(0, 2**16, (20, 30, 4), np.uint16),
    "many tiles": lettering("RGB", (150, 80)),
}


@pytest.mark.parametrize("bits", [8, 16])
def test_fitted_pictures(bits: int) -> None:
    """Photographs of a size for which weights are stated; 16 bits and sharp edges make no difference."""
    samples = np.asarray(picture(256, 130)).astype(np.uint16)
    samples = samples if bits == 8 else samples[..., :1] * 257 + 3
    samples[20:40, 30:90] = 0
    stack = AnsStack()
    push_plain(stack, samples, bits)
    coder = second.Coder(stack.to_bytes())
    assert (np.array(second.pop_plain(coder, *samples.shape, bits)) == samples).all()
    assert coder.empty


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(codec: Codec, name: str, small_tiles: None) -> None:
    data = codec.compress(PICTURES[name], lossless=True)
    tiles = unpack(data).tiles
    assert {tile.method for tile in tiles} == ({3} if name in ("noise", "16-bit noise", "one pixel") else {2})
    assert len(tiles) == 6 or name != "many tiles"
    decoded = second.decode(data)
    assert (np.array(decoded) == codec.decode_array(data)).all()
    assert (np.array(decoded).squeeze() == PICTURES[name].squeeze()).all()


@pytest.mark.usefixtures("doubts", "small_tiles")
@pytest.mark.parametrize("name", ["L", "RGBA", "flat", "16-bit noise", "many tiles", "grey"])
def test_lossy_pictures(codec: Codec, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misfits, "signs", lambda *_: misfits.Signs(0.0, 0.0))
    samples = PICTURES["L"][..., None].repeat(3, 2) if name == "grey" else PICTURES[name]
    data = codec.compress(samples, 100)
    file = unpack(data)
    assert (file.header.kind, file.header.colour) == (1, int(name == "grey"))
    assert {tile.method for tile in file.tiles} == ({3} if name == "16-bit noise" else {2})
    decoded = np.array(second.decode(data))
    assert (decoded == codec.decode_array(data)).all() and (decoded.squeeze() == samples.squeeze()).all()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/*.vae")), ids=lambda path: path.stem)
def test_golden_files(path: Path) -> None:
    header, _, tiles = second.read(path.read_bytes())
    if header.kind < 3 and {tile.method for tile in tiles} <= {2, 3}:
        samples = np.array(second.decode(path.read_bytes()), "<u1" if header.depth == 8 else "<u2")
        hashes = json.loads((path.parent / "hashes.json").read_text())
        assert hashlib.sha256(samples.tobytes()).hexdigest() == hashes[path.stem]


def test_sections_and_tiles_of_networks(codec: Codec) -> None:
    plain = unpack(codec.compress(picture(40, 30)))
    data = pack(plain.header, plain.tiles, [Section(EXIF, b"exif"), Section(b"new ", b"?"), Section(ICC, b"")])
    header, sections, tiles = second.read(data)
    assert header == (*[getattr(plain.header, name) for name in header._fields],)
    assert sections == {b"EXIF": b"exif", b"new ": b"?", b"ICCP": b""}
    assert [(tile.method, tile.crc, tile.data, tile.lanes) for tile in tiles] == [
        (tile.method, tile.crc, tile.words, tile.lanes) for tile in plain.tiles
    ]
    with pytest.raises(second.RefusedError, match="version"):
        second.decode(data)


def judged(codec: Codec, data: bytes) -> object:
    try:
        return codec.decode_array(data).tolist()
    except VaeError as error:
        return NAMES[type(error)]


def judged_by_second(data: bytes) -> object:
    try:
        return second.decode(data)
    except second.RefusedError as error:
        return error.args[0]


def test_both_judge_damaged_files_alike(codec: Codec) -> None:
    file = unpack(codec.compress(lettering("LA")[:16, :24], lossless=True))
    data = pack(file.header, file.tiles, [Section(EXIF, b"exif"), Section(b"new ", b"?")])
    assert file.tiles[0].method == 2
    damaged = [data[:end] for end in range(len(data))]
    tile = len(data) - len(file.tiles[0].words)
    for at in [*range(tile), *range(tile, len(data), 5)]:
        flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        damaged += [flipped, data[:at] + data[at + 1 :], data[:at] + b"\0" + data[at:]]
        damaged += [with_crc(flipped)] * (at < 42)
    verdicts = set[object]()
    for one in [*damaged, data, data + b"\0"]:
        judgement = judged(codec, one)
        assert judged_by_second(one) == judgement, one.hex(" ")
        verdicts.add(str(judgement))
    assert verdicts > {"corrupt", "truncated", "version", "limit"}


def with_crc(data: bytes) -> bytes:
    """With a header CRC to match."""
    return data[:42] + struct.pack("<I", zlib.crc32(data[:42])) + data[46:]


# The examples in FORMAT.md


def block(name: str) -> str:
    found = re.search(rf"```{name}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found[1]


def test_example_of_an_array_and_of_a_file() -> None:
    lines = [re.sub(r"^(values|ids|words|on top of) +", "", line) for line in block("vector").splitlines()]
    values, ids = ([int(number) for number in line.split()] for line in lines[:2])
    lows, counts = [-1, 0], [[4194304, 8388608, 2097152, 2097152], [1048576, 15728640]]
    data = bytes.fromhex("".join(line.partition("   ")[0] for line in block("dump").splitlines()))
    header, sections, (tile,) = second.read(data)
    assert (header.width, header.height, sections) == (5, 3, {b"XMP ": b"<x/>"})
    for words, below in ((bytes.fromhex(lines[2]), b""), (bytes.fromhex(lines[4]), bytes.fromhex(lines[3]))):
        coder = second.Coder(words)
        assert second.pop_values(coder, lows, counts, True, ids) == values
        (lane,) = coder.lanes
        rest = [*lane.stack, lane.state % 2**32, lane.state >> 32]
        assert struct.pack(f"<{len(rest)}I", *rest) == (below or bytes(8))
    coder = second.Coder(bytes.fromhex(block("lanes").replace("\n", " ")), 2)
    assert second.pop_values(coder, lows, counts, True, ids * 40) == values * 40 and coder.empty
    assert tile == (0, zlib.crc32(struct.pack("<8i", *values)), bytes.fromhex(lines[2]), 1, ())


def test_example_of_a_plain_picture() -> None:
    coder = second.Coder(bytes.fromhex(block("plain")))
    pixels = [[[9 * x * y, 40 * x + y, 250 - 3 * x] for x in range(4)] for y in range(3)]
    assert second.pop_plain(coder, 3, 4, 3, 8) == pixels and coder.empty


def test_tables_of_ranks() -> None:
    counts = b"".join(
        struct.pack("<288I", *(b - a for a, b in pairwise(lefts))) for lefts in map(second.rank_table, range(312))
    )
    head = struct.pack("<BI", 0, 312) + bytes(4 * 312) + struct.pack("<I", 288) * 312
    digest = hashlib.sha256(head + counts).hexdigest()
    assert digest in TEXT
