"""Arithmetic of known pixels in numpy, which the engine on a CPU does beside its graphs; ``heads`` has it in torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..engine_onnx import Array, Bytes

MARGIN = 2
"""Known pixels come with so many more on all sides, those at the border repeated."""


def halved(x: Array, times: int) -> Array:
    """Integers divided by 2**times, rounded half to even."""
    half: Array = x + ((1 << times - 1) - 1) + (x >> times & 1) >> times
    return half


def local_mean(x: NDArray[np.int16]) -> NDArray[np.int16]:
    """16 times the binomial 3x3 mean of x [3, h, w]; the border is repeated."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), "edge")
    x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    mean: NDArray[np.int16] = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return mean


def nearest(phase: str, known: list[Bytes]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """See ``lossless.nearest``: int16 [3, h, w] both, the first in halves. known: uint8 with MARGIN."""

    def apart(pixels_8: Bytes) -> NDArray[np.int16]:
        pixels = pixels_8.astype(np.int16)
        pixels[::2] -= pixels[1]
        return pixels

    def at(pixels: NDArray[np.int16], row: int, column: int) -> NDArray[np.int16]:
        rows, columns = (size - 2 * MARGIN for size in pixels.shape[1:])
        return pixels[:, MARGIN + row : MARGIN + row + rows, MARGIN + column : MARGIN + column + columns]

    a = apart(known[0])
    d = a if phase == "D" else apart(known[1])
    places = {
        "D": ((a, 0, 0), (a, 1, 1), (a, 0, 1), (a, 1, 0)),
        "B": ((a, 0, 0), (a, 0, 1), (d, -1, 0), (d, 0, 0)),
        "C": ((a, 0, 0), (a, 1, 0), (d, 0, -1), (d, 0, 0)),
    }
    first, second, third, fourth = (at(*place) for place in places[phase])
    lows = np.minimum(first, second), np.minimum(third, fourth)
    highs = np.maximum(first, second), np.maximum(third, fourth)
    middle = np.maximum(*lows) + np.minimum(*highs)
    return middle, np.maximum(*highs) - np.minimum(*lows)


def padded(x: Bytes) -> Bytes:
    return np.pad(x, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), "edge")
