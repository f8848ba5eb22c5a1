"""What is left of a damaged file: the good tiles, and which are not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_CPU, cli, picture
from PIL import Image

from bitstream import CorruptError, Tile, TruncatedError, VersionError, pack, unpack
from vaecodec import Codec
from vaecodec.tiles import Region

MARGIN = 32  # pixels that a lossy tile sees of its neighbours
TILES = [(x, y, min(64, 150 - x), min(64, 100 - y)) for y in (0, 64) for x in (0, 64, 128)]


@pytest.fixture(scope="module")
def files(tiled_codec: Codec) -> dict[bool, bytes]:
    """A lossy and a lossless file of six tiles."""
    return {lossless: tiled_codec.compress(picture(150, 100), lossless=lossless) for lossless in (False, True)}


def broken(data: bytes, number: int) -> bytes:
    """With one tile of other words."""
    file = unpack(data)
    tiles = [replace(tile, words=bytes(tile.words)) for tile in file.tiles]
    tiles[number] = Tile(tiles[number].method, tiles[number].crc, b"\1" + bytes(tiles[number].words)[1:])
    return pack(file.header, tiles)


def grown(region: Region, margin: int) -> tuple[slice, slice]:
    x, y, width, height = region
    return slice(max(0, y - margin), y + height + margin), slice(max(0, x - margin), x + width + margin)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("number", [0, 4])
def test_a_damaged_tile_is_zero_and_named(codec: Codec, files: dict[bool, bytes], lossless: bool, number: int) -> None:
    whole, data, damaged = codec.decode_array(files[lossless]), broken(files[lossless], number), list[Region]()
    with pytest.raises(CorruptError):
        codec.decode_array(data)
    decoded = codec.decode_array(data, damaged=damaged)
    assert damaged == [TILES[number]]
    assert (decoded[grown(TILES[number], 0)] == 0).all()
    differs = (decoded != whole).any(2)
    differs[grown(TILES[number], 0 if lossless else MARGIN)] = False
    assert not differs.any()


@pytest.mark.parametrize("lossless", [False, True])
def test_a_file_that_ends_early(codec: Codec, files: dict[bool, bytes], lossless: bool) -> None:
    data, counts = files[lossless], list[int]()
    whole = codec.decode_array(data)
    start = len(data) - sum(len(tile.words) for tile in unpack(data).tiles)
    for end in (*range(start, len(data), (len(data) - start) // 5), len(data)):
        damaged = list[Region]()
        decoded = codec.decode_array(data[:end], damaged=damaged)
        assert damaged == TILES[6 - len(damaged) :]
        assert (decoded == whole)[:32, :32].all() or TILES[1] in damaged
        counts.append(len(damaged))
    assert counts[0] == 6 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    with pytest.raises(TruncatedError):
        codec.decode_array(data[: start - 1], damaged=[])
    with pytest.raises(CorruptError):
        codec.decode_array(data + b"\0", damaged=[])


@pytest.mark.parametrize("lossless", [False, True])
def test_a_region_names_the_tiles_that_it_needed(codec: Codec, files: dict[bool, bytes], lossless: bool) -> None:
    data, damaged = broken(files[lossless], 4), list[Region]()
    region = codec.decode_array(data, region=(0, 0, 50, 40), damaged=damaged)
    expected = codec.decode_array(files[lossless], region=(0, 0, 50, 40))
    if lossless:
        assert damaged == [] and (region == expected).all()
    else:
        assert damaged == [TILES[4]] and (region == expected)[:32, :32].all()


def test_what_is_not_damage_stays_an_error(codec: Codec, files: dict[bool, bytes]) -> None:
    file = unpack(files[True])
    newer = pack(file.header, [replace(file.tiles[0], method=9), *file.tiles[1:]])
    with pytest.raises(VersionError):
        codec.decode_array(newer, damaged=[])


def test_the_command_says_which(tmp_path: Path, files: dict[bool, bytes]) -> None:
    source = tmp_path / "x.vae"
    source.write_bytes(files[False][:-1])
    assert cli("decompress", source, *TINY_CPU).exit_code == 3
    result = cli("decompress", source, "--allow-partial", "--quiet", *TINY_CPU)
    assert result.exit_code == 1 and result.stderr == f"vaecodec: {source}: 1 of 6 tiles are damaged: 128,64,22,36\n"
    with Image.open(tmp_path / "x.png") as image:
        assert not np.asarray(image)[64:, 128:].any() and np.asarray(image)[:64, :64].any()


def test_the_command_takes_limits(tmp_path: Path, files: dict[bool, bytes]) -> None:
    source = tmp_path / "x.vae"
    source.write_bytes(files[False])
    for command in (("decompress", source, "--overwrite"), ("verify", source)):
        assert cli(*command, "--max-pixels", 14_999, *TINY_CPU).exit_code == 5
        assert cli(*command, "--max-pixels", 15_000, *TINY_CPU).exit_code == 0
