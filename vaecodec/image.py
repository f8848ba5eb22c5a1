"""Pictures between Pillow and arrays. Nothing is dropped: what cannot be carried is refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bitstream import EXIF, GAIN, ICC, IPTC, PNG, XMP, LimitError, Limits, Mode, Section, VaeError

from .boxes import colour_chunks
from .gainmap import gain_map_of
from .metadata import COLOUR, FULL, INCH, RESOLUTION, TEXT, chunks_of, exif_of, iptc_of, kept_chunks, packed, unpacked
from .reading import deep_samples, depth_of, mend_transparency

Samples = NDArray[np.unsignedinteger[Any]]
CHANNELS = {mode: {"L": 1, "I": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode.name.split(";")[0]] for mode in Mode}


class ImageError(VaeError):
    """The input is no picture, or one of a kind that is not supported."""


@dataclass(frozen=True)
class DeepPicture:
    """A picture of 9 to 16 bits a sample from a file, in grey or in colour, which Pillow has no mode for.

    samples: uint16 [H, W, 1, 3 or 4]. depth: how many bits of them are in use. info: metadata under Pillow's names.
    full: whether white is 2**depth - 1, and not 65535, of which a dark picture takes fewer bits.
    """

    samples: NDArray[np.uint16]
    depth: int
    info: dict[str | tuple[int, int], Any]
    full: bool = False

    @classmethod
    def of(cls, samples: Samples, depth: int, sections: tuple[Section, ...]) -> DeepPicture:
        """From what a ``.vae`` file holds."""
        info = info_of(sections)
        full = any(kind == FULL for kind, _ in unpacked(info.get("png_chunks", b"")))
        return cls(samples.astype(np.uint16, copy=False), depth, info, full)

    def in_depth(self, depth: int) -> DeepPicture:
        """With another depth, for the user knows better. Raises ImageError if the file says what it is."""
        if self.full and depth != self.depth:
            raise ImageError(f"not {depth} bits a sample: the file says {self.depth}")
        return replace(self, depth=depth)

    def spread(self) -> DeepPicture:
        """With the upper bits of each sample repeated below them, so that white is 65535."""
        samples = self.samples << np.uint16(16 - self.depth) | self.samples >> np.uint16(2 * self.depth - 16)
        return replace(self, samples=samples, depth=16, full=False)

    @property
    def white(self) -> int:
        """The sample that white is."""
        return 2**self.depth - 1 if self.full else 65535

    @property
    def width(self) -> int:
        return int(self.samples.shape[1])

    @property
    def height(self) -> int:
        return int(self.samples.shape[0])

    def reduced(self, factor: int) -> DeepPicture:
        """Averages of factor x factor pixels, fewer at the edges; where alpha is, weighed by it."""
        sums = self.samples.astype(np.uint64)
        if sums.shape[2] == 4:
            sums[..., :3] *= sums[..., 3:]
        for axis in (0, 1):
            sums = np.add.reduceat(sums, np.arange(0, sums.shape[axis], factor), axis)
        sides = (np.diff(np.append(np.arange(0, side, factor), side)) for side in self.samples.shape[:2])
        weight: NDArray[np.uint64] = np.multiply.outer(*sides).astype(np.uint64)[..., None]
        if sums.shape[2] == 4:
            weight = np.concatenate([np.maximum(sums[..., 3:], 1).repeat(3, 2), weight], 2)
        return replace(self, samples=((sums + weight // 2) // weight).astype(np.uint16))


Picture = Image.Image | DeepPicture | NDArray[Any]


def open_picture(file: IO[bytes], limits: Limits | None = None) -> Image.Image | DeepPicture:
    """A picture from a file that can seek, which may have to stay open for its other frames to be counted. Raises
    ImageError, and LimitError before any pixels are read."""
    try:
        picture = Image.open(file)
        (limits or Limits()).check_size(*picture.size)
        depth = depth_of(picture, file)
        if depth > 8:
            refuse_frames(picture)
            samples, used = deep_samples(picture, file, depth)
            full = used < 16 and picture.format != "PNG"  # whose white is 65535 in any case
            found = max(depth_used(samples), used if used < 16 else 0)
            deep = DeepPicture(samples, found, carried(picture), full)
        else:
            mend_transparency(picture, file)
            picture.load()
            deep = None
        if picture.format == "PNG":  # with what Pillow does not read
            (deep or picture).info["png_chunks"] = packed(kept_chunks(file))
        else:
            said = colour_chunks(file) if picture.format in ("AVIF", "HEIF") else []
            if deep:
                mark = [(FULL, bytes([deep.depth]))] if deep.full else []
                deep.info["png_chunks"] = packed(mark + said) + deep.info.get("png_chunks", b"")
            elif said:
                picture.info["png_chunks"] = packed(said + chunks_of(picture))
        if not deep and (gain_map := gain_map_of(picture, file)):
            picture.info["gain_map"] = gain_map
    except Image.DecompressionBombError:  # in Pillow's words it would be twice its own limit
        raise LimitError(f"picture of more than {(limits or Limits()).max_pixels} pixels exceeds the limits") from None
    except UnidentifiedImageError:
        raise ImageError("not a picture that Pillow reads") from None
    except (MemoryError, VaeError):
        raise
    except Exception as error:  # each of Pillow's readers has its own kinds
        raise ImageError(str(error) or type(error).__name__) from None
    return deep or picture


def refuse_frames(picture: Image.Image) -> None:
    try:
        frames = getattr(picture, "n_frames", 1)
    except Exception as error:
        raise ImageError(f"its frames cannot be counted: {error}") from None
    if frames > 1 and picture.format != "MPO":  # a JPEG file whose other pictures are previews, depths or gains
        raise ImageError(f"{frames} frames: only single pictures are supported")


@dataclass(frozen=True)
class Pixels:
    """A picture in the mode that a file keeps of it. Its samples are made where they are asked for, so that there is no
    second copy of them all: ``pixels[rows, columns]``, two slices inside the picture, is uint8 or uint16 [h, w, C].

    bits: 8 or 16, of a sample. depth: how many of them are in use, where the picture says so.
    """

    source: Image.Image | NDArray[np.unsignedinteger[Any]]
    width: int
    height: int
    mode: Mode
    bits: int
    depth: int | None = None

    def __getitem__(self, part: tuple[slice, slice]) -> Samples:
        rows, columns = part
        if isinstance(self.source, np.ndarray):
            samples: Samples = self.source[rows, columns]
        else:
            crop = self.source.crop((columns.start, rows.start, columns.stop, rows.stop))
            samples = np.array(crop.convert(self.mode.name)) if self.bits == 8 else np.asarray(crop).astype(np.uint16)
        return samples.reshape(*samples.shape[:2], CHANNELS[self.mode])


def pixels_of(picture: Picture) -> Pixels:
    """The pixels of a picture.

    picture: Pillow's, one from ``open_picture``, or an array [H, W] or [H, W, C], uint8 of 1 to 4 channels or uint16 of
    1, 3 or 4. Black and white becomes grey, a palette the colours it stands for, with alpha if it has any. Raises
    ImageError for pictures whose values this would change, and for those without pixels.
    """
    if isinstance(picture, np.ndarray):
        return array_pixels(picture)
    if isinstance(picture, DeepPicture):
        return replace(array_pixels(picture.samples), depth=picture.depth)
    refuse_deep(picture)
    refuse_frames(picture)
    if not picture.width * picture.height:
        raise ImageError(f"a picture of {picture.width} x {picture.height} has no pixels")
    picture.load()
    mode, transparency = picture.mode, picture.info.get("transparency")
    if mode.startswith("I"):
        if transparency is not None:
            raise ImageError(f"mode {mode} with transparency is not supported: flatten it first")
        if mode == "I":
            extrema: Any = picture.getextrema()
            if extrema[0] < 0 or extrema[1] > 65535:
                raise ImageError(f"mode {mode} with values outside 0..65535 is not supported")
        return Pixels(picture, *picture.size, Mode["I;16"], 16)
    if mode in ("1", "L", "RGB") and transparency is not None:
        whole = transparency if isinstance(transparency, tuple) else (transparency,)
        if len(whole) != len(mode) or not all(isinstance(value, int) for value in whole):
            raise ImageError(f"mode {mode} with transparency {transparency!r} is not supported: convert it first")
        kept = "RGBA" if mode == "RGB" else "LA"
    elif mode in ("P", "PA"):
        kept = "RGBA" if picture.has_transparency_data else "RGB"
    else:
        kept = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA"}.get(mode, "")
    if not kept:
        raise ImageError(f"mode {mode} is not supported: convert it to RGB, RGBA or L first")
    return Pixels(picture, *picture.size, Mode[kept], 8)


def refuse_deep(picture: Image.Image) -> None:
    """Raises ImageError for a file's picture of more than 8 bits a sample that Pillow would cut to 8 as it loads, and
    for other samples that it would change."""
    file = getattr(picture, "fp", None)
    if not getattr(picture, "tile", None) or file is None or file.closed:
        return  # loaded, or of no file
    try:
        depth = depth_of(picture, file)
        mend_transparency(picture, file)
    except ValueError as error:
        raise ImageError(str(error)) from None
    if depth > 8 and not picture.mode.startswith("I"):
        raise ImageError(
            f"Pillow would cut {depth}-bit {picture.mode} to 8 bits: give the file itself or an array of uint16"
        )


def array_pixels(array: NDArray[Any]) -> Pixels:
    """The same of an array."""
    array = np.asarray(array)  # no matrix, which has two dimensions whatever is done to it
    if array.dtype == np.dtype(np.uint16).newbyteorder():
        array = array.astype(np.uint16)
    channels = array.shape[2] if array.ndim == 3 else 1
    names = {np.dtype(np.uint8): ["L", "LA", "RGB", "RGBA"], np.dtype(np.uint16): ["I;16", "", "RGB;16", "RGBA;16"]}
    modes = names.get(array.dtype, [])
    if not array.size:
        raise ImageError(f"an array of shape {list(array.shape)} has no pixels")
    if array.ndim not in (2, 3) or not 1 <= channels <= len(modes) or not modes[channels - 1]:
        raise ImageError(
            f"an array of {array.dtype} {list(array.shape)} is not supported: "
            "[H, W, C] has uint8 with 1 to 4 channels, or uint16 with 1, 3 or 4"
        )
    height, width = array.shape[:2]
    return Pixels(array, width, height, Mode[modes[channels - 1]], 8 * array.dtype.itemsize)


def samples_of(picture: Picture) -> tuple[Samples, Mode, int]:
    """All samples [H, W, C] of a picture as ``pixels_of`` takes it, its mode and the bits a sample."""
    pixels = pixels_of(picture)
    return pixels[0 : pixels.height, 0 : pixels.width], pixels.mode, pixels.bits


def depth_used(samples: Samples) -> int:
    """Bits that the largest sample takes: 8, or 9 to 16 of uint16."""
    return 8 if samples.dtype == np.uint8 else max(9, int(samples.max()).bit_length())


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


CHUNKS = {"icc": COLOUR, "text": TEXT, "dpi": RESOLUTION}
INFO_KEYS = {EXIF: "exif", ICC: "icc_profile", XMP: "xmp", IPTC: "iptc", PNG: "png_chunks", GAIN: "gain_map"}


def info_of(sections: tuple[Section, ...]) -> dict[str | tuple[int, int], Any]:
    """Metadata as Pillow's ``info`` has them; what it has no name for, as bytes under the names of ``INFO_KEYS``."""
    info: dict[str | tuple[int, int], Any] = {
        INFO_KEYS[section.tag]: bytes(section.payload) for section in sections if section.tag in INFO_KEYS
    }
    for kind, data in unpacked(info.get("png_chunks", b"")):
        if kind == b"pHYs" and len(data) == 9 and data[8] == 1:
            info["dpi"] = tuple(int.from_bytes(data[at : at + 4]) * INCH for at in (0, 4))
    return info


def carried(picture: Image.Image) -> dict[str | tuple[int, int], Any]:
    """What a ``.vae`` file keeps of a picture's metadata, under the names of ``INFO_KEYS``. What ``info`` has under
    such a name stands for the picture's own, None for nothing."""
    found: dict[str | tuple[int, int], Any] = {"exif": exif_of(picture)}
    for key in ("icc_profile", "xmp"):
        payload = picture.info.get(key)
        found[key] = payload.encode() if isinstance(payload, str) else payload
    found["iptc"] = picture.info["iptc"] if "iptc" in picture.info else iptc_of(picture)
    found["png_chunks"] = picture.info["png_chunks"] if "png_chunks" in picture.info else packed(chunks_of(picture))
    found["gain_map"] = picture.info.get("gain_map")
    return {key: payload for key, payload in found.items() if payload}


METADATA = {"exif": EXIF, "icc": ICC, "xmp": XMP, "iptc": IPTC, "text": PNG, "dpi": PNG, "gain": GAIN}
"""Names for users, and the sections that they stand for; colour that is no profile goes with icc."""


def keep_metadata(picture: Image.Image | DeepPicture, names: Collection[str]) -> None:
    """Drop a picture's other metadata. names: of ``METADATA``."""
    found = picture.info if isinstance(picture, DeepPicture) else carried(picture)
    kinds = frozenset({FULL}).union(*(CHUNKS[name] for name in names if name in CHUNKS))
    chunks = [chunk for chunk in unpacked(found.get("png_chunks") or b"") if chunk[0] in kinds]
    tags = {METADATA[name] for name in names} - {PNG}
    for tag, key in INFO_KEYS.items():
        picture.info[key] = packed(chunks) if tag == PNG else found.get(key) if tag in tags else None


def metadata_of(picture: Picture) -> list[Section]:
    """What stands in the file beside the picture. Raises ImageError for more than a reader accepts."""
    sections = list[Section]()
    if isinstance(picture, np.ndarray):
        return sections
    found = picture.info if isinstance(picture, DeepPicture) else carried(picture)
    for tag, key in INFO_KEYS.items():
        payload = found.get(key)
        if payload:
            limit = Limits().max_icc if tag == ICC else Limits().max_metadata
            if len(payload) > limit:
                raise ImageError(f"{key} of {len(payload)} bytes: readers accept {limit}")
            sections.append(Section(tag, payload))
    return sections
