"""Pictures between Pillow and arrays. Nothing is dropped: what cannot be carried is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bitstream import EXIF, ICC, XMP, LimitError, Limits, Mode, Section, VaeError

Samples = NDArray[np.unsignedinteger[Any]]
CHANNELS = {mode: {"L": 1, "I": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode.name.split(";")[0]] for mode in Mode}


class ImageError(VaeError):
    """The input is no picture, or one of a kind that is not supported."""


def open_picture(file: IO[bytes], limits: Limits | None = None) -> Image.Image:
    """A picture from a file, which may have to stay open for its other frames to be counted. Raises ImageError, and
    LimitError before any pixels are read."""
    try:
        picture = Image.open(file)
        (limits or Limits()).check_size(*picture.size)
        refuse_deep(picture)
        picture.load()
    except Image.DecompressionBombError:  # in Pillow's words it would be twice its own limit
        raise LimitError(f"picture of more than {(limits or Limits()).max_pixels} pixels exceeds the limits") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error) if not isinstance(error, UnidentifiedImageError) else "not a picture that Pillow reads"
        raise ImageError(reason) from None
    return picture


def refuse_deep(picture: Image.Image) -> None:
    """Raises ImageError for 16-bit colour, which Pillow would cut to 8 bits without a word while it loads."""
    if any("16" in str(tile[3]) for tile in getattr(picture, "tile", [])) and not picture.mode.startswith("I"):
        raise ImageError(f"16-bit {picture.mode} is not supported: convert it to 8 bits first")


def refuse_frames(picture: Image.Image) -> None:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a JPEG file whose other pictures are previews, depths or gains
        raise ImageError(f"{frames} frames: only single pictures are supported")


@dataclass(frozen=True)
class Pixels:
    """A picture in the mode that a file keeps of it. Its samples are made where they are asked for, so that there is no
    second copy of them all: ``pixels[rows, columns]``, two slices inside the picture, is uint8 or uint16 [h, w, C].

    bits: 8 or 16, of a sample.
    """

    source: Image.Image | NDArray[np.unsignedinteger[Any]]
    width: int
    height: int
    mode: Mode
    bits: int

    def __getitem__(self, part: tuple[slice, slice]) -> Samples:
        rows, columns = part
        if isinstance(self.source, np.ndarray):
            samples: Samples = self.source[rows, columns]
        else:
            crop = self.source.crop((columns.start, rows.start, columns.stop, rows.stop))
            samples = np.array(crop.convert(self.mode.name)) if self.bits == 8 else np.asarray(crop).astype(np.uint16)
        return samples.reshape(*samples.shape[:2], CHANNELS[self.mode])


def pixels_of(picture: Image.Image | NDArray[Any]) -> Pixels:
    """The pixels of a picture, which is loaded.

    picture: Pillow's; or an array [H, W] or [H, W, C], uint8 of 1 to 4 channels or uint16 of 1, 3 or 4. Black and white
    becomes grey, a palette the colours it stands for, with alpha if it has any. Raises ImageError for pictures whose
    values this would change.
    """
    if isinstance(picture, np.ndarray):
        return array_pixels(picture)
    refuse_deep(picture)
    refuse_frames(picture)
    mode = picture.mode
    if mode.startswith("I"):
        if "transparency" in picture.info:
            raise ImageError(f"mode {mode} with transparency is not supported: flatten it first")
        if mode == "I":
            extrema: Any = picture.getextrema()
            if extrema[0] < 0 or extrema[1] > 65535:
                raise ImageError(f"mode {mode} with values outside 0..65535 is not supported")
        picture.load()
        return Pixels(picture, *picture.size, Mode["I;16"], 16)
    if mode in ("1", "L", "RGB") and "transparency" in picture.info:
        kept = "RGBA" if mode == "RGB" else "LA"
    elif mode in ("P", "PA"):
        kept = "RGBA" if mode == "PA" or "transparency" in picture.info else "RGB"
    else:
        kept = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA"}.get(mode, "")
    if not kept:
        raise ImageError(f"mode {mode} is not supported: convert it to RGB, RGBA or L first")
    picture.load()
    return Pixels(picture, *picture.size, Mode[kept], 8)


def array_pixels(array: NDArray[Any]) -> Pixels:
    """The same of an array."""
    channels = array.shape[2] if array.ndim == 3 else 1
    names = {np.dtype(np.uint8): ["L", "LA", "RGB", "RGBA"], np.dtype(np.uint16): ["I;16", "", "RGB;16", "RGBA;16"]}
    modes = names.get(array.dtype, [])
    if array.ndim not in (2, 3) or not 1 <= channels <= len(modes) or not modes[channels - 1]:
        raise ImageError(
            f"an array of {array.dtype} {list(array.shape)} is not supported: "
            "[H, W, C] has uint8 with 1 to 4 channels, or uint16 with 1, 3 or 4"
        )
    height, width = array.shape[:2]
    return Pixels(array, width, height, Mode[modes[channels - 1]], 8 * array.dtype.itemsize)


def samples_of(picture: Image.Image | NDArray[Any]) -> tuple[Samples, Mode, int]:
    """All samples [H, W, C] of a picture as ``pixels_of`` takes it, its mode and the bits a sample."""
    pixels = pixels_of(picture)
    return pixels[0 : pixels.height, 0 : pixels.width], pixels.mode, pixels.bits


def grey_of(pixels: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """[H, W, 1], the mean of the three channels [H, W, 3] that the networks gave for a grey picture."""
    grey: NDArray[np.int32] = (pixels.sum(2, keepdims=True, dtype=np.int32) + 1) // 3
    return grey


def picture_of(samples: Samples) -> Image.Image:
    """The Pillow picture of samples [H, W, C] of 8 bits, or of one channel of 16."""
    return Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)


def refuse_deep_colour(mode: Mode) -> None:
    """Raises ImageError for modes of files that Pillow has none for."""
    if mode.name in ("RGB;16", "RGBA;16"):
        raise ImageError(f"Pillow has no mode for {mode.name}: use Codec.decode_array")


INFO_KEYS = {EXIF: "exif", ICC: "icc_profile", XMP: "xmp"}


def info_of(sections: tuple[Section, ...]) -> dict[str | tuple[int, int], Any]:
    """Metadata as Pillow's ``info`` has them."""
    return {INFO_KEYS[section.tag]: bytes(section.payload) for section in sections if section.tag in INFO_KEYS}


def metadata_of(picture: Image.Image | NDArray[Any]) -> list[Section]:
    """EXIF, ICC profile and XMP, as they stand in the file. Raises ImageError for more than a reader accepts."""
    sections = list[Section]()
    if isinstance(picture, np.ndarray):
        return sections
    for tag, key in INFO_KEYS.items():
        payload: Any = picture.info.get(key)
        if isinstance(payload, str):
            payload = payload.encode()
        if payload:
            limit = Limits().max_icc if tag == ICC else Limits().max_metadata
            if len(payload) > limit:
                raise ImageError(f"{key} of {len(payload)} bytes: readers accept {limit}")
            sections.append(Section(tag, payload))
    return sections
