"""Pictures between Pillow and arrays. Nothing is dropped: what cannot be carried is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bitstream import EXIF, ICC, XMP, Mode, Section, VaeError

Pixels = NDArray[np.uint8]


class ImageError(VaeError):
    """The input is no picture, or one of a kind that is not supported."""


def open_picture(data: bytes) -> Image.Image:
    """A picture from the bytes of a file. Raises ImageError."""
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error) if not isinstance(error, UnidentifiedImageError) else "not a picture that Pillow reads"
        raise ImageError(reason) from None
    return picture


def pixels_of(picture: Image.Image) -> tuple[Pixels, Mode]:
    """uint8 [H, W, 3] of an 8-bit grey or colour picture, and its mode. Raises ImageError for any other."""
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{frames} frames: only single pictures are supported")
    mode = picture.mode
    if mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        raise ImageError(f"mode {mode} with transparency is not supported yet: flatten it first")
    if mode not in ("1", "L", "P", "RGB"):
        raise ImageError(f"mode {mode} is not supported: convert it to 8-bit RGB or L first")
    kept = Mode["L"] if mode in ("1", "L") else Mode["RGB"]
    return np.asarray(picture.convert("L").convert("RGB") if kept == Mode["L"] else picture.convert("RGB")), kept


def picture_of(pixels: Pixels, mode: Mode, sections: tuple[Section, ...]) -> Image.Image:
    """The Pillow picture of uint8 [H, W, 3], in the mode it had, with its metadata."""
    if mode == Mode["L"]:
        picture = Image.fromarray(((pixels.astype(np.uint16).sum(2) + 1) // 3).astype(np.uint8), "L")
    else:
        picture = Image.fromarray(pixels, "RGB")
    for section in sections:
        if section.tag in INFO_KEYS:
            picture.info[INFO_KEYS[section.tag]] = bytes(section.payload)
    return picture


INFO_KEYS = {EXIF: "exif", ICC: "icc_profile", XMP: "xmp"}


def metadata_of(picture: Image.Image) -> list[Section]:
    """EXIF, ICC profile and XMP, as they stand in the file."""
    sections = []
    for tag, key in INFO_KEYS.items():
        payload: Any = picture.info.get(key)
        if isinstance(payload, str):
            payload = payload.encode()
        if payload:
            sections.append(Section(tag, payload))
    return sections


def encode_picture(picture: Image.Image, format: str) -> bytes:
    """The bytes of a file in one of Pillow's formats, metadata included. Raises ImageError if it cannot hold them."""
    stream = io.BytesIO()
    keep = {key: picture.info[key] for key in INFO_KEYS.values() if key in picture.info}
    if format == "PNG" and "xmp" in keep:
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", keep.pop("xmp").decode("utf-8", "replace"))
        keep["pnginfo"] = text
    try:
        picture.save(stream, format, **keep)
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"cannot write {format}: {error}") from None
    return stream.getvalue()
