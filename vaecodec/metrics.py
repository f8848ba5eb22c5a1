"""How near one picture is to another: PSNR and MS-SSIM."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .image import ImageError, Picture, Samples, depth_used, pixels_of, samples_of

WINDOW, SIGMA = 11, 1.5
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales, finest first (Wang, Simoncelli and Bovik 2003)."""
SIDE_MIN = (WINDOW - 1) * 2 ** (len(WEIGHTS) - 1) + 1
"""Pixels along the shorter side that MS-SSIM needs."""


@dataclass(frozen=True)
class Likeness:
    """psnr: dB, infinite for equal samples. ms_ssim: 0 to 1; None where a side is under ``SIDE_MIN`` pixels."""

    psnr: float
    ms_ssim: float | None


def compare(a: Picture, b: Picture) -> Likeness:
    """The likeness of two pictures of the same size and depth. Alpha counts as a channel if either has it.

    Raises ImageError where they cannot be compared.
    """
    p, q = pixels_of(a), pixels_of(b)
    if (p.width, p.height) != (q.width, q.height):
        raise ImageError(f"{p.width} x {p.height} and {q.width} x {q.height} pixels cannot be compared")
    if p.bits != q.bits:
        raise ImageError(f"{p.bits} and {q.bits} bits a sample cannot be compared")
    x, y = (pixels[0 : pixels.height, 0 : pixels.width] for pixels in (p, q))
    peak = 2 ** max(pixels.depth or depth_used(samples) for pixels, samples in ((p, x), (q, y))) - 1
    colours, alpha = max(x.shape[2], y.shape[2]) > 2, not x.shape[2] % 2 or not y.shape[2] % 2
    x, y = (with_channels(samples, colours, alpha, peak) for samples in (x, y))
    return Likeness(psnr_of(x, y, peak), ms_ssim_of(x, y, peak) if min(p.width, p.height) >= SIDE_MIN else None)


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
