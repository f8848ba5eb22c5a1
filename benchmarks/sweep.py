"""Pictures of every kind through the lossless codec, compared with what readers other than Pillow make of the files."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaecodec import Codec, LimitError, Limits, VaeError, compress

Samples = NDArray[np.unsignedinteger[Any]]

IGNORED = {".c", ".cfg", ".h", ".in", ".md", ".py", ".pyi", ".rst", ".sh", ".toml", ".ttf", ".txt", ".typed", ".yml"}


@dataclass(frozen=True)
class Result:
    """verdict: "equal", "different", "no other reader", "other reader failed", "refused", "failed" or "too large".
    note: why, or which reader."""

    file: str
    verdict: str
    note: str


def png_samples(file: Path) -> Samples:
    """By pypng, with whatever is transparent as alpha."""
    import png

    width, height, rows, facts = png.Reader(filename=str(file)).asDirect()
    depth = facts["bitdepth"]
    samples: Any = np.array([list(row) for row in rows], np.uint16 if depth > 8 else np.uint8)
    if depth < 8:
        samples = samples * np.uint8(255 // (2**depth - 1))
    shaped: Samples = samples.reshape(height, width, facts["planes"])
    return shaped


def tiff_samples(file: Path) -> Samples:
    """By tifffile: the first picture, upright."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages.first
        kind, samples = page.photometric.name, np.asarray(page.asarray())
        if page.planarconfig == 2 and samples.ndim == 3:
            samples = np.moveaxis(samples, 0, 2)
        bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
        if kind == "PALETTE":
            samples = (page.colormap[:, samples] >> 8).astype(np.uint8).transpose(1, 2, 0)
        elif samples.dtype == bool:
            samples = samples.astype(np.uint8) * 255
        elif bits < 8:
            samples = samples * np.uint8(255 // (2**bits - 1))
        if kind == "MINISWHITE":
            samples = np.iinfo(samples.dtype).max - samples
        elif kind not in ("MINISBLACK", "RGB", "PALETTE"):
            raise ValueError(f"colours are {kind}")
        if 1 in page.extrasamples:
            raise ValueError("alpha is premultiplied")
        orientation = page.tags.get(274)
    return upright(samples, orientation.value if orientation else 1)


def upright(samples: Samples, orientation: int) -> Samples:
    """Samples [H, W, ...] turned as Exif says."""
    if orientation > 4:
        samples = samples.swapaxes(0, 1)
    turned = {2: (0, 1), 3: (1, 1), 4: (1, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}.get(orientation, (0, 0))
    return samples[:: 1 - 2 * turned[0], :: 1 - 2 * turned[1]]


def decoded(name: str) -> Callable[[Path], Samples]:
    """By a decoder of imagecodecs."""

    def read(file: Path) -> Samples:
        import imagecodecs

        return np.asarray(getattr(imagecodecs, name)(file.read_bytes()))

    return read


def opencv_samples(file: Path) -> Samples:
    """By OpenCV."""
    import cv2

    samples = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None:
        raise ValueError("OpenCV reads nothing")
    return np.asarray(samples[..., [2, 1, 0, 3][: samples.shape[2]]] if samples.ndim == 3 else samples)


READERS: dict[bytes, tuple[str, Callable[[Path], Samples]]] = {
    b"\x89PNG": ("pypng", png_samples),
    b"II*\0": ("tifffile", tiff_samples),
    b"MM\0*": ("tifffile", tiff_samples),
    b"II+\0": ("tifffile", tiff_samples),
    b"MM\0+": ("tifffile", tiff_samples),
    b"\xff\xd8\xff": ("imagecodecs", decoded("jpeg8_decode")),
    b"BM": ("imagecodecs", decoded("bmp_decode")),
    b"RIFF": ("imagecodecs", decoded("webp_decode")),
    b"qoif": ("imagecodecs", decoded("qoi_decode")),
    b"\xff\x4f\xff\x51": ("imagecodecs", decoded("jpeg2k_decode")),
    b"\0\0\0\x0cjP": ("imagecodecs", decoded("jpeg2k_decode")),
    b"\0\0\0\x0cJXL": ("imagecodecs", decoded("jpegxl_decode")),
    b"\xff\x0a": ("imagecodecs", decoded("jpegxl_decode")),
    b"GIF8": ("imagecodecs", decoded("gif_decode")),
    **{b"P%d" % kind: ("OpenCV", opencv_samples) for kind in range(1, 7)},
}
"""By the first bytes of a file."""


def other_reader(file: Path) -> tuple[str, Callable[[Path], Samples]] | None:
    head = file.read_bytes()[:16]
    if head[4:8] == b"ftyp":
        return ("imagecodecs", decoded("avif_decode" if b"avi" in head else "heif_decode"))
    return next((reader for magic, reader in READERS.items() if head.startswith(magic)), None)


def unsigned(samples: NDArray[Any]) -> Samples:
    """Of integers that are not negative, the unsigned ones of at most 16 bits."""
    if samples.dtype.kind == "i" and samples.min() >= 0 and samples.max() <= 65535:
        return samples.astype(np.uint16)
    return samples


def as_colour(samples: Samples) -> Samples:
    """[H, W] or [H, W, C] as [H, W, 4]."""
    planes = list(np.moveaxis(samples, 2, 0)) if samples.ndim == 3 else [samples]
    opaque = planes.pop() if len(planes) in (2, 4) else np.full_like(planes[0], np.iinfo(samples.dtype).max)
    return np.stack([*(planes * 3)[:3], opaque], 2)


def swept(codec: Codec, file: Path, limits: Limits) -> Result | None:
    """What becomes of one file; None if it is no picture."""
    try:
        samples = as_colour(codec.decode_array(compress(file, lossless=True, limits=limits)))
    except LimitError as error:
        return Result(str(file), "too large", str(error))
    except VaeError as error:
        if "not a picture" in str(error):
            return None
        return Result(str(file), "refused", str(error))
    except Exception as error:  # which is a fault
        return Result(str(file), "failed", f"{type(error).__name__}: {error}")
    found = other_reader(file)
    if found is None:
        return Result(str(file), "no other reader", "")
    name, read = found
    try:
        other = as_colour(unsigned(read(file)))
    except Exception as error:  # of whatever library
        return Result(str(file), "other reader failed", f"{name}: {error}".splitlines()[0])
    if samples.shape == other.shape and samples.dtype == other.dtype and np.array_equal(samples, other):
        return Result(str(file), "equal", name)
    if name == "imagecodecs" and samples.shape == other.shape and file.suffix == ".gif":
        seen = samples[..., 3] > 0  # where nothing is seen, this reader has black or red
        if np.array_equal(samples[..., 3], other[..., 3]) and np.array_equal(samples[seen], other[seen]):
            return Result(str(file), "equal", f"{name}, but for colours under alpha 0")
    facts = f"{samples.dtype} {list(samples.shape)} against {other.dtype} {list(other.shape)}"
    if samples.shape == other.shape:
        off = np.abs(samples.astype(int) - other.astype(int))
        facts = f"{samples.dtype} against {other.dtype}, by up to {off.max()}, at {np.mean(off.any(2)):.1%}"
    return Result(str(file), "different", f"{name}: {facts}")


def run(folder: Path, max_pixels: int, out: Path | None) -> None:
    """Sweep over all files below a folder and say what became of them."""
    codec, results = Codec(), list[Result]()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in IGNORED):
        result = swept(codec, file, Limits(max_pixels=max_pixels))
        if result:
            results.append(result)
    order = sorted(results, key=lambda result: (result.verdict, result.note))
    for verdict, group in itertools.groupby(order, key=lambda result: result.verdict):
        print(f"\n{verdict}")
        for result in group:
            if verdict not in ("equal", "no other reader"):
                print(f"  {Path(result.file).relative_to(folder)}: {result.note}")
    print()
    for verdict, count in Counter(result.verdict for result in order).most_common():
        print(f"{count:6} {verdict}")
    if out:
        out.write_text(json.dumps([asdict(result) for result in order], indent=1), "utf-8")
