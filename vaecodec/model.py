"""The lossy variational autoencoder.

                 g_a                         round                         g_s
    x [3, H, W] -----> y [M, H/16, W/16] ------------> y_hat -----------------> x_hat [3, H, W]
                          |                      ^ mean, scale of each y
                      h_a |                      |
                          v        round         | h_s, then four context steps
                       z [C_z, H/64, W/64] ---> z_hat

Latents are N(mean, scale^2) under the prior; the posterior is uniform, one quantiser step wide, so the negative ELBO
is rate + lambda * distortion (Balle et al. 2018, arXiv:1802.01436). One network serves all qualities: gains before
and after the quantiser (Cui et al. 2021, arXiv:2003.02012) and biases inside it depend on the quality.

The latents are decoded in four steps. A step takes a quarter of the channels at each position, and which quarter
changes with the parity of row and column, so each later step sees other channels here and the same channel next door
(after Li et al. 2023, arXiv:2302.14402).

h_s, the context networks and g_s are exact (see ``exact.py``); g_a and h_a only run in the encoder and stay float.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exact import (
    HIDDEN_MAX,
    QUALITY_MAX,
    STREAM_MAX,
    STREAM_UNIT,
    UNIT,
    WEIGHT_MAX_8,
    Conv,
    ExactConv,
    interpolate,
    keep_in,
    per_channel,
    requantise,
    rounded,
    shares,
    snap,
)
from .ranks import share_of_noise

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
        return 2.0**-self.bits


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


class Analysis(nn.Module):
    """g_a: x [B, 3, H, W] in 0..255 to y [B, M, H/16, W/16] (H, W multiples of 16); seen: see ``of_seen``."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.stem = Conv(192, c.width, wide=True)
        self.fine = nn.ModuleList(Block(c.width, c.width, c.knots) for _ in range(c.blocks[0]))
        self.down = Conv(4 * c.width, c.latent, wide=True)
        self.coarse = nn.ModuleList(Block(c.latent, c.inner, c.knots) for _ in range(c.blocks[1]))

    def forward(self, x: Tensor, quality: Tensor, seen: Tensor | None = None) -> Tensor:
        h = bounded(self.stem(F.pixel_unshuffle((x - 128) / PIXEL_SCALE, 8)))
        for block in self.fine:
            h = block(of_seen(h, seen), quality)
        h = bounded(self.down(F.pixel_unshuffle(h, 2)))
        for block in self.coarse:
            h = block(of_seen(h, seen), quality)
        return h


class Synthesis(nn.Module):
    """g_s: scaled y_hat [B, M, H/16, W/16] to x_hat [B, 3, H, W] in 0..255, not rounded; seen: see ``of_seen``."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.coarse = nn.ModuleList(ExactBlock(c.latent, c.inner, c.knots) for _ in range(c.blocks[1]))
        self.up = wide_conv(c.latent, 4 * c.width, STREAM_UNIT, STREAM_MAX)
        self.fine = nn.ModuleList(ExactBlock(c.width, c.width, c.knots) for _ in range(c.blocks[0]))
        self.head = wide_conv(c.width, 192, PIXEL_UNIT, OUT_MAX)

    def forward(self, h: Tensor, quality: Tensor, seen: Tensor | None = None) -> Tensor:
        for block in self.coarse:
            h = block(of_seen(h, seen), quality)
        h = F.pixel_shuffle(self.up(h), 2)
        for block in self.fine:
            h = block(of_seen(h, seen), quality)
        return F.pixel_shuffle(self.head(h), 8) * PIXEL_SCALE + 128


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


class HyperAnalysis(nn.Module):
    """h_a: y / step [B, M, h, w] (multiples of 4) to z [B, C_z, h/4, w/4]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.conv_a = Conv(c.latent, c.hyper, 3, knots=c.knots)
        self.conv_b = Conv(4 * c.hyper, c.hyper)
        self.conv_c = Conv(c.hyper, c.hyper, 3)
        self.conv_d = Conv(4 * c.hyper, c.hyper_latent, wide=True)

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        h = F.relu(self.conv_a(torch.asinh(y), quality))
        h = F.relu(self.conv_b(F.pixel_unshuffle(h, 2)))
        h = F.relu(self.conv_c(h))
        z: Tensor = self.conv_d(F.pixel_unshuffle(h, 2))
        return z


class HyperSynthesis(nn.Module):
    """h_s: z_hat [B, C_z, h, w] to features [B, hyper, 4h, 4w]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.conv_a = entropy_conv(c, c.hyper_latent, c.hyper, 3, knots=c.knots, seen=c.hyper_latent)
        self.conv_b = entropy_conv(c, c.hyper, 4 * c.hyper)
        self.conv_c = entropy_conv(c, c.hyper, c.hyper, 3)
        self.conv_d = entropy_conv(c, c.hyper, 4 * c.hyper)

    def forward(self, z: Tensor, quality: Tensor) -> Tensor:
        limit = CONTEXT_MAX * UNIT
        h = self.conv_a(F.hardtanh(z, -limit, limit), quality)
        h = self.conv_c(F.pixel_shuffle(self.conv_b(h), 2))
        return F.pixel_shuffle(self.conv_d(h), 2)


class Context(nn.Module):
    """One context step: features and the latents decoded so far to the mean and the table index of each latent that the
    step decodes, [B, M / 4, h, w] both."""

    def __init__(self, c: Config, step: int) -> None:
        super().__init__()
        self.step = step
        self.conv_a = entropy_conv(c, c.hyper + c.latent, c.hyper, knots=c.knots, seen=c.latent)
        self.conv_b = entropy_conv(c, c.hyper, c.hyper, 3)
        self.conv_c = entropy_conv(c, c.hyper, 2 * c.latent, last=True)
        with torch.no_grad():
            self.conv_c.weight.mul_(0.1)
            self.conv_c.bias[:, c.latent :] = 1.1  # a scale of about 1

    def forward(self, features: Tensor, y_hat: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        exact, limit = self.conv_a.exact, CONTEXT_MAX * UNIT
        seen = requantise(y_hat * 0.25, self.conv_a.out_unit, -limit, limit, exact)
        h = self.conv_b(self.conv_a(torch.cat([features, seen.to(features.dtype)], 1), quality))
        mean, index = self.at_once(h) if h.requires_grad else self.by_parity(h)
        index = requantise(keep_in(INDEX_GAIN * index, 0, SCALES - 1), 1.0, 0, SCALES - 1, exact)
        return F.hardtanh(mean, -MEAN_MAX, MEAN_MAX), index

    def by_parity(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and index [B, M / 4, h, w]. The last layer has both for all M latents, and a position needs those of its
        quarter: four times every other row and column."""
        rows = torch.arange(len(self.conv_c.weight), device=h.device).view(2, STEPS, -1)
        out = h.new_empty(len(h), rows[:, 0].numel(), *h.shape[2:])
        for parity in range(STEPS):
            part = (..., slice(parity // 2, None, 2), slice(parity % 2, None, 2))
            if h[part].numel():
                out[part] = self.conv_c(h[part], rows=rows[:, STEP_ORDER[self.step] ^ parity].flatten())
        mean, index = out.chunk(2, 1)
        return mean, index

    def at_once(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The same from all M latents at all positions: four times the products, and a quarter of the launches."""
        quarters = step_quarters(h.shape[2], h.shape[3], self.step, h.device)
        mean, index = (pick(part, quarters) for part in self.conv_c(h).chunk(2, 1))
        return mean, index


class Pass(NamedTuple):
    """What a training pass gives: bits [B] of each picture, x_hat [B, 3, H, W] in 0..255, and for each latent, in the
    order of the steps, y - mean with noise (or rounded) and the index of its scale [B, M, h, w]."""

    bits: Tensor
    x_hat: Tensor
    residual: Tensor
    scale_index: Tensor


class Quantised(NamedTuple):
    """bits [B] of y and z; y_hat [B, M, h, w]; the rest as in ``Pass``."""

    bits: Tensor
    y_hat: Tensor
    residual: Tensor
    scale_index: Tensor


class LossyModel(nn.Module):
    """All networks of the lossy codec; ``exact(True)`` rounds those that the decoder runs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.g_a, self.h_a = Analysis(c), HyperAnalysis(c)
        self.h_s, self.g_s = HyperSynthesis(c), Synthesis(c)
        self.context = nn.ModuleList(Context(c, step) for step in range(STEPS))
        self.log_inverse = nn.Parameter(torch.zeros(c.knots, c.latent))  # the quantiser's step, in units of g_s
        self.log_ratio = nn.Parameter(torch.zeros(c.knots, c.latent))  # of g_a's units to those of g_s
        self.z_mean = nn.Parameter(torch.zeros(c.knots, c.hyper_latent))
        self.z_index = nn.Parameter(torch.full((c.knots, c.hyper_latent), 25.0))

    def decoder_convs(self) -> dict[str, ExactConv]:
        """The exact layers by name, in a fixed order."""
        return {
            name: m
            for part in ("h_s", "context", "g_s")
            for name, m in getattr(self, part).named_modules(prefix=part)
            if isinstance(m, ExactConv)
        }

    def exact(self, on: bool) -> None:
        for conv in self.decoder_convs().values():
            conv.exact = on

    def scaled(self, y: Tensor, inverse: Tensor, quality: Tensor) -> Tensor:
        """g_a's output in steps of the quantiser.

        The gain is the decoder's, inverted: were it interpolated by itself, the product of the two would swing by a few
        per cent between knots, and large latents with it.
        """
        return y * (per_channel(interpolate(self.log_ratio, quality).exp()) / inverse)

    def forward(self, x: Tensor, quality: Tensor, hard: bool = False) -> Pass:
        """Training pass. x float [B, 3, H, W] in 0..255, H and W multiples of 64; quality int64 [B].

        ``hard`` counts the bits of the rounded latents, otherwise of latents with uniform noise.
        """
        exact = self.g_s.head.exact
        if not self.g_s.head.frozen:
            quality = shares(quality, self.config.knots)  # once for all layers
        y = self.g_a(x, quality).float()
        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not exact):
            inverse = per_channel(interpolate(self.log_inverse.exp(), quality))
            z_mean = per_channel(interpolate(snap(self.z_mean, UNIT), quality))
            z_index = per_channel(interpolate(self.z_index, quality)).clamp(0, SCALES - 1)
            y = self.scaled(y, inverse, quality)
            coded = self.quantised(y, z_mean, z_index, quality, whole if hard else noisy)
            x_hat = self.g_s(stream(coded.y_hat * inverse, exact), quality)
        return Pass(coded.bits, x_hat.float(), coded.residual, coded.scale_index)

    def quantised(
        self, y: Tensor, z_mean: Tensor, z_index: Tensor, quality: Tensor, rounding: Callable[[Tensor], Rounded]
    ) -> Quantised:
        """y [B, M, h, w], in steps of the quantiser, as the decoder gets it, and its bits. z_mean and z_index
        [B, C_z, 1, 1]: the prior of z."""
        rows, columns = y.shape[2:]
        z = self.h_a(F.pad(y, (0, -columns % HYPER, 0, -rows % HYPER), mode="replicate"), quality).float()
        counted, z_hat = rounding(z - z_mean)
        bits = gaussian_bits(counted, scale_of(z_index)).sum((1, 2, 3))
        features = self.h_s(z_hat + z_mean, quality)[:, :, :rows, :columns]
        y_hat, steps = torch.zeros_like(y), []
        for step, context in enumerate(self.context):
            quarters = step_quarters(rows, columns, step, y.device)
            mean, index = context(features, y_hat, quality)
            counted, value = rounding(pick(y, quarters) - mean)
            y_hat = place(y_hat, quarters, value + mean)
            steps.append((counted, index))
        residual, scale_index = (torch.cat(parts, 1) for parts in zip(*steps, strict=True))
        bits = bits + gaussian_bits(residual, scale_of(scale_index)).sum((1, 2, 3))
        return Quantised(bits, y_hat, residual, scale_index)


Rounded = tuple[Tensor, Tensor]
"""Of a latent less its mean: the value whose bits are counted, and the one that goes on to the decoder."""


def whole(value: Tensor) -> Rounded:
    """As the codec does it; the gradient passes straight through."""
    integer = rounded(value)
    return integer, integer


def noisy(value: Tensor) -> Rounded:
    """In training the bits are those of the uniform posterior."""
    return value + share_of_noise(torch.rand_like, value) - 0.5, rounded(value)
