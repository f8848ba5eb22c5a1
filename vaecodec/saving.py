"""Pictures into the files of other formats."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .image import INFO_KEYS, ImageError

XMP_TIFF_TAG = 700

LITTLE_LOSS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True},
}
"""Pillow's defaults would lose about as much as a .vae file of quality 75 did."""


def encode_picture(picture: Image.Image, format: str) -> tuple[bytes, list[str]]:
    """The bytes of a file in one of Pillow's formats, and the names of the metadata that this format could not take.

    Raises ImageError if the picture cannot be written.
    """
    stream = io.BytesIO()
    kept = {key: picture.info[key] for key in INFO_KEYS.values() if key in picture.info}
    options: dict[str, Any] = kept | LITTLE_LOSS.get(format, {})
    # Pillow reads XMP from these two under one name and writes it under others.
    if format == "PNG" and "xmp" in kept:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp").decode("utf-8", "replace"))
    if format == "TIFF" and "xmp" in kept:
        tags = Image.Exif()
        tags.load(kept.get("exif", b""))
        tags[XMP_TIFF_TAG] = options.pop("xmp")
        options["exif"] = tags
    try:
        picture.save(stream, format, **options)
        with Image.open(stream) as written:
            lost = [key for key in kept if key not in written.info]
            if "exif" in lost and written.getexif():  # TIFF keeps it in its own tags
                lost.remove("exif")
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"cannot write {format}: {error}") from None
    return stream.getvalue(), lost
