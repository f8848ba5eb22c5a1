"""Numbers of the lossless codec that need no networks to be known."""

from __future__ import annotations

from dataclasses import dataclass

UNIT = 1 / 32
"""Grid of hidden activations; they lie in 0..HIDDEN_MAX * UNIT."""
HIDDEN_MAX = 511
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
    refined: int = 0  # levels, the finest, whose phases come in passes that are refined, see ``refine``
