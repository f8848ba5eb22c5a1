"""How near one picture is to another: PSNR, MS-SSIM and SSIMULACRA2."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .engines import installed, need
from .image import DeepPicture, ImageError, Picture, Pixels, Samples, depth_used, pixels_of, samples_of
from .saving import cut

WINDOW, SIGMA = 11, 1.5
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales, finest first (Wang, Simoncelli and Bovik 2003)."""
SIDE_MIN = (WINDOW - 1) * 2 ** (len(WEIGHTS) - 1) + 1
"""Pixels along the shorter side that MS-SSIM needs."""
SEEN_MIN = 8
"""Those that SSIMULACRA2 needs."""
SEEN_MAX = 2048
"""Pixels along a side that it looks at together: it takes 500 bytes for each."""
BACKGROUNDS = (26, 230)
"""Greys under pictures with alpha: a tenth and nine tenths of white."""


@dataclass(frozen=True)
class Likeness:
    """psnr: dB, infinite for equal samples. ms_ssim: 0 to 1; None where a side is under ``SIDE_MIN`` pixels.
    ssimulacra2: up to 100; None where a side is under ``SEEN_MIN`` pixels, or its package is not installed."""

    psnr: float
    ms_ssim: float | None
    ssimulacra2: float | None


def compare(a: Picture, b: Picture) -> Likeness:
    """The likeness of two pictures of the same size and depth. Alpha counts as a channel if either has it.

    Raises ImageError where they cannot be compared.
    """
    p, q, peak = comparable(a, b)
    x, y = (pixels[0 : p.height, 0 : p.width] for pixels in (p, q))
    colours, alpha = max(x.shape[2], y.shape[2]) > 2, not x.shape[2] % 2 or not y.shape[2] % 2
    x, y = (with_channels(samples, colours, alpha, peak) for samples in (x, y))
    side = min(p.width, p.height)
    return Likeness(
        psnr_of(x, y, peak),
        ms_ssim_of(x, y, peak) if side >= SIDE_MIN else None,
        ssimulacra2(a, b) if side >= SEEN_MIN and installed("ssimulacra2") else None,
    )


def comparable(a: Picture, b: Picture) -> tuple[Pixels, Pixels, int]:
    """The pixels of two pictures, and the largest sample that they may have; where files say that white is another
    number in one than in the other, it is 65535 in both. Raises ImageError for different sizes, and for 8 bits a sample
    and more."""
    if isinstance(a, DeepPicture) and isinstance(b, DeepPicture) and a.white != b.white:
        a, b = (picture.spread() if picture.full else picture for picture in (a, b))
    p, q = pixels_of(a), pixels_of(b)
    if (p.width, p.height) != (q.width, q.height):
        raise ImageError(f"{p.width} x {p.height} and {q.width} x {q.height} pixels cannot be compared")
    if p.bits != q.bits:
        raise ImageError(f"{p.bits} and {q.bits} bits a sample cannot be compared")
    depths = (pixels.depth or depth_used(pixels[0 : p.height, 0 : p.width]) for pixels in (p, q))
    return p, q, 2 ** max(depths) - 1


def with_channels(samples: Samples, colours: bool, alpha: bool, peak: int) -> Samples:
    """Grey [H, W, 1 or 2] as colour, and opaque alpha, where they are asked for."""
    planes = list(np.moveaxis(samples, 2, 0))
    opaque = planes.pop() if len(planes) in (2, 4) else np.full_like(planes[0], peak)
    if colours and len(planes) == 1:
        planes *= 3
    return np.stack([*planes, opaque] if alpha else planes, 2)


def psnr_of(x: Samples, y: Samples, peak: int = 255) -> float:
    """PSNR in dB of samples [H, W, C]; the squared error is averaged over pixels and channels together."""
    return decibels(squared_error(x, y), x.size, peak)


def squared_error(x: Samples, y: Samples) -> int:
    """The sum over all samples [H, W, C]."""
    error, step = 0, max(1, 2**20 // max(x[0].size, 1))
    for top in range(0, len(x), step):  # so that no wide copy of all samples is made
        difference = x[top : top + step].astype(np.int64) - y[top : top + step]
        error += int((difference**2).sum())
    return error


def decibels(error: int, samples: int, peak: int) -> float:
    """PSNR of a sum of squared errors over so many samples."""
    return 10 * math.log10(peak**2 * samples / error) if error else math.inf


def psnr(a: Image.Image, b: Image.Image) -> float:
    """PSNR in dB of the colours of two pictures of one size and mode; alpha does not count."""
    x, y = samples_of(a)[0], samples_of(b)[0]
    colours = 3 if x.shape[2] > 2 else 1
    return psnr_of(x[..., :colours], y[..., :colours], 2 ** max(depth_used(x), depth_used(y)) - 1)


def fidelity(
    picture: Picture, tiles: Iterable[tuple[tuple[int, int, int, int], Samples]], depth: int = 8
) -> tuple[float, bool]:
    """PSNR in dB of the colours of what a picture was decoded to, tile by tile, and whether every sample is equal.

    tiles: as ``Codec.decode_tiles`` gives them. depth: of the file, which says what the largest sample is.
    """
    pixels, error, equal, peak = pixels_of(picture), 0, True, 2**depth - 1
    colours = 3
    for (x, y, width, height), decoded in tiles:
        if pixels.bits == 8 and isinstance(picture, Image.Image):
            # In Pillow's words, which know nothing of the mode that was chosen for the file.
            original = np.asarray(picture.crop((x, y, x + width, y + height)).convert("RGBA"))
        else:
            original = with_channels(pixels[y : y + height, x : x + width], True, True, peak)
        decoded = with_channels(decoded, True, True, peak)
        error += squared_error(original[..., :colours], decoded[..., :colours])
        equal = equal and np.array_equal(original, decoded)
    return decibels(error, colours * pixels.width * pixels.height, peak), equal


def ssimulacra2(a: Picture, b: Picture) -> float:
    """SSIMULACRA2 of the colours of two pictures, the first being the original: 100 for equal ones, 90 for what cannot
    be told apart side by side, 70 for high quality, 50 for medium, and on below 0.

    It is made for sRGB of 8 bits, to which deeper samples are rounded, whatever their transfer function. Where there is
    alpha, the lower score of those over a dark and a light grey. A side of more than ``SEEN_MAX`` pixels is parted, and
    the mean is over the parts. Raises MissingError without the package, ImageError where they cannot be compared.
    """
    need("ssimulacra2", "SSIMULACRA2", "metrics")
    p, q, peak = comparable(a, b)
    if min(p.width, p.height) < SEEN_MIN:
        raise ImageError(f"SSIMULACRA2 needs sides of {SEEN_MIN} pixels, not {p.width} x {p.height}")
    total = 0.0
    for part in product(parts(p.height), parts(p.width)):
        x, y = (in_8_bits(pixels[part], peak) for pixels in (p, q))
        total += _ssimulacra2(x, y) * x.shape[0] * x.shape[1]
    return total / (p.height * p.width)


def parts(side: int) -> Iterator[slice]:
    """Of as nearly equal lengths up to ``SEEN_MAX`` as there are."""
    count = -(-side // SEEN_MAX)
    for number in range(count):
        yield slice(side * number // count, side * (number + 1) // count)


def in_8_bits(samples: Samples, peak: int) -> NDArray[np.uint8]:
    """Colours and alpha [h, w, 4]."""
    wide = with_channels(samples, True, True, peak)
    return wide if wide.dtype == np.uint8 else cut(wide, peak.bit_length())


def _ssimulacra2(x: NDArray[np.uint8], y: NDArray[np.uint8]) -> float:
    """Of colours and alpha [h, w, 4]."""
    from ssimulacra2 import compute_ssimulacra2

    opaque, scores = min(x[..., 3].min(), y[..., 3].min()) == 255, list[float]()
    for grey in BACKGROUNDS[:1] if opaque else BACKGROUNDS:
        files = io.BytesIO(), io.BytesIO()
        for file, samples in zip(files, (x, y), strict=True):
            picture = Image.new("RGBA", (samples.shape[1], samples.shape[0]), (grey, grey, grey, 255))
            picture.alpha_composite(Image.fromarray(samples))
            picture.convert("RGB").save(file, "PPM")
            file.seek(0)
        scores.append(float(compute_ssimulacra2(*files)))
    return min(scores)


def ms_ssim_of(x: Samples, y: Samples, peak: int = 255) -> float:
    """MS-SSIM of samples [H, W, C] with sides of at least ``SIDE_MIN``, the mean of the channels."""
    a, b = (np.moveaxis(samples, 2, 0).astype(np.float32) for samples in (x, y))
    return sum(_ms_ssim(*pair, peak) for pair in zip(a, b, strict=True)) / len(a)


Floats = NDArray[np.float32]


def _ms_ssim(x: Floats, y: Floats, peak: int) -> float:
    """Of one channel [H, W] each."""
    product = 1.0
    for level, weight in enumerate(WEIGHTS):
        if level:
            x, y = halved(x), halved(y)
        mean_x, mean_y = blurred(x), blurred(y)
        spread = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
        c = np.float32((0.03 * peak) ** 2)
        similarity = (2 * (blurred(x * y) - mean_x * mean_y) + c) / (spread + c)
        if level == len(WEIGHTS) - 1:
            c = np.float32((0.01 * peak) ** 2)
            similarity *= (2 * mean_x * mean_y + c) / (mean_x**2 + mean_y**2 + c)
        product *= max(float(similarity.mean(dtype=np.float64)), 0.0) ** weight
    return product


def halved(x: Floats) -> Floats:
    """Means of 2 x 2 pixels; where a side is odd, zeros are around it."""
    x = np.pad(x, [(side % 2, side % 2) for side in x.shape])
    x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
    means: Floats = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / np.float32(4)
    return means


def blurred(x: Floats) -> Floats:
    """x [H, W] under a Gaussian window, where the window fits."""
    window = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    window = (window / window.sum()).astype(np.float32)
    rows, columns = (side - WINDOW + 1 for side in x.shape)
    down: Floats = np.zeros((rows, x.shape[1]), np.float32)
    for k, weight in enumerate(window):
        down += weight * x[k : k + rows]
    across: Floats = np.zeros((rows, columns), np.float32)
    for k, weight in enumerate(window):
        across += weight * down[:, k : k + columns]
    return across
