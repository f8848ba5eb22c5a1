"""The plugins as guests: what works with Pillow's PNG and with numcodecs' and zarr's own codecs works with them."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, same, saved
from PIL import Image, ImageFile

import vaecodec.codec
import vaecodec.pillow
from bitstream import pack, unpack

pytestmark = pytest.mark.usefixtures("small_weights")

# Pillow


@pytest.mark.parametrize("format", ["PNG", "VAE"])
@pytest.mark.parametrize("step", [1, 100, 10**6])
def test_incremental_parser(format: str, step: int) -> None:
    image = picture(20, 10)
    data = saved(image, format, **({"lossless": True} if format == "VAE" else {}))
    parser = ImageFile.Parser()
    for start in range(0, len(data), step):
        parser.feed(data[start : start + step])
    assert same(parser.close(), image)
    parser = ImageFile.Parser()
    parser.feed(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"incomplete|truncated|cannot parse|ends within"):
        parser.close()


@pytest.mark.parametrize("lossless", [False, True])
def test_verify_looks_at_the_tiles(lossless: bool) -> None:
    data = saved(picture(40, 30), "VAE", lossless=lossless)
    Image.open(io.BytesIO(data)).verify()
    broken = bytearray(data)
    broken[-9] ^= 1
    with pytest.raises(OSError, match="checksum"):
        Image.open(io.BytesIO(broken)).verify()


@pytest.mark.parametrize("lossless", [False, True])
def test_truncated_images(monkeypatch: pytest.MonkeyPatch, lossless: bool) -> None:
    monkeypatch.setattr(vaecodec.codec.shared(), "tile", 64)
    image = picture(128, 64)
    data = saved(image, "VAE", **({"lossless": True} if lossless else {"quality": 90}))
    whole = np.asarray(Image.open(io.BytesIO(data)))
    file = unpack(data)
    swapped = pack(file.header, [file.tiles[1], file.tiles[0]])  # words that fail their checksum, or another picture
    for bad in (data[:-5], data[: -len(file.tiles[1].words)]):
        with pytest.raises(OSError, match="ends within"):
            Image.open(io.BytesIO(bad)).load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for bad in (data[:-5], data[: -len(file.tiles[1].words)]):
        read = np.asarray(Image.open(io.BytesIO(bad)))
        assert read.shape == whole.shape and (read[:, :32] == whole[:, :32]).all()
        assert (read == vaecodec.codec.shared().decode_array(bad, preview=True)).all()
    assert Image.open(io.BytesIO(swapped)).size == (128, 64)


@pytest.mark.parametrize("quality", [np.int64(80), np.float32(80), np.uint8(80), Fraction(80), 80.0])
def test_numbers_of_other_kinds(quality: Any) -> None:
    image = picture(20, 10)
    data = saved(image, "VAE", quality=quality)
    assert data == saved(image, "VAE", quality=80) == vaecodec.compress(image, quality=quality)
    assert saved(image, "VAE", quality=quality, effort=np.int64(0)) == data


def test_options_of_other_formats_are_passed_over(tmp_path: Path) -> None:
    image, path = picture(20, 10), tmp_path / "mine.vae"
    image.save(path, quality=80)
    options: dict[str, Any] = {
        "optimize": True,
        "method": 6,
        "dpi": (72, 72),
        "compress_level": 9,
        "subsampling": 0,
        "comment": b"x",
        "speed": 4,
        "pnginfo": None,
    }
    expected = path.read_bytes()
    image.save(path, quality=80, **options)
    assert path.read_bytes() == expected


REFUSED: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "quality": (picture(8, 8), {"quality": 101}),
    "kind of quality": (picture(8, 8), {"quality": "best"}),
    "effort": (picture(8, 8), {"effort": 10}),
    "kind of effort": (picture(8, 8), {"effort": "high"}),
    "both": (picture(8, 8), {"lossless": True, "quality": 80}),
    "exif": (picture(8, 8), {"exif": 7}),
    "metadata": (picture(8, 8), {"xmp": bytes(2**24 + 1)}),
    "mode": (Image.new("CMYK", (8, 8)), {}),
    "frames": (picture(8, 8), {"save_all": True, "append_images": [picture(8, 8)]}),
    "appended": (picture(8, 8), {"append_images": [picture(8, 8)]}),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("path_type", [str, Path, lambda path: str(path).encode()])
def test_what_is_refused_leaves_the_file(tmp_path: Path, name: str, path_type: Callable[[Path], Any]) -> None:
    image, options = REFUSED[name]
    path = tmp_path / "mine.vae"
    picture(8, 8).save(path)
    before = path.read_bytes()
    for target, format in ((path, None), (tmp_path / "mine.other", "vae")):
        target.write_bytes(before)
        with pytest.raises((ValueError, OSError, TypeError)):
            image.save(path_type(target), format, **options)
        assert target.read_bytes() == before
    with pytest.raises((ValueError, OSError, TypeError)):
        image.save(io.BytesIO(), "VAE", **options)


def test_a_broken_codec_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.vae"
    picture(8, 8).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(vaecodec.codec.Codec, "compress", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        picture(8, 8).save(path)
    assert path.read_bytes() == before
    picture(8, 8).save(tmp_path / "other.png")  # other formats go their own way


def test_pillow_is_changed_once() -> None:
    save = Image.Image.save
    vaecodec.register_vae_opener()
    assert Image.Image.save is save
    image = picture(8, 8)
    image.save(io.BytesIO(), "VAE")
    assert not any("vaecodec" in key for key in vars(image).get("_default_encoderinfo", {}))


@pytest.mark.parametrize("bad", [picture(8, 8), np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)])
def test_a_single_picture_is_no_batch(bad: Any) -> None:
    codec = vaecodec.codec.shared()
    with pytest.raises(vaecodec.ImageError, match="batch"):
        codec.compress_batch(bad)


# numcodecs and zarr

numcodecs = pytest.importorskip("numcodecs")
zarr = pytest.importorskip("zarr")


def array(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


OUTS: dict[str, Callable[[Any], Any]] = {
    "C": np.empty_like,
    "F": lambda a: np.empty_like(a, order="F"),
    "strides": lambda a: np.empty((2 * len(a), *a.shape[1:]), a.dtype)[::2],
    "backwards": lambda a: np.empty_like(a)[::-1],
    "leading axis": lambda a: np.empty((1, *a.shape), a.dtype),
    "flat": lambda a: np.empty(a.size, a.dtype),
    "bytearray": lambda a: bytearray(a.nbytes),
}


@pytest.mark.parametrize("name", OUTS)
def test_out(name: str) -> None:
    from vaecodec.array_codec import VaeCodec

    a = array(9, 7, 3)
    out = OUTS[name](a)
    assert VaeCodec().decode(VaeCodec().encode(a), out=out) is out
    read = np.frombuffer(out, np.uint8) if isinstance(out, bytearray) else out
    assert np.array_equal(np.ascontiguousarray(read).reshape(a.shape), a)


@pytest.mark.parametrize(
    "out", [np.empty((7, 9, 3), np.uint8), np.empty((9, 7, 4), np.uint8), np.empty((9, 7, 3), "u2")]
)
def test_outs_that_do_not_fit(out: Any) -> None:
    from vaecodec.array_codec import VaeCodec

    with pytest.raises(ValueError, match="does not fit"):
        VaeCodec().decode(VaeCodec().encode(array(9, 7, 3)), out=out)


def test_strides_orders_and_buffers() -> None:
    from vaecodec.array_codec import VaeCodec

    a, codec = array(18, 14, 3), VaeCodec()
    for view in (a[::2], a[:, ::-2], a[::-1, :, ::-1], a[..., 1], a[2:9, 3:8]):
        assert np.array_equal(codec.decode(codec.encode(view)).reshape(view.shape), view)
    with pytest.raises(ValueError, match="C order"):
        codec.encode(np.asfortranarray(a))
    for kind in (bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)):
        assert np.array_equal(codec.decode(kind(codec.encode(a))), a)


@pytest.mark.parametrize("quality", [np.int64(60), np.float32(60), 60])
def test_qualities(quality: Any, tmp_path: Path) -> None:
    from vaecodec.array_codec import VaeCodec
    from vaecodec.zarr_codec import VaeSerializer

    assert VaeCodec(quality).get_config() == {"id": "vaecodec", "quality": 60.0}
    for options in (
        {"zarr_format": 2, "compressors": VaeCodec(quality)},
        {"zarr_format": 3, "compressors": None, "serializer": VaeSerializer(quality)},
    ):
        path = tmp_path / str(options["zarr_format"])
        zarr.create_array(path, shape=(9, 7, 3), chunks=(9, 7, 3), dtype="uint8", **options)[:] = 1
        assert zarr.open_array(path)[:].shape == (9, 7, 3)


@pytest.mark.parametrize("quality", [150, -1, float("nan"), "80", np.inf])
def test_bad_qualities(quality: Any) -> None:
    from vaecodec.array_codec import VaeCodec
    from vaecodec.zarr_codec import VaeSerializer

    for codec in (VaeCodec, VaeSerializer):
        with pytest.raises(ValueError, match="quality"):
            codec(quality)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (64, 64, 3)),
        ("int8", (64, 64)),
        ("uint32", (64, 64)),
        ("bool", (64, 64)),
        ("uint8", (64,)),
        ("uint8", (64, 64, 5)),
        ("uint8", (2, 64, 64, 3)),
        ("uint16", (64, 64, 2)),
    ],
)
def test_arrays_that_can_never_be_coded(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    from vaecodec.zarr_codec import VaeSerializer

    options = {"shape": shape, "chunks": shape, "dtype": dtype, "serializer": VaeSerializer(), "compressors": None}
    with pytest.raises(vaecodec.ImageError, match="is no picture"):
        zarr.create_array(tmp_path / "a.zarr", **options)
    assert not (tmp_path / "a.zarr" / "zarr.json").exists()


def test_arrays_that_can(tmp_path: Path) -> None:
    from zarr.codecs import TransposeCodec

    from vaecodec.zarr_codec import VaeSerializer

    for dtype, shape, more in (
        ("uint8", (1, 20, 30, 3), {}),
        ("uint16", (20, 30), {}),
        (">u2", (20, 30), {}),
        ("uint8", (3, 20, 30), {"filters": [TransposeCodec(order=(1, 2, 0))]}),
    ):
        options = {"chunks": shape, "dtype": dtype, "serializer": VaeSerializer(), "compressors": None}
        stored = zarr.create_array(tmp_path / "a.zarr", shape=shape, overwrite=True, **options, **more)
        stored[:] = expected = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        assert np.array_equal(stored[:], expected) and stored[:].dtype == np.dtype(dtype)


def test_chunks_are_compared_with_what_they_should_be(tmp_path: Path) -> None:
    from vaecodec.zarr_codec import VaeSerializer

    others = {
        "turned": np.asarray(picture(128, 32)),
        "deep": np.zeros((64, 64, 3), np.uint16),
        "grey": np.zeros((64, 64), np.uint8),
        "alpha": np.zeros((64, 64, 4), np.uint8),
    }
    options: dict[str, Any] = {"chunks": (64, 64, 3), "serializer": VaeSerializer(), "compressors": None}
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(64, 64, 3), dtype="uint8", **options)
    stored[:] = 1
    for other in others.values():
        (tmp_path / "a.zarr/c/0/0/0").write_bytes(vaecodec.compress(other, lossless=True))
        with pytest.raises(vaecodec.CorruptError, match="a chunk holds"):
            stored[:]


def test_foreign_byte_orders_of_format_2() -> None:
    from vaecodec.array_codec import VaeCodec

    foreign = np.zeros((9, 7), np.dtype(np.uint16).newbyteorder("S"))
    with pytest.raises(vaecodec.ImageError, match="byte order"):  # zarr would read the samples the other way round
        VaeCodec().encode(foreign)
