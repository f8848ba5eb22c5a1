"""Numbers and layers that the lossless model is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exact import ExactConv, keep_in, requantise, snap

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


def act(x: Tensor) -> Tensor:
    """A sum of activations on their grid, kept in their range."""
    return F.hardtanh(x, 0, HIDDEN_MAX * UNIT)


def conv(
    c_in: int, c_out: int, kernel: int = 1, *, low: int = 0, high: int = HIDDEN_MAX, gain: float = 1.0
) -> ExactConv:
    """A layer from activations to activations. With a negative ``low``, something is to be added to these."""
    layer = ExactConv(c_in, c_out, kernel, in_unit=UNIT, in_max=HIDDEN_MAX + 1, out_unit=UNIT, low=low, high=high)
    with torch.no_grad():
        layer.weight.mul_(gain)
    return layer


def last(c_in: int, c_out: int, kernel: int = 1, *, zero: bool = False) -> ExactConv:
    """A layer from activations to numbers, -64 to 64, on a finer grid."""
    return ExactConv(
        c_in,
        c_out,
        kernel,
        in_unit=UNIT,
        in_max=HIDDEN_MAX + 1,
        out_unit=OUT_UNIT,
        low=-OUT_MAX,
        high=OUT_MAX,
        wide=True,
        zero=zero,
    )


def joined(h: Tensor, *more: Tensor) -> Tensor:
    """Channels of h and more, channels last as convolutions want them."""
    return torch.cat([x.to(h.dtype).contiguous(memory_format=torch.channels_last) for x in (h, *more)], 1)


class Residual(nn.Module):
    """act(h + 3x3(h and more))."""

    def __init__(self, channels: int, more: int = 0) -> None:
        super().__init__()
        self.conv = conv(channels + more, channels, 3, low=-HIDDEN_MAX, gain=0.3)

    def forward(self, h: Tensor, *more: Tensor) -> Tensor:
        x = joined(h, *more) if more else h
        return act(h + self.conv(x))


def scale_of(index: Tensor) -> Tensor:
    """Scale, in grey levels, of a (possibly fractional) index 0..SCALES - 1."""
    return SCALE_MIN * torch.exp(index * (math.log(SCALE_MAX / SCALE_MIN) / (SCALES - 1)))


def index_of(scale: Tensor) -> Tensor:
    """The inverse of ``scale_of``."""
    return torch.log(scale / SCALE_MIN) * ((SCALES - 1) / math.log(SCALE_MAX / SCALE_MIN))


def latent_scale_of(index: Tensor) -> Tensor:
    """Standard deviation, in steps of the latents' grid, of an index 0..LATENT_SCALES - 1."""
    return LATENT_SCALE_MIN * torch.exp(index * (math.log(LATENT_SCALE_MAX / LATENT_SCALE_MIN) / (LATENT_SCALES - 1)))


def latent_index_of(scale: Tensor) -> Tensor:
    """The inverse of ``latent_scale_of``, clamped."""
    step = math.log(LATENT_SCALE_MAX / LATENT_SCALE_MIN) / (LATENT_SCALES - 1)
    return (torch.log(scale / LATENT_SCALE_MIN) / step).clamp(0, LATENT_SCALES - 1)


def pixel_bits(residual: Tensor, index: Tensor, shape: Tensor) -> Tensor:
    """Bits of the unit interval around ``residual`` (value less mean, in grey levels).

    Shape 0 is a Gaussian, 1 a logistic distribution, 2 a heavy-tailed mixture of two; in between they are mixed.
    """
    r, inverse = residual.abs(), 1 / scale_of(index)
    near, far = (0.5 - r) * inverse, (-0.5 - r) * inverse  # the lower tail, where nothing cancels
    gauss = torch.special.ndtr(near / 1.6) - torch.special.ndtr(far / 1.6)
    logistic = torch.sigmoid(near) - torch.sigmoid(far)
    narrow = torch.sigmoid(near * 1.5) - torch.sigmoid(far * 1.5)
    broad = torch.sigmoid(near * 0.35) - torch.sigmoid(far * 0.35)
    heavy = 0.7 * narrow + 0.3 * broad
    low, high = (1 - shape).clamp(min=0), (shape - 1).clamp(min=0)
    p = low * gauss + (1 - low - high) * logistic + high * heavy
    return -torch.log2(p * (1 - 1e-5) + 1e-8)


def coarse(residual: Tensor, exact: bool) -> Tensor:
    """Grey levels as an activation."""
    return requantise(residual / 8, UNIT, -16, 16, exact)


LOGARITHMS = torch.tensor(
    [round(32 * math.log2(1 + n * MEAN_UNIT)) / 32 for n in range(4096)], dtype=torch.float32, device="cpu"
)
"""log2(1 + |x|) for |x| in steps of MEAN_UNIT, on the grid of activations; no value is near a tie."""


def logarithm(x: Tensor, exact: bool) -> Tensor:
    """log2(1 + |x|) of grey levels as an activation: scales are logarithms, which small networks are bad at."""
    if not exact:
        return torch.log2(1 + x.abs())
    return logarithms(x.device, x.dtype)[(x.abs() * FRACTIONS).clamp(max=len(LOGARITHMS) - 1).long()]


@cache
def logarithms(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table, kept where it is used: a CUDA graph cannot copy it there."""
    return LOGARITHMS.to(device, dtype)


def normalised(residual: Tensor, index: Tensor, exact: bool) -> Tensor:
    """Residual in units of its scale, as an activation."""
    inverse = 0.5 / scale_of(index)
    if exact:
        inverse = snap(inverse.detach(), 1 / 256)
    return requantise(residual * inverse, UNIT, -8, 8, exact)


def on_grids(mean: Tensor, index: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Mean of latents on a quarter of their grid, and scale index."""
    limit, last = LATENT_MAX * LATENT_UNIT, LATENT_SCALES - 1
    mean = requantise(mean, LATENT_UNIT / LATENT_FRACTIONS, -limit, limit, exact)
    return mean, requantise(keep_in(index, 0, last), 1.0, 0, last, exact)


def linear_conv(c_in: int, c_out: int, kernel: int, in_unit: float, in_max: int) -> ExactConv:
    """A linear path beside the networks."""
    return ExactConv(
        c_in,
        c_out,
        kernel,
        in_unit=in_unit,
        in_max=in_max,
        out_unit=OUT_UNIT,
        low=-OUT_MAX,
        high=OUT_MAX,
        wide=True,
        linear=True,
    )
