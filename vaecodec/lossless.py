"""The lossless variational autoencoder: p(x) over the integers 0..255, every network exact (see ``exact.py``).

A picture is split into its eighth-resolution image and three interlaced levels above it:

    x8          every eighth pixel of every eighth row; coded by bits-back with a hierarchy of Gaussian latents,
                z_3 -> z_2 -> z_1 -> x8, at 1/8, 1/4 and 1/2 of x8's resolution
    x4, x2, x   each from the one before it by a ``Level``

A level knows A, the pixels at even rows and columns, and codes D (odd, odd), then B (even row), then C (odd row):

    A B A B          Phases are coded one after the other, the pixels of one phase all at once, and of each pixel
    C D C D          green, then red given green, then blue given both.
    A B A B

What is coded is always an integer under a table that stands for a symmetric density: a mean in steps of 1/8, a scale
and a shape, which the networks give for each sample. The ELBO of the whole is

    log p(x) >= log p(x | x2) + log p(x2 | x4) + log p(x4 | x8)
                + E_q(z | x8)[log p(x8 | z) + log p(z) - log q(z | x8)].

Interlacing after Kang et al. 2022 (LLICTI), the hierarchy of latents after Townsend et al. 2019 (arXiv:1912.09953).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exact import ExactConv, keep_in, requantise, snap
from .ranks import share_of_noise

UNIT = 1 / 32
"""Grid of hidden activations; they lie in 0..HIDDEN_MAX * UNIT."""
HIDDEN_MAX = 511
OUT_UNIT = 1 / 256
"""Grid of what the last layers give."""
OUT_MAX = 64 * 256
"""Its limit, in its units."""
LEVEL_UNIT = 1 / 4
"""Grid of pixels as the networks see them: differences from a local mean, in grey levels."""
MEAN_UNIT = 1 / 8
GATE_UNIT = 1 / 256

LINEAR_CROPS = 300
GATED_START = 4.0
"""Size of the gated filters, in units of their spread over crops: what a gate of 1 means."""
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
LATENT_SCALES = 48
LATENT_SCALE_MIN, LATENT_SCALE_MAX = 0.4, 256.0
"""In steps of the grid."""
LATENT_START, LATENT_START_STEPS = 8.0, 4.0
"""Scale of the first principal components, and the posterior's first standard deviation, in steps of the grid."""
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


class Head(nn.Module):
    """From features and known pixels to mean, scale and shape of one phase, colour by colour.

    mean = centre + linear filter + gated linear filters + correction + shares of the residuals of the colours that are
    known. The centre is the median of the four nearest known pixels; for red and blue, green and the median of their
    differences from green. ``known``: phases whose pixels are known;
    ``span``: how many grey levels a correction of 1 means.
    """

    def __init__(self, c: Config, channels: int, known: int, span: float) -> None:
        super().__init__()
        self.filters, self.span = (c.filters if known else 0), span
        if known:
            self.base = ExactConv(
                3 * known,
                3 * (1 + c.filters),
                5,
                in_unit=1.0,
                in_max=CENTRE,
                out_unit=MEAN_UNIT,
                low=round(-255 / MEAN_UNIT),
                high=round(255 / MEAN_UNIT),
                wide=True,
                linear=True,
            )
            self.base.weight.data.mul_(0.3)
        given = HIDDEN_MAX + 1  # and what is added to it can change nothing beyond twice that
        self.hidden = conv(channels + 3 * (known > 0), 3 * c.hidden, low=-2 * given, high=2 * given)
        self.given = nn.ModuleList(conv(3 * k, c.hidden, low=-given, high=given) for k in (1, 2))
        self.out = nn.ModuleList(last(c.hidden, 3 + self.filters + k, zero=True) for k in range(3))

    def enter(self, h: Tensor, spread: Tensor | None, colour: int | None = None) -> Tensor:
        """Hidden activations before what earlier colours say, of one colour [B, K, h, w] or of all [B, 3 K, h, w].

        h [B, width, h, w]: the state; spread: see ``Start``.
        """
        inputs = h if spread is None else joined(h, spread)
        rows = torch.arange(len(self.hidden.weight), device=h.device)
        hidden: Tensor = self.hidden(inputs, rows=None if colour is None else rows.chunk(3)[colour])
        return hidden

    def linear(self, known: list[Tensor]) -> Tensor:
        """The linear filters [B, 3 (1 + filters), h, w], colours in coding order, of known pixels [B, 3, h, w] each."""
        pixels = F.pad(torch.cat(known, 1) - CENTRE, (2, 2, 2, 2), mode="replicate")
        x: Tensor = self.base(pixels)[..., 2:-2, 2:-2]
        return x

    def colour(
        self, k: int, hidden: Tensor, linear: Tensor | None, centre: Tensor, seen: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, scale index and shape [B, h, w] of the k-th colour.

        hidden [B, K, h, w] of ``enter``; centre [B, h, w]; seen: for each earlier colour its
        residual in grey levels and the residual in scales (``normalised``).
        """
        exact, h = self.hidden.exact, hidden
        if k:
            inputs = torch.stack([part for r, e in seen for part in (coarse(r, exact), e, logarithm(r, exact))], 1)
            h = h + self.given[k - 1](inputs.to(h.dtype))
        out = F.hardtanh(self.out[k](act(h)).float(), -16, 16)
        mean = centre + out[:, 0] * self.span
        # The factors set how far a training step moves each: many filters add up, so a gate must move little.
        gates = requantise(out[:, 3 : 3 + self.filters] / 8, GATE_UNIT, -2, 2, exact)
        shares = requantise(out[:, 3 + self.filters :] / 2, GATE_UNIT, -2, 2, exact)
        if linear is not None:
            own = linear.chunk(3, 1)[k]
            mean = mean + own[:, 0] + (own[:, 1:] * gates).sum(1)
        for (residual, _), share in zip(seen, shares.unbind(1), strict=True):
            mean = mean + residual * share
        index = requantise(keep_in(16 + 4 * out[:, 1], 0, SCALES - 1), 1.0, 0, SCALES - 1, exact)
        shape = requantise(keep_in(1 + 2 * out[:, 2], 0, SHAPES - 1), 1.0, 0, SHAPES - 1, exact)
        return requantise(mean, MEAN_UNIT, 0, 255, exact), index, shape


def coarse(residual: Tensor, exact: bool) -> Tensor:
    """Grey levels as an activation."""
    return requantise(residual / 8, UNIT, -16, 16, exact)


LOGARITHMS = torch.tensor(
    [round(32 * math.log2(1 + n / 8)) / 32 for n in range(4096)], dtype=torch.float32, device="cpu"
)
"""log2(1 + |x|) for |x| in eighths, on the grid of activations; no value is near a tie."""


def logarithm(x: Tensor, exact: bool) -> Tensor:
    """log2(1 + |x|) of grey levels as an activation: scales are logarithms, which small networks are bad at."""
    if not exact:
        return torch.log2(1 + x.abs())
    return logarithms(x.device, x.dtype)[(x.abs() * 8).clamp(max=len(LOGARITHMS) - 1).long()]


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


class Phase(NamedTuple):
    """What a training pass gives for the samples of one phase [B, 3, h, w]: residual, scale index, shape."""

    residual: Tensor
    scale: Tensor
    shape: Tensor

    def bits(self) -> Tensor:
        return pixel_bits(*self)


class Start(NamedTuple):
    """What a head starts from beside the state: where means start [B, 3, h, w] and, where there are known pixels, the
    linear filters [B, 3 (1 + filters), h, w] and how far those pixels lie apart, as an activation [B, 3, h, w]."""

    centre: Tensor
    linear: Tensor | None = None
    spread: Tensor | None = None


def predict(head: Head, h: Tensor, start: Start, x: Tensor) -> tuple[Phase, Tensor]:
    """All colours of a phase whose pixels x [B, 3, h, w] are known, and the activations that tell later phases how
    good the prediction was [B, 3, h, w]."""
    seen: list[tuple[Tensor, Tensor]] = []
    parts = []
    hidden = head.enter(h, start.spread).chunk(3, 1)
    for k, c in enumerate(CHANNEL_ORDER):
        centre = start.centre[:, c] + x[:, 1] if k and start.linear is not None else start.centre[:, c]
        mean, index, shape = head.colour(k, hidden[k], start.linear, centre, seen)
        residual = x[:, c] - mean
        seen.append((residual, normalised(residual, index, head.hidden.exact)))
        parts.append((residual, index, shape))
    phase = Phase(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))
    return phase, torch.stack([e for _, e in seen], 1)


def split(x: Tensor) -> dict[str, Tensor]:
    """The four phases of x [B, 3, 2h, 2w]: [B, 3, h, w] each."""
    return {"A": x[..., ::2, ::2], "B": x[..., ::2, 1::2], "C": x[..., 1::2, ::2], "D": x[..., 1::2, 1::2]}


def local_mean(a: Tensor) -> Tensor:
    """Binomial 3x3 mean of a [B, 3, h, w] in steps of LEVEL_UNIT."""
    x = F.pad(a, (1, 1, 1, 1), mode="replicate")
    x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    x = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    return snap(x / 16, LEVEL_UNIT)


def differences(x: Tensor) -> Tensor:
    """Red and blue less green, and green, of x [B, 3, h, w]."""
    green = x[:, 1:2]
    return torch.cat([x[:, :1] - green, green, x[:, 2:] - green], 1)


def nearest(phase: str, known: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the four nearest known pixels, for each pixel of a phase, the mean of the two middle ones and the difference
    of the outer ones [B, 3, h, w]; of red and blue, of their differences from green."""
    known = [differences(pixels) for pixels in known]
    height, width = known[0].shape[2:]

    def at(pixels: Tensor, row: int, column: int) -> Tensor:
        padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
        return padded[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    a = known[0]
    if phase == "D":
        four = (a, at(a, 1, 1), at(a, 0, 1), at(a, 1, 0))
    elif phase == "B":
        four = (a, at(a, 0, 1), at(known[1], -1, 0), known[1])
    else:
        four = (a, at(a, 1, 0), at(known[1], 0, -1), known[1])
    lows = torch.minimum(four[0], four[1]), torch.minimum(four[2], four[3])
    highs = torch.maximum(four[0], four[1]), torch.maximum(four[2], four[3])
    middle = (torch.maximum(*lows) + torch.minimum(*highs)) / 2
    return middle, torch.maximum(*highs) - torch.minimum(*lows)


class Level(nn.Module):
    """p(D, B, C | A, features of the coarser levels)."""

    def __init__(self, c: Config, blocks: int, features_in: int, features_out: int) -> None:
        super().__init__()
        self.entry = conv(9 + features_in, c.width, 3)
        self.blocks = nn.ModuleList(Residual(c.width) for _ in range(blocks))
        self.heads = nn.ModuleDict({p: Head(c, c.width, known, 8.0) for known, p in enumerate(PHASES, 1)})
        updated = PHASES if features_out else PHASES[:-1]
        self.updates = nn.ModuleDict({p: Residual(c.width, 6) for p in updated})
        self.up = conv(c.width, 4 * features_out) if features_out else None

    def head(self, phase: str) -> Head:
        head = self.heads[phase]
        assert isinstance(head, Head)
        return head

    def enter(self, a: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """State [B, width, h, w] before the first phase, and the local mean [B, 3, h, w]."""
        exact = self.entry.exact
        mean = local_mean(a)
        bands = [coarse(a - mean, exact), coarse(mean - CENTRE, exact), coarse(2 * (mean - local_mean(mean)), exact)]
        h: Tensor = self.entry(joined(*bands, *([features] if features is not None else [])))
        for block in self.blocks:
            h = block(h)
        return h, mean

    def prepare(self, phase: str, *known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A phase's ``Start``, from the known phases [B, 3, h, w] each."""
        centre, spread = nearest(phase, list(known))
        return centre, self.head(phase).linear(list(known)), logarithm(spread, self.entry.exact)

    def update(self, phase: str, h: Tensor, difference: Tensor, normal: Tensor) -> Tensor:
        """The state after a phase: its pixels as differences from the local mean, and its normalised residuals."""
        updated: Tensor = self.updates[phase](h, coarse(difference, self.entry.exact), normal)
        return updated

    def features(self, h: Tensor) -> Tensor:
        """What the next finer level sees [B, features, 2h, 2w]."""
        assert self.up is not None
        return F.pixel_shuffle(self.up(h), 2)

    def forward(self, x: Tensor, features: Tensor | None) -> tuple[list[Phase], Tensor | None]:
        """Training pass: x [B, 3, 2h, 2w] in 0..255."""
        parts = split(x)
        h, mean = self.enter(parts["A"], features)
        known, phases = [parts["A"]], []
        for name in PHASES:
            phase, normal = predict(self.head(name), h, Start(*self.prepare(name, *known)), parts[name])
            known.append(parts[name])
            phases.append(phase)
            if name in self.updates:
                h = self.update(name, h, known[-1] - mean, normal)
        return phases, self.features(h) if self.up is not None else None


class Latent(NamedTuple):
    """One group of latents in a training pass [B, C, h, w]: mean and scale index of posterior and of prior."""

    q_mean: Tensor
    q_index: Tensor
    p_mean: Tensor
    p_index: Tensor

    def kl(self) -> Tensor:
        """KL(q || p) of each latent in bits, closed form for two Gaussians."""
        q, p = latent_scale_of(self.q_index), latent_scale_of(self.p_index)
        distance = ((self.q_mean - self.p_mean) / LATENT_UNIT).square()
        return (torch.log(p / q) + (q.square() + distance) / (2 * p.square()) - 0.5) / math.log(2)


class Gauss(nn.Module):
    """A layer that gives mean and scale index of Gaussian latents."""

    def __init__(self, c_in: int, latents: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = last(c_in, 2 * latents, kernel)
        with torch.no_grad():
            self.conv.weight.mul_(0.03)

    def forward(self, h: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and index; ``linear`` [B, C, h, w] is added to the mean."""
        mean, index = self.conv(h).float().chunk(2, 1)
        return on_grids(mean + linear, 24 + 8 * index, self.conv.exact)


def on_grids(mean: Tensor, index: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Mean of latents on a quarter of their grid, and scale index."""
    limit, last = LATENT_MAX * LATENT_UNIT, LATENT_SCALES - 1
    mean = requantise(mean, LATENT_UNIT / 4, -limit, limit, exact)
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


class Above(NamedTuple):
    """What coarser latents say: features [B, width, h, w] and a linear prediction [B, C, h, w]."""

    h: Tensor
    linear: Tensor


class Vae(nn.Module):
    """The coarsest image with its latents; the last group is the coarsest."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        w, groups = c.vae_width, len(c.latents)
        self.entry = conv(12, w, 3)
        self.down = nn.ModuleList(conv(4 * w, w) for _ in range(groups - 1))
        self.bottom_up = nn.ModuleList(
            nn.Sequential(*(Residual(w) for _ in range(c.vae_blocks))) for _ in range(groups)
        )
        self.posterior = nn.ModuleList(Gauss(w if g == groups - 1 else 2 * w, n, 3) for g, n in enumerate(c.latents))
        self.prior = nn.ModuleList(Gauss(w, n) for n in c.latents[:-1])
        # Linear paths beside the networks: pixels to posterior means, latents to the means of what they stand above.
        self.project = nn.ModuleList(
            linear_conv(3 * 4 ** (g + 1), n, 1, 1 / CENTRE, CENTRE) for g, n in enumerate(c.latents)
        )
        self.expand = nn.ModuleList(
            linear_conv(n, 4 * m, 3, LATENT_UNIT, LATENT_MAX) for n, m in zip(c.latents, (3, *c.latents), strict=False)
        )
        top = torch.zeros(2, c.latents[-1])
        top[1] = 24
        self.top_mean, self.top_index = nn.Parameter(top[0]), nn.Parameter(top[1])
        self.take = nn.ModuleList(
            ExactConv(
                n,
                w,
                3,
                in_unit=LATENT_UNIT,
                in_max=LATENT_MAX,
                out_unit=UNIT,
                low=-HIDDEN_MAX,
                high=HIDDEN_MAX,
            )
            for n in c.latents
        )
        self.top_down = nn.ModuleList(nn.Sequential(*(Residual(w) for _ in range(c.vae_blocks))) for _ in range(groups))
        self.up = nn.ModuleList(conv(w, 4 * w) for _ in range(groups))
        self.last = Residual(w)
        self.head = Head(c, w, 0, 64.0)

    def inference(self, x: Tensor) -> list[Tensor]:
        """Bottom-up features, finest first, of x [B, 3, 8h, 8w] in 0..255 (for three groups)."""
        exact = self.entry.exact
        h: Tensor = self.entry(F.pixel_unshuffle(requantise((x - 128) / 8, UNIT, -16, 16, exact), 2))
        features = []
        for g, blocks in enumerate(self.bottom_up):
            if g:
                h = self.down[g - 1](F.pixel_unshuffle(h, 2))
            h = blocks(h)
            features.append(h)
        return features

    def prior_of(self, g: int, above: Above | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale index of p(z_g | coarser latents), each [B, C, h, w]."""
        if above is not None:
            mean, index = self.prior[g](above.h, above.linear)
            return mean, index
        size = (len(like), -1, *like.shape[2:])
        mean, index = on_grids(self.top_mean, self.top_index, self.entry.exact)
        return mean[None, :, None, None].expand(size), index[None, :, None, None].expand(size)

    def posterior_of(self, g: int, above: Above | None, features: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale index of q(z_g | coarser latents, x)."""
        linear = self.project[g](F.pixel_unshuffle((x - CENTRE) / CENTRE, 2 ** (g + 1)))
        inputs = features if above is None else torch.cat([features, above.h], 1)
        mean, index = self.posterior[g](inputs, linear)
        return mean, index

    def descend(self, g: int, above: Above | None, z: Tensor) -> Above:
        """What is known after z_g [B, C, h, w], at twice its resolution."""
        exact = self.entry.exact
        seen = requantise(z, LATENT_UNIT, -LATENT_MAX * LATENT_UNIT, LATENT_MAX * LATENT_UNIT, exact)
        h = act(self.take[g](seen) + (0 if above is None else above.h))
        h = self.top_down[g](h)
        return Above(F.pixel_shuffle(self.up[g](h), 2), F.pixel_shuffle(self.expand[g](seen), 2))

    def sample(self, x: Tensor) -> tuple[Above, list[Latent]]:
        """Latents of x [B, 3, h, w] drawn from the posterior, differentiable, and what they say of x."""
        features, above, latents = self.inference(x), None, []
        for g in range(len(features) - 1, -1, -1):
            p_mean, p_index = self.prior_of(g, above, features[g])
            q_mean, q_index = self.posterior_of(g, above, features[g], x)
            z = q_mean + share_of_noise(torch.randn_like, q_mean) * latent_scale_of(q_index) * LATENT_UNIT
            above = self.descend(g, above, z)
            latents.append(Latent(q_mean, q_index, p_mean, p_index))
        assert above is not None
        return above, latents

    def likelihood(self, x: Tensor, above: Above) -> Phase:
        """p(x | latents)."""
        return predict(self.head, self.last(above.h), Start(self.centre(above)), x)[0]

    def centre(self, above: Above) -> Tensor:
        """Where the likelihood's means start from, in grey levels [B, 3, h, w]."""
        return CENTRE + CENTRE * above.linear


class LosslessModel(nn.Module):
    """The VAE of the coarsest image and the levels above it, coarsest level first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.vae = Vae(c)
        self.levels = nn.ModuleList(
            Level(c, c.blocks + 2 * depth, c.features * (depth < c.levels - 1), c.features * (depth > 0))
            for depth in range(c.levels - 1, -1, -1)
        )

    def convs(self) -> Iterator[tuple[str, ExactConv]]:
        return ((name, m) for name, m in self.named_modules() if isinstance(m, ExactConv))

    def exact(self, on: bool) -> None:
        for _, layer in self.convs():
            layer.exact = on

    def forward(self, x: Tensor, coarse: Tensor | None = None) -> tuple[list[list[Phase]], Phase, list[Latent]]:
        """Training pass. x float [B, 3, H, W] in 0..255; H, W multiples of 2^levels.

        coarse: what the VAE codes, [B', 3, h, w], h and w multiples of 2^groups; x's own coarsest image by default.
        """
        exact = self.vae.entry.exact
        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not exact):
            step = 2**self.config.levels
            coarse = x[..., ::step, ::step] if coarse is None else coarse
            above, latents = self.vae.sample(coarse)
            return self.phases(x), self.vae.likelihood(coarse, above), latents

    def phases(self, x: Tensor) -> list[list[Phase]]:
        """The phases of the levels, the coarsest first, given the coarsest image."""
        step, levels, features = 2**self.config.levels, [], None
        for level in self.levels:
            step //= 2
            phases, features = level(x[..., ::step, ::step], features)
            levels.append(phases)
        return levels


@torch.no_grad()
def start_from_linear(model: LosslessModel, x: Tensor, coarse: Tensor) -> None:
    """Start each level's linear filters at weighted least squares on training crops; flat places weigh more.

    The gated filters are principal components of how the best filters of single crops differ from those of all.
    x: crops [B, 3, H, W] in 0..255; coarse: crops of the coarsest image, from which the VAE's linear paths start.
    """
    x = x.cpu()
    filters = model.config.filters
    for depth, module in enumerate(model.levels):
        assert isinstance(module, Level)
        step = 2 ** (model.config.levels - 1 - depth)
        parts = split(x[..., ::step, ::step])
        known = [parts["A"]]
        for name in PHASES:
            base = module.head(name).base
            inputs = F.pad(torch.cat(known, 1) - CENTRE, (2, 2, 2, 2), mode="replicate")
            rows = F.unfold(inputs, 5).transpose(1, 2).double()  # [crops, pixels, taps]
            target = (differences(parts[name]) - nearest(name, known)[0])[:, CHANNEL_ORDER]
            target = target.flatten(2).transpose(1, 2).double()
            weighted = rows / (rows.var(2, keepdim=True) + 4)
            grams, cross = rows.mT @ weighted, weighted.mT @ target
            gram = grams.mean(0)
            gram += torch.eye(len(gram)) * (1e-5 * gram.diagonal().mean())
            solution = solve(gram, cross.mean(0))
            apart = solve(grams + gram, cross - grams @ solution)  # pulled towards the solution
            root = torch.linalg.cholesky(gram)
            weight = base.weight.view(3, 1 + filters, -1)
            for k in range(3):
                vectors, values, _ = torch.linalg.svd(root.T @ apart[..., k].T, full_matrices=False)
                spread = vectors[:, :filters] * (values[:filters] / math.sqrt(len(x)))
                weight[k, 0] = solution[:, k].float()
                weight[k, 1:] = GATED_START * torch.linalg.solve_triangular(root.T, spread, upper=True).T.float()
            known.append(parts[name])
    start_vae(model.vae, coarse.cpu())


def solve(a: Tensor, b: Tensor) -> Tensor:
    """a^-1 b, by numpy: torch 2.15's (MKL) has been seen to wait for ever in it on a busy machine with two threads."""
    return torch.from_numpy(np.linalg.solve(a.numpy(), b.numpy()))


def start_vae(vae: Vae, x: Tensor) -> None:
    """Start the linear paths: principal components as latents, and least squares from each group to what is below."""
    x = (x - CENTRE) / CENTRE
    below = x
    for g, (project, expand) in enumerate(zip(vae.project, vae.expand, strict=True)):
        posterior = vae.posterior[g]
        assert isinstance(project, ExactConv) and isinstance(expand, ExactConv) and isinstance(posterior, Gauss)
        blocks = F.pixel_unshuffle(x, 2 ** (g + 1))
        rows = blocks.permute(0, 2, 3, 1).flatten(0, 2).double()
        vectors = torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, : len(project.weight)].T
        scale = LATENT_START / 2**g
        project.weight[: len(vectors)] = (vectors * scale).float()
        project.weight[len(vectors) :] = 0
        z = project(blocks)
        seen = F.unfold(z, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        target = F.pixel_unshuffle(below, 2).permute(0, 2, 3, 1).flatten(0, 2).double()
        gram = seen.T @ seen
        gram += torch.eye(len(gram)) * (1e-4 * gram.diagonal().mean())
        solution = solve(gram, seen.T @ target).T
        expand.weight.copy_(solution)
        if g:
            error = (target - seen @ solution.T).std(0).view(-1, 4).mean(1) / LATENT_UNIT
            prior = vae.prior[g - 1]
            assert isinstance(prior, Gauss)
            prior.conv.bias[0, len(error) :] = (latent_index_of(error.float()) - 24) / 8
        below = z
        posterior.conv.bias[0, len(z[0]) :] = (latent_index_of(torch.tensor(LATENT_START_STEPS)) - 24) / 8
    vae.top_index.copy_(latent_index_of(z.std((0, 2, 3)) / LATENT_UNIT))
