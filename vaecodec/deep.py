"""Pictures of more than 8 bits a sample into files, which Pillow does not write in colour."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .engines import need
from .image import DeepPicture, ImageError
from .metadata import FOLDERS, FULL, IPTC_TAG, RESOLUTION, STRUCTURE, XMP_KEYWORD, Chunk, unpacked

ORIENTATION_TAG, RESOLUTION_TAGS = 274, frozenset({282, 283, 296})
BLOCK = 64  # rows whose filters are chosen together


def encode_deep(picture: DeepPicture, format: str) -> bytes:
    """The bytes of a file that holds every sample: PNG, TIFF, PPM, which has no alpha; with the extra "deep" AVIF and
    HEIC of 10 and 12 bits, JPEG XL and JPEG 2000.

    Where white is not 65535, PNG and TIFF have the samples spread over 16 bits, and the others say what it is. Raises
    ImageError for other formats and for what they cannot hold.
    """
    writers = {"PNG": _png, "TIFF": _tiff, "PPM": _ppm, **FOREIGN}
    if format not in writers:
        raise ImageError(f"{format} does not hold {picture.depth} bits a sample")
    return writers[format](picture)


def _ppm(picture: DeepPicture) -> bytes:
    channels = picture.samples.shape[2]
    if channels == 4:
        raise ImageError("PPM does not hold alpha")
    kind, peak = {1: "P5", 3: "P6"}[channels], picture.white
    head = f"{kind}\n{picture.width} {picture.height}\n{peak}\n".encode()
    return head + picture.samples.astype(">u2").tobytes()


def _by_imagecodecs(picture: DeepPicture, name: str, **options: Any) -> bytes:
    need("imagecodecs", f"{picture.depth if picture.full else 16} bits a sample in this format", "deep")
    import imagecodecs

    samples = picture.samples[..., 0] if picture.samples.shape[2] == 1 else picture.samples
    bits = picture.depth if picture.full else 16
    return bytes(getattr(imagecodecs, name)(samples, bitspersample=bits, numthreads=1, **options))


def _coded_colour(picture: DeepPicture, format: str, *names: str) -> dict[str, int]:
    """Primaries and transfer function, under these names, if the picture says them. Raises ImageError for depths that
    AVIF and HEIC do not hold."""
    if not (picture.full and picture.depth in (10, 12)):
        raise ImageError(f"{format} holds 10 or 12 bits a sample, not {picture.depth if picture.full else 16}")
    said = dict(unpacked(picture.info.get("png_chunks") or b"")).get(b"cICP", b"")
    return dict(zip(names, said, strict=False))


def _avif(picture: DeepPicture) -> bytes:
    return _by_imagecodecs(picture, "avif_encode", level=100, **_coded_colour(picture, "AVIF", "primaries", "transfer"))


def _heif(picture: DeepPicture) -> bytes:
    colour = _coded_colour(picture, "HEIF", "color_primaries", "transfer_characteristics")
    need("pillow_heif", f"{picture.depth} bits a sample in HEIC", "deep")
    import pillow_heif

    mode = {1: "L", 3: "RGB", 4: "RGBA"}[picture.samples.shape[2]]
    size, stream = (picture.width, picture.height), io.BytesIO()
    image = pillow_heif.from_bytes(f"{mode};{picture.depth}", size, picture.samples.tobytes())
    if icc := picture.info.get("icc_profile"):
        image.info["icc_profile"] = icc
    others = {key: picture.info[key] for key in ("exif", "xmp") if picture.info.get(key)}
    image.save(stream, quality=-1, chroma=444, matrix_coefficients=0, **colour, **others)
    return stream.getvalue()


def _jxl(picture: DeepPicture) -> bytes:
    return _by_imagecodecs(picture, "jpegxl_encode", lossless=True)


def _jpeg2000(picture: DeepPicture) -> bytes:
    return _by_imagecodecs(picture, "jpeg2k_encode", level=0, reversible=True, codecformat="jp2")


FOREIGN = {"AVIF": _avif, "HEIF": _heif, "JXL": _jxl, "JPEG2000": _jpeg2000}
"""Formats that hold deep samples, which Pillow does not write."""


def _png(picture: DeepPicture) -> bytes:
    samples = picture.spread().samples if picture.full else picture.samples
    height, width, channels = samples.shape
    info, colour = picture.info, {1: 0, 3: 2, 4: 6}[channels]
    chunks: list[Chunk] = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if icc := info.get("icc_profile"):
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    if picture.full:
        chunks.append((b"sBIT", bytes([picture.depth] * channels)))
    unwanted = {FULL, b"sRGB"} if icc else {FULL}
    chunks += [chunk for chunk in unpacked(info.get("png_chunks") or b"") if chunk[0] not in unwanted]
    if exif := info.get("exif"):
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    if xmp := info.get("xmp"):
        chunks.append((b"iTXt", XMP_KEYWORD + b"\0\0\0\0" + xmp))
    packer = zlib.compressobj()
    data = b"".join(packer.compress(part) for part in _filtered(samples)) + packer.flush()
    chunks += [(b"IDAT", data), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _filtered(samples: NDArray[np.uint16]) -> Any:
    """The rows of a PNG file, each under the filter whose bytes, taken as signed, are smallest; some rows at a time."""
    height, width, channels = samples.shape
    step = 2 * channels
    above = np.zeros((1, width * step), np.uint8)
    for top in range(0, height, BLOCK):
        rows = np.frombuffer(samples[top : top + BLOCK].astype(">u2").tobytes(), np.uint8).reshape(-1, width * step)
        up = np.concatenate([above, rows[:-1]])
        left, corner = (np.pad(part[:, :-step], ((0, 0), (step, 0))) for part in (rows, up))
        a, b, c = (part.astype(np.int16) for part in (left, up, corner))
        near = np.abs(np.stack([b - c, a - c, a + b - 2 * c]))
        paeth = np.where((near[0] <= near[1]) & (near[0] <= near[2]), a, np.where(near[1] <= near[2], b, c))
        kinds = np.stack([rows, rows - left, rows - up, rows - paeth.astype(np.uint8)])
        best = np.abs(kinds.view(np.int8).astype(np.int16)).sum(2).argmin(0)
        numbers = np.array([0, 1, 2, 4], np.uint8)[best]
        yield np.column_stack([numbers, kinds[best, np.arange(len(rows))]]).tobytes()
        above = rows[-1:]


def _typed(value: Any) -> tuple[int, int, Any] | None:
    """TIFF's type, count and value of a tag that Pillow has read; None if it is of no simple type."""
    if isinstance(value, str | bytes):
        data = value if isinstance(value, bytes) else value.encode("ascii", "replace") + b"\0"
        return (7 if isinstance(value, bytes) else 2), len(data), data
    values = value if isinstance(value, tuple) else (value,)
    if values and all(isinstance(part, int) and 0 <= part < 2**32 for part in values):
        return (3 if max(values) < 2**16 else 4), len(values), value
    try:
        return 12, len(values), tuple(map(float, values)) if values is value else float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _tiff(picture: DeepPicture) -> bytes:
    import tifffile

    picture = picture.spread() if picture.full else picture
    info, samples, stream = picture.info, picture.samples, io.BytesIO()
    grey = samples.shape[2] == 1
    tags: list[tuple[int, int, int, Any, bool]] = [
        (code, 7 if code == IPTC_TAG else 1, len(info[key]), info[key], True)
        for code, key in ((700, "xmp"), (IPTC_TAG, "iptc"))
        if info.get(key)
    ]
    exif = Image.Exif()
    exif.load(info.get("exif") or b"")
    for code, value in exif.items():
        if code not in STRUCTURE - {ORIENTATION_TAG} | RESOLUTION_TAGS | {*FOLDERS}:
            tags += [(code, *typed, True)] if (typed := _typed(value)) else []
    options: dict[str, Any] = {"extrasamples": ["unassalpha"]} if samples.shape[2] == 4 else {}
    for kind, data in unpacked(info.get("png_chunks") or b""):
        if kind in RESOLUTION and len(data) == 9 and data[8] == 1:
            metres = struct.unpack_from(">II", data)
            options |= {"resolution": tuple(value / 100 for value in metres), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        stream,
        samples[..., 0] if grey else samples,
        photometric="minisblack" if grey else "rgb",
        compression="zlib",
        predictor=True,
        metadata=None,
        software=False,
        iccprofile=info.get("icc_profile"),
        extratags=tags,
        **options,
    )
    return stream.getvalue()
