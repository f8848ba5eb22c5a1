"""Numbers and layers that the lossy model is made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exact import QUALITY_MAX, WEIGHT_MAX_8, Conv, ExactConv, per_channel, requantise, rounded
from .numbers import (
    CONTEXT_MAX as CONTEXT_MAX,
    GAIN_BITS as GAIN_BITS,
    HIDDEN_MAX as HIDDEN_MAX,
    HYPER as HYPER,
    INDEX_GAIN as INDEX_GAIN,
    LAMBDA_MIN as LAMBDA_MIN,
    MEAN_MAX as MEAN_MAX,
    OUT_MAX as OUT_MAX,
    PATCH as PATCH,
    PIXEL_SCALE as PIXEL_SCALE,
    PIXEL_UNIT as PIXEL_UNIT,
    SCALE_MAX as SCALE_MAX,
    SCALE_MIN as SCALE_MIN,
    SCALES as SCALES,
    STEP_ORDER as STEP_ORDER,
    STEPS as STEPS,
    STREAM_MAX as STREAM_MAX,
    STREAM_UNIT as STREAM_UNIT,
    UNIT as UNIT,
    Config as Config,
)


def lagrangian(quality: Tensor, largest: float) -> Tensor:
    """lambda of a quality (hundredths): log-linear up to ``largest``; weighs the mean squared error on the 0..255
    scale."""
    return LAMBDA_MIN * (largest / LAMBDA_MIN) ** (quality.double() / QUALITY_MAX).float()


def scale_of(index: Tensor) -> Tensor:
    """Standard deviation for a (possibly fractional) table index 0..63."""
    return SCALE_MIN * torch.exp(index * (math.log(SCALE_MAX / SCALE_MIN) / (SCALES - 1)))


def gaussian_bits(value: Tensor, scale: Tensor) -> Tensor:
    """Bits of the unit interval around ``value`` under N(0, scale^2): the density convolved with the uniform posterior
    (Balle et al. 2018, eq. 9)."""
    value = value.abs()
    upper, lower = torch.special.ndtr((0.5 - value) / scale), torch.special.ndtr((-0.5 - value) / scale)
    return -torch.log2((upper - lower).clamp(min=1e-9))


def step_quarters(height: int, width: int, step: int, device: torch.device) -> Tensor:
    """int64 [h, w]: which quarter of the channels a context step decodes at each position."""
    row = torch.arange(height, device=device)[:, None] % 2
    column = torch.arange(width, device=device)[None, :] % 2
    return STEP_ORDER[step] ^ (2 * row + column)


def pick(y: Tensor, quarters: Tensor) -> Tensor:
    """Of y [B, M, h, w] the given quarter of the channels at each position: [B, M / 4, h, w]."""
    y = y.view(len(y), STEPS, -1, *y.shape[2:])
    return y.gather(1, quarters.expand(len(y), 1, *y.shape[2:])).squeeze(1)


def place(y: Tensor, quarters: Tensor, values: Tensor) -> Tensor:
    """y with ``values`` where ``pick`` takes them from."""
    y = y.view(len(y), STEPS, -1, *y.shape[2:])
    return y.scatter(1, quarters.expand(len(y), 1, *y.shape[2:]), values.unsqueeze(1)).flatten(1, 2)


class Block(nn.Module):
    """x + 1x1(relu(3x3(x))), in floating point; the hidden layer's bias depends on the quality."""

    def __init__(self, channels: int, inner: int, knots: int) -> None:
        super().__init__()
        self.conv_3 = Conv(channels, inner, 3, knots=knots)
        self.conv_1 = Conv(inner, channels, zero=True)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        h = F.hardtanh(self.conv_3(x, quality), 0, HIDDEN_MAX * UNIT)
        return bounded(x + bounded(self.conv_1(h)))


class ExactBlock(nn.Module):
    """The same in 8 bits: what the stream gives (-128 to 127), the hidden layer (0 to 255) and what is added to the
    stream (-128 to 127), each channel in units of its own."""

    def __init__(self, channels: int, inner: int, knots: int) -> None:
        super().__init__()
        self.conv_3 = conv_8(channels, inner, 3, in_max=128, low=0, high=255, knots=knots)
        self.conv_1 = conv_8(inner, channels, in_max=255, low=-128, high=127, zero=True)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        units = per_channel(self.conv_3.in_units).to(x.dtype)
        if x.requires_grad or not self.conv_3.exact:
            h = F.hardtanh(x / units, -128, 127)
            h = (rounded(h) if self.conv_3.exact else h) * units
        else:
            h = (x / units).round_().clamp_(-128, 127).mul_(units)
        # Units of what is added are multiples of the stream's, so the sum needs no rounding.
        return bounded(x + self.conv_1(self.conv_3(h, quality)))


class CentredBlock(nn.Module):
    """``Block`` with the 3x3 layer's weights around the centre in 8 bits. Those at the centre are far larger, so that
    with them the steps would be coarse; they stay in floating point, as the 1x1 layer does."""

    def __init__(self, channels: int, inner: int, knots: int) -> None:
        super().__init__()
        self.around = conv_8(channels, inner, 3, in_max=128, low=-128, high=127)
        self.centre = Conv(channels, inner, knots=knots)
        self.conv_1 = Conv(inner, channels)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        h = self.around(given(self.around, x)) + self.centre(x, quality)
        return bounded(x + bounded(self.conv_1(F.hardtanh(h, 0, HIDDEN_MAX * UNIT))))

    def whole(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the 3x3 layer, of a frozen block."""
        taps = self.around.thawed()[0].view(*self.centre.weight.shape, 9).clone()
        taps[..., 4] = self.centre.weight
        return taps.flatten(1), self.centre.bias


def given(conv: ExactConv, x: Tensor) -> Tensor:
    """What of x [B, C, H, W], in floating point, a layer of 8 bits is given: -128 to 127 of its units, or 0 to 255."""
    units = per_channel(conv.in_units).to(x.dtype)
    h = (x / units).clamp(*limits_of(conv))
    return (rounded(h) if conv.exact else h) * units


def limits_of(conv: ExactConv) -> tuple[int, int]:
    """Of the inputs of a layer of 8 bits, in its units."""
    return (-128, 127) if int(conv.in_max[0]) == 128 else (0, 255)


def centred(block: Block) -> CentredBlock:
    """The same block, not calibrated yet."""
    inner, channels = block.conv_3.shape[:2]
    made = CentredBlock(channels, inner, len(block.conv_3.bias))
    made.conv_1.load_state_dict(block.conv_1.state_dict())
    with torch.no_grad():
        taps = block.conv_3.weight.view(inner, channels, 9)
        made.centre.weight.copy_(taps[..., 4])
        made.centre.bias.copy_(block.conv_3.bias)
        made.around.weight.copy_(block.conv_3.weight)
        made.around.weight.view(inner, channels, 9)[..., 4] = 0
    return made


def in_8_bits(block: Block) -> ExactBlock:
    """The same block, not calibrated yet."""
    inner, channels = block.conv_3.shape[:2]
    made = ExactBlock(channels, inner, len(block.conv_3.bias))
    made.load_state_dict(block.state_dict(), strict=False)
    return made


def conv_8(
    c_in: int, c_out: int, kernel: int = 1, *, in_max: int, low: int, high: int, knots: int = 1, zero: bool = False
) -> ExactConv:
    """A layer of 8-bit integers whose units are calibrated."""
    return ExactConv(
        c_in,
        c_out,
        kernel,
        in_unit=UNIT,
        in_max=in_max,
        out_unit=UNIT,
        low=low,
        high=high,
        weight_max=WEIGHT_MAX_8,
        calibrated=True,
        knots=knots,
        zero=zero,
    )


def of_seen(h: Tensor, seen: Tensor | None) -> Tensor:
    """h [B, C, H, W] with zeros where ``seen`` [1, 1, h, w] has some, of latents at 1/16: there nothing is, as outside
    the picture."""
    return h if seen is None else h * F.interpolate(seen, size=h.shape[2:], mode="nearest")


def stream(x: Tensor, exact: bool) -> Tensor:
    return requantise(x, STREAM_UNIT, -STREAM_MAX * STREAM_UNIT, STREAM_MAX * STREAM_UNIT, exact)


def bounded(x: Tensor) -> Tensor:
    return F.hardtanh(x, -STREAM_MAX * STREAM_UNIT, STREAM_MAX * STREAM_UNIT)


def entropy_conv(
    c: Config, c_in: int, c_out: int, kernel: int = 1, *, knots: int = 1, seen: int = 0, last: bool = False
) -> ExactConv:
    """A layer of h_s or a context network. Its last ``seen`` inputs are latents, the others hidden activations, as its
    outputs are, unless it is the ``last``."""
    finer = round(UNIT / c.unit)
    low, high = (-OUT_MAX, OUT_MAX) if last else (0, HIDDEN_MAX * finer)
    limits = [HIDDEN_MAX * finer] * (c_in - seen) + [CONTEXT_MAX * finer] * seen
    return ExactConv(
        c_in,
        c_out,
        kernel,
        in_unit=c.unit,
        in_max=limits,
        out_unit=c.unit,
        low=low,
        high=high,
        knots=knots,
        wide=last,
    )


def wide_conv(c_in: int, c_out: int, out_unit: float, limit: int) -> ExactConv:
    """A 1x1 layer that reads the stream of g_s."""
    return ExactConv(
        c_in,
        c_out,
        in_unit=STREAM_UNIT,
        in_max=STREAM_MAX,
        out_unit=out_unit,
        low=-limit,
        high=limit,
        wide=True,
    )
