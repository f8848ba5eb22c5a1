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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exact import ExactConv, reach_of, requantise
from .heads import MEAN_REACH, ByteHead, Head, Phase, Start, local_mean, nearest, predict, split
from .layers import (
    CENTRE,
    HIDDEN_MAX,
    LATENT_MAX,
    LATENT_UNIT,
    OF_COARSE,
    OF_SIGNS,
    PHASES,
    UNIT,
    Config,
    Plain,
    Residual,
    act,
    byte_conv,
    coarse,
    coarse_bytes,
    conv,
    joined,
    last,
    latent_scale_of,
    linear_conv,
    logarithm,
    on_grids,
    signs,
)


class Level(nn.Module):
    """p(D, B, C | A, features of the coarser levels)."""

    def __init__(self, c: Config, blocks: int, features_in: int, features_out: int) -> None:
        super().__init__()
        self.in_bytes, self.takes = c.in_bytes, features_in
        updated = PHASES if features_out else PHASES[:-1]
        if c.in_bytes:
            self.entry = byte_conv(features_in, c.width, 3, (9, OF_COARSE))
            self.blocks = nn.ModuleList(Plain(c.width) for _ in range(blocks))
            self.updates = nn.ModuleDict({p: Plain(c.width, (3, OF_COARSE), (3, OF_SIGNS)) for p in updated})
        else:
            self.entry = conv(9 + features_in, c.width, 3)
            self.blocks = nn.ModuleList(Residual(c.width) for _ in range(blocks))
            self.updates = nn.ModuleDict({p: Residual(c.width, 6) for p in updated})
        head = ByteHead if c.in_bytes else Head
        self.heads = nn.ModuleDict({p: head(c, c.width, known, 8.0) for known, p in enumerate(PHASES, 1)})
        up = byte_conv if c.in_bytes else conv
        self.up = up(c.width, 4 * features_out, 1) if features_out else None

    def head(self, phase: str) -> Head:
        head = self.heads[phase]
        assert isinstance(head, Head)
        return head

    @property
    def reach(self) -> int:
        """How many pixels beyond each ``enter`` looks at: the mean of a mean is the widest that it makes of them."""
        return 2 * MEAN_REACH + reach_of(self.entry, self.blocks)

    def enter(self, a: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """State [B, width, h, w] before the first phase, and the local mean [B, 3, h, w]."""
        exact = self.entry.exact
        mean = local_mean(a)
        bands = [coarse(a - mean, exact), coarse(mean - CENTRE, exact), coarse(2 * (mean - local_mean(mean)), exact)]
        if self.in_bytes:
            bands = [*([features] if features is not None else []), coarse_bytes(torch.cat(bands, 1), exact)]
        elif features is not None:
            bands.append(features)
        h: Tensor = self.entry(joined(*bands))
        for block in self.blocks:
            h = block(h)
        return h, mean

    def prepare(self, phase: str, *known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A phase's ``Start``, from the known phases [B, 3, h, w] each."""
        centre, spread = nearest(phase, list(known))
        return centre, self.head(phase).linear(list(known)), logarithm(spread, self.entry.exact)

    def update(self, phase: str, h: Tensor, difference: Tensor, normal: Tensor) -> Tensor:
        """The state after a phase: its pixels as differences from the local mean, and its normalised residuals."""
        difference = coarse(difference, self.entry.exact)
        if self.in_bytes:
            difference, normal = coarse_bytes(difference, self.entry.exact), signs(normal)
        updated: Tensor = self.updates[phase](h, difference, normal)
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


class Above(NamedTuple):
    """What coarser latents say: features [B, width, h, w] and a linear prediction [B, C, h, w]."""

    h: Tensor
    linear: Tensor


Draw = Callable[[Tensor], Tensor]
"""Normal noise of the shape of a tensor. Processes that train together draw for all, see ``training.ranks``."""


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

    def sample(self, x: Tensor, draw: Draw = torch.randn_like) -> tuple[Above, list[Latent]]:
        """Latents of x [B, 3, h, w] drawn from the posterior, differentiable, and what they say of x."""
        features, above, latents = self.inference(x), None, []
        for g in range(len(features) - 1, -1, -1):
            p_mean, p_index = self.prior_of(g, above, features[g])
            q_mean, q_index = self.posterior_of(g, above, features[g], x)
            z = q_mean + draw(q_mean) * latent_scale_of(q_index) * LATENT_UNIT
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

    def forward(
        self, x: Tensor, coarse: Tensor | None = None, draw: Draw = torch.randn_like
    ) -> tuple[list[list[Phase]], Phase, list[Latent]]:
        """Training pass. x float [B, 3, H, W] in 0..255; H, W multiples of 2^levels.

        coarse: what the VAE codes, [B', 3, h, w], h and w multiples of 2^groups; x's own coarsest image by default.
        draw: the noise of the posterior.
        """
        exact = self.vae.entry.exact
        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not exact):
            step = 2**self.config.levels
            coarse = x[..., ::step, ::step] if coarse is None else coarse
            above, latents = self.vae.sample(coarse, draw)
            return self.phases(x), self.vae.likelihood(coarse, above), latents

    def phases(self, x: Tensor) -> list[list[Phase]]:
        """The phases of the levels, the coarsest first, given the coarsest image."""
        step, levels, features = 2**self.config.levels, [], None
        for level in self.levels:
            step //= 2
            phases, features = level(x[..., ::step, ::step], features)
            levels.append(phases)
        return levels
