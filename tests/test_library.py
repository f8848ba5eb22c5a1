"""vaecodec from Python: the functions of the package, and what ``Codec`` takes and gives."""

import ast
import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, cli, picture, python, same, saved
from hypothesis import given, settings, strategies as st
from PIL import Image

import vaecodec.codec
from bitstream import CorruptError, LimitError, Limits, TruncatedError, VaeError, pack, unpack
from vaecodec import Codec, ImageError, read_info
from vaecodec.codec import shared
from vaecodec.lossless.tile import TileCoder
from vaecodec.lossy.coder import LossyCoder


@pytest.fixture(scope="module")
def tiled(tiled_codec: Codec) -> dict[bool, bytes]:
    """A lossy and a lossless file of 4 x 3 tiles."""
    return {lossless: tiled_codec.compress(picture(200, 150), lossless=lossless) for lossless in (False, True)}


def deep(channels: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.random.default_rng(0).integers(0, 2**16, (9, 7, channels), np.uint16)


# The package


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path, tiny: Codec) -> None:
    (tmp_path / "a.vae").write_bytes(tiny.compress(picture(20, 10)))
    code = """
import sys, vaecodec
assert "numpy" not in sys.modules
assert vaecodec.read_info(sys.argv[1]).width == 20
assert issubclass(vaecodec.LimitError, vaecodec.VaeError) and vaecodec.Limits().max_side
assert not {"torch", "PIL", "safetensors"} & sys.modules.keys()
import vaecodec.pillow
assert "torch" not in sys.modules
"""
    result = python(code, tmp_path / "a.vae")
    assert result.returncode == 0, result.stderr.decode()


def test_every_name_is_there_for_people_and_for_type_checkers() -> None:
    assert all(getattr(vaecodec, name).__doc__ for name in vaecodec.__all__)
    assert {*vaecodec.__all__} <= {*dir(vaecodec)}
    tree = ast.parse(Path(vaecodec.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    declared = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(declared) == sorted(vaecodec.__all__)
    assert (Path(vaecodec.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="nonsense"):
        vaecodec.nonsense  # noqa: B018


@pytest.mark.usefixtures("small_weights")
def test_bytes_and_back(codec: Codec) -> None:
    image = picture(40, 30)
    lossy = vaecodec.compress(image, quality=40, device="cpu")
    assert lossy == codec.compress(image, 40) != vaecodec.compress(image, device="cpu")
    assert same(vaecodec.decompress(lossy, device="cpu"), codec.decompress(lossy))
    exact = vaecodec.compress(image, lossless=True)
    assert same(vaecodec.decompress(exact), image)
    assert same(vaecodec.decompress(exact, region=(3, 5, 11, 7)), image.crop((3, 5, 14, 12)))
    with pytest.raises(vaecodec.LimitError):
        vaecodec.decompress(exact, limits=vaecodec.Limits(max_side=39))


@pytest.mark.usefixtures("small_weights")
def test_one_codec_is_shared_by_all_callers() -> None:
    with ThreadPoolExecutor(8) as pool:
        codecs = {*pool.map(shared, ["cpu"] * 32)}
    assert len(codecs) == 1 and shared("cpu") in codecs
    assert shared("auto") is shared("cuda" if torch.cuda.is_available() else "cpu")


# Files


def test_a_file_is_read_from_wherever_it_is(tmp_path: Path, codec: Codec) -> None:
    data, path = codec.compress(picture(40, 30), lossless=True), tmp_path / "a.vae"
    path.write_bytes(data)
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    with path.open("rb") as file, open(reading, "rb") as pipe:
        for source in (data, bytearray(data), memoryview(data), path, str(path), io.BytesIO(data), file, pipe):
            assert same(codec.decompress(source), picture(40, 30))
    path.write_bytes(b"")
    with pytest.raises(TruncatedError):
        codec.decompress(path)
    with pytest.raises(FileNotFoundError):
        codec.decompress(tmp_path / "none.vae")


@pytest.mark.parametrize("lossless", [False, True])
def test_info(tmp_path: Path, codec: Codec, lossless: bool) -> None:
    image, path = picture(40, 30, "L"), tmp_path / "a.vae"
    image.info["exif"] = b"Exif\0\0MM\0\x2a"
    path.write_bytes(codec.compress(image, 12.5, lossless=lossless))
    info = read_info(path)
    assert info == read_info(path.read_bytes()) == read_info(io.BytesIO(path.read_bytes()))
    assert asdict(info) == json.loads(cli("info", "--json", path).stdout)
    expected = {"kind": "lossless", "quality": None} if lossless else {"kind": "lossy", "quality": 12.5}
    expected |= {"width": 40, "height": 30, "mode": "L", "depth": 8, "tiles": 1, "metadata": {"exif": 10}}
    assert expected.items() <= asdict(info).items()
    assert info.bytes == path.stat().st_size and info.bpp == round(8 * info.bytes / 1200, 4)
    for cut in (0, 20, 60):
        with pytest.raises(VaeError):
            read_info(path.read_bytes()[:cut])


# Pictures, arrays and tensors


@pytest.mark.parametrize(
    ("mode", "lossless"), [(mode, lossless) for mode in ("L", "LA", "RGB", "RGBA") for lossless in (False, True)]
)
def test_equal_pixels_give_equal_bytes(codec: Codec, mode: str, lossless: bool) -> None:
    image = picture(37, 21, mode)
    data = codec.compress(image, 60, lossless=lossless)
    array = np.asarray(image)
    array = array[..., None] if mode == "L" else array
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for same_pixels in (array, np.asfortranarray(array), array[::-1].copy()[::-1], tensor, tensor.contiguous()):
        assert codec.compress(same_pixels, 60, lossless=lossless) == data
    if mode == "L":
        assert codec.compress(array[..., 0], 60, lossless=lossless) == data
    decoded = np.asarray(codec.decompress(data)).reshape(array.shape)
    assert np.array_equal(codec.decode_array(data), decoded)
    assert np.array_equal(codec.decode_tensor(data).permute(1, 2, 0).numpy(), decoded)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_arrays_and_tensors(codec: Codec, channels: int) -> None:
    samples = deep(channels)
    data = codec.compress(samples, lossless=True)
    assert codec.compress(torch.from_numpy(samples).permute(2, 0, 1), lossless=True) == data
    decoded, tensor = codec.decode_array(data), codec.decode_tensor(data, "cpu")
    assert decoded.dtype == np.uint16 and np.array_equal(decoded, samples)
    assert tensor.dtype == torch.uint16 and tensor.shape == (channels, 9, 7) and tensor.is_contiguous()
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), samples)


def test_deep_colour_is_refused_before_it_is_decoded(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.compress(deep(3), lossless=True)
    monkeypatch.setattr(Codec, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="decode_array"):
        codec.decompress(data)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_batch_is_what_its_pictures_are(codec: Codec, lossless: bool) -> None:
    images = [picture(30, 20, seed=seed) for seed in range(3)]
    files = [codec.compress(image, 33, lossless=lossless) for image in images]
    stack = np.stack([np.asarray(image) for image in images])
    for batch in (images, stack, torch.from_numpy(stack).permute(0, 3, 1, 2)):
        assert codec.compress_batch(batch, 33, lossless=lossless) == files
    mixed = [images[0], stack[1], picture(9, 50, "L")]
    assert [codec.decompress(file).size for file in codec.compress_batch(mixed)] == [(30, 20), (30, 20), (9, 50)]
    assert codec.compress_batch([]) == []


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (np.zeros((4, 4, 5), np.uint8), "uint8"),
        (np.zeros((4, 4, 2), np.uint16), "uint16"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\[2, 4, 4, 3\]"),
        (torch.zeros(3, 4, 4), "float32"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"\[4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "compress_batch"),
    ],
)
def test_what_is_no_picture(codec: Codec, thing: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        codec.compress(thing)


# Regions


@pytest.mark.parametrize("lossless", [False, True])
def test_a_region_is_the_crop_of_the_whole(codec: Codec, tiled: dict[bool, bytes], lossless: bool) -> None:
    data, whole = tiled[lossless], codec.decode_array(tiled[lossless])

    @settings(max_examples=12)
    @given(st.integers(0, 199), st.integers(0, 149), st.integers(1, 200), st.integers(1, 150))
    def check(x: int, y: int, w: int, h: int) -> None:
        w, h = min(w, 200 - x), min(h, 150 - y)
        assert np.array_equal(codec.decode_array(data, region=(x, y, w, h)), whole[y : y + h, x : x + w])

    check()
    x, y, w, h = region = (60, 50, 100, 40)
    crop = codec.decompress(data).crop((x, y, x + w, y + h))
    assert same(codec.decompress(data, region=region), crop)
    assert np.array_equal(codec.decode_tensor(data, region=region).permute(1, 2, 0).numpy(), np.asarray(crop))


@pytest.mark.parametrize(
    ("region", "lossy", "lossless"),
    [
        ((0, 0, 1, 1), 1, 1),
        ((31, 31, 1, 1), 1, 1),
        ((63, 10, 2, 5), 2, 2),
        ((62, 62, 1, 1), 4, 1),
        ((0, 0, 200, 150), 12, 12),
    ],
)
def test_only_the_tiles_of_the_region_are_decoded(
    codec: Codec,
    tiled: dict[bool, bytes],
    region: tuple[int, int, int, int],
    lossy: int,
    lossless: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert codec.lossy.margin == 2  # latents, half of a tile of 64 pixels
    popped: list[object] = []

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def pop(self: object, tile: object, *arguments: Any) -> Any:
            popped.append(tile)
            return method(self, tile, *arguments)

        return pop

    monkeypatch.setattr(LossyCoder, "_pop", counted(LossyCoder._pop))
    monkeypatch.setattr(TileCoder, "pop", counted(TileCoder.pop))
    for kind, count in ((False, lossy), (True, lossless)):
        popped.clear()
        done: list[int] = []
        codec.decode_array(tiled[kind], progress=done.append, region=region)
        assert len(popped) == count and sum(done) >= region[2] * region[3]


@pytest.mark.parametrize("lossless", [False, True])
def test_damage_elsewhere_does_not_matter_to_a_region(codec: Codec, tiled: dict[bool, bytes], lossless: bool) -> None:
    file = unpack(tiled[lossless])
    damaged = pack(file.header, [*file.tiles[:-1], replace(file.tiles[-1], crc=file.tiles[-1].crc ^ 1)])
    region = (0, 0, 60, 60)
    assert same(codec.decompress(damaged, region=region), codec.decompress(tiled[lossless], region=region))
    with pytest.raises(CorruptError):
        codec.decompress(damaged)


@pytest.mark.parametrize(
    "region", [(0, 0, 0, 1), (0, 0, 1, 0), (-1, 0, 5, 5), (0, -1, 5, 5), (199, 0, 2, 1), (0, 149, 1, 2), (0, 0, -1, -1)]
)
def test_regions_outside_the_picture(codec: Codec, tiled: dict[bool, bytes], region: tuple[int, int, int, int]) -> None:
    for data in tiled.values():
        with pytest.raises(ValueError, match="region"):
            codec.decompress(data, region=region)


def test_limits_are_those_of_the_whole_picture(codec: Codec, tiled: dict[bool, bytes]) -> None:
    for decode in (codec.decompress, codec.decode_array, codec.decode_tensor):
        with pytest.raises(LimitError):
            decode(tiled[True], limits=Limits(max_pixels=200 * 150 - 1), region=(0, 0, 1, 1))


# Cancelling


class CancelledError(Exception):
    pass


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lossless", [False, True])
def test_what_progress_raises_ends_the_work(codec: Codec, tiled: dict[bool, bytes], lossless: bool) -> None:
    calls: list[int] = []

    def cancel(pixels: int) -> None:
        calls.append(pixels)
        if len(calls) == 2:
            raise CancelledError

    for work in (
        lambda: codec.compress(picture(200, 150), 75, cancel, lossless=lossless),
        lambda: codec.decompress(tiled[lossless], progress=cancel),
    ):
        calls.clear()
        with pytest.raises(CancelledError):
            work()
        assert len(calls) == 2 and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert codec.compress(picture(200, 150), lossless=lossless) == tiled[lossless]


# Pickling


def test_a_codec_is_pickled_as_its_arguments(tiny: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps(tiny)
    assert len(pickled) < 500
    assert pickle.loads(pickled).compress(picture(40, 30)) == tiny.compress(picture(40, 30))
    assert b"auto" in pickle.dumps(Codec())  # which may be another device elsewhere
    monkeypatch.chdir(TINY.parent)
    relative = pickle.dumps(Codec("cpu", TINY.name))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(relative).lossy.identity == tiny.lossy.identity


def test_metadata_after_the_pixels_is_kept(codec: Codec) -> None:
    exif = Image.Exif()
    exif[0x010E] = "after"
    data = bytearray(saved(picture(20, 10)))
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + body
    data[-12:-12] = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with Image.open(io.BytesIO(bytes(data))) as image:
        assert "exif" not in image.info
        assert codec.decompress(codec.compress(image)).getexif()[0x010E] == "after"
