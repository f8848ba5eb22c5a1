"""Lossless tiles whose samples are tensors, as on a GPU: their bytes are those of the host.

Most tests code what is sorted there with the coder of the host, for Triton's interpreter takes some milliseconds for
each value; some go all the way.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made
pytest.importorskip("triton", reason="Triton is not installed: torch's CUDA build brings it")

from conftest import TINY_LOSSLESS, in_bytes, picture, refined, refiners, same  # noqa: E402
from hypothesis import given, settings, strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

from bitstream import BITS_BACK, ROUNDED, CorruptError, Tables, Tile, pack, unpack  # noqa: E402
from bitstream.rans import kind_of_lanes  # noqa: E402
from vaecodec import Codec, arrays, device_coder  # noqa: E402
from vaecodec.lossless import refine  # noqa: E402
from vaecodec.lossless.numbers import Config  # noqa: E402
from vaecodec.lossless.tile import TileCoder  # noqa: E402
from vaecodec.together import at_once  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


class HostLanes:
    """As ``TritonLanes``, by the coder of the host."""

    def __init__(self, lanes: Sequence[NDArray[np.uint32]], device: torch.device) -> None:
        self.lanes, self.device = kind_of_lanes()(lanes), device
        self.words, self.positions = self.lanes.words, self.lanes.positions

    def push(self, symbols: torch.Tensor, tables: Tables, ids: torch.Tensor) -> None:
        assert (ids[1:] >= ids[:-1]).all()
        self.lanes.push(symbols.cpu().numpy(), tables, np.bincount(ids.cpu(), minlength=len(tables.sizes)))

    def pop(self, tables: Tables, ids: torch.Tensor) -> torch.Tensor:
        symbols = self.lanes.pop(tables, np.bincount(ids.cpu(), minlength=len(tables.sizes)))
        return torch.from_numpy(symbols).to(self.device)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_coder, "TritonLanes", HostLanes)


@pytest.fixture(scope="module")
def host() -> Codec:
    return refined(Codec("cpu", TINY_LOSSLESS, engine="torch"))


@pytest.fixture(scope="module")
def device() -> Codec:
    codec = refined(Codec(DEVICE, TINY_LOSSLESS, engine="torch"))
    codec.lossless.codes = True
    return codec


def pushed(codec: Codec, image: Image.Image, progressive: bool = False) -> Tile:
    """By the networks, even if another way should be shorter."""
    return coder_of(codec, progressive)._push_network(codec.lossless, samples_of(image))


def coder_of(codec: Codec, progressive: bool = False) -> TileCoder:
    return TileCoder(codec.lossless, 8, progressive=progressive)


def samples_of(image: Image.Image) -> NDArray[np.uint8]:
    samples = np.asarray(image)
    return samples.reshape(*samples.shape[:2], -1)


def check(host: Codec, device: Codec, image: Image.Image, progressive: bool = False) -> Tile:
    tile = pushed(host, image, progressive)
    assert pushed(device, image, progressive) == tile
    samples = samples_of(image)
    assert (coder_of(device).pop(tile, samples.shape) == samples).all()
    return tile


@pytest.mark.usefixtures("fast")
@settings(max_examples=10)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["RGB", "L", "RGBA", "LA"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_bytes_are_those_of_the_host(
    host: Codec, device: Codec, width: int, height: int, mode: str, progressive: bool, seed: int
) -> None:
    check(host, device, picture(width, height, mode, seed), progressive)


@pytest.mark.usefixtures("fast")
def test_of_all_ways_to_code_a_pass(host: Codec, device: Codec, photo: Image.Image) -> None:
    """Lanes, offsets, weights, latents by bits-back and, of small tiles, rounded ones."""
    for image, method, lanes in (
        (photo.crop((0, 0, 128, 192)), BITS_BACK, 4),
        (photo.crop((0, 0, 64, 33)).convert("L"), BITS_BACK, 1),
        (picture(1, 1), ROUNDED, 1),
    ):
        tile = check(host, device, image)
        assert tile.method == method and tile.lanes >= lanes


@pytest.mark.usefixtures("fast")
def test_levels_of_bytes(tmp_path: Any, photo: Image.Image) -> None:
    path = in_bytes(tmp_path / "bytes.safetensors")
    host, device = (refined(Codec(where, path, engine="torch")) for where in ("cpu", DEVICE))
    device.lossless.codes = True
    check(host, device, photo.crop((0, 0, 61, 34)))


@pytest.mark.usefixtures("fast")
def test_shipped_weights(shipped_lossless: Any, photo: Image.Image) -> None:
    host, device = Codec("cpu", shipped_lossless), Codec(DEVICE, shipped_lossless, engine="torch")
    device.lossless.codes = True
    check(host, device, photo.crop((0, 0, 131, 98)))


@pytest.mark.usefixtures("fast", "networks_only")
def test_files_of_several_tiles_at_once(photo: Image.Image) -> None:
    usual, codec = (refined(Codec("cpu", TINY_LOSSLESS, engine="torch", tile=64)) for _ in range(2))
    codec.lossless.codes = codec.lossless.gathers = True
    codec._each = at_once
    images = [photo.crop((0, 0, 90, 50)), photo.crop((0, 0, 64, 50)).convert("L")]
    expected = [usual.compress(image, lossless=True) for image in images]
    assert codec.compress_batch(images, lossless=True) == expected
    assert all(map(same, codec.decompress_batch(expected), images))
    assert codec.account(expected[0]) == pytest.approx(usual.account(expected[0]))


@pytest.mark.usefixtures("fast", "networks_only")
def test_cut_and_damaged_tiles(host: Codec, device: Codec) -> None:
    image = picture(60, 41)
    data = host.compress(image, lossless=True, progressive=True)
    for part in (0.3, 0.6, 0.9):
        cut = data[: int(part * len(data))]
        assert same(device.decompress(cut, preview=True), host.decompress(cut, preview=True))
    container = unpack(host.compress(image, lossless=True))
    (tile,) = container.tiles
    for place in (1, len(tile.words) // 2, len(tile.words) - 1):
        words = bytearray(tile.words)
        words[place] ^= 64
        damaged = Tile(tile.method, tile.crc, bytes(words), tile.lanes)
        with pytest.raises(CorruptError):
            device.decompress(pack(container.header, [damaged], []))


@pytest.mark.parametrize(
    ("width", "height", "mode"), [(6, 4, "L"), pytest.param(20, 11, "RGBA", marks=pytest.mark.slow)]
)
def test_by_triton(host: Codec, device: Codec, width: int, height: int, mode: str) -> None:
    check(host, device, picture(width, height, mode))


# What is written once for arrays and tensors


def test_helpers_give_what_numpy_gives() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-300, 300, (3, 4, 5)).astype(np.int16)
    here = torch.from_numpy(x).to(DEVICE)
    for function in (
        lambda x: arrays.edged(x, (0, 0), (1, 2), (0, 3)),
        lambda x: arrays.edged(x[:, :0], (0, 0), (1, 1), (1, 1)),
        lambda x: arrays.cast(x, np.uint8),
        lambda x: arrays.zeros((2, 3), np.float64, x),
        lambda x: arrays.stacked([x[0], 2 * arrays.cast(x[1], np.int32)], np.float32, x[0]),
        lambda x: arrays.stacked([], np.int16, x[0]),
        lambda x: arrays.counted(abs(x[0]).ravel(), 400),
        lambda x: arrays.counted(abs(x[0]).ravel(), 400, arrays.cast(x[1].ravel(), np.float64)),
        lambda x: arrays.floors(arrays.cast(x, np.float32) / 7, -9, 20),
    ):
        expected, found = function(x), function(here)
        assert isinstance(found, torch.Tensor)
        assert arrays.get(found).dtype == expected.dtype and np.array_equal(arrays.get(found), expected)
    weights = rng.integers(-9, 9, 3).astype(np.int32)
    product = arrays.product(arrays.put(weights, here), here.reshape(3, -1))
    assert np.array_equal(arrays.get(product), weights @ x.reshape(3, -1))


def test_constants_stay_as_long_as_they_are_used() -> None:
    table, here = np.arange(9), torch.zeros(1, device=DEVICE)
    before = len(arrays._constants)
    assert arrays.constant(table, here) is arrays.constant(table, here) and len(arrays._constants) == before + 1
    assert arrays.constant(table, table) is table
    del table
    assert len(arrays._constants) == before


def test_refiners_are_those_of_the_host() -> None:
    config, random = Config(width=16, refined=1), np.random.default_rng(0)
    layers = refine.layers_of(refiners(4, config), config)[refine.name_of(1, "D", 0, 3)]
    seen = random.integers(-80, 81, (refine.input_count("D", 0, 3), 700)).astype(np.int16)
    states = random.integers(0, 256, (700, config.width)).astype(np.uint8)
    outputs: Any = layers.outputs(*(torch.from_numpy(x).to(DEVICE) for x in (seen, states)))  # type: ignore[arg-type]
    assert np.array_equal(outputs.cpu(), layers.outputs(seen, states))
