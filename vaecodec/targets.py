"""The quality at which a picture takes a given number of bytes, or reaches a given PSNR.

Every network depends on the quality, so nothing that one encode computes serves the next: a search costs whole encodes
and, for a PSNR, decodes. Three or four of them do, because both curves are nearly straight in the right scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from PIL import Image

from bitstream import Limits, read_header

from .codec import Codec
from .guest import public
from .image import DeepPicture, metadata_of
from .metrics import fidelity
from .weights import QUALITY_MAX

ENCODES = 10
"""At most; a search that has not ended by then is on a curve with a step in it."""
SIZE_TOLERANCE = 0.01  # of the size
PSNR_TOLERANCE = 0.05  # dB
PSNR_MAX = 99.0  # stands for equal pixels
OVERHEAD = 64  # bytes of header and tile table that no quality changes, about
ROOT_START, ROOT_RISE = 0.545, 0.76e-4
"""The cube root of a photograph's bits a pixel is about ROOT_START + ROOT_RISE * hundredths of quality, times a factor
that depends on the photograph."""
PSNR_START, PSNR_RISE = 27.0, 1.35e-3
"""Its PSNR is about PSNR_START + PSNR_RISE * hundredths of quality, plus an offset."""


@dataclass(frozen=True)
class Found:
    """A file, the quality (0 to 100) it was made with and how many encodes the search took.

    reached: its bytes, or its PSNR in dB where that was the target. near: within the tolerance.
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
    effort: int = 0,
    progressive: bool = False,
    limits: Limits | None = None,
) -> bytes:
    """The bytes of a lossy file of about ``bpp`` bits a pixel or ``size`` bytes (the whole file, within 1 %), or of
    about ``psnr`` dB over RGB (within 0.05). effort, progressive and limits: of each of the about three encodes, as for
    ``Codec.compress``.

    What no quality reaches gives a UserWarning and the nearest there is. Raises ValueError unless there is one target,
    and what ``Codec.compress`` raises.
    """
    found = search(codec, picture, bpp=bpp, size=size, psnr=psnr, effort=effort, progressive=progressive, limits=limits)
    if not found.near:
        warnings.warn(missed(found, psnr is not None), stacklevel=2)
    return found.data


def missed(found: Found, in_psnr: bool) -> str:
    """What to say of a target that was not met."""
    reached = f"{found.reached:.2f} dB" if in_psnr else f"{found.reached:.0f} bytes"
    return f"no quality meets the target; the nearest is {reached}, at quality {found.quality:g}"


@public
def search(
    codec: Codec,
    picture: Image.Image | DeepPicture,
    *,
    bpp: float | None = None,
    size: float | None = None,
    psnr: float | None = None,
    effort: int = 0,
    progressive: bool = False,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """As ``compress_to``, with what was found on the way and no warning. progress: as for ``Codec.compress``."""
    if [bpp, size, psnr].count(None) != 2:
        raise ValueError("one of bpp, size and psnr is the target")
    pixels = picture.width * picture.height
    fixed = OVERHEAD + sum(len(section.payload) for section in metadata_of(picture))

    def straight(reached: float) -> float:
        return reached if psnr is not None else (8 * max(reached - fixed, 1) / pixels) ** (1 / 3)

    if psnr is not None:
        goal, tolerance = psnr, PSNR_TOLERANCE
        guess = (goal - PSNR_START) / PSNR_RISE
    else:
        goal = size if size is not None else (bpp or 0) * pixels / 8
        tolerance = goal * SIZE_TOLERANCE
        guess = (straight(goal) - ROOT_START) / ROOT_RISE
    hundredths, known, best = inside(guess), dict[int, float](), None
    while hundredths not in known and len(known) < ENCODES:
        quality = hundredths / 100
        data = codec.compress(picture, quality, progress, effort=effort, progressive=progressive, limits=limits)
        reached = float(len(data))
        if psnr is not None:
            decoded = codec.decode_tiles(data, limits, progress)
            reached = min(fidelity(picture, decoded, read_header(data).depth)[0], PSNR_MAX)
        known[hundredths] = straight(reached)
        if best is None or abs(reached - goal) < abs(best.reached - goal):
            best = Found(data, quality, 0, reached, abs(reached - goal) <= tolerance)
        if best.near:
            break
        factor = known[hundredths] / (ROOT_START + ROOT_RISE * hundredths)
        hundredths = following(known, straight(goal), PSNR_RISE if psnr is not None else factor * ROOT_RISE)
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
