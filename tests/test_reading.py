"""Ways in: how deep a file is, 16-bit colour, alpha outside the mode, and metadata, whatever format they stand in."""

import base64
import importlib.util
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import png
import pytest
import tifffile
import torch
from conftest import TINY, TINY_CPU, TINY_LOSSLESS, cli, picture, same, saved
from PIL import Image, ImageFile, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

import vaecodec.metadata
from bitstream import read_header, unpack
from vaecodec import Codec
from vaecodec.engines import MissingError
from vaecodec.image import DeepPicture, ImageError, keep_metadata, metadata_of, open_picture, pixels_of, samples_of
from vaecodec.metadata import left_out, unpacked
from vaecodec.reading import DEPTHS, depth_of

pytestmark = pytest.mark.usefixtures("threads")

LOSSLESS_CPU = ("--weights", str(TINY_LOSSLESS), "--device", "cpu")


def wave(channels: int, depth: int = 16, height: int = 21, width: int = 19) -> np.ndarray[Any, Any]:
    """Samples [H, W, C] that use all their bits."""
    rng = np.random.default_rng(channels)
    samples = rng.integers(0, 2**depth, (height, width, channels), np.uint16)
    samples[0, 0] = 2**depth - 1
    return samples


def deep_png(samples: np.ndarray[Any, Any], **options: Any) -> bytes:
    stream, (height, width, channels) = io.BytesIO(), samples.shape
    kinds = {"greyscale": channels < 3, "alpha": channels in (2, 4), "bitdepth": 16}
    png.Writer(width, height, **(kinds | options)).write(stream, samples.reshape(height, -1).tolist())
    return stream.getvalue()


def deep_tiff(samples: np.ndarray[Any, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    extra = {"extrasamples": ["unassalpha"]} if samples.shape[2] == 4 else {}
    tifffile.imwrite(stream, samples, photometric="rgb", **(extra | options))
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with more chunks before its pixels."""
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunk(*c) for c in chunks) + data[at:]


def opened(data: bytes) -> Image.Image | DeepPicture:
    return open_picture(io.BytesIO(data))


def samples_in(data: bytes) -> np.ndarray[Any, Any]:
    return samples_of(opened(data))[0]


def depth_in(data: bytes) -> int:
    file = io.BytesIO(data)
    return depth_of(Image.open(file), file)


def patched(data: bytes, mark: bytes, offset: int, value: int) -> bytes:
    changed = bytearray(data)
    changed[data.index(mark) + offset] = value
    return bytes(changed)


def pnm(kind: int, peak: int, samples: np.ndarray[Any, Any]) -> bytes:
    height, width = samples.shape[:2]
    head = f"P{kind}\n# made here\n{width} {height}\n{peak}\n".encode()
    if kind < 4:
        return head + b"# and more\n" + b"\n".join(b" ".join(b"%d" % v for v in row.ravel()) for row in samples)
    return head + samples.astype(">u2" if peak > 255 else np.uint8).tobytes()


def dds(masks: tuple[int, int, int]) -> bytes:
    form = struct.pack("<4I4I", 32, 0x40, 0, 32, *masks, 0)
    return (
        b"DDS "
        + struct.pack("<7I44x", 124, 0x1007, 4, 4, 16, 0, 0)
        + form
        + struct.pack("<4I4x", 0x1000, 0, 0, 0)
        + bytes(64)
    )


def fits(bits: int) -> bytes:
    cards = ["SIMPLE  =                    T", f"BITPIX  = {bits:20}", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    4", "NAXIS2  =                    4", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)


AVIF = {
    10: "0000WW^{RQVRmU|00000VRmU|ZE0pPZE0a<O+hh10002%ZDn*}000000000XXk=`10000000000aA{+7000000000000000000004sdC7Z2$l"
    "O000310016oY;R)#0000)000310RR910RR926951JDF6TfC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ00000YH4tCZ~y=ROKEUpZvX"
    "%Q6lrsCWdHyG000002mk;82mk;85O8UDX#fBK00RmN3IG5A3}JRLLxCVb000006Ju{|a&BX6cmM(b0ssbp0000NX>e^}0000000001009I60)qqq00"
    "1#<WMOm?015~=2)}Ov0tS#W8ydo5<lq1l5C8y>HVMg2;155BI(xh|KgX^1",
    12: "0000S"
    "W^{RQVRmU|00000VRmU|ZE0pPZE0a<0002%ZDn*}000000000XXk=`10000000000aA{+7000000000000000000004sdC7Z2$lO00031001"
    "6oY;R)#0000)000310RR910RR924*&oFA^-pYC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ00000YH4tCZ~y=ROKEUpZvX%Q6lrsCWd"
    "HyG000002mk;82mk;85O8UDX#fBK00RsR3;+NC3}JRLLxDhG000006Ju{|a&BX6cmM(b0ssbp0000NX>e^}0000000001009I60)qqq001g&WMOm?0"
    "160L2)}DUfPtbi6dJ-}<lq1l5CD)hj=1`*^%vJ-?f",
}
"""Slopes of 8 x 8 pixels with so many bits a sample, in base 85."""


# The depth of a file


@pytest.mark.parametrize(
    ("format", "data", "depth"),
    [
        ("AVIF", saved(picture(16, 16), "AVIF"), 8),
        ("AVIF", base64.b85decode(AVIF[10]), 10),
        ("AVIF", base64.b85decode(AVIF[12]), 12),
        ("BMP", saved(picture(5, 5), "BMP"), 8),
        ("DDS", dds((0xFF0000, 0xFF00, 0xFF)), 8),
        ("DDS", dds((0x3FF00000, 0xFFC00, 0x3FF)), 10),
        ("FITS", fits(8), 8),
        ("GIF", saved(picture(9, 5), "GIF"), 8),
        ("JPEG", saved(picture(9, 5), "JPEG"), 8),
        ("JPEG2000", saved(picture(32, 32), "JPEG2000"), 8),
        ("JPEG2000", saved(picture(32, 32), "JPEG2000", no_jp2=True), 8),
        ("JPEG2000", saved(Image.fromarray(wave(1)[..., 0]), "JPEG2000"), 16),
        ("JPEG2000", patched(saved(picture(32, 32), "JPEG2000", no_jp2=True), b"\xff\x51", 40, 11), 12),
        ("PNG", saved(picture(9, 5)), 8),
        ("PNG", saved(picture(9, 5).convert("1")), 8),
        ("PNG", deep_png(wave(3)), 16),
        ("PPM", pnm(6, 255, wave(3, 8)), 8),
        ("PPM", pnm(6, 15, wave(3, 4)), 8),
        ("PPM", pnm(5, 65535, wave(1)), 16),
        ("PPM", pnm(6, 1023, wave(3, 10)), 10),
        ("PPM", pnm(3, 4095, wave(3, 12)), 12),
        ("SGI", saved(picture(9, 5), "SGI"), 8),
        ("SGI", saved(picture(9, 5), "SGI", bpc=2), 16),
        ("TIFF", saved(picture(9, 5), "TIFF"), 8),
        ("TIFF", saved(picture(9, 5).convert("1"), "TIFF"), 8),
        ("TIFF", deep_tiff(wave(3)), 16),
        ("WEBP", saved(picture(9, 5), "WEBP"), 8),
    ],
)
def test_depth_is_what_the_file_says(format: str, data: bytes, depth: int) -> None:
    assert Image.open(io.BytesIO(data)).format == format and depth_in(data) == depth


def test_every_entry_of_the_table_has_a_test() -> None:
    """HEIF and JXL are of plugins, and below."""
    assert set(DEPTHS) == {"AVIF", "DDS", "FITS", "HEIF", "JPEG2000", "JXL", "PNG", "PPM", "SGI", "TIFF"}


@pytest.mark.parametrize("width", [5, 15, 16, 21, 32, 160, 720])
@pytest.mark.parametrize(
    ("format", "options"),
    [("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PCX", {}), ("JPEG2000", {}), ("TGA", {})],
)
def test_no_number_in_an_8_bit_file_makes_it_deep(width: int, format: str, options: dict[str, Any]) -> None:
    """As row lengths, file sizes and offsets of 16 once did."""
    image = picture(width, 16)
    assert np.array_equal(samples_in(saved(image, format, **options)), np.asarray(image))


def test_bmp_of_16_bits_a_pixel() -> None:
    pixels = np.array([[0xF800, 0x07E0, 0x001F, 0xFFFF]], "<u2")
    head = struct.pack("<IiiHHIIiiII3I", 40, 4, 1, 1, 16, 3, 8, 2835, 2835, 0, 0, 0xF800, 0x07E0, 0x001F)
    data = b"BM" + struct.pack("<IHHI", 14 + len(head) + 8, 0, 0, 14 + len(head)) + head + pixels.tobytes()
    assert samples_in(data)[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


# 16 bits a sample


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits(channels: int, interlace: bool) -> None:
    samples = wave(channels)
    expected = samples if channels != 2 else samples[..., [0, 0, 0, 1]]
    assert np.array_equal(samples_in(deep_png(samples, interlace=interlace)), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_16_bits_with_a_transparent_colour(channels: int) -> None:
    samples = wave(channels)
    key = tuple(samples[3, 4].tolist())
    found = samples_in(deep_png(samples, transparent=key if channels > 1 else key[0]))
    assert np.array_equal(found[..., :3], samples.repeat(3 // channels, 2))
    assert np.array_equal(found[..., 3], np.where((samples == key).all(2), 0, 65535))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}, {"rowsperstrip": 5}]
)
def test_tiff_of_16_bits(channels: int, byteorder: str, options: dict[str, Any]) -> None:
    samples = wave(channels)
    assert np.array_equal(samples_in(deep_tiff(samples, byteorder=byteorder, **options)), samples)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_tiff_is_turned_as_shallow_ones_are(orientation: int) -> None:
    shallow = wave(3, 8).astype(np.uint8)
    tags = [(274, 3, 1, orientation, True)]
    deep = samples_in(deep_tiff(shallow.astype(np.uint16) * 257, extratags=tags))
    assert np.array_equal(deep, samples_in(deep_tiff(shallow, extratags=tags)).astype(np.uint16) * 257)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_tiff_with_planes_of_16_bits(channels: int, options: dict[str, Any]) -> None:
    samples = wave(channels)
    planes, extra = np.moveaxis(samples, 2, 0), {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    stream = io.BytesIO()
    tifffile.imwrite(stream, planes, photometric="rgb", planarconfig="separate", **extra, **options)
    assert np.array_equal(samples_in(stream.getvalue()), samples)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sgi_of_16_bits(channels: int, packed: bool) -> None:
    samples = wave(channels)
    height, width = samples.shape[:2]
    head = struct.pack(">HBBHHHHII", 474, packed, 2, 2 if channels == 1 else 3, width, height, channels, 0, 65535)
    rows = [row.astype(">u2").tobytes() for plane in np.moveaxis(samples, 2, 0) for row in plane[::-1]]
    if packed:  # each row one run of single samples
        rows = [struct.pack(">H", 0x80 | width) + row + b"\0\0" for row in rows]
        starts = 512 + 8 * len(rows) + np.arange(len(rows)) * len(rows[0])
        rows = [starts.astype(">u4").tobytes(), np.full(len(rows), len(rows[0]), ">u4").tobytes(), *rows]
    assert np.array_equal(samples_in(head.ljust(512, b"\0") + b"".join(rows)), samples)


def test_grey_tiff_whose_white_is_0() -> None:
    samples, stream = wave(1), io.BytesIO()
    tifffile.imwrite(stream, samples[..., 0], photometric="miniswhite")
    assert np.array_equal(samples_in(stream.getvalue()), 65535 - samples)


@pytest.mark.parametrize("kind", [2, 3, 5, 6])
@pytest.mark.parametrize("depth", [9, 10, 12, 16])
def test_pnm_of_more_than_8_bits(kind: int, depth: int) -> None:
    samples = wave(1 if kind in (2, 5) else 3, depth)
    found = opened(pnm(kind, 2**depth - 1, samples))
    assert isinstance(found, DeepPicture) and found.depth == depth and np.array_equal(found.samples, samples)


def test_pnm_of_another_maximum_is_spread_over_16_bits() -> None:
    samples = np.array([[[0], [1], [500], [1000]]], np.uint16)
    for kind in (2, 5):
        assert samples_in(pnm(kind, 1000, samples)).ravel().tolist() == [0, 66, 32768, 65535]


def test_jpeg_2000_grey_of_16_bits() -> None:
    samples = wave(1, height=32, width=32)
    assert np.array_equal(samples_in(saved(Image.fromarray(samples[..., 0]), "JPEG2000")), samples)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (patched(saved(picture(32, 32), "JPEG2000", no_jp2=True), b"\xff\x51", 40, 11), "12 bits a sample"),
        (dds((0x3FF00000, 0xFFC00, 0x3FF)), "10 bits a sample"),
        (fits(16), "signed"),
        (deep_tiff(wave(4), extrasamples=["assocalpha"]), "not supported in TIFF"),
        (deep_tiff(wave(4), extrasamples=["unspecified"]), "neither colour nor alpha"),
        (deep_tiff(wave(4, 8).astype(np.uint8), extrasamples=["unspecified"]), "neither colour nor alpha"),
    ],
)
def test_what_cannot_be_had_exactly_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        opened(data)


def test_signed_samples_are_refused() -> None:
    stream = io.BytesIO()
    tifffile.imwrite(stream, wave(1, 8)[..., 0].astype(np.int8))
    with pytest.raises(ImageError, match="signed"):
        opened(stream.getvalue())


@pytest.mark.parametrize("depth", [10, 12])
def test_avif_of_more_than_8_bits(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = base64.b85decode(AVIF[depth])
    if importlib.util.find_spec("imagecodecs"):
        found = opened(data)
        assert isinstance(found, DeepPicture) and (found.depth, found.full) == (depth, True)
        shallow = np.asarray(Image.open(io.BytesIO(data)), float)
        assert np.abs(found.samples * (255 / (2**depth - 1)) - shallow).max() <= 3  # its chroma is halved
    monkeypatch.setattr("vaecodec.engines.installed", lambda name: name != "imagecodecs")
    with pytest.raises(MissingError, match=r"pip install 'vaecodec\[deep\]'"):
        opened(data)


@pytest.mark.parametrize("depth", [10, 12])
def test_heic_of_more_than_8_bits(depth: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    samples, stream = wave(3, depth), io.BytesIO()
    whole = pillow_heif.from_bytes(f"RGB;{depth}", (19, 21), samples.tobytes())
    whole.save(stream, quality=-1, chroma=444, matrix_coefficients=0)
    pillow_heif.register_heif_opener()
    found = opened(stream.getvalue())
    assert isinstance(found, DeepPicture) and (found.depth, found.full) == (depth, True)
    assert np.array_equal(found.samples, samples)


def test_jpeg_xl_of_8_and_16_bits() -> None:
    pytest.importorskip("pillow_jxl")
    grey, colour = Image.fromarray(wave(1)[..., 0]), picture(9, 5)
    assert np.array_equal(samples_in(saved(grey, "JXL", lossless=True))[..., 0], np.asarray(grey))
    assert np.array_equal(samples_in(saved(colour, "JXL", lossless=True)), np.asarray(colour))
    deep = bytearray(saved(colour, "JXL", lossless=True))
    file = io.BytesIO(bytes(deep))
    assert depth_of(Image.open(file), file) == 8


def test_a_picture_of_the_library_is_refused_before_pillow_cuts_it() -> None:
    for data in (deep_png(wave(3)), deep_tiff(wave(3)), pnm(6, 65535, wave(3)), saved(picture(9, 5), "SGI", bpc=2)):
        with pytest.raises(ImageError, match=r"cut 16-bit"):
            pixels_of(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize(("suffix", "channels"), [("png", 3), ("png", 4), ("tiff", 3), ("tiff", 4), ("ppm", 3)])
def test_16_bit_colour_goes_through_the_command_line(
    tmp_path: Path, suffix: str, channels: int, lossless: bool
) -> None:
    samples = wave(channels)
    data = {"png": deep_png, "tiff": deep_tiff, "ppm": lambda a: pnm(6, 65535, a)}[suffix](samples)
    source, packed, back = tmp_path / f"a.{suffix}", tmp_path / "a.vae", tmp_path / f"b.{suffix}"
    source.write_bytes(data)
    weights = LOSSLESS_CPU if lossless else TINY_CPU
    result = cli("compress", source, *weights, *(["-l"] if lossless else []))
    assert result.exit_code == 0 and ("every pixel equal" if lossless else " dB") in result.stderr
    result = cli("decompress", packed, "-o", back, *weights)
    assert result.exit_code == 0, result.stderr
    decoded = Codec("cpu", TINY_LOSSLESS if lossless else TINY).decode_array(packed)
    assert np.array_equal(other_reading(back), decoded) and decoded.dtype == np.uint16
    assert np.array_equal(decoded[..., 3:], samples[..., 3:])
    if lossless:
        assert np.array_equal(decoded, samples)


def other_reading(path: Path) -> np.ndarray[Any, Any]:
    """Samples [H, W, C] by another library, or by hand."""
    if path.suffix == ".png":
        width, height, rows, facts = png.Reader(filename=str(path)).read()
        return np.array([list(row) for row in rows], np.uint16).reshape(height, width, facts["planes"])
    if path.suffix == ".tiff":
        return tifffile.imread(path)
    head, data = path.read_bytes().split(b"65535\n", 1)
    width, height = map(int, head.split()[1:])
    return np.frombuffer(data, ">u2").reshape(height, width, -1)


def test_16_bit_colour_elsewhere_is_refused_unless_a_loss_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(deep_png(wave(4)))
    assert cli("compress", tmp_path / "a.png", "-l", *LOSSLESS_CPU).exit_code == 0
    for suffix in ("webp", "bmp", "ppm"):
        result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / f"b.{suffix}", *LOSSLESS_CPU)
        assert result.exit_code == 1 and ".png and .tiff" in result.stderr and not (tmp_path / f"b.{suffix}").exists()
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.webp", "--lossy-output", *LOSSLESS_CPU)
    assert result.exit_code == 0
    with Image.open(tmp_path / "b.webp") as image:
        assert np.array_equal(np.asarray(image), np.rint(wave(4) / 257).astype(np.uint8))


def test_downsampled_16_bit_colour(tmp_path: Path) -> None:
    flat = np.broadcast_to(np.array([1000, 20000, 65535], np.uint16), (20, 18, 3)).copy()
    flat[:2, :2, 0] = [[0, 1], [1, 1000]]
    (tmp_path / "a.png").write_bytes(deep_png(flat))
    assert cli("compress", tmp_path / "a.png", "-l", *LOSSLESS_CPU).exit_code == 0
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.png", "--downsample", 2, *LOSSLESS_CPU)
    assert result.exit_code == 0
    small = other_reading(tmp_path / "b.png")
    assert small.shape == (10, 9, 3) and small[0, 0].tolist() == [251, 20000, 65535]
    assert (small.reshape(-1, 3)[1:] == flat[-1, -1]).all()


def test_compare_of_16_bit_colour(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(deep_png(wave(3)))
    assert cli("compress", tmp_path / "a.png", "-l", *LOSSLESS_CPU).exit_code == 0
    result = cli("compare", tmp_path / "a.png", tmp_path / "a.vae", *LOSSLESS_CPU)
    assert result.exit_code == 0 and "inf dB" in result.stdout


# The bits that are in use


def test_depth_of_12_bits_in_16_is_found(tmp_path: Path) -> None:
    """Without it, a lossy file would keep a sixteenth of the levels."""
    grey = (np.asarray(picture(64, 48, "L")).astype(np.uint16) << 4) | 5
    Image.fromarray(grey).save(tmp_path / "a.png")
    result = cli("compress", tmp_path / "a.png", *TINY_CPU)
    assert read_header((tmp_path / "a.vae").read_bytes()).depth == 12
    decoded = Codec("cpu", TINY).decode_array(tmp_path / "a.vae")[..., 0]
    error = np.mean((decoded.astype(float) - grey) ** 2)
    assert f"{10 * np.log10(4095**2 / error):.2f} dB" in result.stderr
    shown = cli("compare", tmp_path / "a.png", tmp_path / "a.vae", *TINY_CPU).stdout
    assert f"{10 * np.log10(4095**2 / error):.3f} dB" in shown
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), grey)


def test_depth_by_choice(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(deep_png(wave(1, 12)))
    (tmp_path / "b.ppm").write_bytes(pnm(6, 4095, wave(3, 12)))
    picture(9, 5).save(tmp_path / "c.png")
    for name, depth, found in (("a.png", 14, 14), ("b.ppm", 12, 12), ("c.png", 12, 8)):
        target = tmp_path / f"{name}.vae"
        assert cli("compress", tmp_path / name, "-o", target, "--depth", depth, *TINY_CPU).exit_code == 0
        assert read_header(target.read_bytes()).depth == found
    for name, depth, words in (("a.png", 10, "more than 10 bits"), ("b.ppm", 14, "the file says 12")):
        result = cli("compress", tmp_path / name, "-o", tmp_path / "d.vae", "--depth", depth, *TINY_CPU)
        assert result.exit_code == 1 and words in result.stderr and not (tmp_path / "d.vae").exists()


def test_depth_is_that_of_the_files_own_word(tiny: Codec) -> None:
    dark = np.minimum(wave(1, 12), 700)
    said = with_chunks(deep_png(dark), (b"sBIT", b"\x0c"))
    assert read_header(tiny.compress(said)).depth == 12
    assert read_header(tiny.compress(deep_png(dark))).depth == 10  # of the largest sample
    assert read_header(tiny.compress(with_chunks(deep_png(wave(1)), (b"sBIT", b"\x0c")))).depth == 16  # it is wrong
    assert read_header(tiny.compress(pnm(6, 4095, np.minimum(wave(3, 12), 700)))).depth == 12
    assert read_header(tiny.compress(dark, depth=14)).depth == 14


def test_white_stays_white(tmp_path: Path) -> None:
    """12 bits of a PPM whose white is 4095 are spread in a PNG file, whose white is 65535, and as they were in a PPM. A
    dark PNG file stays dark as PPM."""
    samples = wave(3, 12)
    (tmp_path / "a.ppm").write_bytes(pnm(6, 4095, samples).replace(b"# made here\n", b""))
    (tmp_path / "dark.png").write_bytes(deep_png(samples))
    assert cli("compress", tmp_path / "a.ppm", tmp_path / "dark.png", "-l", *LOSSLESS_CPU).exit_code == 0
    for metadata in ("all", "none"):
        arguments = ("--metadata", metadata, "--overwrite", *LOSSLESS_CPU)
        assert cli("compress", tmp_path / "a.ppm", "-l", *arguments).exit_code == 0
        for name in ("b.ppm", "b.png", "b.tiff"):
            assert (
                cli("decompress", tmp_path / "a.vae", "-o", tmp_path / name, "--overwrite", *LOSSLESS_CPU).exit_code
                == 0
            )
        assert (tmp_path / "b.ppm").read_bytes() == (tmp_path / "a.ppm").read_bytes()
        for name in ("b.png", "b.tiff"):
            assert np.array_equal(other_reading(tmp_path / name), samples << 4 | samples >> 8)
    assert cli("decompress", tmp_path / "dark.vae", "-o", tmp_path / "dark.ppm", *LOSSLESS_CPU).exit_code == 0
    assert np.array_equal(other_reading(tmp_path / "dark.ppm"), samples)


# Alpha outside the mode


@pytest.mark.parametrize(("bits", "key", "grey"), [(1, 1, 255), (2, 2, 170), (4, 5, 85), (2, 6, 170), (8, 5, 5)])
def test_grey_png_of_few_bits_keeps_its_transparent_level(bits: int, key: int, grey: int) -> None:
    levels = np.arange(16).reshape(4, 4) % 2**bits
    rows = b"".join(b"\0" + np.packbits((row[:, None] >> np.arange(bits)[::-1]) & 1).tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", 4, 4, bits, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", struct.pack(">H", key)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    expected = levels * (255 // (2**bits - 1))
    for samples in (samples_in(data), samples_of(Image.open(io.BytesIO(data)))[0]):
        assert np.array_equal(samples[..., 0], expected)
        assert np.array_equal(samples[..., 1], np.where(expected == grey, 0, 255))


def palettes() -> list[Image.Image]:
    """Pictures whose palettes have alpha, as several operations and files make them."""
    rgba = picture(16, 16, "RGBA")
    rgba.putalpha(picture(16, 16, "L", 3))
    own = Image.new("P", (2, 2))
    own.putpalette([255, 0, 0, 0], "RGBA")
    head = b"\0\1\1" + struct.pack("<HHB", 0, 16, 32) + struct.pack("<HHHHBB", 0, 0, 16, 4, 8, 0x28)
    tga = head + bytes(v for i in range(16) for v in (i * 16, 255 - i * 16, 128, i * 17)) + bytes(range(16)) * 4
    return [own, rgba.quantize(7), rgba.convert("P"), Image.open(io.BytesIO(tga))]


@pytest.mark.parametrize("number", range(4))
def test_alpha_of_a_palette_is_kept(number: int, lossless_codec: Codec) -> None:
    image = palettes()[number]
    decoded = lossless_codec.decompress(lossless_codec.compress(image, lossless=True))
    assert decoded.mode == ("RGBA" if image.has_transparency_data else "RGB")
    assert np.array_equal(np.asarray(decoded.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_the_check_after_compression_has_its_own_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong choice of the mode is not repeated there."""
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0], "RGBA")
    image.save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "has_transparency_data", False)
    result = cli("compress", tmp_path / "a.png", "-l", *LOSSLESS_CPU)
    assert result.exit_code == 1 and "not those of the picture" in result.stderr
    assert not (tmp_path / "a.vae").exists()


def test_transparency_of_another_kind_than_the_mode_is_an_image_error() -> None:
    for mode, transparency in (("L", b"\0"), ("RGB", 3), ("RGB", (1, 2)), ("L", (1, 2, 3)), ("1", "x")):
        image = Image.new(mode, (4, 4))
        image.info["transparency"] = transparency
        with pytest.raises(ImageError, match="transparency"):
            samples_of(image)


# Metadata


def tags() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0132], exif[0x013B] = "Maker", "2020:01:02 03:04:05", "someone"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    exif.get_ifd(0x8825)[1] = "N"
    return exif


def through(data: bytes, codec: Codec, format: str, folder: Path, **options: str) -> Image.Image:
    """The picture of a file, after both commands."""
    (folder / "in").write_bytes(data)
    arguments = [f for key, value in options.items() for f in (f"--{key}", value)]
    packed, out = folder / "a.vae", folder / f"out.{format}"
    assert cli("compress", folder / "in", "-o", packed, "--overwrite", *arguments, *TINY_CPU).exit_code == 0
    assert cli("decompress", packed, "-o", out, "--overwrite", *TINY_CPU).exit_code == 0
    image = Image.open(folder / f"out.{format}")
    image.load()
    return image


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("source", ["TIFF", "PNG", "JPEG", "WEBP", "AVIF"])
def test_exif_of_every_format(source: str, format: str, tiny: Codec, tmp_path: Path) -> None:
    found = through(saved(picture(24, 16), source, exif=tags().tobytes()), tiny, format, tmp_path).getexif()
    assert (found[0x010F], found[0x0132], found[0x013B]) == ("Maker", "2020:01:02 03:04:05", "someone")
    assert found.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05" and found.get_ifd(0x8825)[1] == "N"


@pytest.mark.parametrize("deep", [False, True])
def test_tags_of_tiff_come_back_in_tiff(deep: bool, tmp_path: Path) -> None:
    """Those of GeoTIFF, say."""
    more = [
        (33550, 12, 3, (1.5, 1.5, 0.0), True),
        (34735, 3, 4, (1, 1, 0, 0), True),
        (42112, 2, 0, "<GDAL/>", True),
        (65000, 7, 3, b"\1\2\3", True),
    ]
    samples = wave(3) if deep else wave(3, 8).astype(np.uint8)
    (tmp_path / "a.tif").write_bytes(deep_tiff(samples, extratags=more, description="what", metadata=None))
    assert cli("compress", tmp_path / "a.tif", "-l", *LOSSLESS_CPU).exit_code == 0
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.tif", *LOSSLESS_CPU)
    assert result.exit_code == 0 and "did not take" not in result.stderr
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        page: Any = file.pages.first
        assert {code: page.tags[code].value for code, *_ in more} == {code: value for code, _, _, value, _ in more}
        assert page.description == "what" and np.array_equal(page.asarray(), samples)


def test_what_deep_tiff_does_not_take_of_exif_is_said(tmp_path: Path) -> None:
    data = with_chunks(deep_png(wave(3)), (b"eXIf", tags().tobytes()[6:]))
    (tmp_path / "a.png").write_bytes(data)
    assert cli("compress", tmp_path / "a.png", "-l", *LOSSLESS_CPU).exit_code == 0
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.tif", *LOSSLESS_CPU)
    assert result.exit_code == 0 and "TIFF did not take the picture's exif\n" in result.stderr
    assert Image.open(tmp_path / "b.tif").getexif()[0x010F] == "Maker"
    assert cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.png", *LOSSLESS_CPU).stderr.count("take") == 0


def test_exif_of_imagemagicks_text_chunk(tiny: Codec) -> None:
    raw = tags().tobytes()
    made = PngInfo()
    made.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n")
    sections = unpack(tiny.compress(saved(picture(9, 5), pnginfo=made))).sections
    found = Image.Exif()
    found.load(next(bytes(section.payload) for section in sections if section.tag == b"EXIF"))
    assert found[0x010F] == "Maker"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("source", ["TIFF", "PNG", "JPEG", "WEBP", "AVIF"])
def test_pictures_come_back_upright(source: str, orientation: int, tiny: Codec, tmp_path: Path) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (24, 16))
    image.paste((255, 255, 255), (0, 0, 24, 8))
    data = saved(image, source, exif=exif)
    before = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    after = ImageOps.exif_transpose(through(data, tiny, "png", tmp_path))
    assert after.size == before.size
    difference = np.abs(np.asarray(after.convert("L")).astype(int) - np.asarray(before.convert("L")).astype(int))
    assert difference.mean() < 64


def test_pillows_save_keeps_what_stands_outside_info(small_weights: None, tmp_path: Path) -> None:
    import vaecodec.pillow

    assert vaecodec.pillow
    for name, data in (
        ("a.tif", saved(picture(9, 5), "TIFF", exif=tags().tobytes(), dpi=(300, 300))),
        ("b.png", with_chunks(saved(picture(9, 5), exif=tags()), *CHUNKS[:4])),
        ("c.jpg", iptc_jpeg()),
    ):
        Image.open(io.BytesIO(data)).save(tmp_path / f"{name}.vae")
        with Image.open(tmp_path / f"{name}.vae") as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
            assert ("iptc" in image.info) == (name == "c.jpg")
            assert name == "c.jpg" or image.getexif()[0x010F] == "Maker"
            kinds = [kind for kind, _ in unpacked(image.info["png_chunks"])]
            assert name == "a.tif" or b"tEXt" in kinds


def test_an_exif_object_in_info(tiny: Codec) -> None:
    image = picture(9, 5)
    image.info["exif"] = tags()
    assert tiny.decompress(tiny.compress(image)).getexif()[0x010F] == "Maker"
    image.info["exif"] = Image.Exif()
    assert "exif" not in tiny.decompress(tiny.compress(image)).info


CHUNKS = [
    (b"tEXt", b"parameters\0a cat, steps 20"),
    (b"iTXt", b"Title\0\0\0de\0Titel\0" + "Käse".encode()),
    (b"zTXt", b"Long\0\0" + zlib.compress(b"text " * 100)),
    (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
    (b"gAMA", struct.pack(">I", 100000)),
    (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)),
    (b"cICP", bytes([9, 16, 0, 1])),
]


@pytest.mark.parametrize("late", [False, True])
def test_text_resolution_and_colour_of_png(late: bool, tiny: Codec, tmp_path: Path) -> None:
    data = with_chunks(saved(picture(9, 5)), *CHUNKS)
    if late:  # text may follow the pixels
        data = with_chunks(saved(picture(9, 5)), *CHUNKS[3:])
        data = data[:-12] + b"".join(chunk(*c) for c in CHUNKS[:3]) + data[-12:]
    image = through(data, tiny, "png", tmp_path)
    assert isinstance(image, PngImagePlugin.PngImageFile)
    assert image.text == {"parameters": "a cat, steps 20", "Title": "Käse", "Long": "text " * 100}
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01) and image.info["gamma"] == 1
    assert image.info["chromaticity"][0] == 0.3127
    assert b"cICP" + bytes([9, 16, 0, 1]) in (tmp_path / "out.png").read_bytes()


def test_chunks_of_16_bit_colour(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(with_chunks(deep_png(wave(3)), *CHUNKS))
    assert cli("compress", tmp_path / "a.png", "-l", *LOSSLESS_CPU).exit_code == 0
    assert cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.png", *LOSSLESS_CPU).exit_code == 0
    with open(tmp_path / "b.png", "rb") as file:
        assert vaecodec.metadata.kept_chunks(file) == CHUNKS


def iptc_jpeg() -> bytes:
    records = b"\x1c\x02\x69\x00\x05title"
    block = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + records
    extra = b"\xff\xed" + struct.pack(">H", len(block) + 2) + block
    return saved(picture(16, 16), "JPEG", extra=extra, comment=b"a comment", dpi=(300, 300))


def test_iptc_comment_and_resolution_of_jpeg(tiny: Codec, tmp_path: Path) -> None:
    from PIL.IptcImagePlugin import getiptcinfo

    image = through(iptc_jpeg(), tiny, "jpg", tmp_path)
    assert getiptcinfo(image) == {(2, 105): b"title"}
    assert image.info["comment"] == b"a comment" and image.info["dpi"] == (300, 300)
    image = through(iptc_jpeg(), tiny, "tiff", tmp_path)
    assert getiptcinfo(image) == {(2, 105): b"title"} and image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    image = through(iptc_jpeg(), tiny, "png", tmp_path)
    assert image.info["Comment"] == "a comment" and image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    again = through((tmp_path / "out.tiff").read_bytes(), tiny, "jpg", tmp_path)
    assert getiptcinfo(again) == {(2, 105): b"title"}


def test_what_a_format_does_not_take_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(iptc_jpeg())
    (tmp_path / "b.png").write_bytes(with_chunks(saved(picture(9, 5)), *CHUNKS))
    assert cli("compress", tmp_path / "a.jpg", tmp_path / "b.png", *TINY_CPU).exit_code == 0
    for name, suffix, words in (("a", "png", "iptc"), ("a", "webp", "iptc, text, dpi"), ("b", "jpg", "text, colour")):
        result = cli("decompress", tmp_path / f"{name}.vae", "-o", tmp_path / f"out.{suffix}", "--overwrite", *TINY_CPU)
        assert f"did not take the picture's {words}\n" in result.stderr


@pytest.mark.parametrize(
    ("names", "kinds", "tags"),
    [
        ("none", set(), set()),
        ("icc", {b"gAMA", b"cHRM", b"cICP"}, set()),
        ("text,dpi", {b"tEXt", b"iTXt", b"zTXt", b"pHYs"}, set()),
        ("exif", set(), {b"EXIF"}),
        ("all", {kind for kind, _ in CHUNKS}, {b"EXIF"}),
    ],
)
def test_metadata_by_choice(names: str, kinds: set[bytes], tags: set[bytes], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    (tmp_path / "a.png").write_bytes(with_chunks(saved(picture(9, 5), exif=exif), *CHUNKS))
    assert cli("compress", tmp_path / "a.png", "--metadata", names, *TINY_CPU).exit_code == 0
    sections = {s.tag: bytes(s.payload) for s in unpack((tmp_path / "a.vae").read_bytes()).sections}
    assert {kind for kind, _ in unpacked(sections.pop(b"PNG ", b""))} == kinds and set(sections) == tags


def test_exif_of_tiff_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(saved(picture(9, 5), "TIFF", exif=tags()))
    assert cli("compress", tmp_path / "a.tif", "--metadata", "none", *TINY_CPU).exit_code == 0
    assert unpack((tmp_path / "a.vae").read_bytes()).sections == ()


def test_what_is_not_kept_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(with_chunks(saved(picture(9, 5)), (b"bKGD", bytes(6)), (b"tIME", bytes(7))))
    block = b"Photoshop 3.0\x008BIM\x04\x0c\0\0" + struct.pack(">I", 4) + b"thum"
    other = b"".join(
        b"\xff" + mark + struct.pack(">H", len(b) + 2) + b for mark, b in ((b"\xed", block), (b"\xeb", b"JP"))
    )
    (tmp_path / "b.jpg").write_bytes(saved(picture(9, 5), "JPEG", extra=other))
    for name, words in (("a.png", "PNG's bKGD, PNG's tIME"), ("b.jpg", "JPEG's APP11, Photoshop's resources")):
        result = cli("compress", tmp_path / name, *TINY_CPU)
        assert result.exit_code == 0 and f"{name}: not kept: {words}\n" in result.stderr
    (tmp_path / "c.jpg").write_bytes(iptc_jpeg())
    assert "not kept" not in cli("compress", tmp_path / "c.jpg", *TINY_CPU).stderr
    assert left_out(io.BytesIO(saved(picture(9, 5), "TIFF", exif=tags()))) == []


def test_metadata_has_limits() -> None:
    image = opened(saved(picture(9, 5)))
    image.info["png_chunks"] = bytes(2**24 + 1)
    with pytest.raises(ImageError, match="readers accept"):
        metadata_of(image)


def test_unknown_and_broken_chunks_are_passed_over() -> None:
    assert (
        unpacked(b"") == [] and unpacked(b"\0\0\0\x05tEXtab") == [] and unpacked(b"\0\0\0\0tEXt\0") == [(b"tEXt", b"")]
    )
    image = picture(9, 5)
    image.info["png_chunks"] = b"\xff" * 40
    keep_metadata(image, ["text"])
    assert metadata_of(image) == []


# What the library takes


def test_compress_takes_files(tmp_path: Path, tiny: Codec) -> None:
    data = saved(picture(9, 5), exif=tags())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    expected = tiny.compress(Image.open(path))
    with path.open("rb") as file:
        for source in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file):
            assert tiny.compress(source) == expected


def test_what_is_no_picture_is_said(tmp_path: Path, tiny: Codec) -> None:
    for source in (b"\x89PNG", b"", tmp_path / "none.png", 5, None, [1, 2]):
        with pytest.raises((ImageError, OSError, TypeError)):
            tiny.compress(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0, 3), (3, 0, 3), (3, 3, 0)])
def test_empty_pictures_are_image_errors(shape: tuple[int, ...], tiny: Codec) -> None:
    with pytest.raises(ImageError):
        tiny.compress(np.zeros(shape, np.uint8))
    if len(shape) == 3:
        with pytest.raises(ImageError):
            tiny.compress(torch.zeros(shape[2], *shape[:2], dtype=torch.uint8))
    if shape[-1] == 3:
        with pytest.raises(ImageError):
            tiny.compress(Image.new("RGB", (shape[1], shape[0])))


def test_arrays_of_other_orders_and_kinds(lossless_codec: Codec) -> None:
    samples = wave(3)
    expected = lossless_codec.compress(samples, lossless=True)
    for array in (samples.astype(">u2"), np.asfortranarray(samples), samples[::-1][::-1]):
        assert lossless_codec.compress(array, lossless=True) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        matrix = np.matrix([[1, 2], [3, 4]], dtype=np.uint8)
    assert (
        lossless_codec.decode_array(lossless_codec.compress(matrix, lossless=True))[..., 0].tolist() == matrix.tolist()
    )


def test_sources_of_decompress(tiny: Codec) -> None:
    data = tiny.compress(picture(9, 5))
    expected = tiny.decompress(data)
    spaced = np.zeros(2 * len(data), np.uint8)
    spaced[::2] = np.frombuffer(data, np.uint8)
    for source in (
        np.frombuffer(data, np.uint8),
        np.frombuffer(data, np.int8),
        spaced[::2],
        torch.frombuffer(bytearray(data), dtype=torch.uint8),
        bytearray(data),
        io.BytesIO(data),
    ):
        assert same(tiny.decompress(source), expected)
    for wrong in (np.zeros(4, np.uint16), 5):
        with pytest.raises(TypeError):
            tiny.decompress(wrong)  # type: ignore[arg-type]


def test_truncated_files_are_image_errors() -> None:
    for data in (deep_png(wave(3)), deep_tiff(wave(3)), pnm(6, 65535, wave(3)), pnm(3, 65535, wave(3))):
        for end in (20, 40, len(data) // 2, len(data) - 30):
            if not ImageFile.LOAD_TRUNCATED_IMAGES:
                with pytest.raises(ImageError):
                    opened(data[:end])
