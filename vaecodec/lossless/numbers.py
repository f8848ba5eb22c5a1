"""Numbers of the lossless codec that need no networks to be known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

UNIT = 1 / 32
"""Grid of hidden activations; they lie in 0..HIDDEN_MAX * UNIT."""
HIDDEN_MAX = 511
BYTE_UNIT, BYTE_MAX = 1 / 16, 255
"""The same where they are bytes."""
OUT_UNIT = 1 / 256
"""Grid of what the last layers give."""
OUT_MAX = 64 * 256
"""Its limit, in its units."""
LEVEL_UNIT = 1 / 4
"""Grid of pixels as the networks see them: differences from a local mean, in grey levels."""
FRACTIONS = 8
"""Of a grey level, in which means are counted: a table for each."""
MEAN_UNIT = 1 / FRACTIONS
GATE_UNIT = 1 / 256
CENTRE = 128
"""Middle of the grey levels, and their half-range."""

SCALES = 40
SCALE_MIN, SCALE_MAX = 0.07, 40.0
SHAPES = 3
CHANNEL_ORDER = (1, 0, 2)
"""Green, red, blue."""
PHASES = "DBC"
FLOATING = ".float"
"""Ends the names of graphs that compute with bytes in float32."""

LATENT_UNIT = 1 / 16
"""Step of the grid on which latents are popped and pushed."""
LATENT_FRACTIONS = 4
"""Of such a step, in which their means are counted."""
LATENT_SCALES = 48
LATENT_SCALE_MIN, LATENT_SCALE_MAX = 0.4, 256.0
"""In steps of the grid."""
LATENT_MAX = 511
"""Networks see latents clamped to this many steps."""


@dataclass(frozen=True)
class Config:
    """Widths of the networks."""

    levels: int = 3  # interlaced levels above the image that the latents code
    width: int = 64  # channels of a level
    features: int = 32  # channels that a level hands to the next finer one
    blocks: int = 1  # layers before the first phase, at the finest level; each coarser level has two more
    hidden: int = 32  # of a head, for each colour
    filters: int = 4  # gated difference filters, for each colour
    vae_width: int = 96
    vae_blocks: int = 2
    latents: tuple[int, ...] = (16, 16, 16)  # channels of z_1, z_2, z_3
    groups: int = 0  # of scale indices, each of which a tile moves to where its own residuals want it
    activation_bits: int = 16  # of the levels: 8, and between their layers are bytes, which integer kernels multiply
    refined: int = 0  # levels, the finest, whose phases come in passes that are refined, see ``refine``

    @property
    def in_bytes(self) -> bool:
        return self.activation_bits == 8

    @property
    def kind(self) -> np.dtype[Any]:
        """Of activations of the levels, as the engine on a CPU keeps them."""
        return np.dtype(np.uint8 if self.in_bytes else np.float32)

    # Channels of the arrays that the engine on a CPU keeps, where layers of bytes want sixteens.

    @property
    def beside(self) -> int:
        """What there may be beside a state: for a head the spread, and what it is given of two colours, three numbers
        each; for an update three differences and three residuals. Of bytes a difference takes three, a residual two."""
        return sixteens(self.width + 15) - self.width if self.in_bytes else 9

    @property
    def width_beside(self) -> int:
        return self.width + self.beside

    def entered(self, features: int) -> int:
        """What a level begins with."""
        return sixteens(features + 27) if self.in_bytes else 9 + features


def sixteens(channels: int) -> int:
    return -(-channels // 16) * 16
