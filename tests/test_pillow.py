"""Pillow, and what reads through it, opens and saves ``.vae`` files."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, python, same, saved
from PIL import Image, UnidentifiedImageError

import vaecodec
import vaecodec.pillow
from bitstream import pack, unpack
from vaecodec import Codec
from vaecodec.pillow import VaeImageFile


@pytest.fixture(autouse=True)
def opener(codec: Codec) -> Iterator[None]:
    """Pillow uses the small models as well."""
    vaecodec.register_vae_opener(codec)
    yield
    vaecodec.register_vae_opener()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_pictures_are_saved_and_opened_by_name(tmp_path: Path, codec: Codec) -> None:
    image, path = picture(40, 30), tmp_path / "a.vae"
    for options in ({}, {"quality": 85}, {"quality": 12.5}, {"lossless": True}):
        image.save(path, **options)
        assert path.read_bytes() == codec.compress(image, **options)  # type: ignore[arg-type]
        with Image.open(path) as read:
            assert read.format == "VAE" and read.get_format_mimetype() == "image/x-vae"
            assert same(read, codec.decompress(path))


def test_importing_the_module_is_enough(tmp_path: Path) -> None:
    picture(40, 30).save(tmp_path / "a.vae", lossless=True)
    code = """
import sys
from PIL import Image
import vaecodec.pillow
image = Image.open(sys.argv[1])
assert (image.format, image.size, image.mode) == ("VAE", (40, 30), "RGB")
assert "torch" not in sys.modules
"""
    assert python(code, tmp_path / "a.vae").returncode == 0


def test_pixels_are_decoded_when_they_are_asked_for(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoded = codec.compress(picture(40, 30)), list[bool]()
    decode = Codec.decode_tiles
    monkeypatch.setattr(Codec, "decode_tiles", lambda *a, **b: decoded.append(True) or decode(*a, **b))
    image = opened(data)
    assert image.size == (40, 30) and not decoded
    image.load()
    assert same(image.copy(), image) and decoded == [True]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"])
def test_modes(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 999)
    else:
        image = picture(40, 30).convert(mode)
    read = opened(saved(image, "VAE", lossless=True))
    assert same(read, image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}.get(mode, mode)))


@pytest.mark.parametrize(("mode", "lossless"), [("CMYK", True), ("F", True), ("YCbCr", False)])
def test_modes_that_are_refused(tmp_path: Path, mode: str, lossless: bool) -> None:
    with pytest.raises(OSError, match=f"mode {mode} "):
        Image.new(mode, (4, 4)).save(tmp_path / "a.vae", lossless=lossless)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("lossless", [False, True])
def test_metadata_is_kept_replaced_and_dropped(lossless: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = opened(saved(picture(20, 10), "JPEG", exif=exif, icc_profile=b"profile" * 9, xmp=b"<x/>"))
    kept = opened(saved(image, "VAE", lossless=lossless))
    keys = ("exif", "icc_profile", "xmp")
    assert kept.info == {key: image.info[key] for key in keys} and kept.getexif()[0x0112] == 6
    exif[0x0112] = 8
    for given in (exif, exif.tobytes()):
        changed = opened(saved(image, "VAE", lossless=lossless, exif=given, xmp="<y/>", icc_profile=None))
        assert changed.info.keys() == {"exif", "xmp"}
        assert changed.getexif()[0x0112] == 8 and changed.info["xmp"] == b"<y/>"
    assert image.getexif()[0x0112] == 6 and image.info["xmp"] == b"<x/>"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": 101}, "101"),
        ({"quality": -1}, "-1"),
        ({"quality": "keep"}, "keep"),
        ({"quality": 80, "lossless": True}, "no quality"),
        ({"exif": 7}, "exif"),
        ({"append_images": [picture(4, 4)]}, "several frames"),
        ({"save_all": True, "append_images": [picture(4, 4)]}, "several frames"),
    ],
)
def test_invalid_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        picture(4, 4).save(tmp_path / "a.vae", **options)
    assert [*tmp_path.iterdir()] == []


def test_of_several_frames_the_current_one_is_saved_and_all_are_refused() -> None:
    frames = [picture(8, 8, seed=seed) for seed in range(3)]
    gif = opened(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    gif.seek(1)
    assert same(opened(saved(gif, "VAE", lossless=True)), gif.convert("RGB"))
    with pytest.raises(ValueError, match="several frames"):
        saved(gif, "VAE", save_all=True)
    assert opened(saved(frames[0], "VAE", save_all=True)).size == (8, 8)


def test_a_picture_replaces_its_own_file(tmp_path: Path) -> None:
    path, image = tmp_path / "a.vae", picture(20, 10)
    image.save(path, lossless=True)
    with Image.open(path) as read:
        read.save(path, lossless=True)
    assert same(Image.open(path), image)


# What is no picture


def test_files_that_are_not_ours_are_left_to_others(tmp_path: Path) -> None:
    picture(4, 4).save(tmp_path / "png.vae", "PNG")  # the suffix proves nothing
    assert Image.open(tmp_path / "png.vae").format == "PNG"
    for data in (b"", b"hello, this is no picture", b"\x8bVAE\n"):
        with pytest.raises(UnidentifiedImageError):
            opened(data)
        with pytest.raises(SyntaxError):
            VaeImageFile(io.BytesIO(data))


def test_damaged_files(codec: Codec) -> None:
    data = codec.compress(picture(40, 30))
    for changed, words in (
        (data[:20], "header"),
        (data[:-3], "ends"),
        (data[:9] + b"\x09" + data[10:], "newer"),
        (data[:20] + b"\x09" + data[21:], "checksum"),
    ):
        with pytest.raises(OSError, match=words):
            opened(changed)
    file = unpack(data)
    image = opened(pack(file.header, [replace(file.tiles[0], crc=0)]))
    assert image.size == (40, 30)
    for _ in range(2):
        with pytest.raises(OSError, match="checksum"):
            image.load()
    deep = codec.compress(np.zeros((4, 4, 3), np.uint16), lossless=True)
    with pytest.raises(OSError, match="decode_array"):
        opened(deep)


def test_how_many_pixels_are_accepted_is_for_pillow_to_say(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.compress(picture(40, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(Image.DecompressionBombError):
        opened(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.warns(Image.DecompressionBombWarning):
        opened(data).load()


# imageio


def test_imageio_reads_and_writes_through_pillow(tmp_path: Path, codec: Codec) -> None:
    imageio = pytest.importorskip("imageio.v3")
    array, path = np.asarray(picture(40, 30)), tmp_path / "a.vae"
    imageio.imwrite(path, array, plugin="pillow", lossless=True)
    assert path.read_bytes() == codec.compress(array, lossless=True)
    assert np.array_equal(imageio.imread(path), array)
