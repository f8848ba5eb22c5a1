"""More than 8 bits a sample, through every door; what says what their numbers mean; gain maps."""

import importlib.util
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TINY_LOSSLESS, cli, picture, saved
from PIL import Image

from bitstream import read_header, unpack
from vaecodec import Codec, ImageError, boxes, gainmap, saving
from vaecodec.boxes import colour_chunks
from vaecodec.gainmap import ISO, MARKS, gain_map_of, other_pictures, with_gain_map
from vaecodec.image import DeepPicture, open_picture
from vaecodec.metadata import unpacked
from vaecodec.saving import encode_picture

WEIGHTS = ("--weights", TINY, "--weights", TINY_LOSSLESS, "--device", "cpu")
DOORS = {
    "png": ("PNG", {1, 3, 4}, {10, 12, 16}),
    "tiff": ("TIFF", {1, 3, 4}, {10, 12, 16}),
    "ppm": ("PPM", {1, 3}, {10, 12, 16}),
    "avif": ("AVIF", {1, 3, 4}, {10, 12}),
    "heic": ("HEIF", {1, 3, 4}, {10, 12}),
    "jxl": ("JXL", {1, 3, 4}, {10, 12, 16}),
    "jp2": ("JPEG2000", {1, 3, 4}, {10, 12, 16}),
}
"""Suffixes, Pillow's names, and the channels and depths that they hold."""
NEEDS = {"avif": ["imagecodecs"], "heic": ["pillow_heif"], "jxl": ["imagecodecs", "pillow_jxl"], "jp2": ["imagecodecs"]}
COLOUR_OF_PQ = bytes([9, 16, 0, 1])
"""cICP: primaries of BT.2020 and the transfer function PQ."""


def wave(channels: int, depth: int, height: int = 34, width: int = 37) -> np.ndarray[Any, Any]:
    """Samples [H, W, C] with structure that use all their bits."""
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / (5 + c)) + np.cos(y / (7 + c)) + (x * y % (3 + c)) / 40 for c in range(channels)]
    wide = np.stack(planes, 2)
    wide -= wide.min()
    return np.rint(wide / wide.max() * (2**depth - 1)).astype(np.uint16)


def deep(channels: int, depth: int, **info: Any) -> DeepPicture:
    found = DeepPicture(wave(channels, depth), depth, info, depth < 16)
    if found.full:
        found.info["png_chunks"] = struct.pack(">I4sB", 1, b"sBIT", depth) + info.get("png_chunks", b"")
    return found


def opened(data: bytes) -> Image.Image | DeepPicture:
    return open_picture(io.BytesIO(data))


CASES = [
    (suffix, channels, depth)
    for suffix, (_, counts, depths) in DOORS.items()
    for channels in sorted(counts)
    for depth in sorted(depths)
]


@pytest.mark.parametrize(("suffix", "channels", "depth"), CASES)
def test_round_trips_are_equal_through_every_door(suffix: str, channels: int, depth: int, tmp_path: Path) -> None:
    """Into the format, to a .vae file without loss, and back into the format; samples as they are in the depth that the
    format says, which of PNG and TIFF is 16 bits."""
    for module in NEEDS.get(suffix, ()):
        pytest.importorskip(module)
    saving.load_plugins()
    picture = deep(channels, depth)
    data, _ = encode_picture(picture, DOORS[suffix][0])
    source, packed, back = (tmp_path / name for name in (f"a.{suffix}", "a.vae", f"b.{suffix}"))
    source.write_bytes(data)
    result = cli("compress", source, "-l", *WEIGHTS)
    assert result.exit_code == 0 and "every pixel equal" in result.stderr
    assert cli("decompress", packed, "-o", back, *WEIGHTS).exit_code == 0
    first, second = opened(data), opened(back.read_bytes())
    expected = picture.samples
    if suffix in ("png", "tiff") and depth < 16:
        expected = picture.spread().samples
    for found in (first, second):
        samples = found.samples if isinstance(found, DeepPicture) else np.asarray(found)[..., None]
        assert np.array_equal(samples, expected)
    assert read_header(packed.read_bytes()).depth == (depth if suffix not in ("png", "tiff") else 16)


@pytest.mark.parametrize("shape", [(30, 41), (30, 41, 3), (30, 41, 4)])
@pytest.mark.parametrize("depth", [10, 12, 16])
def test_arrays_are_equal(shape: tuple[int, ...], depth: int, codec: Codec) -> None:
    samples = wave(shape[2] if len(shape) > 2 else 1, depth, *shape[:2]).reshape(shape)
    data = codec.compress(samples, lossless=True)
    assert read_header(data).depth == depth
    assert np.array_equal(codec.decode_array(data).reshape(shape), samples)


def test_white_may_be_two_numbers(tmp_path: Path) -> None:
    """PNG spreads samples over 16 bits, where PPM and .vae files say how many there are."""
    (tmp_path / "a.ppm").write_bytes(encode_picture(deep(3, 10), "PPM")[0])
    assert cli("compress", tmp_path / "a.ppm", "--lossless", "--fast").exit_code == 0
    assert cli("decompress", tmp_path / "a.vae").exit_code == 0
    for a, b in (("a.ppm", "a.png"), ("a.vae", "a.png"), ("a.png", "a.vae"), ("a.ppm", "a.vae")):
        result = cli("compare", tmp_path / a, tmp_path / b, "--json", *(WEIGHTS if "a.vae" in (a, b) else ()))
        assert result.exit_code == 0 and json.loads(result.stdout)["psnr"] is None, (a, b)


@pytest.mark.parametrize("suffix", ["avif", "jxl", "jp2", "png"])
def test_lossy_files_keep_the_depth(suffix: str, tmp_path: Path) -> None:
    for module in NEEDS.get(suffix, ()):
        pytest.importorskip(module)
    saving.load_plugins()
    (tmp_path / f"a.{suffix}").write_bytes(encode_picture(deep(3, 10), DOORS[suffix][0])[0])
    result = cli("compress", tmp_path / f"a.{suffix}", *WEIGHTS)
    assert result.exit_code == 0, result.stderr
    result = cli("compare", tmp_path / f"a.{suffix}", tmp_path / "a.vae", *WEIGHTS)
    assert result.exit_code == 0 and " dB" in result.stdout
    assert cli("decompress", tmp_path / "a.vae", "-o", tmp_path / f"b.{suffix}", *WEIGHTS).exit_code == 0


@pytest.mark.parametrize(
    ("format", "depth", "words"),
    [
        ("AVIF", 16, "10 or 12 bits a sample, not 16"),
        ("HEIF", 11, "not 11"),
        ("WEBP", 10, "does not hold 10"),
    ],
)
def test_what_a_format_does_not_hold(format: str, depth: int, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        encode_picture(deep(3, depth), format)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engines", "saving"):
        monkeypatch.setattr(f"vaecodec.{module}.installed", lambda name: name not in ("imagecodecs", "pillow_heif"))
    for format in ("AVIF", "HEIF"):
        with pytest.raises(ImageError, match=r"pip install 'vaecodec\[deep\]'"):
            encode_picture(deep(3, 10), format)
    assert encode_picture(deep(3, 10), "AVIF", lossy=True)[0]
    grey, _ = encode_picture(deep(1, 10), "JPEG2000")  # which Pillow writes in grey
    assert Image.open(io.BytesIO(grey)).mode == "I;16"


def test_pictures_whose_plugin_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "load_plugins", lambda: False)
    monkeypatch.setattr(Image, "registered_extensions", lambda: {".png": "PNG"})
    (tmp_path / "n.png").write_bytes(saved(picture(9, 9)))
    for name in ("a.heic", "b.JXL"):
        (tmp_path / name).write_bytes(b"such a picture")
    assert cli("compress", tmp_path / "n.png", *WEIGHTS).exit_code == 0
    for command in (
        ("compress", tmp_path / "a.heic"),
        ("compress", tmp_path / "a.heic", tmp_path / "b.JXL", *WEIGHTS),
        ("decompress", tmp_path / "n.vae", "-o", tmp_path / "c.heic"),
    ):
        result = cli(*command)
        assert result.exit_code == 1, command
        lines = [line for line in result.stderr.splitlines() if line.startswith("vaecodec: ")]
        assert lines and all("pip install 'vaecodec[deep]'" in line for line in lines), result.stderr


def test_heic_takes_all_metadata() -> None:
    pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[271] = "maker"
    said: dict[str, Any] = {"exif": exif.tobytes(), "icc_profile": b"a profile" * 20, "xmp": b"<x:xmpmeta/>"}
    data, missing = encode_picture(deep(3, 12, **said), "HEIF")
    saving.load_plugins()
    found = opened(data)
    assert missing == [] and found.info["icc_profile"] == said["icc_profile"]
    assert b"maker" in found.info["exif"] and found.info["xmp"].startswith(said["xmp"])


def test_damaged_deep_files_are_image_errors() -> None:
    pytest.importorskip("imagecodecs")
    for format in ("AVIF", "JPEG2000"):
        data, _ = encode_picture(deep(3, 10), format)
        for size in (len(data) // 2, len(data) - 40):
            with pytest.raises(ImageError):
                opened(data[:size])


def test_jpeg_2000_of_other_colours_is_refused() -> None:
    pytest.importorskip("imagecodecs")
    data, _ = encode_picture(deep(3, 12), "JPEG2000")
    at = data.index(b"colr\1") + 7
    assert data[at : at + 4] == b"\0\0\0\x10"
    with pytest.raises(ImageError, match="JPEG2000 of this kind"):
        opened(data[: at + 3] + b"\x12" + data[at + 4 :])  # sYCC


# What the numbers mean


def chunks_in(found: Image.Image | DeepPicture) -> dict[bytes, bytes]:
    return dict(unpacked(found.info.get("png_chunks", b"")))


def test_pq_goes_from_avif_to_png_and_back(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    picture = deep(3, 10, png_chunks=struct.pack(">I4s", 4, b"cICP") + COLOUR_OF_PQ)
    data, missing = encode_picture(picture, "AVIF")
    assert missing == [] and chunks_in(opened(data))[b"cICP"] == COLOUR_OF_PQ
    (tmp_path / "a.avif").write_bytes(data)
    assert cli("compress", tmp_path / "a.avif", "-l", *WEIGHTS).exit_code == 0
    suffixes = ["png", "avif", *(["heic"] if importlib.util.find_spec("pillow_heif") else [])]
    for suffix in suffixes:
        result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / f"b.{suffix}", *WEIGHTS)
        assert result.exit_code == 0 and "did not take" not in result.stderr
        assert chunks_in(opened((tmp_path / f"b.{suffix}").read_bytes()))[b"cICP"] == COLOUR_OF_PQ
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.tiff", *WEIGHTS)
    assert "did not take the picture's colour" in result.stderr


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def heif(*properties: bytes, wide: bool = False, numbers: list[int] | None = None) -> io.BytesIO:
    """A file of which only the box with the properties is there, all of item 7."""
    listed = numbers or list(range(1, len(properties) + 1))
    packed = b"".join(struct.pack(">H", 0x8000 | number) if wide else bytes([0x80 | number]) for number in listed)
    item = struct.pack(">I" if wide else ">H", 7)
    associated = (
        struct.pack(">I", 2) + item[:-1] + b"\x09\x01" + packed[: 1 + wide] + item + bytes([len(listed)]) + packed
    )
    version = bytes([wide, 0, 0, wide])
    meta = box(
        b"meta",
        bytes(4),
        box(b"pitm", bytes([wide, 0, 0, 0]), item),
        box(b"iprp", box(b"ipco", *properties), box(b"ipma", version, associated)),
    )
    return io.BytesIO(box(b"ftyp", b"avif") + meta)


def nclx(*parts: int) -> bytes:
    return box(b"colr", b"nclx", struct.pack(">HHHB", *parts, 0x80))


@pytest.mark.parametrize("wide", [False, True])
def test_mastering_metadata_are_png_s(wide: bool) -> None:
    display = struct.pack(">8H2I", 13250, 34500, 7500, 3000, 34000, 16000, 15635, 16450, 10_000_000, 50)
    file = heif(nclx(9, 16, 9), box(b"clli", struct.pack(">HH", 1000, 400)), box(b"mdcv", display), wide=wide)
    found = dict(colour_chunks(file))
    assert found[b"cICP"] == COLOUR_OF_PQ and struct.unpack(">II", found[b"cLLI"]) == (10_000_000, 4_000_000)
    assert struct.unpack(">8H2I", found[b"mDCV"])[:6] == (34000, 16000, 13250, 34500, 7500, 3000)  # red comes first
    assert struct.unpack(">8H2I", found[b"mDCV"])[6:] == (15635, 16450, 10_000_000, 50)


@pytest.mark.parametrize(
    ("properties", "found"),
    [
        ([nclx(1, 13, 6)], {}),
        ([nclx(2, 2, 2)], {}),
        ([nclx(12, 13, 6)], {b"cICP": bytes([12, 13, 0, 1])}),
        ([box(b"colr", b"prof", b"icc"), nclx(12, 13, 6)], {}),
        ([box(b"colr", b"prof", b"icc"), nclx(9, 18, 9)], {b"cICP": bytes([9, 18, 0, 1])}),
        ([box(b"clli", b"\0")], {}),
        ([], {}),
    ],
    ids=["sRGB", "unspecified", "P3", "profile", "profile and HLG", "damaged", "nothing"],
)
def test_colours_beside_a_profile(properties: list[bytes], found: dict[bytes, bytes]) -> None:
    assert dict(colour_chunks(heif(*properties))) == found


def test_only_the_primary_picture_counts_and_damage_is_no_error() -> None:
    whole = heif(nclx(9, 16, 9), nclx(12, 13, 6), numbers=[2]).getvalue()
    assert dict(colour_chunks(io.BytesIO(whole))) == {b"cICP": bytes([12, 13, 0, 1])}
    for size in range(len(whole)):
        assert colour_chunks(io.BytesIO(whole[:size])) in ([], [(b"cICP", bytes([12, 13, 0, 1]))])
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(whole)
        bad[rng.integers(len(bad))] = rng.integers(256)
        colour_chunks(io.BytesIO(bytes(bad)))
        boxes.has_gain_map(io.BytesIO(bytes(bad)))


# Gain maps


@pytest.mark.parametrize("mark", [b"tmap", b"urn:com:apple:photo:2020:aux:hdrgainmap"])
def test_gain_maps_of_other_formats_are_seen(mark: bytes) -> None:
    """They are not carried, and that is said."""
    assert boxes.has_gain_map(heif(box(b"auxC", mark))) and not boxes.has_gain_map(heif(nclx(9, 16, 9)))


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    return jpeg[:2] + gainmap.segment(marker, data) + jpeg[2:]


def ultra_hdr(mark: bytes) -> tuple[bytes, bytes]:
    """A JPEG file with a gain map, and the gain map."""
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta "
    small = saved(picture(20, 16, "L"), "JPEG")
    gain_map = with_segment(small, *((0xFFE2, mark + bytes(8)) if mark == ISO else (0xFFE1, xmp + mark + b"/>")))
    first = with_segment(saved(picture(80, 64), "JPEG"), 0xFFE1, xmp + b' hdrgm:Version="1.0" />')
    return with_gain_map(first, gain_map), gain_map


def gain_map_in(data: bytes) -> bytes:
    return gain_map_of(Image.open(io.BytesIO(data)), io.BytesIO(data))


@pytest.mark.parametrize("mark", MARKS)
def test_gain_maps_are_kept(mark: bytes, tmp_path: Path) -> None:
    data, gain_map = ultra_hdr(mark)
    (tmp_path / "a.jpg").write_bytes(data)
    result = cli("compress", tmp_path / "a.jpg", *WEIGHTS)
    assert result.exit_code == 0 and "not kept" not in result.stderr
    sections = {section.tag: section.payload for section in unpack((tmp_path / "a.vae").read_bytes()).sections}
    assert sections[b"GAIN"] == gain_map
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.jpg", *WEIGHTS)
    assert result.exit_code == 0 and "did not take" not in result.stderr
    back = (tmp_path / "b.jpg").read_bytes()
    assert gain_map_in(back) == gain_map and back.endswith(gain_map)
    assert (gainmap.segment(0xFFE2, ISO + bytes(4)) in back) == (mark == ISO)
    first = Image.open(io.BytesIO(back))
    assert first.format == "JPEG" and first.size == (80, 64)
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "b.png", *WEIGHTS)
    assert "PNG did not take the picture's gain_map" in result.stderr
    part = ("--region", "0,0,40,40")
    result = cli("decompress", tmp_path / "a.vae", "-o", tmp_path / "c.jpg", *part, *WEIGHTS)
    assert result.exit_code == 0 and gain_map_in((tmp_path / "c.jpg").read_bytes()) == b""
    assert cli("compress", tmp_path / "a.jpg", "-o", tmp_path / "c.vae", "--metadata", "icc", *WEIGHTS).exit_code == 0
    assert b"GAIN" not in (tmp_path / "c.vae").read_bytes()


def test_pillow_reads_our_index() -> None:
    """As a file of two pictures, where the first does not say that it is Ultra HDR."""
    gain_map = ultra_hdr(ISO)[1]
    data = with_gain_map(saved(picture(80, 64), "JPEG"), gain_map)
    both: Any = Image.open(io.BytesIO(data))
    assert both.format == "MPO" and both.n_frames == 2
    both.seek(1)
    assert both.size == (20, 16) and np.array_equal(both, Image.open(io.BytesIO(gain_map)))
    assert gain_map_in(data) == gain_map


def test_other_pictures_are_no_gain_maps_and_damage_is_no_error() -> None:
    first, other = picture(80, 64), picture(20, 16)
    data = saved(first, "MPO", save_all=True, append_images=[other])
    image = Image.open(io.BytesIO(data))
    assert len(other_pictures(image, io.BytesIO(data))) == 1 and gain_map_in(data) == b""
    whole, gain_map = ultra_hdr(ISO)
    head = Image.open(io.BytesIO(whole))
    index = head.info["mp"]
    for at in range(len(index)):
        head.info["mp"] = index[:at]
        assert gain_map_of(head, io.BytesIO(whole)) in (b"", gain_map)
        head.info["mp"] = index[:at] + b"\xff" + index[at + 1 :]
        assert gain_map_of(head, io.BytesIO(whole)) in (b"", gain_map)
    assert gain_map_in(whole[:-1]) == b""
    assert gainmap.pixels_at(b"\xff\xd8\xff\xe1\xff\xff") == 6
