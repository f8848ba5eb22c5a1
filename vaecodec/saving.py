"""Pictures into the files of other formats. What a format cannot hold exactly is refused, unless it is asked for."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from .deep import FOREIGN, encode_deep
from .engines import MissingError, installed
from .gainmap import with_gain_map
from .image import INFO_KEYS, DeepPicture, ImageError, Samples, open_picture, pixels_of
from .info import UNLIMITED
from .metadata import lost, save_options

PLUGINS = ("pillow_heif.HeifImagePlugin", "pillow_jxl")
"""Packages that teach Pillow a format when they are imported: HEIC and JPEG XL."""
PLUGGED = frozenset({".heic", ".heif", ".hif", ".jxl"})
"""The suffixes of these."""

LOSING = frozenset({"JPEG", "MPO", "AVIF", "PDF"})
"""Formats whose loss is their purpose, or of which Pillow writes no other kind: who names one has asked for it."""
WHOLE = frozenset({"PNG", "TIFF"})
"""Formats that hold every picture. Tests compare their samples for each mode; here this would take a second copy of the
picture, so that it is done for the other formats only."""
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "MPO": {"quality": 95, "subsampling": "4:4:4"},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "PDF": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True, "exact": True},
    "HEIF": {"quality": -1, "chroma": 444, "matrix_coefficients": 0},
    "JXL": {"lossless": True},
}
"""Pillow's defaults would lose about as much as a .vae file of quality 75 did."""


_tried = set[str]()


def load_plugins() -> bool:
    """Let Pillow read and write what the plugins that are installed know. Whether there was one left to try."""
    untried = [name for name in PLUGINS if name not in _tried]
    for name in untried:
        _tried.add(name)
        try:
            importlib.import_module(name)
        except ImportError as error:
            if error.name != name.partition(".")[0]:  # it is there, and broken
                warnings.warn(f"{name} is not used: {error}", stacklevel=2)
    return bool(untried)


def lacking(suffix: str) -> str:
    """What to add to an error where a suffix is that of a plugin which is not there; nothing elsewhere."""
    if suffix.lower() not in PLUGGED or suffix.lower() in Image.registered_extensions():
        return ""
    return f"; {suffix} needs the extra \"deep\": pip install 'vaecodec[deep]'"


def picture_format(suffix: str) -> str:
    """Pillow's name of the format that a suffix stands for. Raises ImageError where there is none."""
    if suffix.lower() not in Image.registered_extensions():
        load_plugins()
    format = Image.registered_extensions().get(suffix.lower())
    if format is None or format not in Image.SAVE:
        raise ImageError(f"no picture format for the suffix {suffix!r}{lacking(suffix)}")
    return format


def encode_picture(
    picture: Image.Image | DeepPicture,
    format: str,
    *,
    depth: int = 16,
    lossy: bool = False,
    background: str | None = None,
) -> tuple[bytes, list[str]]:
    """The bytes of a file in one of Pillow's formats, and the names of the metadata that this format could not take.

    depth: bits of the samples of a 16-bit picture. lossy: write what the format can hold of the picture: fewer bits,
    fewer colours, another size. background: a colour in Pillow's words, under a picture with alpha. Raises ImageError
    if the picture cannot be written, or not without a loss that nobody has asked for.
    """
    if isinstance(picture, DeepPicture):
        picture = picture if background is None else deep_flattened(picture, background)
        grey, foreign = picture.samples.shape[2] == 1, picture.full and installed("imagecodecs")
        try:
            if not grey or format in ("PPM", "AVIF", "HEIF") or (foreign and format in FOREIGN):
                data = encode_deep(picture, format)
                return data, lost(picture.info, io.BytesIO(data))
            picture, depth = (picture.spread(), 16) if picture.full else (picture, depth)
        except (ImageError, MissingError) as error:
            if not lossy:
                raise ImageError(f"{error}; .png and .tiff hold all of it, --lossy-output writes what it can") from None
        shown = Image.fromarray(picture.samples[..., 0] if grey else cut(picture.samples, picture.depth))
        shown.info, picture = picture.info, shown
    if background is not None:
        picture = flattened(picture, background)
    problem, last = "", None
    for attempt in chain(alike(picture), simplified(picture, depth, background) if lossy else ()):
        try:
            last = encoded(attempt, format)
            reason = loss(attempt, last[0], format, lossy)
        except ImageError as error:
            reason = str(error)
        if not reason:
            break
        problem = problem or reason
    if last and (lossy or not reason):
        return last
    if lossy:
        raise ImageError(problem)
    remedy = ", --background COLOUR lays it over a colour" if has_alpha(picture) else ""
    raise ImageError(f"{problem}; .png and .tiff hold all of it, --lossy-output writes what {format} can{remedy}")


def alike(picture: Image.Image) -> Iterator[Image.Image]:
    """The picture, and the same with its grey as colours."""
    yield picture
    if picture.mode in ("L", "LA"):
        yield like(picture.convert("RGB" if picture.mode == "L" else "RGBA"), picture)


def simplified(picture: Image.Image, depth: int, background: str | None) -> Iterator[Image.Image]:
    """What is left of a picture with 8 bits a sample, then without alpha, then in colours."""
    if picture.mode.startswith("I"):
        picture = like(Image.fromarray(cut(np.asarray(picture), depth)), picture)
        yield picture
    if has_alpha(picture):
        picture = flattened(picture, background or "white")
        yield picture
    if picture.mode == "L":
        yield like(picture.convert("RGB"), picture)


def cut(samples: Samples, depth: int) -> NDArray[np.uint8]:
    """To 8 bits, rounded."""
    scaled = np.rint(samples.astype(np.float64) * (255 / (2**depth - 1))).clip(0, 255)
    return np.asarray(scaled, np.uint8)


def has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "RGBA")


def flattened(picture: Image.Image, colour: str) -> Image.Image:
    """Without alpha: over a colour. A grey picture over a grey stays grey."""
    if not has_alpha(picture):
        return picture
    red, green, blue = ImageColor.getrgb(colour)[:3]
    grey = picture.mode == "LA" and red == green == blue
    under = Image.new("L", picture.size, red) if grey else Image.new("RGB", picture.size, (red, green, blue))
    under.paste(picture.convert(under.mode), mask=picture.getchannel("A"))
    return like(under, picture)


def deep_flattened(picture: DeepPicture, colour: str) -> DeepPicture:
    """The same of a picture with more than 8 bits a sample."""
    if picture.samples.shape[2] != 4:
        return picture
    peak = picture.white
    under = np.array(ImageColor.getrgb(colour)[:3]) * (peak / 255)
    colours, alpha = picture.samples[..., :3], picture.samples[..., 3:] / peak
    return replace(picture, samples=np.rint(under + (colours - under) * alpha).astype(np.uint16))


def like(picture: Image.Image, other: Image.Image) -> Image.Image:
    """With the metadata of another."""
    picture.info = dict(other.info)
    return picture


def encoded(picture: Image.Image, format: str) -> tuple[bytes, list[str]]:
    """The file as Pillow writes it, and which metadata are not in it. Raises ImageError."""
    stream = io.BytesIO()
    options = save_options(picture.info, format) | OPTIONS.get(format, {})
    if format == "ICO" and max(picture.size) <= 256:
        options["sizes"] = [picture.size]
    try:
        picture.save(stream, format, **options)
        if format in ("JPEG", "MPO") and (gain_map := picture.info.get("gain_map")):
            stream = io.BytesIO(with_gain_map(stream.getvalue(), gain_map))
        if format == "PDF":  # which Pillow does not read
            return stream.getvalue(), [key for key in INFO_KEYS.values() if picture.info.get(key)]
        missing = lost(picture.info, stream)
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's writers has its own kinds
        raise ImageError(f"cannot write {format} ({error})") from None
    return stream.getvalue(), missing


def loss(picture: Image.Image, data: bytes, format: str, lossy: bool) -> str:
    """What is missing in the file that was written of a picture, read back; "" if nothing is that was promised.

    lossy: the values of the samples may be others. Grey may have become equal colours, and alpha that is opaque
    everywhere may be missing.
    """
    if format == "PDF":
        return ""
    if format in WHOLE:
        with Image.open(io.BytesIO(data)) as written:  # Pillow turns a TIFF picture as its orientation says
            alike = sorted(written.size) == sorted(picture.size) and written.mode == picture.mode
            return "" if alike else f"{format} changes the mode to {written.mode}"
    before = pixels_of(ImageOps.exif_transpose(picture) if format == "HEIF" else picture)  # its plugin turns it
    try:
        after = pixels_of(open_picture(io.BytesIO(data), UNLIMITED))
    except ImageError as error:
        return f"what {format} holds cannot be read back ({error})"
    if (before.width, before.height) != (after.width, after.height):
        return "" if lossy else f"{format} changes the size to {after.width} x {after.height}"
    if before.bits != after.bits:
        return f"{format} does not hold {before.bits} bits a sample"
    opaque = np.uint16(2**before.bits - 1)
    for top in range(0, before.height, 256):  # so that there is no copy of them all
        part = (slice(top, min(top + 256, before.height)), slice(0, before.width))
        (x, x_alpha), (y, y_alpha) = (split(pixels[part], opaque) for pixels in (before, after))
        if after.mode.name not in ("LA", "RGBA") and (x_alpha != opaque).any():
            return f"{format} does not hold alpha"
        if not lossy and format not in LOSING and not ((x == y).all() and (x_alpha == y_alpha).all()):
            return f"{format} changes the samples"
    return ""


def split(samples: Samples, opaque: np.unsignedinteger[Any]) -> tuple[Samples, Samples]:
    """Colours [h, w, 1 or 3] and alpha [h, w, 1] of samples [h, w, C]."""
    if samples.shape[2] % 2:
        return samples, np.full_like(samples[..., :1], opaque)
    return samples[..., :-1], samples[..., -1:]
