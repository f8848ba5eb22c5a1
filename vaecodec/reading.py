"""How many bits a sample has in a picture's file, and the samples of files that Pillow would cut to 8 bits.

Pillow has no mode for 16-bit colour: it keeps the high byte of each sample, without a word. Told that the file has the
other byte order, it keeps the low byte, so that two readings give all there is, in every compression that it knows.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .engines import need

Deep = NDArray[np.uint16]


def depth_of(picture: Image.Image, file: IO[bytes]) -> int:
    """Bits a sample of a picture that has been opened from a file, as the file says them; 8 if they are fewer.

    Raises ValueError for samples that are no unsigned integers, or none of a colour, of grey or of alpha.
    """
    measure = DEPTHS.get(picture.format or "")
    if picture.mode == "F":
        return 8  # which is refused for its mode
    if measure is None:
        return 16 if picture.mode.startswith("I") else 8
    at = file.tell()
    file.seek(0)
    found = measure(picture, file)
    file.seek(at)
    return max(8, found)


def _png(_picture: Any, file: IO[bytes]) -> int:
    return file.read(25)[24]


def _tiff(picture: Any, _file: IO[bytes]) -> int:
    tags = picture.tag_v2
    bits, formats, extra = (tags.get(tag, default) for tag, default in ((258, (1,)), (339, (1,)), (338, ())))
    if 2 in formats and not picture.mode.startswith("I"):
        raise ValueError("signed samples are not supported")
    if 0 in extra:
        raise ValueError("it has a channel that is neither colour nor alpha")
    return int(max(bits))


def _ppm(picture: Any, _file: IO[bytes]) -> int:
    decoder, _, _, arguments = picture.tile[0]
    if decoder == "raw":  # its samples are those of the mode
        return 16 if picture.mode == "I" else 8
    return int(arguments[-1]).bit_length() if isinstance(arguments, tuple) else 8


def _jpeg2000(_picture: Any, file: IO[bytes]) -> int:
    data = file.read()
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0:
        raise ValueError("its codestream cannot be found")
    (channels,) = struct.unpack_from(">H", data, at + 40)
    kinds = [data[at + 42 + 3 * channel] for channel in range(channels)]
    if channels < 3 and kinds[0] & 0x80:
        raise ValueError("signed samples are not supported")
    return max((kind & 0x7F) + 1 for kind in kinds)


def _avif(_picture: Any, file: IO[bytes]) -> int:
    # Bits 6 and 5 of the third byte of an AV1 configuration: high bit depth, twelve bits.
    flags = [match[1][2] for match in re.finditer(rb"av1C(...)", file.read(), re.DOTALL)]
    return max((8 if not flag & 0x40 else 12 if flag & 0x20 else 10 for flag in flags), default=8)


def _heif(picture: Any, _file: IO[bytes]) -> int:
    return int(picture.info.get("bit_depth", 8))


def _jxl(_picture: Any, file: IO[bytes]) -> int:
    data = file.read()
    part, whole = data.find(b"jxlp"), data.find(b"jxlc")  # boxes with the codestream; where there are none, it is alone
    start = 0 if data.startswith(b"\xff\x0a") else whole + 4 if whole >= 0 else part + 8
    bits = iter(np.unpackbits(np.frombuffer(data[start + 2 : start + 66], np.uint8), bitorder="little").tolist())

    def number(count: int) -> int:
        return sum(next(bits) << at for at in range(count))

    def skip_size() -> None:
        small = number(1)

        def side() -> int:
            return number(5) if small else number((9, 13, 18, 30)[number(2)])

        side()
        if number(3) == 0:  # no ratio of the sides
            side()

    skip_size()
    if number(1):  # all as usual
        return 8
    if number(1):
        number(3)  # orientation
        if number(1):
            skip_size()
        if number(2):
            raise ValueError("previews and animations are not supported")
    floating, kind = number(1), number(2)
    if floating:
        raise ValueError("floating-point samples are not supported")
    return (8, 10, 12)[kind] if kind < 3 else number(6) + 1


def _sgi(_picture: Any, file: IO[bytes]) -> int:
    return 8 * file.read(4)[3]


def _dds(picture: Any, _file: IO[bytes]) -> int:
    if getattr(picture, "pixel_format", "").startswith("BC6H"):
        return 16
    decoder, _, _, arguments = picture.tile[0]
    return max(mask.bit_count() for mask in arguments[1]) if decoder == "dds_rgb" else 8


def _fits(picture: Any, _file: IO[bytes]) -> int:
    if picture.mode != "L":
        raise ValueError("signed samples are not supported")
    return 8


DEPTHS: dict[str, Callable[[Any, IO[bytes]], int]] = {
    "AVIF": _avif,
    "DDS": _dds,
    "FITS": _fits,
    "HEIF": _heif,
    "JPEG2000": _jpeg2000,
    "JXL": _jxl,
    "PNG": _png,
    "PPM": _ppm,
    "SGI": _sgi,
    "TIFF": _tiff,
}
"""By Pillow's names, with the file at its beginning. Samples of other formats have 8 bits, or as many as Pillow's
mode."""


def mend_transparency(picture: Image.Image, file: IO[bytes]) -> None:
    """Of PNG's grey of 2 and 4 bits Pillow spreads the samples over 8, but not the one that is transparent."""
    key = picture.info.get("transparency")
    if picture.format == "PNG" and picture.mode == "L" and isinstance(key, int):
        at = file.tell()
        file.seek(0)
        peak = 2 ** _png(picture, file) - 1
        file.seek(at)
        picture.info["transparency"] = (key & peak) * 255 // peak


def deep_samples(picture: Image.Image, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    """Samples [H, W, 1, 3 or 4] of a picture of more than 8 bits a sample, and the bits that the file says are in use.

    picture: opened from the file; it is loaded here if that is of use. Raises ValueError where the samples cannot be
    had as they are.
    """
    reader = READERS.get(picture.format or "")
    if reader is None:
        raise ValueError(f"{depth} bits a sample are not supported in {picture.format}: convert it to 8 bits first")
    return reader(picture, file, depth)


def _deep_png(picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    file.seek(0)
    chunks = dict(png_chunks(file))
    colour, used = chunks[b"IHDR"][9], max(chunks.get(b"sBIT", b"\x10"))
    if colour == 4:  # four bytes a pixel, whatever they are called
        grey, alpha = np.moveaxis(_loaded(picture, "RGBA").view(">u2"), 2, 0)
        return np.stack([grey, grey, grey, alpha], 2).astype(np.uint16), used
    samples = _grey(picture) if colour == 0 else _halves(picture, file)
    if b"tRNS" in chunks and samples.shape[2] < 4:
        key = np.frombuffer(chunks[b"tRNS"], ">u2")
        alpha = np.where((samples == key).all(2, keepdims=True), 0, 65535).astype(np.uint16)
        samples = np.concatenate([samples.repeat(3, 2) if colour == 0 else samples, alpha], 2)
    return samples, used


def _deep_tiff(picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    tags = picture.tag_v2
    if picture.mode.startswith("I"):
        samples = _grey(picture)
        if not tags.get(262, 1):  # white is 0, of which Pillow takes no notice in 16 bits
            samples = np.uint16(2**depth - 1) - samples
        return samples, depth
    if picture.mode not in ("RGB", "RGBA") or 1 in tags.get(338, ()) or tags[262] != 2:
        raise ValueError(f"16-bit {picture.mode} of this kind is not supported in TIFF: convert it to 8 bits first")
    return _planes(picture, file) if tags.get(284, 1) == 2 else _halves(picture, file), depth


def _deep_ppm(picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    file.seek(0)
    plain = file.read(2) in (b"P2", b"P3")
    decoder, _, offset, arguments = picture.tile[0]
    peak = 65535 if decoder == "raw" else int(arguments[-1])
    channels, count = (1, 3)[picture.mode == "RGB"], picture.width * picture.height
    file.seek(offset)
    if plain:
        words = re.sub(rb"#[^\r\n]*", b"", file.read()).split()[: count * channels]
        values = np.array(words, np.int64)
    else:
        values = np.frombuffer(file.read(2 * count * channels), ">u2").astype(np.int64)
    if len(values) < count * channels or values.min() < 0 or values.max() > peak:
        raise ValueError("samples are missing or beyond the maximum")
    if peak & (peak + 1):  # not all bits set
        values, depth = (values * 65535 + peak // 2) // peak, 16
    return values.astype(np.uint16).reshape(picture.height, picture.width, channels), depth


def _planes(picture: Any, file: IO[bytes]) -> Deep:
    """Samples of a TIFF file with a plane for each channel, of which Pillow makes something else in 16 bits."""
    import tifffile

    if picture.tag_v2.get(274, 1) != 1:
        raise ValueError("16-bit planes that are not upright are not supported in TIFF")
    file.seek(0)
    try:
        planes = tifffile.imread(file, key=0)
    except (ValueError, KeyError, tifffile.TiffFileError) as error:
        raise ValueError(f"16-bit planes in TIFF: {error}") from None
    samples = np.moveaxis(planes, 0, 2)
    if samples.dtype != np.uint16 or samples.shape != (picture.height, picture.width, len(picture.mode)):
        raise ValueError(f"planes of {samples.dtype} {list(planes.shape)} are not supported in TIFF")
    return np.ascontiguousarray(samples, np.uint16)


def _deep_sgi(picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    decoder, _, offset, _ = picture.tile[0]
    if decoder == "sgi_rle":
        return _halves(picture, file), depth
    shape = (len(picture.mode), picture.height, picture.width)
    file.seek(offset)
    planes = np.frombuffer(file.read(2 * math.prod(shape)), ">u2").reshape(shape)[:, ::-1]  # upwards
    return np.moveaxis(planes, 0, 2).astype(np.uint16), depth


def _deep_jpeg2000(picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    if picture.mode == "I;16":
        return _grey(picture) >> np.uint16(16 - depth), depth  # Pillow has shifted them up
    file.seek(0)
    data = file.read()
    at = data.find(b"\xff\x4f\xff\x51")
    (channels,) = struct.unpack_from(">H", data, at + 40)
    kinds = {data[at + 42 + 3 * channel : at + 45 + 3 * channel] for channel in range(channels)}
    header = data[:at]
    alike = len(kinds) == 1 and all(kind[0] < 0x80 and kind[1:] == b"\1\1" for kind in kinds)
    spaces = set(re.findall(rb"colr\x01..(....)", header, re.DOTALL))
    if not alike or b"pclr" in header or not spaces <= {b"\0\0\0\x10", b"\0\0\0\x11"}:  # sRGB and grey
        raise ValueError(f"{depth} bits a sample are not supported in JPEG2000 of this kind: convert it first")
    return _by_imagecodecs(picture, "jpeg2k_decode", data, depth), depth


def _deep_avif(picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    file.seek(0)
    return _by_imagecodecs(picture, "avif_decode", file.read(), depth), depth


def _by_imagecodecs(picture: Any, name: str, data: bytes, depth: int) -> Deep:
    """Samples of a file in a format that Pillow cuts to 8 bits. Raises ValueError where they are not of the form that
    Pillow gives the picture, and MissingError."""
    need("imagecodecs", f"{depth} bits a sample", "deep")
    import imagecodecs

    samples: NDArray[Any] = np.atleast_3d(getattr(imagecodecs, name)(data, numthreads=1))
    if samples.shape[2] == 2:
        samples = samples[..., [0, 0, 0, 1]]
    expected = (picture.height, picture.width, {"L": 1, "I;16": 1, "RGB": 3}.get(picture.mode, 4))
    if samples.dtype != np.uint16 or samples.shape != expected or int(samples.max()).bit_length() > depth:
        raise ValueError(f"its {depth} bits a sample cannot be read: {samples.dtype} {list(samples.shape)}")
    return samples


def _deep_heif(_picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    need("pillow_heif", f"{depth} bits a sample", "deep")
    import pillow_heif

    file.seek(0)
    try:
        image = pillow_heif.open_heif(file, convert_hdr_to_8bit=False, hdr_to_16bit=False)
        samples = np.asarray(image)
    except RuntimeError as error:
        raise ValueError(f"{depth} bits a sample: {error}") from None
    if samples.dtype != np.uint16 or image.info.get("bit_depth") != depth:
        raise ValueError(f"its {depth} bits a sample cannot be read")
    return samples.reshape(*samples.shape[:2], -1), depth


def _deep_jxl(picture: Any, file: IO[bytes], depth: int) -> tuple[Deep, int]:
    if picture.mode != "I;16":
        file.seek(0)
        return _by_imagecodecs(picture, "jpegxl_decode", file.read(), depth), depth
    wide = _grey(picture).astype(np.int64)  # spread over 16 bits
    return ((wide * (2**depth - 1) + 32767) // 65535).astype(np.uint16), depth


def _deep_mode(picture: Any, _file: IO[bytes], depth: int) -> tuple[Deep, int]:
    return _grey(picture), depth


READERS: dict[str, Callable[[Any, IO[bytes], int], tuple[Deep, int]]] = {
    "AVIF": _deep_avif,
    "HEIF": _deep_heif,
    "IM": _deep_mode,
    "JPEG2000": _deep_jpeg2000,
    "JXL": _deep_jxl,
    "MCIDAS": _deep_mode,
    "PNG": _deep_png,
    "PPM": _deep_ppm,
    "SGI": _deep_sgi,
    "TIFF": _deep_tiff,
}


def _grey(picture: Image.Image) -> Deep:
    """[H, W, 1] of a grey picture of 16 bits, or of 32 that fit in 16."""
    samples = np.asarray(picture)
    if samples.dtype != np.uint16 and (samples.min() < 0 or samples.max() > 65535):
        raise ValueError(f"mode {picture.mode} with values outside 0..65535 is not supported")
    return samples.astype(np.uint16)[..., None]


def _loaded(picture: Any, rawmode: str) -> NDArray[np.uint8]:
    """The bytes [H, W, C] of a picture whose samples are taken for those of a raw mode."""
    tiles = list[Any]()
    for tile in picture.tile:
        arguments = rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:])
        tiles.append(tile._replace(args=arguments))
    picture.tile = tiles
    return np.asarray(picture)


_FOREIGN = "B" if np.little_endian else "L"
SWAPPED = {
    "L;16B": "L;16",
    **{f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in ("BL", "LB")},
    **{f"{mode};16N": f"{mode};16{_FOREIGN}" for mode in ("RGB", "RGBA")},
}
"""Pillow's names of kinds of samples, and of those in the other byte order; N is the machine's."""


def _halves(picture: Any, file: IO[bytes]) -> Deep:
    """Samples [H, W, 1, 3 or 4] of 16 bits, of which Pillow keeps one byte at a time."""
    arguments = picture.tile[0].args
    rawmode: str = arguments if isinstance(arguments, str) else arguments[0]
    low = SWAPPED.get(rawmode)
    if low is None:
        raise ValueError(f"samples of the kind {rawmode} are not supported")
    high = np.asarray(picture).astype(np.uint16)
    high <<= 8
    file.seek(0)
    high |= _loaded(Image.open(file), low)
    return high.reshape(picture.height, picture.width, -1)


def png_chunks(file: IO[bytes]) -> list[tuple[bytes, bytes]]:
    """Type and data of the chunks of a PNG file, but those of its pixels. The file is read from where it stands."""
    chunks = list[tuple[bytes, bytes]]()
    file.read(8)
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4]), head[4:]
        if kind in (b"IDAT", b"fdAT"):
            file.seek(size, 1)
        else:
            chunks.append((kind, file.read(size)))
        file.seek(4, 1)
        if kind == b"IEND":
            break
    return chunks
