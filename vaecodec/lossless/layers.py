"""Numbers and layers that the lossless model is made of."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exact import WEIGHT_MAX_8, ExactConv, keep_in, requantise, snap
from .numbers import (
    BYTE_MAX as BYTE_MAX,
    BYTE_UNIT as BYTE_UNIT,
    CENTRE as CENTRE,
    CHANNEL_ORDER as CHANNEL_ORDER,
    FRACTIONS as FRACTIONS,
    GATE_UNIT as GATE_UNIT,
    HIDDEN_MAX as HIDDEN_MAX,
    LATENT_FRACTIONS as LATENT_FRACTIONS,
    LATENT_MAX as LATENT_MAX,
    LATENT_SCALE_MAX as LATENT_SCALE_MAX,
    LATENT_SCALE_MIN as LATENT_SCALE_MIN,
    LATENT_SCALES as LATENT_SCALES,
    LATENT_UNIT as LATENT_UNIT,
    LEVEL_UNIT as LEVEL_UNIT,
    MEAN_UNIT as MEAN_UNIT,
    OUT_MAX as OUT_MAX,
    OUT_UNIT as OUT_UNIT,
    PHASES as PHASES,
    SCALE_MAX as SCALE_MAX,
    SCALE_MIN as SCALE_MIN,
    SCALES as SCALES,
    SHAPES as SHAPES,
    UNIT as UNIT,
    Config as Config,
)


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


def last(c_in: int, c_out: int, kernel: int = 1, *, zero: bool = False, in_bytes: bool = False) -> ExactConv:
    """A layer from activations to numbers, -64 to 64, on a finer grid."""
    return ExactConv(
        c_in,
        c_out,
        kernel,
        in_unit=BYTE_UNIT if in_bytes else UNIT,
        in_max=BYTE_MAX if in_bytes else HIDDEN_MAX + 1,
        out_unit=OUT_UNIT,
        low=-OUT_MAX,
        high=OUT_MAX,
        wide=True,
        zero=zero,
    )


OF_COARSE, OF_SIGNS, OF_BYTE = [BYTE_UNIT, BYTE_UNIT, UNIT], [UNIT, UNIT], [UNIT]
"""Units of the bytes that ``coarse_bytes``, ``signs`` and ``byte`` make of each number."""


def byte_conv(c_in: int, c_out: int, kernel: int, *more: tuple[int, list[float]]) -> ExactConv:
    """A layer of 8 bits, from activations and ``more`` to activations, all of them bytes. more: how many numbers, and
    the units of the bytes of each."""
    units = [BYTE_UNIT] * c_in + [unit for count, each in more for unit in each for _ in range(count)]
    return ExactConv(
        len(units),
        c_out,
        kernel,
        in_unit=units,
        in_max=BYTE_MAX,
        out_unit=BYTE_UNIT,
        low=0,
        high=BYTE_MAX,
        weight_max=WEIGHT_MAX_8,
    )


def byte(x: Tensor) -> Tensor:
    """Activations that are not negative, in steps of UNIT, as bytes of these."""
    return F.hardtanh(x, 0, BYTE_MAX * UNIT)


def signs(x: Tensor) -> Tensor:
    """Of activations in steps of UNIT [B, C, h, w] what is above and what is below 0, two bytes [B, 2 C, h, w]."""
    return torch.cat([byte(x), byte(-x)], 1)


def coarse_bytes(x: Tensor, exact: bool) -> Tensor:
    """Of activations in steps of UNIT, x = BYTE_UNIT q + UNIT r, three bytes: q above and below 0, and r, 0 or 1."""
    q = x + ((x.detach() / BYTE_UNIT).floor() * BYTE_UNIT - x.detach()) if exact else x
    sides = [F.hardtanh(side, 0, BYTE_MAX * BYTE_UNIT) for side in (q, -q)]
    return torch.cat([*sides, (x - q).detach()], 1)


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


class Plain(nn.Module):
    """3x3(h and more) of bytes; begins near the identity."""

    def __init__(self, channels: int, *more: tuple[int, list[float]]) -> None:
        super().__init__()
        self.conv = byte_conv(channels, channels, 3, *more)
        with torch.no_grad():
            self.conv.weight.mul_(0.3)
            self.conv.weight.view(self.conv.shape)[:, :channels, 1, 1] += torch.eye(channels)

    def forward(self, h: Tensor, *more: Tensor) -> Tensor:
        out: Tensor = self.conv(joined(h, *more) if more else h)
        return out


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
