"""Pictures between Pillow and arrays: what is carried, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import picture, same, saved
from PIL import Image

from bitstream import EXIF, ICC, XMP, Section
from vaecodec.image import (
    ImageError,
    grey_of,
    info_of,
    metadata_of,
    open_picture,
    picture_of,
    pixels_of,
    samples_of,
)
from vaecodec.saving import encode_picture


def exif() -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = 6  # orientation
    data[0x010E] = "a description"
    return data


def deep_png(colour_type: int, samples: int) -> bytes:
    """A PNG with 16 bits a sample, which Pillow does not write in colour."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    rows = b"".join(b"\0" + bytes(range(5 * samples * 2)) for _ in range(4))
    head = struct.pack(">IIBBBBB", 5, 4, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def reopened(data: bytes) -> Image.Image:
    return open_picture(io.BytesIO(data))


def through(image: Image.Image) -> Image.Image:
    """The picture of the samples of a picture."""
    return picture_of(samples_of(image)[0])


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_samples_round_trip(mode: str) -> None:
    image = picture(9, 5, mode)
    samples, kept, depth = samples_of(image)
    assert samples.shape == (5, 9, len(mode)) and samples.dtype == np.uint8 and (kept.name, depth) == (mode, 8)
    assert same(through(image), image)


def test_bilevel_and_palette_pictures_keep_their_pixels() -> None:
    for image, mode in ((picture(9, 5).convert("1"), "L"), (picture(9, 5).quantize(7), "RGB")):
        assert same(through(image), image.convert(mode))


def test_parts_are_those_of_the_whole() -> None:
    """Whatever Pillow's mode is: what is converted part by part is what is converted in one piece."""
    images = [picture(9, 5, mode) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I")]
    images += [Image.fromarray(np.arange(45, dtype=np.uint16).reshape(5, 9) * 1456), picture(9, 5).quantize(7)]
    images[-1].info["transparency"] = bytes(range(7))
    images += [image.copy() for image in images[1:6:4]]  # L, RGB
    for image, colour in zip(images[-2:], (image.getpixel((3, 2)) for image in images[-2:]), strict=True):
        image.info["transparency"] = colour
    for image in images:
        pixels, (samples, mode, bits) = pixels_of(image), samples_of(image)
        part = pixels[2:5, 3:9]
        assert (mode, bits, samples.shape[:2]) == (pixels.mode, pixels.bits, (5, 9))
        assert part.dtype == samples.dtype and np.array_equal(part, samples[2:5, 3:9])
        assert np.array_equal(samples.squeeze(), np.asarray(image.convert(mode.name) if bits == 8 else image))


def test_grey_is_the_mean_of_the_channels() -> None:
    pixels = np.array([[[10, 11, 11], [0, 0, 1], [255, 255, 255]]], np.uint8)
    assert grey_of(pixels).ravel().tolist() == [11, 0, 255]


@pytest.mark.parametrize("mode", ["CMYK", "F", "YCbCr", "LAB", "HSV"])
def test_other_modes_are_refused_by_name(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode} "):
        samples_of(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparency_outside_the_mode_becomes_alpha(mode: str) -> None:
    colour = (1, 2, 3) if mode == "RGB" else 1
    image = reopened(saved(Image.new(mode, (4, 4)), transparency=colour))
    assert same(through(image), image.convert("LA" if mode == "L" else "RGBA"))


@pytest.mark.parametrize(("colour_type", "samples"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_colour_are_refused_not_cut_to_eight(colour_type: int, samples: int) -> None:
    with pytest.raises(ImageError, match="cut 16-bit"):
        samples_of(Image.open(io.BytesIO(deep_png(colour_type, samples))))


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_several_frames_are_refused(format: str) -> None:
    frames = [picture(8, 8, seed=seed) for seed in range(3)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="3 frames"):
        samples_of(reopened(data))


def test_what_is_no_picture_is_refused() -> None:
    for data in (b"", b"hello", saved(picture(40, 40))[:200], saved(picture(40, 40), "JPEG")[:300]):
        with pytest.raises(ImageError):
            reopened(data)


def test_metadata_that_a_format_cannot_take_is_named() -> None:
    image = picture(9, 5)
    image.info |= info_of((Section(EXIF, exif().tobytes()), Section(ICC, b"profile" * 30)))
    assert sorted(encode_picture(image, "BMP")[1]) == ["exif", "icc_profile"]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_metadata_goes_through_pictures_files(format: str) -> None:
    image = picture(9, 5)
    sections = (Section(EXIF, exif().tobytes()), Section(ICC, b"profile" * 30), Section(XMP, b"<x:xmpmeta/>"))
    image.info |= info_of(sections)
    written, lost = encode_picture(image, format)
    assert lost == []
    read = {section.tag: bytes(section.payload) for section in metadata_of(reopened(written))}
    assert read[ICC] == b"profile" * 30 and read[XMP] == b"<x:xmpmeta/>"
    tags = Image.open(io.BytesIO(written)).getexif()
    assert tags[0x0112] == 6 and tags[0x010E] == "a description"
    if format != "TIFF":  # which keeps EXIF in its own tags
        assert read[EXIF].removeprefix(b"Exif\0\0") == exif().tobytes().removeprefix(b"Exif\0\0")


def test_a_format_that_cannot_hold_the_mode_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="cannot write"):
        encode_picture(picture(4, 4).convert("F"), "JPEG")
