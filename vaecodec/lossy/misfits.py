"""Tiles that the networks are no good at: saturated colours, one-pixel patterns, drawings, noise.

A tile of a lossy file costs its bits and lambda times its squared error. One without networks has no error, so that
what it costs is its bits. The encoder takes what costs less; the mean squared error of a tile is then never more than
the bits a pixel that it takes without loss over lambda, and no tile takes more bytes than it would without networks.

To find out takes longer than to encode the tile. Of an ordinary one some lines tell that there is no doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINES = 16
"""Rows that are looked at."""
BITS = 1.6
"""Bits without networks to those that bends of lines tell: 1.56 to 2.17 on the validation set."""
FEW = 32
"""Colours of what was drawn, or dithered: bends tell nothing of it."""
WORST = ((100, 120.0), (180, 900.0))
"""Range of a pixel's colours, of 255, and the squared error that was seen from there on."""
STEEP, OFTEN, WORST_STEEP = 48, 0.2, 5000.0
"""A step between neighbours, of 255; the part of them that is usual; the squared error where more are."""


@dataclass(frozen=True)
class Signs:
    """What some lines of a tile tell. bits: a pixel without networks, a low guess. error: mean squared with networks,
    of 0..255, a high guess from how far the lines are from photographs; 0 for photographs."""

    bits: float
    error: float

    def doubtful(self, bits: float, weight: float) -> bool:
        """Whether the tile may cost less without networks. bits: a pixel, with them; weight: lambda.

        The error of photographs costs about as much as their bits, and never more than 3 / (2 ln 2) bits: that is what
        theory says of Gaussian sources and what was seen on the validation set."""
        return bits + max(min(1.5 * bits + 0.3, 2.2), weight * self.error) > self.bits


def signs(samples: NDArray[np.unsignedinteger[Any]], depth: int) -> Signs:
    """Of a tile [h, w, C] of ``depth`` bits a sample."""
    lines = samples[:: -(-len(samples) // LINES)].astype(np.int32)
    if lines.shape[1] < 3 or few_colours(lines):
        return Signs(0.0, 0.0)
    bends = 2 * lines[:, 1:-1] - lines[:, :-2] - lines[:, 2:]
    costs = [bits_of(bends[..., c]) for c in range(lines.shape[2])]
    if len(costs) > 2:
        costs[0], costs[2] = (min(costs[c], bits_of(bends[..., c] - bends[..., 1])) for c in (0, 2))
    return Signs(BITS * sum(costs), error_of(lines, 255 / (2**depth - 1)))


def bits_of(bends: NDArray[np.int32]) -> float:
    return float(np.log2(1 + np.abs(bends).astype(np.float32)).mean())


def few_colours(lines: NDArray[np.int32]) -> bool:
    some = lines[:, :: -(-lines.shape[1] // 128)]
    words = np.ascontiguousarray(some).view(np.dtype((np.void, some.shape[2] * 4)))
    return len(np.unique(words)) <= FEW


def error_of(lines: NDArray[np.int32], unit: float) -> float:
    """unit: of the samples, on the 0..255 scale."""
    steps = np.abs(lines[:, 1::2, 0] - lines[:, : lines.shape[1] // 2 * 2 : 2, 0])
    error = WORST_STEEP * max(0.0, float((steps * unit >= STEEP).mean()) - OFTEN)
    if lines.shape[2] > 2:
        red, green, blue = (lines[:, ::4, c] for c in range(3))
        spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
        error += sum(worst * float((spread * unit >= limit).mean()) for limit, worst in WORST)
    return error
