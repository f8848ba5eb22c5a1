"""Convolutions that give the same bits on every machine.

Every activation is a multiple of a power of two (its *unit*) and every weight a multiple of ``2**-shift``, so each
product and each partial sum is an integer times one power of two. While that integer stays below 2**24 a float32
holds it exactly, and a sum of exact terms does not depend on the order in which a library, a vector unit or a GPU
adds them up. So a plain ``conv2d`` is exact as it stands; no integer kernels are needed.

A layer lives in one of three states:

* float     training, first part: ordinary weights, nothing is rounded (bf16 autocast is allowed);
* exact     training, last part: weights and activations are rounded in the forward pass, gradients pass straight
            through (Bengio et al. 2013, arXiv:1308.3432);
* frozen    after export: the parameters *are* the rounded values and are used as they stand.

The rounded layer in training and the frozen layer compute the same function (at qualities between two knots up to the
rounding of the interpolated bias).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACCUMULATOR_LIMIT = 2**24
"""Sums stay below this integer, up to which float32 is exact."""
WEIGHT_LIMIT = 1023
"""Largest integer weight; at most 2047, the integers that survive a cast to TF32."""

UNIT = 1 / 16
"""Grid of hidden activations."""
STREAM_UNIT = 1 / 128
"""Grid of the residual streams of the synthesis transform."""
HIDDEN_MAX = 255
STREAM_MAX = 2047
QUALITY_MAX = 10000
"""Quality is counted in hundredths: 0..10000."""


def snap(x: Tensor, unit: float) -> Tensor:
    """Round to the nearest multiple of ``unit`` (ties upwards); the gradient passes straight through."""
    rounded = torch.floor(x * (1 / unit) + 0.5) * unit
    return x + (rounded - x).detach() if x.requires_grad else rounded


def interpolate(knots: Tensor, quality: Tensor) -> Tensor:
    """Piecewise linear interpolation over the quality range.

    knots [K, C], int64 or floating; quality int64 [B] in hundredths, 0..10000, or for floating knots their ``shares``.
    Gives [B, C] of the knots' type; integer knots are interpolated in integers (rounding half up), so the result is the
    same everywhere.
    """
    if knots.dtype != torch.int64:
        weights = quality if quality.is_floating_point() else shares(quality, len(knots))
        # No matmul: autocast and TF32 would round it.
        return (weights.to(knots.dtype)[:, :, None] * knots).sum(1)
    position = quality * (len(knots) - 1)
    left = (position // QUALITY_MAX).clamp(max=max(len(knots) - 2, 0))
    right = (left + 1).clamp(max=len(knots) - 1)
    part = (position - left * QUALITY_MAX)[:, None]
    total = knots[left] * (QUALITY_MAX - part) + knots[right] * part
    return (total + QUALITY_MAX // 2).div(QUALITY_MAX, rounding_mode="floor")


def shares(quality: Tensor, knots: int) -> Tensor:
    """float64 [B, knots]: how much of each knot there is in a value that is interpolated at quality int64 [B]."""
    position = quality.double()[:, None] * (knots - 1) / QUALITY_MAX
    return (1 - (position - torch.arange(knots, device=quality.device)).abs()).clamp(min=0)


class Conv(nn.Module):
    """A 1x1 or 3x3 convolution, zero padding, whose bias may depend on the quality.

    The weight is kept as a matrix [out, in * k * k]: an output channel is a row, which is what the accumulator bound
    and a matrix optimiser look at.

    ``in_max``: largest magnitude of each input channel in units of ``in_unit`` (one number, or one for each channel).
    ``knots``: how many biases are stored over the quality range; they are interpolated.
    ``wide``: never computed in bf16 (linear paths whose values span many bits).
    ``linear``: starts at the solution of a linear problem and is not trained: a small step there moves every
    output.
    ``added``: largest magnitude, in units of ``out_unit``, of what is added to the result before it is rounded.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        *,
        in_unit: float = UNIT,
        in_max: int | list[int] = HIDDEN_MAX,
        out_unit: float = UNIT,
        knots: int = 1,
        added: int = 0,
        wide: bool = False,
        linear: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (c_out, c_in, kernel, kernel)
        self.in_unit, self.out_unit, self.added = in_unit, out_unit, added
        self.wide, self.linear = wide, linear
        fan_in = c_in * kernel * kernel
        self.weight = nn.Parameter(torch.randn(c_out, fan_in) * (0.0 if zero else math.sqrt(2 / fan_in)))
        self.bias = nn.Parameter(torch.zeros(knots, c_out))
        self.requires_grad_(not linear)
        limits = torch.tensor([in_max] * c_in if isinstance(in_max, int) else in_max, dtype=torch.float64)
        self.register_buffer("in_max", limits.repeat_interleave(kernel * kernel), persistent=False)
        self.in_max: Tensor
        self.exact = False
        self.frozen = False

    def shifts(self) -> Tensor:
        """int64 [out]: the finest grid 2**-shift of each row that keeps every sum below the accumulator limit."""
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        reach = (weight.abs() * self.in_max).sum(1) + bias.abs().amax(0) / self.in_unit
        rounding = (0.5 + self.added) * self.out_unit / self.in_unit
        largest = weight.abs().amax(1)
        # 0.98: rounding a weight up may lengthen the row a little
        by_sum = torch.log2(0.98 * ACCUMULATOR_LIMIT / (reach + rounding))
        by_weight = torch.log2(WEIGHT_LIMIT / largest.clamp(min=1e-9))
        return torch.minimum(by_sum, by_weight).floor().clamp(max=20).long()

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias on their grids, differentiable."""
        scale = torch.exp2(self.shifts()).to(self.weight.dtype)
        weight = snap(self.weight * scale[:, None], 1.0) / scale[:, None]
        return weight, snap(self.bias, self.out_unit)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is exported: weight int16 [out, in*k*k] in steps of 2**-shift, bias int32 [knots, out] in steps of
        ``out_unit``, shift int8 [out].

        Raises ValueError where a sum could leave the range in which float32 is exact.
        """
        shift = self.shifts()
        scale = torch.exp2(shift.double())
        weight = torch.floor(self.weight.detach().double() * scale[:, None] + 0.5)
        bias = torch.floor(self.bias.detach().double() / self.out_unit + 0.5)
        unit = scale * self.out_unit / self.in_unit  # one out_unit, counted in steps of the sum
        reach = (weight.abs() * self.in_max).sum(1) + (bias.abs().amax(0) + 0.5 + self.added) * unit
        if float(unit.min()) < 1:
            raise ValueError("biases are finer than the grid of the sums")
        if float(reach.max()) >= ACCUMULATOR_LIMIT or float(weight.abs().max()) > WEIGHT_LIMIT:
            raise ValueError(f"a sum may reach {float(reach.max()):.0f}, the limit is {ACCUMULATOR_LIMIT}")
        return weight.to(torch.int16), bias.to(torch.int32), shift.to(torch.int8)

    def freeze(self, weight: Tensor, bias: Tensor, shift: Tensor) -> None:
        """Take exported integers (see ``integers``) as parameters, to be used as they stand."""
        scale = torch.exp2(shift.double())
        if weight.shape != self.weight.shape or bias.shape != self.bias.shape:
            raise ValueError("exported integers do not fit the layer")
        self.weight = nn.Parameter((weight.double() / scale[:, None]).float(), requires_grad=False)
        self.bias = nn.Parameter((bias.double() * self.out_unit).float(), requires_grad=False)
        self.exact = self.frozen = True

    def forward(self, x: Tensor, quality: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x [B, in, H, W]; quality int64 [B], needed where ``knots`` > 1 (unless frozen, its ``shares`` will do); rows
        int64 [out], the output channels wanted, by default all. Gives [B, out, H, W], not yet rounded."""
        weight, bias = (self.weight, self.bias) if self.frozen or not self.exact else self.rounded()
        if rows is not None:
            weight, bias = weight[rows], bias[:, rows]
        x = x.to(self.weight.dtype) if self.wide else x
        constant = bias[0] if len(bias) == 1 else None
        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not self.wide):
            if self.shape[2] == 1 and not x.requires_grad and x.device.type == "cpu":
                # A product of matrices, and faster so than by what conv2d calls on one thread.
                out = F.linear(x.permute(0, 2, 3, 1), weight, constant).permute(0, 3, 1, 2)
            else:
                kernel, pad = weight.view(-1, *self.shape[1:]), self.shape[2] // 2
                if pad and not x.requires_grad:
                    kernel, x = (t.contiguous(memory_format=torch.channels_last) for t in (kernel, x))
                out = F.conv2d(x, kernel, constant, padding=pad)
        if len(bias) == 1:
            return out
        assert quality is not None
        if self.frozen:
            offset = interpolate((bias / self.out_unit).long(), quality) * self.out_unit
        else:
            offset = interpolate(bias, quality)
        return out + offset[:, :, None, None].to(out.dtype)


def keep_in(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient still pulls values from outside back in."""
    clamped = x.clamp(low, high)
    return clamped + 0.01 * (x - clamped) - 0.01 * (x - clamped).detach() if x.requires_grad else clamped


def requantise(x: Tensor, unit: float, low: float, high: float, exact: bool) -> Tensor:
    """Clamp to [low, high] and, where ``exact``, round to multiples of ``unit`` (of which low and high are some)."""
    if x.requires_grad or not exact:
        x = F.hardtanh(x, low, high)
        return snap(x, unit) if exact else x
    # The same with less traffic: memory is what limits the elementwise operations.
    return x.mul(1 / unit).add_(0.5).floor_().clamp_(low / unit, high / unit).mul_(unit)
