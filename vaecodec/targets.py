"""The quality at which a picture takes a given number of bytes, or reaches a given PSNR or SSIMULACRA2.

Every network depends on the quality, so nothing that one encode computes serves the next: a search costs whole encodes
and, for a likeness, decodes. Three or four of them do, because the curves are nearly straight in the right scale.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from PIL import Image

from bitstream import Limits, read_header

from .codec import Codec
from .engines import need
from .guest import public
from .image import DeepPicture, metadata_of
from .metrics import fidelity, ssimulacra2 as seen
from .weights import QUALITY_MAX

ENCODES = 10
"""At most; a search that has not ended by then is on a curve with a step in it."""
SIZE_TOLERANCE = 0.01  # of the size
PSNR_TOLERANCE = 0.05  # dB
PSNR_MAX = 99.0  # stands for equal pixels
SEEN_TOLERANCE = 0.5  # of SSIMULACRA2
SEEN_TOP = 0.1  # below 100, where its scale ends
OVERHEAD = 64  # bytes of header and tile table that no quality changes, about
ROOT_START, ROOT_RISE = 0.545, 0.76e-4
"""The cube root of a photograph's bits a pixel is about ROOT_START + ROOT_RISE * hundredths of quality, times a factor
that depends on the photograph."""
PSNR_START, PSNR_RISE = 27.0, 1.35e-3
"""Its PSNR is about PSNR_START + PSNR_RISE * hundredths of quality, plus an offset."""

SEEN_START, SEEN_RISE = -4.65, 1.98e-4
"""The logarithm of what its SSIMULACRA2 lacks of 100, negative, is about SEEN_START + SEEN_RISE * hundredths of
quality, plus an offset."""
VISUALLY_LOSSLESS = 90.0
"""The SSIMULACRA2 from which on two pictures cannot be told apart side by side."""


@dataclass(frozen=True)
class Found:
    """A file, the quality (0 to 100) it was made with and how many encodes the search took.

    reached: its bytes, or its PSNR in dB or SSIMULACRA2 where that was the target. near: within the tolerance.
    """

    data: bytes
    quality: float
    encodes: int
    reached: float
    near: bool


@public
def compress_to(
    codec: Codec,
    picture: Image.Image | DeepPicture,
    *,
    bpp: float | None = None,
    size: float | None = None,
    psnr: float | None = None,
    ssimulacra2: float | None = None,
    effort: int = 0,
    progressive: bool = False,
    limits: Limits | None = None,
) -> bytes:
    """The bytes of a lossy file of about ``bpp`` bits a pixel or ``size`` bytes (the whole file, within 1 %), or of
    about ``psnr`` dB over RGB (within 0.05), or of an SSIMULACRA2 of about ``ssimulacra2`` (within 0.5; the extra
    "metrics"). effort, progressive and limits: of each of the about three encodes, as for ``Codec.compress``.

    What no quality reaches gives a UserWarning and the nearest there is. Raises ValueError unless there is one target,
    MissingError without the extra, and what ``Codec.compress`` raises.
    """
    coding: dict[str, Any] = {"effort": effort, "progressive": progressive, "limits": limits}
    found = search(codec, picture, bpp=bpp, size=size, psnr=psnr, ssimulacra2=ssimulacra2, **coding)
    if not found.near:
        target = "psnr" if psnr is not None else "size" if ssimulacra2 is None else "ssimulacra2"
        warnings.warn(missed(found, target), stacklevel=2)
    return found.data


def missed(found: Found, target: str) -> str:
    """What to say of a target that was not met; target: its name, as ``search`` has it."""
    words = {"psnr": f"{found.reached:.2f} dB", "ssimulacra2": f"an SSIMULACRA2 of {found.reached:.2f}"}
    reached = words.get(target, f"{found.reached:.0f} bytes")
    return f"no quality meets the target; the nearest is {reached}, at quality {found.quality:g}"


@public
def search(
    codec: Codec,
    picture: Image.Image | DeepPicture,
    *,
    bpp: float | None = None,
    size: float | None = None,
    psnr: float | None = None,
    ssimulacra2: float | None = None,
    effort: int = 0,
    progressive: bool = False,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """As ``compress_to``, with what was found on the way and no warning. progress: as for ``Codec.compress``."""
    if [bpp, size, psnr, ssimulacra2].count(None) != 3:
        raise ValueError("one of bpp, size, psnr and ssimulacra2 is the target")
    pixels = picture.width * picture.height
    fixed = OVERHEAD + sum(len(section.payload) for section in metadata_of(picture))

    def straight(reached: float) -> float:
        """On the scale on which the curve is nearly that."""
        if ssimulacra2 is not None:
            return -math.log(max(100 - reached, SEEN_TOP))
        return reached if psnr is not None else (8 * max(reached - fixed, 1) / pixels) ** (1 / 3)

    if ssimulacra2 is not None:
        need("ssimulacra2", "SSIMULACRA2", "metrics")
        goal, tolerance, start, rise = ssimulacra2, SEEN_TOLERANCE, SEEN_START, SEEN_RISE
    elif psnr is not None:
        goal, tolerance, start, rise = psnr, PSNR_TOLERANCE, PSNR_START, PSNR_RISE
    else:
        goal = size if size is not None else (bpp or 0) * pixels / 8
        tolerance, start, rise = goal * SIZE_TOLERANCE, ROOT_START, ROOT_RISE
    likeness = ssimulacra2 is not None or psnr is not None

    def reached_by(data: bytes) -> float:
        if ssimulacra2 is not None:
            return seen(picture, codec.decode_array(data, limits, progress))
        if psnr is not None:
            decoded = codec.decode_tiles(data, limits, progress)
            return min(fidelity(picture, decoded, read_header(data).depth)[0], PSNR_MAX)
        return float(len(data))

    hundredths, known, best = inside((straight(goal) - start) / rise), dict[int, float](), None
    while hundredths not in known and len(known) < ENCODES:
        quality = hundredths / 100
        data = codec.compress(picture, quality, progress, effort=effort, progressive=progressive, limits=limits)
        reached = reached_by(data)
        known[hundredths] = straight(reached)
        if best is None or abs(reached - goal) < abs(best.reached - goal):
            best = Found(data, quality, 0, reached, abs(reached - goal) <= tolerance)
        if best.near:
            break
        factor = 1 if likeness else known[hundredths] / (start + rise * hundredths)
        hundredths = following(known, straight(goal), factor * rise)
    assert best is not None
    return replace(best, encodes=len(known))


def following(known: dict[int, float], goal: float, rise: float) -> int:
    """The next quality to try, in hundredths; one that is known already where there is nothing left to try.

    known: what the qualities tried so far gave, in a scale where the curve is nearly straight. rise: its slope, if one
    point is all that is known.
    """
    tried = sorted(known)
    around = [(low, high) for low, high in pairwise(tried) if (known[low] < goal) != (known[high] < goal)]
    if around:
        low, high = max(around, key=lambda gap: gap[1] - gap[0])
        between = low + (high - low) * (goal - known[low]) / (known[high] - known[low])
        if len(tried) > 3 and len(tried) % 2 == 0:  # far from straight: a line would keep coming from the same side
            between = (low + high) / 2
        return min(max(round(between), low + 1), high - 1) if high - low > 1 else low
    end = min(tried, key=lambda q: abs(known[q] - goal))
    if len(tried) > 1:
        other = min(set(tried) - {end}, key=lambda q: abs(q - end))
        rise = max((known[end] - known[other]) / (end - other), rise / 4)
    further = inside(end + (goal - known[end]) / rise)
    falls = any(known[high] < known[low] for low, high in pairwise(tried))
    ends = (QUALITY_MAX, 0) if goal > known[end] else (0, QUALITY_MAX)
    untried = [q for q in ends if q not in known]
    if untried and (falls or further in known):  # not what curves are like: see what there is
        return untried[0]
    if falls:
        low, high = max(pairwise(tried), key=lambda gap: gap[1] - gap[0])
        return (low + high) // 2
    return further


def inside(hundredths: float) -> int:
    return round(min(max(hundredths, 0), QUALITY_MAX))
