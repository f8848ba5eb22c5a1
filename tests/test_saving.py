"""Pictures into other formats: what is written is what was there, or is refused, or is what was asked for."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, cli, names, picture, saved
from PIL import Image, ImageOps

from vaecodec import Codec, saving
from vaecodec.image import DeepPicture, ImageError
from vaecodec.saving import WHOLE, encode_picture, flattened, picture_format

RNG = np.random.default_rng(0)
MODES = {
    mode: Image.fromarray(RNG.integers(0, 256, (30, 40, len(mode)), np.uint8).squeeze())
    for mode in ("L", "LA", "RGB", "RGBA")
}
MODES["I;16"] = Image.fromarray(RNG.integers(0, 65536, (30, 40), np.uint16))


def reopened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", sorted(WHOLE))
def test_the_formats_that_hold_everything_do(format: str, mode: str) -> None:
    image = MODES[mode]
    back = reopened(encode_picture(image, format)[0])
    assert back.mode == mode and np.array_equal(back, image)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", ["BMP", "DIB", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA", "WEBP"])
def test_what_is_written_is_exact_or_refused(format: str, mode: str) -> None:
    image = MODES[mode]
    try:
        data, _ = encode_picture(image, format)
    except ImageError as error:
        words = str(error)
        assert ".png and .tiff" in words and "--lossy-output" in words and "\n" not in words
        assert ("--background" in words) == (mode in ("LA", "RGBA"))
    else:
        back = reopened(data)
        back = back.convert("L") if back.mode == "P" else back
        wide = {"L": "RGB", "LA": "RGBA"}.get(mode, mode) if back.mode.startswith("RGB") else mode
        expected = np.asarray(image.convert(wide))
        assert back.size == image.size and np.array_equal(np.asarray(back).astype(int), expected.astype(int))


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("WEBP", "I;16"), ("AVIF", "I;16"), ("JPEG", "I;16"), ("GIF", "I;16"), ("BMP", "I;16"), ("PDF", "I;16"),
        ("BMP", "RGBA"), ("DIB", "RGBA"), ("PPM", "RGBA"), ("PPM", "LA"), ("JPEG", "RGBA"), ("JPEG", "LA"),
        ("GIF", "RGB"), ("GIF", "RGBA"), ("ICNS", "L"), ("SPIDER", "RGB"),
    ],
)  # fmt: skip
def test_formats_that_lose_do_so_only_if_asked(format: str, mode: str) -> None:
    with pytest.raises(ImageError):
        encode_picture(MODES[mode], format)
    assert encode_picture(MODES[mode], format, lossy=True)[0]


def test_an_icon_ends_at_256_pixels() -> None:
    assert np.array_equal(reopened(encode_picture(picture(256, 200), "ICO")[0]), picture(256, 200))
    with pytest.raises(ImageError):
        encode_picture(picture(300, 200), "ICO")
    assert encode_picture(picture(300, 200), "ICO", lossy=True)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "HEIF", "JXL"])
def test_a_picture_that_lies_on_its_side(format: str) -> None:
    saving.load_plugins()
    if format not in Image.SAVE:
        pytest.skip("a plugin is not there")
    exif, image = Image.Exif(), picture(40, 30)
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    upright = ImageOps.exif_transpose(image)
    assert np.array_equal(ImageOps.exif_transpose(reopened(encode_picture(image, format)[0])), upright)


def test_few_colours_fit_into_gif() -> None:
    drawing = Image.new("RGB", (20, 10), "red")
    drawing.paste("blue", (3, 3, 9, 9))
    assert np.array_equal(reopened(encode_picture(drawing, "GIF")[0]).convert("RGB"), drawing)


@pytest.mark.parametrize("format", ["WEBP", "PNG", "TIFF", "TGA", "JPEG2000", "QOI"])
def test_colours_under_alpha_0_are_kept(format: str) -> None:
    image = picture(40, 30)
    image.putalpha(0)
    image.putpixel((1, 1), (*image.getpixel((1, 1))[:3], 255))  # type: ignore[index]
    assert np.array_equal(reopened(encode_picture(image, format)[0]).convert("RGBA"), image)


@pytest.mark.parametrize(("format", "suffix"), [("HEIF", ".heic"), ("JXL", ".jxl")])
@pytest.mark.parametrize("mode", MODES)
def test_plugins_formats_are_exact(format: str, suffix: str, mode: str) -> None:
    pytest.importorskip({"HEIF": "pillow_heif", "JXL": "pillow_jxl"}[format])
    assert picture_format(suffix) == format
    if (format, mode) == ("HEIF", "I;16"):
        with pytest.raises(ImageError, match="changes the samples"):
            encode_picture(MODES[mode], format)
    else:
        back = reopened(encode_picture(MODES[mode], format)[0])
        assert np.array_equal(back, MODES[mode].convert(back.mode))


def test_a_broken_plugin_is_a_warning_and_a_missing_one_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text("import of_nothing_that_is_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(saving, "PLUGINS", ("not_installed.Plugin",))
    assert saving.load_plugins() and not saving.load_plugins()
    monkeypatch.setattr(saving, "PLUGINS", ("broken_plugin",))
    with pytest.warns(UserWarning, match="broken_plugin is not used"):
        saving.load_plugins()


def test_sixteen_bits_are_scaled_where_eight_are_asked_for() -> None:
    for depth in (12, 16):
        image = Image.fromarray(np.array([[0, 2 ** (depth - 1), 2**depth - 1]], np.uint16))
        back = reopened(encode_picture(image, "BMP", depth=depth, lossy=True)[0])
        assert np.asarray(back).tolist() == [[0, 128, 255]]


def test_a_background() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 8))
    over = flattened(image, "lime")
    assert over.mode == "RGB" and over.getpixel((0, 0)) == (0, 255, 0) and over.getpixel((5, 5)) == (0, 0, 255)
    back = reopened(encode_picture(image, "JPEG", background="lime")[0])
    assert np.abs(np.asarray(back).astype(int) - np.asarray(over)).max() < 9
    assert np.asarray(reopened(encode_picture(image, "BMP", lossy=True)[0])).tolist()[0][0] == [255, 255, 255]
    grey = Image.new("LA", (8, 8), (100, 0))
    assert flattened(grey, "black").getextrema() == (0, 0) and flattened(grey, "red").mode == "RGB"
    assert flattened(picture(8, 8), "red").tobytes() == picture(8, 8).tobytes()


def test_a_background_of_16_bits() -> None:
    samples = np.zeros((2, 2, 4), np.uint16)
    samples[..., 0], samples[0, :, 3], samples[1, 0, 3] = 65535, 65535, 32768
    deep = DeepPicture(samples, 16, {})
    over = saving.deep_flattened(deep, "lime").samples
    assert over[0, 0].tolist() == [65535, 0, 0] and over[1, 1].tolist() == [0, 65535, 0]
    assert over[1, 0].tolist() == [32768, 32767, 0]
    assert encode_picture(deep, "PPM", background="lime")[0].endswith(over.astype(">u2").tobytes())
    assert reopened(encode_picture(deep, "JPEG", background="lime", lossy=True)[0]).mode == "RGB"


def test_a_pdf() -> None:
    data, lost = encode_picture(picture(40, 30), "PDF")
    assert data.startswith(b"%PDF") and b"/DCTDecode" in data and lost == []


# The command


@pytest.fixture
def exact(tmp_path: Path, codec: Codec) -> Path:
    """A lossless file for each mode."""
    for mode, image in MODES.items():
        (tmp_path / f"{mode.replace(';', '')}.vae").write_bytes(codec.compress(image, lossless=True))
    return tmp_path


@pytest.mark.usefixtures("small_weights")
def test_the_command_refuses_and_writes_what_is_asked(exact: Path) -> None:
    before = names(exact)
    for name, suffix in (("I16", "webp"), ("I16", "avif"), ("RGBA", "bmp"), ("RGBA", "jpg"), ("RGB", "gif")):
        target = exact / f"out.{suffix}"
        result = cli("decompress", exact / f"{name}.vae", "-o", target, *CPU)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "--lossy-output" in result.stderr
        assert names(exact) == before
        assert cli("decompress", exact / f"{name}.vae", "-o", target, "--lossy-output", *CPU).exit_code == 0
        target.unlink()
    assert cli("decompress", exact / "RGBA.vae", "-o", exact / "a.jpg", "--background", "white", *CPU).exit_code == 0
    assert cli("decompress", exact / "RGB.vae", "-o", exact / "a.pdf", *CPU).exit_code == 0
    result = cli("decompress", exact / "RGBA.vae", "--background", "no colour", *CPU)
    assert result.exit_code == 2 and "no colour" in result.stderr


@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize(("format", "suffix"), [("HEIF", "heic"), ("JXL", "jxl")])
def test_plugins_formats_on_the_command_line(tmp_path: Path, format: str, suffix: str) -> None:
    pytest.importorskip({"HEIF": "pillow_heif", "JXL": "pillow_jxl"}[format])
    saving.load_plugins()
    (tmp_path / f"a.{suffix}").write_bytes(encode_picture(picture(40, 30), format)[0])
    assert cli("compress", tmp_path / f"a.{suffix}", "--lossless", *CPU).exit_code == 0
    assert cli("decompress", tmp_path / "a.vae", "-o", tmp_path / f"b.{suffix}", *CPU).exit_code == 0
    assert np.array_equal(reopened((tmp_path / f"b.{suffix}").read_bytes()), picture(40, 30))
    assert cli("compare", tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}").exit_code == 0


def test_a_file_that_was_written_wrong_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Pillow says: the file is read back."""
    other = saved(picture(40, 30, seed=3), "BMP")
    monkeypatch.setitem(Image.SAVE, "BMP", lambda image, stream, name: stream.write(other))
    with pytest.raises(ImageError, match="changes the samples"):
        encode_picture(picture(40, 30), "BMP")
