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

h_s, the context networks and g_s are exact (see ``exact.py``); g_a and h_a only run in the encoder and are trained in
floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exact import (
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
from .layers import (
    CONTEXT_MAX,
    HYPER,
    INDEX_GAIN,
    MEAN_MAX,
    OUT_MAX,
    PIXEL_SCALE,
    PIXEL_UNIT,
    SCALES,
    STEP_ORDER,
    STEPS,
    STREAM_MAX,
    STREAM_UNIT,
    UNIT,
    Block,
    Config,
    ExactBlock,
    bounded,
    conv_8,
    entropy_conv,
    gaussian_bits,
    given,
    of_seen,
    pick,
    place,
    scale_of,
    step_quarters,
    stream,
    wide_conv,
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


class HyperAnalysis(nn.Module):
    """h_a: y / step [B, M, h, w] (multiples of 4) to z [B, C_z, h/4, w/4]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.conv_a = Conv(c.latent, c.hyper, 3, knots=c.knots)
        self.conv_b = Conv(4 * c.hyper, c.hyper)
        self.conv_c = Conv(c.hyper, c.hyper, 3)
        self.conv_d = Conv(4 * c.hyper, c.hyper_latent, wide=True)

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        conv_a, conv_c = self.conv_a, self.conv_c
        h = torch.asinh(y)
        h = F.relu(conv_a(given(conv_a, h) if isinstance(conv_a, ExactConv) else h, quality))
        h = F.relu(self.conv_b(F.pixel_unshuffle(h, 2)))
        h = F.relu(conv_c(given(conv_c, h) if isinstance(conv_c, ExactConv) else h))
        z: Tensor = self.conv_d(F.pixel_unshuffle(h, 2))
        return z

    def in_8_bits(self) -> None:
        """Put the 3x3 layers in 8 bits, not calibrated yet."""
        for name, in_max in (("conv_a", 128), ("conv_c", 255)):
            conv = getattr(self, name)
            c_out, c_in, kernel, _ = conv.shape
            made = conv_8(c_in, c_out, kernel, in_max=in_max, low=0, high=255, knots=len(conv.bias))
            made.load_state_dict(conv.state_dict(), strict=False)
            setattr(self, name, made)


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


class Walk:
    """The context steps, one after the other: gives mean and table index of the latents of each, [B, M / 4, h, w] both,
    and before it goes on takes what these latents are. y_hat [B, M, h, w]: those that are known, 0 elsewhere."""

    def __init__(self, contexts: Iterable[nn.Module], features: Tensor, y_hat: Tensor, quality: Tensor) -> None:
        self.contexts, self.features, self.y_hat, self.quality = contexts, features, y_hat, quality

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step, context in enumerate(self.contexts):
            rows, columns = self.y_hat.shape[2:]
            self.quarters = step_quarters(rows, columns, step, self.y_hat.device)
            self.mean, index = context(self.features, self.y_hat, self.quality)
            yield self.mean, index

    def left(self, y: Tensor) -> Tensor:
        """Of latents y [B, M, h, w] those of this step, less their means."""
        left: Tensor = pick(y, self.quarters) - self.mean
        return left

    def take(self, values: Tensor) -> None:
        """Values [B, M / 4, h, w] of the latents of this step."""
        self.y_hat = place(self.y_hat, self.quarters, values)


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
        return self.exact_convs("h_s", "context", "g_s")

    def encoder_convs(self) -> dict[str, ExactConv]:
        """The layers of g_a and h_a that are in 8 bits, if any."""
        return self.exact_convs("g_a", "h_a")

    def exact_convs(self, *parts: str) -> dict[str, ExactConv]:
        return {
            name: m
            for part in parts
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

    def forward(self, x: Tensor, quality: Tensor, hard: bool = False, draw: Draw = torch.rand_like) -> Pass:
        """Training pass. x float [B, 3, H, W] in 0..255, H and W multiples of 64; quality int64 [B].

        ``hard`` counts the bits of the rounded latents, otherwise of latents with uniform noise, which ``draw`` draws.
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
            coded = self.quantised(y, z_mean, z_index, quality, whole if hard else partial(noisy, draw=draw))
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
        walk, steps = Walk(self.context, features, torch.zeros_like(y), quality), []
        for mean, index in walk:
            counted, value = rounding(walk.left(y))
            walk.take(value + mean)
            steps.append((counted, index))
        residual, scale_index = (torch.cat(parts, 1) for parts in zip(*steps, strict=True))
        bits = bits + gaussian_bits(residual, scale_of(scale_index)).sum((1, 2, 3))
        return Quantised(bits, walk.y_hat, residual, scale_index)


Draw = Callable[[Tensor], Tensor]
"""Noise of the shape of a tensor. Processes that train together draw for all of them, see ``training.ranks``."""
Rounded = tuple[Tensor, Tensor]
"""Of a latent less its mean: the value whose bits are counted, and the one that goes on to the decoder."""


def whole(value: Tensor) -> Rounded:
    """As the codec does it; the gradient passes straight through."""
    integer = rounded(value)
    return integer, integer


def noisy(value: Tensor, draw: Draw) -> Rounded:
    """In training the bits are those of the uniform posterior."""
    return value + draw(value) - 0.5, rounded(value)
