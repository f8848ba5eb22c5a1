"""What the networks are no good at: tiles of lossy files without them, and pictures whose colours are equal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture, same
from numpy.typing import NDArray
from PIL import Image

from bitstream import PLAIN, RAW, SPARSE, CorruptError, Kind, Mode, VersionError, pack, unpack
from vaecodec import Codec
from vaecodec.lossless.tile import TileCoder
from vaecodec.lossy import misfits
from vaecodec.lossy.layers import lagrangian
from vaecodec.tiles import Region

RNG = np.random.default_rng(0)
Y, X = np.mgrid[:96, :128]

LAMBDA = 0.25


def of(colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((64, 64, 3), colour, np.uint8)


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    error = np.square(a.astype(float) - b).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.fixture(scope="module")
def shipped_codec() -> Codec:
    """With the packaged weights."""
    return Codec("cpu")


def photograph() -> NDArray[np.uint8]:
    return np.asarray(picture(128, 96))


def grid(colours: bool) -> NDArray[np.uint8]:
    board = ((X + Y) % 2 * 255).astype(np.uint8)
    return np.stack([board, 255 - board, board], 2) if colours else np.stack([board] * 3, 2)


MISFITS: dict[str, Callable[[], NDArray[np.uint8]]] = {
    "checkerboard": lambda: grid(False),
    "checkerboard of colours": lambda: grid(True),
    "stripes": lambda: np.stack([(Y % 2 * 255).astype(np.uint8)] * 3, 2),
    "noise": lambda: RNG.integers(0, 256, (96, 128, 3), np.uint8),
    "black and white noise": lambda: RNG.integers(0, 2, (96, 128, 1), np.uint8).repeat(3, 2) * 255,
    "green slope": lambda: np.stack([0 * X, 128 + X, 0 * X], 2).astype(np.uint8),
    "green photograph": lambda: photograph() * np.array([0, 1, 0], np.uint8),
    "magenta photograph": lambda: np.maximum(photograph(), 128) * np.array([1, 0, 1], np.uint8),
    "slope": lambda: np.stack([X, X + Y, 2 * Y], 2).astype(np.uint8),
    "letters": lambda: np.asarray(Image.fromarray(photograph()).convert("1").convert("RGB")),
    "few levels": lambda: photograph() // 128 * 255,
}


@pytest.mark.usefixtures("doubts", "shipped")
@pytest.mark.parametrize(
    "colour", [(0, 255, 0), (255, 0, 255), (51, 255, 0), (204, 0, 255), (255, 255, 255), (9, 9, 9)]
)
def test_flat_colours(shipped_codec: Codec, colour: tuple[int, int, int]) -> None:
    for quality in (0, 75, 100):
        for samples in (of(colour), of(colour)[:1, :1]):
            data = shipped_codec.compress(samples, quality)
            assert (shipped_codec.decode_array(data) == samples).all()
            assert len(data) <= 80


@pytest.mark.usefixtures("doubts", "shipped")
@pytest.mark.parametrize("name", MISFITS)
def test_no_picture_is_worse_than_lambda_allows_or_larger_than_without_networks(
    shipped_codec: Codec, name: str
) -> None:
    samples = MISFITS[name]()
    plain = TileCoder(None, 8).push(samples)
    for quality in (0, 50, 100):
        data = shipped_codec.compress(samples, quality)
        (tile,) = unpack(data).tiles
        assert len(tile.words) <= len(plain.words)
        decoded = shipped_codec.decode_array(data).astype(float)
        pixels, weight = samples.shape[0] * samples.shape[1], float(lagrangian(torch.tensor([quality * 100]), LAMBDA))
        assert weight * np.square(decoded - samples).mean() <= 8 * len(plain.words) / pixels + 0.01
    assert psnr(decoded, samples) > 33


def test_photographs_are_not_doubted(photo: Image.Image) -> None:
    samples = np.asarray(photo)
    for bits, quality in ((0.1, 0), (0.5, 50), (1.5, 75), (2.5, 90)):
        assert not misfits.signs(samples, 8).doubtful(bits, float(lagrangian(torch.tensor([quality * 100]), LAMBDA)))
        assert not misfits.signs(samples.astype(np.uint16) * 257, 16).doubtful(bits, 0.0)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 1), (1, 70), (70, 1), (4, 4)])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.usefixtures("doubts")
def test_every_size_and_mode(tiny: Codec, size: tuple[int, int], mode: str) -> None:
    image = picture(*size, mode)
    for quality in (0, 100):
        data = tiny.compress(image, quality)
        assert tiny.decompress(data).size == size
        assert len(data) <= len(Codec("cpu").compress(image, lossless=True)) if size == (1, 1) else True


# Tiles without networks among others


def mixed(places: set[int]) -> Callable[[Any, int], misfits.Signs]:
    """Instead of ``signs``: tiles are without networks by their number in the order of work."""
    numbers = iter(range(1000))
    return lambda _samples, _depth: misfits.Signs(0.0 if next(numbers) in places else np.inf, 0.0)


@pytest.fixture
def half(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> tuple[NDArray[np.uint8], bytes]:
    """200 x 150 pixels in twelve tiles, of which the sixth, seventh and last are without networks."""
    monkeypatch.setattr(misfits, "signs", mixed({5, 6, 11}))
    samples = np.asarray(picture(200, 150))
    return samples, tiny.compress(samples, 100)


NEEDS = pytest.mark.usefixtures("doubts", "small_tiles")


@NEEDS
def test_tiles_among_others(tiny: Codec, half: tuple[NDArray[np.uint8], bytes]) -> None:
    samples, data = half
    methods = [tile.method for tile in unpack(data).tiles]
    assert [n for n, method in enumerate(methods) if method in (PLAIN, RAW)] == [5, 6, 11]
    decoded = tiny.decode_array(data)
    for top, left in ((64, 64), (64, 128), (128, 192)):
        assert (decoded[top : top + 64, left : left + 64] == samples[top : top + 64, left : left + 64]).all()
    for region in ((0, 0, 200, 150), (60, 60, 10, 10), (70, 70, 100, 20), (0, 100, 64, 50), (199, 149, 1, 1)):
        x, y, w, h = region
        assert (tiny.decode_array(data, region=region) == decoded[y : y + h, x : x + w]).all()
    assert sum(part.size for _, part in tiny.decode_tiles(data)) == samples.size


@NEEDS
def test_the_picture_ends_at_a_tile_without_networks(tiny: Codec) -> None:
    """Left of such a tile everything is as if the picture had no more columns, in the encoder and in the decoder."""
    samples = np.asarray(picture(128, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(misfits, "signs", mixed({1}))
        both = unpack(tiny.compress(samples, 80))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(misfits, "signs", mixed(set()))
        alone = unpack(tiny.compress(np.ascontiguousarray(samples[:, :64]), 80))
    left, right = both.tiles
    assert right.method in (PLAIN, RAW) and bytes(left.words) == bytes(alone.tiles[0].words)
    decoded = tiny.decode_array(pack(both.header, both.tiles))
    assert (decoded[:, :64] == tiny.decode_array(pack(alone.header, alone.tiles))).all()


@NEEDS
def test_effort_and_progress_with_such_tiles(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misfits, "signs", mixed({1}))
    counts = list[int]()
    data = tiny.compress(picture(90, 20), 80, counts.append, effort=1)
    assert [tile.method == SPARSE for tile in unpack(data).tiles] == [True, False]
    assert sum(counts) == 96 * 32 and tiny.decompress(data).size == (90, 20)


@NEEDS
def test_damage_beside_such_a_tile(tiny: Codec, half: tuple[NDArray[np.uint8], bytes]) -> None:
    _, data = half
    file, decoded = unpack(data), tiny.decode_array(data)
    tiles = list(file.tiles)
    tiles[5] = replace(tiles[5], crc=tiles[5].crc ^ 1)
    broken, damaged = pack(file.header, tiles), list[Region]()
    with pytest.raises(CorruptError):
        tiny.decode_array(broken)
    partial = tiny.decode_array(broken, damaged=damaged)
    assert damaged == [(64, 64, 64, 64)] and not partial[64:128, 64:128].any()
    # The networks of its neighbours never asked for it.
    partial[64:128, 64:128] = decoded[64:128, 64:128]
    assert (partial == decoded).all()
    # A region beside it does not read it.
    assert (tiny.decode_array(broken, region=(0, 0, 64, 64)) == decoded[:64, :64]).all()


@NEEDS
@pytest.mark.parametrize("words", [b"", b"\1\0\0\0", bytes(range(1, 41)), b"\xff" * 400])
def test_hostile_tiles(tiny: Codec, half: tuple[NDArray[np.uint8], bytes], words: bytes) -> None:
    _, data = half
    file = unpack(data)
    for method in (PLAIN, RAW):
        tiles = [replace(tile, method=method, words=words) if n == 5 else tile for n, tile in enumerate(file.tiles)]
        with pytest.raises(CorruptError):
            tiny.decode_array(pack(file.header, tiles))
    for method in (4, 15):
        with pytest.raises(VersionError):
            tiny.decode_array(pack(file.header, [replace(tile, method=method) for tile in file.tiles]))


@pytest.mark.usefixtures("doubts")
def test_files_without_networks_need_no_weights(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.compress(of((0, 255, 0)))
    monkeypatch.setattr(Codec, "lossy", property(lambda _: pytest.fail("weights are loaded")))
    assert (Codec("cpu").decode_array(data) == of((0, 255, 0))).all()


# Equal colours


def grey_twins(mode: str) -> tuple[Image.Image, Image.Image]:
    """In a mode with colours that are equal, and in the one without."""
    grey = picture(150, 90, "L" if mode == "RGB" else "LA")
    if mode == "RGBA":
        grey.putalpha(picture(150, 90, "L", seed=3))
    return grey.convert(mode), grey


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_grey_stays_grey(codec: Codec, mode: str, lossless: bool) -> None:
    colour, grey = grey_twins(mode)
    for quality in (0, 60, 100):
        data, twin = (codec.compress(image, quality, lossless=lossless) for image in (colour, grey))
        assert len(data) == len(twin)
        assert [tile.words for tile in unpack(data).tiles] == [tile.words for tile in unpack(twin).tiles]
        assert unpack(data).header.colour == 1
        decoded = codec.decompress(data)
        assert decoded.mode == mode and same(decoded, codec.decompress(twin).convert(mode))
        assert (codec.decode_array(data) == np.asarray(decoded)).all()
        assert np.ptp(np.asarray(decoded)[..., :3].astype(int), 2).max() == 0
        assert not lossless or same(decoded, colour)
        region = codec.decompress(data, region=(30, 20, 50, 40))
        assert same(region, decoded.crop((30, 20, 80, 60)))


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_deep_grey_stays_grey(codec: Codec, lossless: bool, channels: int) -> None:
    samples = (np.asarray(picture(60, 40, "L")).astype(np.uint16) * 16)[..., None].repeat(channels, 2)
    samples[..., 3:] = 99
    data = codec.compress(samples, lossless=lossless, depth=12)
    decoded = codec.decode_array(data)
    assert unpack(data).header.colour == 1 and decoded.shape == samples.shape and decoded.dtype == samples.dtype
    assert np.ptp(decoded[..., :3].astype(int), 2).max() == 0 and (decoded[..., 3:] == 99).all()
    assert not lossless or (decoded == samples).all()


def test_other_sources_of_grey(codec: Codec) -> None:
    grey = np.asarray(picture(40, 30, "L"))[..., None].repeat(3, 2)
    data = codec.compress(grey)
    assert data == codec.compress(Image.fromarray(grey)) == codec.compress(torch.from_numpy(grey).permute(2, 0, 1))
    assert data == codec.compress(np.asfortranarray(grey)) == codec.compress_batch(grey[None])[0]
    palette = Image.fromarray(grey).quantize(9)
    assert codec.decompress(codec.compress(palette, lossless=True)).mode == "RGB"
    stream = io.BytesIO(data)
    assert (codec.decode_tensor(stream).numpy() == codec.decode_array(data).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("where", [(0, 0), (29, 39), (15, 16)])
def test_one_pixel_of_colour_is_colour(codec: Codec, where: tuple[int, int]) -> None:
    samples = np.asarray(picture(40, 30, "L"))[..., None].repeat(3, 2)
    for channel in range(3):
        changed = samples.copy()
        changed[(*where, channel)] ^= 1
        data = codec.compress(changed, lossless=True)
        assert unpack(data).header.colour == 0 and (codec.decode_array(data) == changed).all()


def test_equal_colours_of_modes_without_any(codec: Codec) -> None:
    for kind in (False, True):
        file = unpack(codec.compress(picture(20, 10, "L"), lossless=kind))
        with pytest.raises(CorruptError):
            codec.decode_array(pack(replace(file.header, colour=1), file.tiles))
    deep = unpack(codec.compress(np.zeros((8, 8), np.uint16), lossless=True))
    assert (deep.header.kind, deep.header.mode) == (Kind.LOSSLESS, Mode["I;16"])
    with pytest.raises(CorruptError):
        codec.decode_array(pack(replace(deep.header, colour=1), deep.tiles))
