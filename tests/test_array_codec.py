"""Arrays of pictures: the codec of numcodecs, zarr's format 2 with it, and the serializer of format 3."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, python
from numpy.typing import NDArray

pytest.importorskip("numcodecs")
pytest.importorskip("zarr")

import numcodecs
import zarr

from vaecodec import ImageError
from vaecodec.array_codec import VaeCodec
from vaecodec.codec import shared
from vaecodec.zarr_codec import VaeSerializer

pytestmark = pytest.mark.usefixtures("small_weights")
both_formats = pytest.mark.parametrize("codec", [VaeCodec, VaeSerializer])
Codec = VaeCodec | VaeSerializer


def photographs(count: int, mode: str = "RGB") -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture(40, 30, mode, seed)) for seed in range(count)])


def stored(path: Path, array: NDArray[Any], chunks: tuple[int, ...], codec: Codec, **options: Any) -> Any:
    coding: dict[str, Any] = {"zarr_format": 2, "compressors": codec}
    if isinstance(codec, VaeSerializer):
        coding = {"zarr_format": 3, "serializer": codec, "compressors": None}
    layout = {"shape": array.shape, "chunks": chunks, "dtype": array.dtype}
    zarr.create_array(path, **layout, **coding, **options)[:] = array
    return zarr.open_array(path, mode="r")[:]


def chunks_of(path: Path) -> list[bytes]:
    """The stored chunks, without zarr's own files."""
    files = [file for file in path.rglob("*") if file.is_file() and "zarr" not in file.name and file.name[0] != "."]
    return sorted(file.read_bytes() for file in files)


@pytest.mark.parametrize(
    "shape",
    [(9, 7), (9, 7, 1), (9, 7, 2), (9, 7, 3), (9, 7, 4), (1, 9, 7), (1, 9, 7, 3), (1, 1, 9, 7), (1, 1, 9, 7, 3)],
)
def test_samples_are_kept_by_default(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    codec, out = VaeCodec(), np.empty_like(array)
    data = codec.encode(array)
    assert np.array_equal(codec.decode(data).reshape(shape), array)
    assert codec.decode(data, out) is out and np.array_equal(out, array)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3), (1, 9, 7, 4)])
def test_sixteen_bits(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    decoded = VaeCodec().decode(VaeCodec().encode(array))
    assert decoded.dtype == np.uint16 and np.array_equal(decoded.reshape(shape), array)


def test_a_quality_makes_it_lossy() -> None:
    (array,) = photographs(1)
    data = VaeCodec(quality=40).encode(array)
    assert data == shared().compress(array, 40)
    assert np.array_equal(VaeCodec().decode(data), shared().decode_array(data))


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.zeros((2, 9, 7, 3), np.uint8), ImageError),
        (np.zeros((9, 7, 5), np.uint8), ImageError),
        (np.zeros((9, 7), np.float32), ImageError),
        (np.zeros((9, 7), ">u2" if np.dtype("<u2").isnative else "<u2"), ImageError),
        (np.zeros((9, 7, 3), np.uint8, order="F"), ValueError),
    ],
)
def test_chunks_that_are_no_pictures(array: NDArray[Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        VaeCodec().encode(array)


def test_configuration() -> None:
    for codec in (VaeCodec(), VaeCodec(quality=12.5)):
        assert codec.get_config() == {"id": "vaecodec", "quality": codec.quality}
        assert numcodecs.get_codec(codec.get_config()) == codec


def test_numcodecs_finds_the_codec_without_an_import() -> None:
    result = python("import numcodecs, sys; print(numcodecs.get_codec({'id': 'vaecodec'}), 'torch' in sys.modules)")
    assert result.stdout.decode().split() == ["VaeCodec(quality=None)", "False"], result.stderr.decode()


@both_formats
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_zarr_array_of_pictures(tmp_path: Path, mode: str, codec: type[Codec]) -> None:
    pictures = photographs(3, mode)
    read = stored(tmp_path / "a.zarr", pictures, (1, *pictures.shape[1:]), codec())
    assert np.array_equal(read, pictures)
    assert chunks_of(tmp_path / "a.zarr") == sorted(shared().compress(one, lossless=True) for one in pictures)
    lossy = stored(tmp_path / "b.zarr", pictures, (1, *pictures.shape[1:]), codec(quality=80))
    for one, other in zip(pictures, lossy, strict=True):
        expected = shared().decode_array(shared().compress(one, 80)).reshape(one.shape)
        assert np.array_equal(other, expected)


@both_formats
def test_a_large_picture_in_zarr_chunks(tmp_path: Path, codec: type[Codec]) -> None:
    """Chunks at the edges are filled up to their full size by zarr."""
    array = np.asarray(picture(100, 70))
    assert np.array_equal(stored(tmp_path / "a.zarr", array, (32, 32, 3), codec()), array)
    deep = array.astype(np.uint16)[..., 0] * 257
    assert np.array_equal(stored(tmp_path / "b.zarr", deep, (32, 32), codec()), deep)


def test_the_serializer_names_itself_and_its_quality(tmp_path: Path) -> None:
    """This, and the entry point, is how zarr finds it again; memory in Fortran's order is no matter to format 3."""
    array = np.asfortranarray(picture(40, 30))
    assert np.array_equal(stored(tmp_path / "a.zarr", array, array.shape, VaeSerializer()), array)
    described = {"name": "vaecodec", "configuration": {"quality": None}}
    assert json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["codecs"] == [described]
    code = "import sys, zarr; print(zarr.open_array(sys.argv[1], mode='r').serializer, 'torch' in sys.modules)"
    result = python(code, tmp_path / "a.zarr")
    assert result.stdout.split() == [b"VaeSerializer(quality=None)", b"False"], result.stderr.decode()


def test_the_serializer_refuses_what_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        stored(tmp_path / "a.zarr", photographs(2), (2, 30, 40, 3), VaeSerializer())


def test_arrays_in_other_orders_are_refused_not_scrambled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="C order"):
        stored(tmp_path / "a.zarr", photographs(2), (1, 30, 40, 3), VaeCodec(), order="F")
