"""Lossless files: what goes in comes out, in few enough bytes, whichever way each tile takes."""

import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, TINY_CPU, cli, moving, names, picture, refined, same, saved
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from PIL import Image

import vaecodec.kinds
from bitstream import (
    BITS_BACK,
    PLAIN,
    RAW,
    ROUNDED,
    AnsStack,
    CorruptError,
    Kind,
    LimitError,
    Limits,
    Mode,
    Tile,
    VaeError,
    VersionError,
    pack,
    push_plain,
    unpack,
)
from vaecodec import Codec
from vaecodec.exact import exact_arithmetic
from vaecodec.image import ImageError, Samples, samples_of
from vaecodec.kinds import packaged
from vaecodec.lossless.heads import Phase
from vaecodec.lossless.layers import CHANNEL_ORDER, PHASES, SHAPES, scale_of
from vaecodec.lossless.samples import OFTEN, PixelCodec
from vaecodec.lossless.tile import COLOURS, Latents, Network, TileCoder
from vaecodec.lossless.weights import LosslessWeights
from vaecodec.plain_tiles import crc_of
from vaecodec.weights import WeightsError

DEVICE = torch.device("cpu")
SIDES = st.integers(1, 70)
MODES = ["L", "LA", "RGB", "RGBA"]

Array = NDArray[Any]


def push_by_networks(coder: TileCoder, samples: Samples) -> Tile:
    assert coder.weights is not None
    return coder._push_network(coder.weights, samples)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are coded by the networks even where another way is shorter."""
    monkeypatch.setattr(TileCoder, "push", push_by_networks)


@pytest.fixture(params=["smallest", "networks"])
def way(request: pytest.FixtureRequest) -> None:
    """Each tile goes the shortest way, or all by the networks."""
    if request.param == "networks":
        request.getfixturevalue("networks")


def photograph(width: int, height: int, mode: str, seed: int = 0) -> Image.Image:
    """``picture`` with alpha that is a picture as well."""
    image = picture(width, height, mode.removesuffix("A"), seed)
    if mode.endswith("A"):
        image.putalpha(picture(width, height, "L", seed + 1))
    return image


def noise(height: int, width: int, mode: str, depth: int = 8) -> Array:
    channels = {"L": 1, "I;16": 1, "LA": 2, "RGB": 3, "RGB;16": 3, "RGBA": 4, "RGBA;16": 4}[mode]
    values = np.random.default_rng(0).integers(0, 2**depth, (height, width, channels))
    return values.astype(np.uint8 if depth == 8 else np.uint16)


def methods(data: bytes) -> list[int]:
    return [tile.method for tile in unpack(data).tiles]


# Round trips


@pytest.mark.usefixtures("way")
def test_any_size_and_mode(lossless_codec: Codec) -> None:
    @settings(max_examples=20)
    @given(SIDES, SIDES, st.sampled_from(MODES), st.integers(0, 99))
    def check(width: int, height: int, mode: str, seed: int) -> None:
        image = photograph(width, height, mode, seed)
        assert same(lossless_codec.decompress(lossless_codec.compress(image, lossless=True)), image)

    check()


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 5), (1, 70), (70, 1), (33, 17), (64, 64)])
def test_sizes_that_leave_phases_empty(lossless_codec: Codec, size: tuple[int, int], mode: str) -> None:
    image = photograph(*size, mode)
    assert same(lossless_codec.decompress(lossless_codec.compress(image, lossless=True)), image)


@pytest.mark.parametrize(
    ("mode", "depth"), [("I;16", 16), ("I;16", 12), ("RGB;16", 16), ("RGB;16", 9), ("RGBA;16", 16)]
)
def test_deep_samples(lossless_codec: Codec, mode: str, depth: int) -> None:
    samples = noise(23, 31, mode, depth) // 2 + np.arange(31, dtype=np.uint16)[:, None]
    for part in (samples, samples[:1, :1], np.full_like(samples, 2**depth - 1)):
        data = lossless_codec.compress(part, lossless=True, depth=depth)
        assert set(methods(data)) <= {PLAIN, RAW} and unpack(data).header.depth == depth
        decoded = lossless_codec.decode_array(data)
        assert decoded.dtype == np.uint16 and np.array_equal(decoded, part)


def test_deep_grey_is_a_picture_and_deep_colour_only_an_array(lossless_codec: Codec) -> None:
    grey, colour = (noise(9, 7, mode, 16) for mode in ("I;16", "RGB;16"))
    image = lossless_codec.decompress(lossless_codec.compress(grey, lossless=True))
    assert image.mode == "I;16" and np.array_equal(np.asarray(image), grey[..., 0])
    data = lossless_codec.compress(colour, lossless=True)
    with pytest.raises(ImageError, match="decode_array"):
        lossless_codec.decompress(data)


def test_a_picture_is_left_as_it_was_and_gives_the_array_it_holds(lossless_codec: Codec) -> None:
    image = photograph(20, 10, "RGBA")
    data = lossless_codec.compress(image, lossless=True)
    assert same(image, photograph(20, 10, "RGBA"))
    assert np.array_equal(lossless_codec.decode_array(data), np.asarray(image))
    assert lossless_codec.compress(np.asarray(image), lossless=True) == data


@pytest.mark.usefixtures("small_tiles", "way")
@pytest.mark.parametrize("size", [(64, 64), (65, 64), (130, 100), (1, 129)])
def test_several_tiles(lossless_codec: Codec, size: tuple[int, int]) -> None:
    image, done = photograph(*size, "RGBA"), list[int]()
    data = lossless_codec.compress(image, progress=done.append, lossless=True)
    count = -(-size[0] // 64) * -(-size[1] // 64)
    assert len(unpack(data).tiles) == count == len(done) and sum(done) == size[0] * size[1]
    assert same(lossless_codec.decompress(data, progress=done.append), image)
    assert done[:count] == done[count:]


def test_metadata_is_carried_verbatim(lossless_codec: Codec) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = {"exif": exif.tobytes(), "icc_profile": bytes(range(256)) * 4, "xmp": b"<x:xmpmeta/>"}
    image = Image.open(io.BytesIO(saved(picture(20, 10), "JPEG", **payload)))
    decoded = lossless_codec.decompress(lossless_codec.compress(image, lossless=True))
    assert {key: decoded.info[key] for key in payload} == {key: image.info[key] for key in payload}
    assert same(decoded, image)
    plain = lossless_codec.compress(picture(20, 10), lossless=True)
    assert unpack(plain).sections == () and lossless_codec.decompress(plain).info == {}


# Offsets of scales


@pytest.fixture
def moving_codec(lossless_weights: Path) -> Codec:
    return moving(Codec("cpu", lossless_weights))


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (70, 1), (130, 94)])
def test_tiles_that_move_their_scales(moving_codec: Codec, size: tuple[int, int], mode: str) -> None:
    image = photograph(*size, mode)
    assert same(moving_codec.decompress(moving_codec.compress(image, lossless=True)), image)


@pytest.mark.parametrize("count", [0, 1, OFTEN - 1, OFTEN, 20_000])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_residuals_of_another_size_than_foretold_are_given_other_tables(
    moving_codec: Codec, count: int, spread: float
) -> None:
    random = np.random.default_rng(5)
    scales = random.integers(14, 22, count).astype(np.int32)
    steps, shapes = random.integers(0, 2040, count).astype(np.int32), np.ones(count, np.int32)
    deviation = spread * scale_of(torch.from_numpy(scales)).numpy()
    values = np.rint(steps / 8 + random.logistic(0, deviation)).astype(np.int32)
    codec = PixelCodec(moving_codec.lossless, np.stack([steps, scales, shapes])).codec()
    stack = AnsStack()
    codec.push(stack, values)
    unmoved = moving_codec.lossless.pixel_tables.bits((scales * SHAPES + shapes) * 8 + steps % 8, values - steps // 8)
    if count == 20_000:  # a scale too large or small by a factor of two costs 0.1 bits a sample and more
        assert stack.bits() < unmoved.sum() - 0.1 * count
    else:
        assert stack.bits() < unmoved.sum() + 64
    assert np.array_equal(codec.pop(stack), values) and stack.is_empty()


# Passes


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 5), (5, 6), (70, 1), (131, 94)])
def test_tiles_that_are_refined(lossless_weights: Path, size: tuple[int, int], mode: str) -> None:
    codec = refined(Codec("cpu", lossless_weights))
    image = photograph(*size, mode)
    assert same(codec.decompress(codec.compress(image, lossless=True)), image)


# Ways of coding a tile, and how long they may become


@pytest.mark.parametrize(("mode", "depth"), [("L", 8), ("RGB", 8), ("RGBA", 8), ("I;16", 16), ("RGB;16", 10)])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (130, 70)])
@pytest.mark.usefixtures("small_tiles")
def test_no_file_is_much_longer_than_the_samples(
    lossless_codec: Codec, size: tuple[int, int], mode: str, depth: int
) -> None:
    random = noise(*size, mode, depth)
    for samples in (random, np.zeros_like(random), random // 2 * 2):
        data = lossless_codec.compress(samples, lossless=True, depth=depth)
        assert len(data) <= samples.nbytes + 96 + 12 * len(unpack(data).tiles)
        assert np.array_equal(lossless_codec.decode_array(data), samples)
    if size == (130, 70):
        assert set(methods(lossless_codec.compress(random, lossless=True, depth=depth))) <= {RAW, PLAIN}


@pytest.mark.parametrize("mode", MODES)
def test_flat_pictures_are_small(lossless_codec: Codec, mode: str) -> None:
    image = Image.new(mode, (400, 300), (1, 200, 30, 99)[: len(mode)] if len(mode) > 1 else 77)
    data = lossless_codec.compress(image, lossless=True)
    assert len(data) < 200 and same(lossless_codec.decompress(data), image)


@pytest.mark.usefixtures("networks")
def test_tiles_that_hold_too_few_bits_to_pop_latents_send_their_means(lossless_codec: Codec) -> None:
    for image, method in (
        (picture(1, 1), ROUNDED),
        (picture(3, 2, "L"), ROUNDED),
        (picture(90, 70), BITS_BACK),
    ):
        data = lossless_codec.compress(image, lossless=True)
        assert methods(data) == [method] and same(lossless_codec.decompress(data), image)


def test_the_shortest_way_is_taken(lossless_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, coder = np.asarray(picture(40, 40)), TileCoder(lossless_codec.lossless, 8)
    with exact_arithmetic(DEVICE):
        network = push_by_networks(coder, samples)
        assert len(coder.push(samples).words) <= len(network.words)
        short = replace(network, words=network.words[:40])
        monkeypatch.setattr(TileCoder, "_push_network", lambda *_: short)
        assert coder.push(samples) == short
        # Without weights there are no networks to ask.
        assert TileCoder(None, 8).push(samples).method in (PLAIN, RAW)


def test_files_without_network_tiles_need_no_weights(lossless_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lossless_codec.compress(Image.new("RGB", (50, 40), "red"), lossless=True)
    monkeypatch.setattr(vaecodec.kinds, "packaged", lambda kind: Path(f"no {kind} weights"))
    codec = Codec("cpu")
    assert set(methods(data)) <= {PLAIN, RAW} and codec.decompress(data).size == (50, 40)
    with pytest.raises(WeightsError, match="no weights at no lossless weights"):
        codec.compress(picture(9, 9), lossless=True)
    with pytest.raises(WeightsError, match="no weights at no lossy weights"):
        codec.compress(picture(9, 9))


# Rates


def by_tables(codec: Codec, phase: Phase) -> tuple[Array, Array]:
    """Bits of the samples [3, h, w] of a phase by the counts of the tables, and which of them are escaped."""
    tables = codec.lossless.pixel_tables
    residual, index, shape = (part[0].double().numpy() for part in phase)
    fraction = np.rint(-8 * residual).astype(int) % 8
    ids = (np.rint(index).astype(int) * SHAPES + np.rint(shape).astype(int)) * 8 + fraction
    at = np.rint(residual + fraction / 8).astype(int) - tables.lows[ids]
    escaped = (at < 0) | (at >= tables.sizes[ids] - 1)
    entries = zip(ids.ravel(), np.where(escaped, tables.sizes[ids] - 1, at).ravel(), strict=True)
    return np.reshape([24 - np.log2(tables.counts[t][i]) for t, i in entries], residual.shape), escaped


@pytest.mark.usefixtures("networks")
def test_the_bits_of_a_file_are_those_of_the_model(
    torch_lossless_codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, likelihood = list[Latents](), Network._likelihood_parts

    def spy(self: Network, z: Latents) -> Any:
        given.append(z)
        return likelihood(self, z)

    monkeypatch.setattr(Network, "_likelihood_parts", spy)
    image, model = picture(96, 80, seed=7), torch_lossless_codec.lossless.model
    data = torch_lossless_codec.compress(image, lossless=True)
    bits, lanes = torch_lossless_codec.account(data), unpack(data).tiles[0].lanes
    assert methods(data) == [BITS_BACK] and sum(bits.values()) == pytest.approx(8 * len(data), abs=1e-6)
    assert 0 < bits["overhead"] < 8 * (80 + 16 * lanes) and bits["metadata"] == 0

    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    torch.manual_seed(0)
    with exact_arithmetic(DEVICE):
        step = 2**model.config.levels
        coarsest, levels = model.vae.likelihood(x[..., ::step, ::step], given[-1].above[0]), model.phases(x)
        _, _, latents = model(x)
    phases = {"x": coarsest} | {
        f"{name}_{len(levels) - i}": phase
        for i, level in enumerate(levels)
        for name, phase in zip(PHASES, level, strict=True)
    }
    for name, phase in phases.items():
        expected, escaped = by_tables(torch_lossless_codec, phase)
        for k, c in enumerate(CHANNEL_ORDER):
            # Each lane of an empty stack takes some bits to start.
            coded, slack = bits[f"{name} {COLOURS[c]}"], 24 * float(escaped[k].sum()) + 32 * lanes
            assert expected[k].sum() - 1 <= coded <= expected[k].sum() + slack, (name, c)
    density = sum(float(phase.bits().sum()) for phase in phases.values())
    coded = sum(bits[f"{name} {COLOURS[c]}"] for name in phases for c in CHANNEL_ORDER)
    assert 0.8 * density < coded < 1.02 * density  # fitted tables know better
    groups = range(1, len(latents) + 1)
    assert all(bits[f"z_{g}"] > 0 > bits[f"z_{g} returned"] for g in groups)
    net = sum(bits[f"z_{g}"] + bits[f"z_{g} returned"] for g in groups)
    assert net == pytest.approx(sum(float(latent.kl().sum()) for latent in latents), rel=0.1)


@pytest.mark.usefixtures("small_tiles", "networks")
@pytest.mark.parametrize("mode", MODES)
def test_an_account_covers_the_file(lossless_codec: Codec, mode: str) -> None:
    image = photograph(130, 70, mode)
    image.info["icc_profile"] = b"profile" * 9
    data = lossless_codec.compress(image, lossless=True)
    bits = lossless_codec.account(data)
    assert sum(bits.values()) == pytest.approx(8 * len(data)) and bits["metadata"] == 8 * 63
    # Header, sections, the directory, and the words that each tile ends in: alpha is none of it.
    assert 0 < bits["overhead"] < 8 * (96 + 12 * len(methods(data)))


def test_an_account_of_tiles_without_networks(lossless_codec: Codec) -> None:
    data = lossless_codec.compress(Image.new("RGB", (50, 40), "red"), lossless=True)
    bits = lossless_codec.account(data)
    assert bits["tiles without networks"] == 8 * len(unpack(data).tiles[0].words)
    assert sum(bits.values()) == pytest.approx(8 * len(data))


# Bytes


@pytest.mark.usefixtures("networks")
def test_bytes_are_deterministic_and_shared_by_threads(lossless_codec: Codec, lossless_weights: Path) -> None:
    images = [photograph(40 + seed, 30, MODES[seed % 4], seed) for seed in range(6)]
    files = [lossless_codec.compress(image, lossless=True) for image in images]
    other = Codec("cpu", lossless_weights)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda image: other.compress(image, lossless=True), images)) == files
        assert all(map(same, pool.map(other.decompress, files), images))


@pytest.mark.usefixtures("way")
def test_python_and_constriction_write_and_read_the_same_bytes(
    lossless_codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("constriction")
    image, files = photograph(50, 40, "RGBA"), []
    for coder in ("constriction", "numpy"):
        monkeypatch.setenv("VAECODEC_CODER", coder)
        files.append(lossless_codec.compress(image, lossless=True))
        assert same(lossless_codec.decompress(files[0]), image)
    assert files[0] == files[1]


@pytest.mark.usefixtures("networks")
def test_float64_takes_over_where_float32_fails_and_writes_the_same_bytes(
    lossless_codec: Codec, lossless_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_answer = LosslessWeights.known_answer

    def failing(lossless: LosslessWeights) -> int:
        return known_answer(lossless) ^ (lossless.model.vae.top_mean.dtype == torch.float32)

    monkeypatch.setattr(LosslessWeights, "known_answer", failing)
    double = Codec("cpu", lossless_weights, engine="torch")
    assert double.lossless.model.vae.top_mean.dtype == torch.float64
    image = picture(75, 53)
    data = lossless_codec.compress(image, lossless=True)
    assert double.compress(image, lossless=True) == data and same(double.decompress(data), image)


@pytest.mark.usefixtures("networks")
def test_global_settings_of_torch_are_left_alone(lossless_codec: Codec) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = lossless_codec.compress(picture(40, 30), lossless=True)
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled() and inside == lossless_codec.compress(picture(40, 30), lossless=True)


def test_one_codec_reads_both_kinds(shipped: Path, lossless_codec: Codec, lossless_weights: Path) -> None:
    """The given weights stand in for the packaged ones of their kind, and for no others."""
    image = picture(40, 30)
    lossy, lossless = Codec("cpu", shipped).compress(image), lossless_codec.compress(image, lossless=True)
    codec = Codec("cpu", lossless_weights)
    assert codec.decompress(lossy).size == image.size and same(codec.decompress(lossless), image)
    assert codec.compress(image) == lossy


# What is refused


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4,), np.uint8),
        ((1, 4, 4, 3), np.uint8),
        ((4, 4, 5), np.uint8),
        ((4, 4, 2), np.uint16),
        ((4, 4, 3), np.int16),
        ((4, 4, 3), np.float32),
        ((4, 4, 3), bool),
    ],
)
def test_arrays_that_are_no_pictures(lossless_codec: Codec, shape: tuple[int, ...], dtype: Any) -> None:
    with pytest.raises(ImageError, match="not supported"):
        lossless_codec.compress(np.zeros(shape, dtype), lossless=True)


def test_samples_beyond_their_depth_and_pictures_beyond_the_limits(lossless_codec: Codec) -> None:
    deep = np.full((2, 2, 1), 4096, np.uint16)
    with pytest.raises(ImageError, match="12 bits"):
        lossless_codec.compress(deep, lossless=True, depth=12)
    for depth in (8, 17):
        with pytest.raises(ValueError, match="depth"):
            lossless_codec.compress(deep, lossless=True, depth=depth)
    with pytest.raises(ImageError, match="no pixels"):
        lossless_codec.compress(deep[:, :0], lossless=True)
    with pytest.raises(LimitError):
        lossless_codec.compress(Image.new("L", (2**17 + 1, 1)), lossless=True)
    with pytest.raises(LimitError):
        lossless_codec.decompress(lossless_codec.compress(picture(20, 10), lossless=True), Limits(max_pixels=199))


@pytest.mark.parametrize("mode", ["CMYK", "F", "YCbCr", "LAB", "HSV"])
def test_modes_that_are_refused(lossless_codec: Codec, mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode} "):
        lossless_codec.compress(Image.new(mode, (4, 4)), lossless=True)


def test_wide_integers_are_kept_where_sixteen_bits_hold_them(lossless_codec: Codec) -> None:
    values = np.array([[0, 65535, 7]], np.int32)
    decoded = lossless_codec.decompress(lossless_codec.compress(Image.fromarray(values), lossless=True))
    assert decoded.mode == "I;16" and np.array_equal(np.asarray(decoded), values)
    for wrong in (-1, 65536):
        with pytest.raises(ImageError, match="mode I "):
            lossless_codec.compress(Image.fromarray(np.array([[0, wrong]], np.int32)), lossless=True)


@pytest.mark.usefixtures("networks")
def test_files_of_other_weights_transforms_and_methods(lossless_codec: Codec) -> None:
    file = unpack(lossless_codec.compress(picture(20, 10), lossless=True))
    (tile,) = file.tiles
    for changes, error in (
        ({"model": bytes(16)}, WeightsError),
        ({"kind": Kind.LOSSY}, WeightsError),
        ({"kind": Kind.PCA}, WeightsError),
        ({"colour": 2}, VersionError),
        ({"tile": 4096}, CorruptError),
        ({"mode": Mode["RGBA"]}, CorruptError),
        ({"mode": Mode["L"]}, CorruptError),
        ({"mode": Mode["RGB;16"], "depth": 16}, CorruptError),
    ):
        with pytest.raises(error):
            lossless_codec.decode_array(pack(replace(file.header, **changes), file.tiles))
    for changed, error in (
        (replace(tile, method=4), VersionError),
        (replace(tile, method=15), VersionError),
        (replace(tile, lanes=2), CorruptError),
        (Tile(RAW, tile.crc, bytes(600), 2), CorruptError),
        (replace(tile, method=PLAIN), CorruptError),
        (replace(tile, method=RAW), CorruptError),
        (replace(tile, crc=tile.crc ^ 1), CorruptError),
    ):
        with pytest.raises(error):
            lossless_codec.decompress(pack(file.header, [changed]))


# Damage


@pytest.fixture(scope="module", params=[BITS_BACK, ROUNDED, PLAIN, RAW])
def damaged(request: pytest.FixtureRequest, lossless_codec: Codec) -> tuple[bytes, Image.Image]:
    """A file whose one tile has the method, and the picture in it."""
    if request.param in (PLAIN, RAW):
        image = picture(12, 9)
        data = lossless_codec.compress(image, lossless=True)
        samples, stack = np.asarray(image), AnsStack()
        push_plain(stack, samples, 8)
        words = samples.tobytes() if request.param == RAW else stack.to_bytes()
        data = pack(unpack(data).header, [Tile(request.param, crc_of(samples), words)])
    else:
        image = photograph(30, 23, "RGBA") if request.param == BITS_BACK else picture(3, 2, "L")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TileCoder, "push", push_by_networks)
            data = lossless_codec.compress(image, lossless=True)
    assert methods(data) == [request.param]
    return data, image


def test_bytes_cut_off(lossless_codec: Codec, damaged: tuple[bytes, Image.Image]) -> None:
    data, _ = damaged
    for length in {*range(0, len(data), 1 + len(data) // 60), *range(len(data) - 9, len(data))}:
        with pytest.raises(VaeError):
            lossless_codec.decompress(data[:length])


def test_bytes_flipped(lossless_codec: Codec, damaged: tuple[bytes, Image.Image]) -> None:
    """An error of ours or the right picture."""
    data, image = damaged
    for at in range(0, len(data), 1 + len(data) // 120):
        changed = data[:at] + bytes([data[at] ^ (255 if at % 3 else 1 << at % 8)]) + data[at + 1 :]
        with contextlib.suppress(VaeError):
            assert same(lossless_codec.decompress(changed), image)


def test_any_words_in_a_tile(lossless_codec: Codec) -> None:
    data = lossless_codec.compress(photograph(11, 9, "RGBA"), lossless=True)

    @settings(max_examples=40)
    @given(st.integers(0, 4), st.binary(max_size=40), st.integers(0, 9), st.integers(0, 2**32 - 1))
    def check(method: int, words: bytes, times: int, crc: int) -> None:
        with pytest.raises(VaeError):
            lossless_codec.decompress(pack(unpack(data).header, [Tile(method, crc, words * times)]))

    check()


def test_a_wrong_tile_under_a_right_checksum_of_its_words(lossless_codec: Codec) -> None:
    """A stack that is not empty in the end was not written for this picture, whatever its samples."""
    data = lossless_codec.compress(picture(12, 9), lossless=True)
    (tile,) = unpack(data).tiles
    stack = AnsStack(tile.words)
    with pytest.raises(CorruptError, match="checksum"):
        lossless_codec.decompress(pack(unpack(data).header, [replace(tile, words=b"\1\0\0\0" + stack.to_bytes())]))


# The command line


@pytest.fixture
def options(lossless_weights: Path) -> tuple[str, ...]:
    return ("--weights", str(lossless_weights), *CPU)


FILES: dict[str, tuple[str, dict[str, Any], str]] = {
    "1": ("1", {}, "L"),
    "L": ("L", {}, "L"),
    "LA": ("LA", {}, "LA"),
    "RGB": ("RGB", {}, "RGB"),
    "RGBA": ("RGBA", {}, "RGBA"),
    "P": ("P", {}, "RGB"),
    "P, one colour clear": ("P", {"transparency": 2}, "RGBA"),
    "P, all more or less": ("P", {"transparency": bytes(range(0, 250, 50))}, "RGBA"),
    "L, one clear": ("L", {"transparency": 1}, "LA"),
    "RGB, one clear": ("RGB", {"transparency": (1, 2, 3)}, "RGBA"),
    "1, one clear": ("1", {"transparency": 0}, "LA"),
}


@pytest.mark.parametrize("name", FILES)
def test_pictures_through_files(tmp_path: Path, options: tuple[str, ...], name: str) -> None:
    mode, info, kept = FILES[name]
    image = picture(21, 13).quantize(7) if mode == "P" else photograph(21, 13, mode.replace("1", "L")).convert(mode)
    if mode in ("L", "RGB"):
        image.putpixel((3, 4), (1, 2, 3)[: len(mode)])
    source, file, target = (tmp_path / name for name in ("in.png", "in.vae", "out.png"))
    image.save(source, **info)
    with Image.open(source) as opened:
        expected = opened.convert(kept)
        assert (opened.mode, "transparency" in opened.info) == (mode, bool(info))
    assert kept[-1] != "A" or expected.getchannel("A").getextrema()[0] != 255
    result = cli("compress", "--lossless", source, *options)
    assert result.exit_code == 0 and "every pixel equal" in result.stderr
    assert cli("verify", file, *options).exit_code == 0
    assert cli("decompress", file, target, *options).exit_code == 0
    with Image.open(target) as decoded:
        assert same(decoded, expected)


def test_deep_grey_through_files(tmp_path: Path, options: tuple[str, ...]) -> None:
    values = noise(9, 7, "I;16", 16)[..., 0]
    Image.fromarray(values).save(tmp_path / "in.png")
    assert cli("compress", "--lossless", tmp_path / "in.png", *options).exit_code == 0
    assert cli("decompress", tmp_path / "in.vae", tmp_path / "out.png", *options).exit_code == 0
    with Image.open(tmp_path / "out.png") as decoded:
        assert decoded.mode == "I;16" and np.array_equal(np.asarray(decoded), values)


def test_deep_grey_with_a_clear_value_is_not_cut_short(lossless_codec: Codec) -> None:
    """There is no mode for it, so that it is refused, as all that cannot be kept."""
    image = Image.open(io.BytesIO(saved(Image.fromarray(noise(9, 7, "I;16", 16)[..., 0]), transparency=77)))
    assert "transparency" in image.info
    with pytest.raises(ImageError, match="transparency"):
        samples_of(image)


def test_deep_colour_is_verified_without_a_mode_for_it(
    tmp_path: Path, lossless_codec: Codec, options: tuple[str, ...]
) -> None:
    path = tmp_path / "in.vae"
    path.write_bytes(lossless_codec.compress(noise(9, 7, "RGB;16", 16), lossless=True))
    result = cli("verify", path, *options)
    assert result.exit_code == 0 and "good" in result.stderr


def test_deep_colour_has_one_clear_error(lossless_codec: Codec) -> None:
    """In the library, whose pictures are Pillow's."""
    with pytest.raises(ImageError, match="RGBA;16"):
        lossless_codec.decompress(lossless_codec.compress(noise(9, 7, "RGBA;16", 16), lossless=True))


def test_lossless_has_no_quality(tmp_path: Path, options: tuple[str, ...]) -> None:
    picture(9, 9).save(tmp_path / "in.png")
    for quality in ("75", "100"):
        result = cli("compress", "--lossless", "-q", quality, tmp_path / "in.png", *options)
        assert result.exit_code == 2 and "--quality" in result.stderr and names(tmp_path) == ["in.png"]


def test_pixels_that_differ_are_never_written(
    tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(9, 9).save(tmp_path / "in.png")
    other = [((0, 0, 9, 9), np.asarray(picture(9, 9, seed=1)))]
    monkeypatch.setattr(Codec, "decode_tiles", lambda *_, **__: other)
    result = cli("compress", "--lossless", tmp_path / "in.png", *options)
    assert result.exit_code == 1 and "nothing was written" in result.stderr and names(tmp_path) == ["in.png"]


@pytest.fixture
def as_packaged(lossless_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small lossless weights in place of the packaged ones."""
    monkeypatch.setattr(
        vaecodec.kinds, "packaged", lambda kind: lossless_weights if kind == "lossless" else packaged(kind)
    )


@pytest.mark.usefixtures("as_packaged", "networks")
def test_info_shows_where_the_bits_went(tmp_path: Path, lossless_codec: Codec) -> None:
    path = tmp_path / "in.vae"
    path.write_bytes(lossless_codec.compress(photograph(90, 70, "RGBA"), lossless=True))
    facts = json.loads(cli("info", "--json", "--bits", path).stdout)
    assert facts["kind"] == "lossless" and sum(facts["bits"].values()) == pytest.approx(8 * facts["bytes"])
    assert facts["bits"] == pytest.approx(lossless_codec.account(path.read_bytes()))
    assert "bits" not in json.loads(cli("info", "--json", path).stdout)
    lines = cli("info", "--bits", path).stdout.splitlines()
    for name, count in facts["bits"].items():
        (line,) = (line for line in lines if line.startswith(f"{name:22} "))
        assert f"{count:.1f} bits" in line and f"{count / 90 / 70 / 4:.5f} a sample" in line


def test_info_shows_the_bits_of_lossy_files(tmp_path: Path, tiny: Codec) -> None:
    path = tmp_path / "in.vae"
    path.write_bytes(tiny.compress(picture(90, 70, "RGBA")))
    facts = json.loads(cli("info", "--json", "--bits", path, *TINY_CPU).stdout)
    assert facts["kind"] == "lossy" and sum(facts["bits"].values()) == pytest.approx(8 * facts["bytes"])
    assert list(facts["bits"]) == ["z", "y_1", "y_2", "y_3", "y_4", "alpha", "metadata", "overhead"]
    assert all(facts["bits"][name] > 0 for name in ("z", "y_1", "y_4", "alpha")) and facts["bits"]["overhead"] < 700


# The packaged weights


@pytest.mark.usefixtures("way")
def test_shipped_weights_beat_png(shipped_lossless: Path, photo: Image.Image) -> None:
    codec, image = Codec("cpu", shipped_lossless), Image.fromarray(np.asarray(photo))
    data = codec.compress(image, lossless=True)
    assert same(codec.decompress(data), image) and len(data) < 0.9 * len(saved(image, optimize=True))


def test_fast_files_need_no_weights(tmp_path: Path) -> None:
    """Neither to be made nor to be read, and every mode comes back."""
    codec = Codec("cpu", weights=[])
    for image in (picture(300, 200), picture(70, 50, "LA"), picture(260, 140, "L")):
        data = codec.compress(image, lossless=True, fast=True)
        file = unpack(data)
        assert file.header.model == bytes(16) and {tile.method for tile in file.tiles} <= {PLAIN, RAW}
        assert same(codec.decompress(data), image)
    assert not codec._shelf._loaded
    with pytest.raises(ValueError, match="fast is for lossless"):
        codec.compress(image, fast=True)
