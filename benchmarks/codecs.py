"""The codecs that are compared, behind one interface: a picture to the bytes of a whole file, and back.

Importing this module loads Pillow and nothing heavier, so that a fresh process shows what one codec alone needs.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, features

if TYPE_CHECKING:
    from vaecodec import Codec as Vaecodec

NINE = (0, 12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100)
WHOLE = range(101)
TENTHS = [number / 10 for number in range(1001)]


@dataclass(frozen=True)
class Codec:
    """encode: an 8-bit RGB picture without metadata, and a quality, to the bytes of a file. decode: those to RGB again.

    name: on the command line and of the result file. note: the settings. qualities: those that are measured, smallest
    files first. scale: all among which one may be sought for a given size, in the same order. versions: of what the
    bytes may depend on. A lossless codec has one quality, which it ignores, and no scale.
    """

    name: str
    title: str
    note: str
    qualities: Sequence[float]
    scale: Sequence[float]
    encode: Callable[[Image.Image, float], bytes]
    decode: Callable[[bytes], Image.Image]
    versions: Mapping[str, str]
    lossless: bool = False
    options: Sequence[str] = ()  # vaecodec's own on the command line, beside the quality

    @property
    def identity(self) -> list[object]:
        """What the bytes depend on, besides the picture and the quality."""
        return [self.name, self.note, dict(self.versions)]


def installed(*packages: str) -> dict[str, str]:
    """Versions of those packages that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_hash(*modules: str) -> str:
    """Of the source files of modules and packages: what is not released yet has the same version all the time."""
    digest = hashlib.sha256()
    for module in modules:
        spec = find_spec(module)
        assert spec and spec.origin
        path = Path(spec.origin)
        for file in sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# vaecodec and PCA


def about_vaecodec(weights: bytes) -> dict[str, str]:
    """Versions of everything below a ``.vae`` file."""
    from vaecodec import __version__

    return {
        "vaecodec": __version__,
        **installed("torch", "constriction"),
        "weights": weights.hex(),
        "source": source_hash("vaecodec", "bitstream"),
    }


def vaecodec(codec: Vaecodec | None = None) -> Codec:
    """vaecodec, lossy, on the CPU; with the packaged weights unless a codec with others is given."""
    from vaecodec import Codec as Vaecodec

    codec = codec or Vaecodec("cpu")
    return Codec(
        "vaecodec",
        "vaecodec",
        "vaecodec.Codec, defaults but for the quality",
        NINE,
        TENTHS,
        codec.compress,
        codec.decompress,
        about_vaecodec(codec.lossy.identity),
    )


def vaecodec_lossless() -> Codec:
    """vaecodec by bits-back, on the CPU, with the packaged weights."""
    from vaecodec import Codec as Vaecodec

    codec = Vaecodec("cpu")
    return Codec(
        "vaecodec_lossless",
        "vaecodec lossless",
        "vaecodec.Codec, lossless",
        (100,),
        (),
        lambda picture, _: codec.compress(picture, lossless=True),
        codec.decompress,
        about_vaecodec(codec.lossless.identity),
        lossless=True,
        options=["--lossless"],
    )


def vaecodec_fast() -> Codec:
    """vaecodec without networks and without loss."""
    from vaecodec import Codec as Vaecodec

    codec = Vaecodec("cpu")
    return Codec(
        "vaecodec_fast",
        "vaecodec fast",
        "vaecodec.Codec, lossless, fast",
        (100,),
        (),
        lambda picture, _: codec.compress(picture, lossless=True, fast=True),
        codec.decompress,
        about_vaecodec(b""),
        lossless=True,
        options=["--lossless", "--fast"],
    )


def pca() -> Codec:
    """The linear codec of ``pca.py``."""
    from . import pca as linear

    versions = {
        **installed("numpy"),
        "parameters": hashlib.sha256(linear.PARAMETERS.read_bytes()).hexdigest()[:16],
        "source": source_hash("vaecodec.linear", "bitstream"),
    }
    return Codec("pca", "PCA", "benchmarks/pca.py", NINE, TENTHS, linear.compress, linear.decompress, versions)


# Pillow and its plugins


def pillow(
    name: str,
    title: str,
    format: str,
    library: Mapping[str, str | None],
    qualities: Sequence[float] = (),
    scale: Sequence[float] = WHOLE,
    at: Callable[[float], dict[str, Any]] = lambda quality: {"quality": int(quality)},
    **options: Any,
) -> Codec:
    """A codec of Pillow's, in memory. at: the options that a quality stands for. Without qualities it is lossless."""

    def encode(picture: Image.Image, quality: float) -> bytes:
        file = io.BytesIO()
        picture.save(file, format, **options, **(at(quality) if qualities else {}))
        return file.getvalue()

    def decode(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    note = ", ".join([f"Pillow, {format}", *(f"{key}={value}" for key, value in options.items())])
    versions = {**installed("pillow"), **{key: str(value) for key, value in library.items()}}
    return Codec(
        name, title, note, qualities or (100,), scale if qualities else (), encode, decode, versions, not qualities
    )


def library(feature: str) -> dict[str, str | None]:
    """Version of a library that Pillow may have been built without. Raises ImportError if it was."""
    found = features.version(feature)
    if found is None:
        raise ImportError(f"this Pillow has no {feature}")
    return {feature: found}


def jpeg(subsampling: str) -> Codec:
    """JPEG at its best in Pillow: optimised Huffman tables, progressive."""
    return pillow(
        f"jpeg{subsampling.replace(':', '')}",
        f"JPEG {subsampling}",
        "JPEG",
        library("libjpeg_turbo"),
        (5, 10, 15, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 93, 95, 97),
        range(1, 101),
        subsampling=subsampling,
        optimize=True,
        progressive=True,
    )


def jpeg2000() -> Codec:
    """JPEG 2000 with the 9/7 wavelet; the quality is the rate that is asked for, in bits per pixel."""
    return pillow(
        "jpeg2000",
        "JPEG 2000",
        "JPEG2000",
        library("jpg_2000"),
        (0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8, 4.0),
        [number / 200 for number in range(4, 1000)],
        lambda rate: {"quality_layers": [24 / rate]},
        quality_mode="rates",
        irreversible=True,
        mct=1,
        no_jp2=True,
    )


def jpeg2000_lossless() -> Codec:
    """JPEG 2000 with the reversible 5/3 wavelet."""
    return pillow(
        "jpeg2000_lossless",
        "JPEG 2000 lossless",
        "JPEG2000",
        library("jpg_2000"),
        irreversible=False,
        mct=1,
        no_jp2=True,
    )


def webp() -> Codec:
    """Lossy WebP at its slowest method."""
    qualities = (1, 5, 10, 20, 35, 50, 65, 75, 85, 90, 95, 98, 100)
    return pillow("webp", "WebP", "WEBP", library("webp"), qualities, method=6)


def webp_lossless() -> Codec:
    """Lossless WebP at its slowest."""
    options: dict[str, Any] = {"lossless": True, "quality": 100, "method": 6, "exact": True}
    return pillow("webp_lossless", "WebP lossless", "WEBP", library("webp"), **options)


def avif() -> Codec:
    """AVIF, 4:4:4, at the default speed and with aom's default tuning."""
    return pillow(
        "avif",
        "AVIF",
        "AVIF",
        library("avif"),
        (10, 20, 30, 40, 50, 60, 70, 80),
        subsampling="4:4:4",
        speed=6,
        max_threads=1,
        codec="aom",
    )


def avif_psnr() -> Codec:
    """AVIF, 4:4:4, slower, and tuned for PSNR."""
    return pillow(
        "avif_psnr",
        "AVIF tuned for PSNR",
        "AVIF",
        library("avif"),
        (8, 20, 32, 44, 56, 70),
        subsampling="4:4:4",
        speed=4,
        max_threads=1,
        codec="aom",
        advanced={"tune": "psnr"},
    )


def jpeg_xl_version() -> dict[str, str | None]:
    """Load the plugin and name it; it does not tell the version of its libjxl. Raises ImportError without it."""
    from pillow_jxl import JpegXLImagePlugin

    JpegXLImagePlugin.DECODE_THREADS = 0  # none but the calling one, as in encoding
    return dict(installed("pillow-jxl-plugin"))


def quality_of(distance: float) -> float:
    """The quality that libjxl turns into this Butteraugli distance (JxlEncoderDistanceFromQuality), 0.1 to 25."""
    if distance <= 6.4:
        return 100 - (distance - 0.1) / 0.09
    return (1.15 - math.sqrt(1.15**2 - 4 * 53 / 3000 * (25 - distance))) / (2 * 53 / 3000)


def jpeg_xl() -> Codec:
    """Lossy JPEG XL, effort 7, at Butteraugli distances of 9.9 to 0.3; from 10 on libjxl halves the resolution."""
    distances = (9.9, 7, 5, 3.5, 2.5, 1.8, 1.2, 0.8, 0.5, 0.3)
    return pillow(
        "jpeg_xl",
        "JPEG XL",
        "JXL",
        jpeg_xl_version(),
        [quality_of(distance) for distance in distances],
        # Sizes grow within each of the two resolutions. Between them is a stretch of worse and larger files.
        [number / 4 for number in (*range(53), *range(73, 400))],
        lambda quality: {"quality": quality},
        effort=7,
        num_threads=0,
    )


def jpeg_xl_lossless() -> Codec:
    """Lossless JPEG XL, effort 7."""
    options: dict[str, Any] = {"lossless": True, "effort": 7, "num_threads": 0}
    return pillow("jpeg_xl_lossless", "JPEG XL lossless", "JXL", jpeg_xl_version(), **options)


def heic() -> Codec:
    """HEIC from x265, 4:2:0, the library's defaults."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    about = pillow_heif.libheif_info()
    versions = {**installed("pillow-heif"), "libheif": str(about["libheif"]), "x265": str(about["HEIF"])}
    return pillow("heic", "HEIC", "HEIF", versions, (10, 20, 30, 40, 50, 60, 70), chroma=420)


def png() -> Codec:
    """PNG at its best in Pillow."""
    return pillow("png", "PNG", "PNG", {"zlib": features.version("zlib_ng") or features.version("zlib")}, optimize=True)


CODECS: dict[str, Callable[[], Codec]] = {
    "vaecodec": vaecodec,
    "pca": pca,
    "jpeg420": lambda: jpeg("4:2:0"),
    "jpeg444": lambda: jpeg("4:4:4"),
    "jpeg2000": jpeg2000,
    "webp": webp,
    "jpeg_xl": jpeg_xl,
    "heic": heic,
    "avif": avif,
    "avif_psnr": avif_psnr,
    "vaecodec_lossless": vaecodec_lossless,
    "vaecodec_fast": vaecodec_fast,
    "jpeg_xl_lossless": jpeg_xl_lossless,
    "webp_lossless": webp_lossless,
    "jpeg2000_lossless": jpeg2000_lossless,
    "png": png,
}
"""All of them, in the order of the tables. Each raises ImportError if what it needs is not installed."""


def once(name: str, picture: str, quality: float) -> None:
    """Encode and decode the file ``picture`` once: what a fresh process is watched at."""
    codec = CODECS[name]()
    codec.decode(codec.encode(Image.open(picture).convert("RGB"), quality))
