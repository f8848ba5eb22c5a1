"""Numbers of the lossy codec that need no networks to be known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..weights import QUALITY_MAX

Steps = NDArray[np.int16]

KNOWN_INPUTS = ((0, 64), (6180, 64), (QUALITY_MAX, 2**20))
"""Quality and largest latent, in its steps, of the self-test's tiles; the last drives every sum to its limits."""

UNIT = 1 / 16
"""Grid of hidden activations."""
STREAM_BITS = 7
STREAM_UNIT = 1 / 128
"""Grid of the residual streams of the synthesis transform."""
HIDDEN_MAX = 255
STREAM_MAX = 2047

SCALES = 64
SCALE_MIN, SCALE_MAX = 0.11, 256.0
LAMBDA_MIN = 0.001
PATCH = 16
"""Pixels to a latent, along one side."""
HYPER = 4
"""Latents to a hyper-latent, along one side."""
STEPS = 4
STEP_ORDER = (0, 3, 1, 2)
"""A step's quarter, xor the parity of the position. Diagonal neighbours come first (0 and 3): then the last two steps
see all four direct neighbours of the same channel."""
BANDS = (64, 16, 4)
"""In progressive files, the latents of a step are cut where so large a part of them has been coded."""
PIXEL_SCALE = 64
"""Levels in one unit of the networks: it keeps first and last weights the size of the others."""
PIXEL_UNIT = 1 / 16 / PIXEL_SCALE
MEAN_MAX = 2047.0
INDEX_GAIN = 16
"""Table indices to one unit of the networks."""
CONTEXT_MAX = 511
OUT_MAX = 2**17 - 1
"""Limit of what the last layers give, in their units."""
GAIN_BITS = 20
"""Fraction bits of the decoder's integer gains."""


@dataclass(frozen=True)
class Config:
    """Widths of the network; ``latent`` is M, the channels of y and of the streams at 1/16."""

    width: int = 128  # channels at 1/8
    latent: int = 320
    inner: int = 192  # hidden channels of the residual blocks at 1/16
    blocks: tuple[int, int] = (2, 3)  # residual blocks at 1/8 and at 1/16, in g_a and in g_s
    hyper: int = 128  # hidden channels of h_a, h_s and the context networks
    hyper_latent: int = 64  # channels of z
    knots: int = 9  # stored points over the quality range
    bits: int = 4  # of activations after the point, in h_s and the context networks, and of means
    lambda_max: float = 0.25  # at quality 100

    @property
    def unit(self) -> float:
        """Grid of those activations, of means and of y_hat."""
        return float(2.0**-self.bits)

    @property
    def margin(self) -> int:
        """How many latents around a tile analysis and synthesis see; two samples at 1/8 are one latent."""
        fine, coarse = self.blocks
        return coarse + -(-fine // 2)


def lagrangian_of(hundredths: int, largest: float) -> float:
    """lambda of a quality (hundredths): log-linear up to ``largest``; weighs the mean squared error on the 0..255
    scale."""
    return float(LAMBDA_MIN * (largest / LAMBDA_MIN) ** (hundredths / QUALITY_MAX))


def stream_of(y_hat: NDArray[np.int32], gains: NDArray[np.int64], bits: int) -> Steps:
    """g_s's input, int16 [M, h, w] in steps of STREAM_UNIT, for decoded latents in steps of 2**-bits. gains: int64 [M],
    in steps of 2**-GAIN_BITS."""
    shift = GAIN_BITS + bits - STREAM_BITS
    steps = y_hat * gains[:, None, None]
    steps += 1 << shift - 1
    steps >>= shift
    stream: Steps = steps.clip(-STREAM_MAX, STREAM_MAX, out=steps).astype(np.int16)
    return stream
