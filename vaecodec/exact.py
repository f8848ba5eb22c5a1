"""Convolutions that give the same bits on every machine.

Every activation is an integer times a power of two (its *unit*). A layer multiplies integers by integer weights and
adds an integer bias; while such a sum stays below 2**24 a float32 holds it exactly, and a sum of exact terms does not
depend on the order in which a library, a vector unit or a GPU adds them up. The sum is then multiplied once, in
float32, by the scale of its row, rounded half to even and clamped:

    out = clamp(rint(float32(sum) * scale), low, high)

That is what ONNX calls QLinearConv, so where activations and weights have 8 bits, integer kernels give the same; and
a plain ``conv2d`` of integers in float32 gives it everywhere.

A layer lives in one of three states:

* float     training, first part: ordinary weights, nothing is rounded (bf16 autocast is allowed);
* exact     training, last part: weights and activations are rounded in the forward pass, gradients pass straight
            through (Bengio et al. 2013, arXiv:1308.3432);
* frozen    after export: the parameters *are* the integers and are used as they stand.

The rounded layer in training and the frozen layer compute the same function (at qualities between two knots up to the
rounding of the interpolated bias).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .weights import QUALITY_MAX as QUALITY_MAX

ACCUMULATOR_LIMIT = 2**24
"""Sums stay below this integer, up to which float32 is exact."""
WEIGHT_MAX = 1023
"""Largest integer weight; at most 2047, the integers that survive a cast to TF32."""
WEIGHT_MAX_8 = 127


def rounded(x: Tensor) -> Tensor:
    """To the nearest integer, half to even; the gradient passes straight through."""
    return x + (x.detach().round() - x.detach()) if x.requires_grad else x.round()


def snap(x: Tensor, unit: float) -> Tensor:
    """Round to the nearest multiple of ``unit``, half to even; the gradient passes straight through."""
    return rounded(x * (1 / unit)) * unit


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
    """A convolution with zero padding whose bias may depend on the quality, in floating point.

    The weight is kept as a matrix [out, in * k * k]: an output channel is a row, which is what the accumulator bound
    and a matrix optimiser look at.

    ``knots``: how many biases are stored over the quality range; they are interpolated.
    ``wide``: never computed in bf16 (linear paths whose values span many bits).
    ``linear``: starts at the solution of a linear problem and is not trained: a small step there moves every
    output.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        *,
        knots: int = 1,
        wide: bool = False,
        linear: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (c_out, c_in, kernel, kernel)
        self.wide, self.linear = wide, linear
        fan_in = c_in * kernel * kernel
        self.weight = nn.Parameter(torch.randn(c_out, fan_in) * (0.0 if zero else math.sqrt(2 / fan_in)))
        self.bias = nn.Parameter(torch.zeros(knots, c_out))
        self.requires_grad_(not linear)

    @property
    def reach(self) -> int:
        """How many samples beyond each it looks at."""
        return self.shape[2] // 2

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [B, in, H, W] with the weight [out, in * k * k] of some rows and a bias [1, out], or one for each of the
        batch [B, out]."""
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
        return out if constant is not None else out + bias[:, :, None, None].to(out.dtype)

    def forward(self, x: Tensor, quality: Tensor | None = None) -> Tensor:
        """x [B, in, H, W]; quality int64 [B], or its ``shares``, needed where ``knots`` > 1. Gives [B, out, H, W]."""
        return self.convolved(x, self.weight, at(self.bias, quality))


def reach_of(*modules: nn.Module) -> int:
    """How many samples beyond each they look at, one after the other."""
    return sum(layer.reach for module in modules for layer in module.modules() if isinstance(layer, Conv))


def at(bias: Tensor, quality: Tensor | None) -> Tensor:
    """A bias [knots, out] at each quality [B]: [B, out], or [1, out] if it does not depend on it."""
    if len(bias) == 1:
        return bias
    assert quality is not None
    return interpolate(bias, quality)


class ExactConv(Conv):
    """A convolution of integers, see above. Inputs and outputs are floating-point multiples of their units.

    ``in_unit``, ``out_unit``: powers of two; ``in_max``: largest magnitude of each input channel in units of
    ``in_unit`` (of both one number, or one for each channel). ``low``, ``high``: the outputs' limits in units of
    ``out_unit``.
    ``weight_max``: largest integer weight; up to 127 they are kept in 8 bits.
    ``calibrated``: each channel has a unit of its own, in buffers ``in_units`` [in] and ``out_units`` [out] that
    training sets.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        *,
        in_unit: float | list[float],
        in_max: int | list[int],
        out_unit: float,
        low: int,
        high: int,
        weight_max: int = WEIGHT_MAX,
        calibrated: bool = False,
        knots: int = 1,
        wide: bool = False,
        linear: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__(c_in, c_out, kernel, knots=knots, wide=wide, linear=linear, zero=zero)
        self.low, self.high, self.weight_max, self.calibrated = low, high, weight_max, calibrated
        self.out_unit = out_unit
        units = torch.tensor(in_unit if isinstance(in_unit, list) else [in_unit] * c_in)
        self.register_buffer("in_units", units, persistent=calibrated)
        self.register_buffer("out_units", torch.full((c_out,), out_unit), persistent=calibrated)
        limits = torch.tensor([in_max] * c_in if isinstance(in_max, int) else in_max, dtype=torch.float64)
        self.register_buffer("in_max", limits, persistent=False)
        self.register_buffer("scale", torch.ones(c_out), persistent=False)
        self.in_units: Tensor
        self.out_units: Tensor
        self.in_max: Tensor
        self.scale: Tensor
        self.exact = False
        self.frozen = False

    def by_column(self, channels: Tensor) -> Tensor:
        """Values of the input channels [in] for the weight's columns [in * k * k]."""
        return channels.repeat_interleave(self.shape[2] * self.shape[3])

    def steps(self, weight: Tensor, bias: Tensor) -> Tensor:
        """float64 [out]: how many steps of the sum make an output unit, as many as the limits allow.

        weight and bias: in units of inputs and outputs.
        """
        weight, bias = weight.detach().double(), bias.detach().double()
        limits = self.by_column(self.in_max)
        # Rounding may lengthen each weight by half a step.
        room = ACCUMULATOR_LIMIT - 1 - 0.5 * (limits.sum() + 1)
        by_sum = room / ((weight.abs() * limits).sum(1) + bias.abs().amax(0)).clamp(min=1e-9)
        by_weight = self.weight_max / weight.abs().amax(1).clamp(min=1e-6)
        return torch.minimum(by_sum, by_weight).clamp(max=2.0**20)

    def on_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integer weight [out, in * k * k] and bias [knots, out], differentiable, and the float32 scale [out]."""
        dtype = self.weight.dtype
        weight = self.weight * self.by_column(self.in_units).to(dtype) / self.out_units[:, None].to(dtype)
        bias = self.bias / self.out_units.to(dtype)
        scale = (1 / self.steps(weight, bias)).float()
        inverse = (1 / scale.double()).to(dtype)
        weight = rounded(weight * inverse[:, None]).clamp(-self.weight_max, self.weight_max)
        return weight, rounded(bias * inverse), scale

    def integers(self) -> dict[str, Tensor]:
        """What is exported: ``weight`` int8 or int16 [out, in * k * k] and ``bias`` int32 [knots, out], both in steps
        of the sum, ``scale`` float32 [out]; where ``calibrated``, the logarithms to base 2 of the units too,
        ``in_units`` and ``out_units``, int8.

        Raises ValueError where a sum could leave the range in which float32 is exact.
        """
        weight, bias, scale = (t.detach() for t in self.on_grid())
        reach = float(
            ((weight.double().abs() * self.by_column(self.in_max)).sum(1) + bias.double().abs().amax(0)).max()
        )
        if not reach < ACCUMULATOR_LIMIT:
            raise ValueError(f"a sum may reach {reach:.0f}, the limit is {ACCUMULATOR_LIMIT}")
        kind = torch.int8 if self.weight_max <= WEIGHT_MAX_8 else torch.int16
        parts = {"weight": weight.to(kind), "bias": bias.to(torch.int32), "scale": scale}
        if self.calibrated:
            parts |= {
                name: units.double().log2().round().to(torch.int8)
                for name, units in (("in_units", self.in_units), ("out_units", self.out_units))
            }
        return parts

    def freeze(self, parts: dict[str, Tensor]) -> None:
        """Take exported integers (see ``integers``) as parameters, to be used as they stand."""
        weight, bias = parts["weight"], parts["bias"]
        if weight.shape != self.weight.shape or bias.shape != self.bias.shape:
            raise ValueError("exported integers do not fit the layer")
        if self.calibrated:
            self.in_units, self.out_units = (torch.exp2(parts[name].float()) for name in ("in_units", "out_units"))
        self.weight = nn.Parameter(self.kernel(weight.float()), requires_grad=False)
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.scale = parts["scale"].float()
        self.exact = self.frozen = True

    def thawed(self) -> tuple[Tensor, Tensor]:
        """Of a frozen layer, the weight and bias that training goes on from."""
        step = self.scale.double() * self.out_units.double()
        return (self.weight * step[:, None]).float(), (self.bias * step).float()

    def kernel(self, weight: Tensor) -> Tensor:
        """Integer weights divided by the units of what they multiply: products with activations are integers then."""
        return weight / self.by_column(self.in_units).to(weight.dtype)

    def forward(self, x: Tensor, quality: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x [B, in, H, W]; quality int64 [B], or unless frozen its ``shares``, needed where ``knots`` > 1; rows int64
        [out], the output channels wanted, by default all. Gives [B, out, H, W], clamped and, where ``exact``, rounded.
        """
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        scale, units = self.scale, self.out_units
        if self.exact and not self.frozen:
            weight, bias, scale = self.on_grid()
            weight = self.kernel(weight)
        if rows is not None:
            weight, bias, scale, units = weight[rows], bias[:, rows], scale[rows], units[rows]
        if self.frozen:
            bias = at(bias.long(), quality).to(bias.dtype)
        else:
            bias = rounded(at(bias, quality)) if self.exact else at(bias, quality)
        out, units = self.convolved(x, weight, bias), per_channel(units)
        if not self.exact:
            if not self.calibrated:
                return F.hardtanh(out, self.low * self.out_unit, self.high * self.out_unit)
            units = units.to(out.dtype)
            return F.hardtanh(out / units, self.low, self.high) * units
        # The one product is float32's, also where the sums are float64's.
        scale = per_channel(scale.float())
        if out.requires_grad:
            return rounded(F.hardtanh(out.float() * scale, self.low, self.high)).to(x.dtype) * units
        return out.float().mul_(scale).round_().clamp_(self.low, self.high).to(x.dtype).mul_(units)


def per_channel(x: Tensor) -> Tensor:
    """Values [C] or [B, C] to go with [B, C, H, W]."""
    return x[..., :, None, None]


def flat(x: Tensor) -> NDArray[np.int32]:
    """int32 [N] in the order of the dimensions, as the coder takes them."""
    values: NDArray[np.int32] = x.to(torch.int32).flatten().cpu().numpy()
    return values


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
    return x.mul(1 / unit).round_().clamp_(low / unit, high / unit).mul_(unit)


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast, and on CUDA plain matrix products instead of cuDNN's algorithms (TF32, Winograd)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_without_cudnn())
        yield


_cudnn = threading.Lock()
_users, _before = 0, True


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Its switch is the process's, so the last thread to leave puts it back."""
    global _users, _before
    with _cudnn:
        if _users == 0:
            _before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
        _users += 1
    try:
        yield
    finally:
        with _cudnn:
            _users -= 1
            if _users == 0:
                torch.backends.cudnn.enabled = _before
