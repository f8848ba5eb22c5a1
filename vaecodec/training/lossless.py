"""How the lossless model starts, what a training step minimises, how it is validated, and its entropy tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bitstream import Tables, gaussian_tables, normalise

from ..exact import ExactConv
from ..lossless import heads
from ..lossless.heads import differences, nearest, split
from ..lossless.layers import (
    CENTRE,
    CHANNEL_ORDER,
    FRACTIONS,
    LATENT_FRACTIONS,
    LATENT_SCALES,
    LATENT_UNIT,
    PHASES,
    SCALES,
    SHAPES,
    Config,
    index_of,
    latent_index_of,
    latent_scale_of,
    pixel_bits,
    scale_of,
)
from ..lossless.model import Gauss, Latent, Level, LosslessModel, Vae
from ..lossless.weights import save_lossless
from .crops import Crops
from .objective import FIT_BATCHES, PRIOR_WEIGHT, START_SIDE, Phase, centre, check_crop
from .ranks import share, shared


@dataclass(frozen=True)
class LosslessObjective:
    """The negative ELBO, in bits per sub-pixel.

    The crops that suit the finest level leave a few pixels of the coarsest image, all at their edge. So the VAE, which
    shares nothing with the levels, gets its own: ``coarse_batch`` of ``coarse_crop`` pixels a side.
    """

    config: Config
    coarse_batch: int = 2
    coarse_crop: int = 48
    worn: float = 0.0  # part of the crops that are made softer, noisier or poorer in colour
    configuration = Config
    name = "lossless"

    @property
    def step(self) -> int:
        """Pixels to one of the coarsest image, along one side."""
        step: int = 2**self.config.levels
        return step

    @property
    def stride(self) -> int:
        stride: int = self.step * 2 ** len(self.config.latents)
        return stride

    def build(self) -> LosslessModel:
        return LosslessModel(self.config)

    def check(self, phase: Phase, crops: Crops) -> None:
        if phase.hard:
            raise ValueError("hard phases are for lossy models: the latents of the others are not rounded")
        check_crop(phase, self.step, crops)
        if self.coarse_crop % 2 ** len(self.config.latents):
            raise ValueError(f"coarse_crop {self.coarse_crop}: {2 ** len(self.config.latents)} must divide it")
        crops.chances(self.step * (self.coarse_crop - 1) + 1)
        share(torch.empty(self.coarse_batch))

    def start(self, model: LosslessModel, crops: Crops, side: int) -> None:
        count = LINEAR_CROPS
        x = crops.batch(count, min(side, START_SIDE // 2))
        start_from_linear(model, x, crops.batch(count, self.coarse_crop, self.step))

    def calibrate(self, model: LosslessModel, crops: Crops, side: int) -> None:
        """All units are fixed."""

    def frozen(self, model: LosslessModel) -> list[nn.Parameter]:
        return []

    def loss(self, model: nn.Module, crops: Crops, phase: Phase) -> Tensor:
        x = share(crops.worn(phase.batch, phase.crop, self.worn))
        coarse = share(crops.batch(self.coarse_batch, self.coarse_crop, self.step))
        levels, *vae = model(x, coarse, shared(torch.randn_like))
        level_bits = sum(phase.bits().sum() for phases in levels for phase in phases)
        vae_bits = sum(part.sum() for name, part in bits(([], *vae)).items())
        loss: Tensor = level_bits / x.numel() + vae_bits / (coarse.numel() * self.step**2)
        return loss

    @torch.no_grad()
    def validate(self, model: LosslessModel, images: list[Tensor], device: torch.device) -> dict[str, float]:
        """Mean over centre crops of at most 512 x 512, in bits per sub-pixel, in all and by part."""
        rows = []
        for image in images:
            x = centre(image, self.stride, device)
            rows.append({name: float(part.sum()) / x.numel() for name, part in bits(model(x)).items()})
        parts = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {"bpsp": sum(parts.values()), **parts}

    def export(self, out: Path, model: LosslessModel, crops: Crops, side: int) -> None:
        model.exact(True)
        save_lossless(out, model, fit_pixel_tables(model, crops, side), latent_tables(True), latent_tables(False))

    def plot(self, axes: Any, rows: list[dict[str, str]]) -> None:
        axes.plot([float(row["minutes"]) for row in rows], [float(row["bpsp"]) for row in rows], marker="o")
        axes.set(xlabel="minutes", ylabel="bits per sub-pixel", title="validation")


def bits(out: tuple[list[list[heads.Phase]], heads.Phase, list[Latent]]) -> dict[str, Tensor]:
    """The parts of -ELBO in bits: phases of the levels (level 1 is the finest), coarsest image given its latents, and
    KL divergences."""
    levels, coarsest, latents = out
    parts = {
        f"{name}_{len(levels) - i}": phase.bits()
        for i, phases in enumerate(levels)
        for name, phase in zip(PHASES, phases, strict=True)
    }
    parts["x_given_z"] = coarsest.bits()
    return parts | {f"kl_{len(latents) - i}": latent.kl() for i, latent in enumerate(latents)}


LINEAR_CROPS = 300
GATED_START = 4.0
"""Size of the gated filters, in units of their spread over crops: what a gate of 1 means."""
LATENT_START, LATENT_START_STEPS = 8.0, 4.0
"""Scale of the first principal components, and the posterior's first standard deviation, in steps of the grid."""


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


TABLE_REACH = 1e-5
"""Pixel tables end where less than this lies outside; what does is escaped."""


def pixel_mass(scale: float, shape: int, half_width: int, fraction: float) -> NDArray[np.float64]:
    """Probabilities of -half_width..half_width around a mean of ``fraction``, then of all the rest."""
    values = torch.arange(-half_width, half_width + 1, dtype=torch.float64) - fraction
    index = index_of(torch.tensor(scale, dtype=torch.float64))
    mass = torch.exp2(-pixel_bits(values, index, torch.tensor(float(shape)))).numpy()
    return np.append(mass, max(1e-6, 1 - mass.sum()))


@torch.no_grad()
def fit_pixel_tables(model: LosslessModel, crops: Crops, side: int) -> Tables:
    """One table for each scale, shape and fraction of the mean: the histogram of training samples on the density that
    the model was trained with. A fraction f and its mirror image 1 - f share their samples.

    side: pixels of the crops, at most; a multiple of what the levels need is taken, and so of their coarsest image.
    """
    step, coarsest_step = 2**model.config.levels, 2 ** len(model.config.latents)
    side -= side % step
    coarse_side = -(-side // step // coarsest_step) * coarsest_step
    scales = scale_of(torch.arange(SCALES).double()).tolist()
    priors, widths = [], []
    for scale in scales:
        for shape in range(SHAPES):
            for f in range(FRACTIONS):
                width = 255
                mass = pixel_mass(scale, shape, width, f / FRACTIONS)
                tail = np.cumsum((mass[:-1] + mass[-2::-1])[: width + 1])
                width = max(2, int(width - np.searchsorted(tail, TABLE_REACH)))
                widths.append(width)
                priors.append(pixel_mass(scale, shape, width, f / FRACTIONS))
    reach = np.array(widths)
    histograms = [np.zeros(2 * w + 2) for w in widths]
    for _ in range(FIT_BATCHES):
        levels, coarsest, _ = model(crops.batch(4, side), crops.batch(4, coarse_side, step))
        for phase in [coarsest, *(phase for phases in levels for phase in phases)]:
            residual = phase.residual.flatten().double().numpy()
            # value = residual + mean, so the mean's fraction is minus the residual's
            fraction = np.round(-residual * FRACTIONS).astype(np.int64) % FRACTIONS
            index, shape_ = (part.flatten().round().long().numpy() for part in (phase.scale, phase.shape))
            table = (index * SHAPES + shape_) * FRACTIONS + fraction
            offset = np.round(residual + fraction / FRACTIONS).astype(np.int64)
            order = np.argsort(table, kind="stable")
            tables, starts = np.unique(table[order], return_index=True)
            for t, part in zip(tables, np.split(offset[order], starts[1:]), strict=True):
                slot = np.where(np.abs(part) <= reach[t], part + reach[t], 2 * reach[t] + 1)
                histograms[t] += np.bincount(slot, minlength=len(histograms[t]))
    counts = []
    for t, (prior, width) in enumerate(zip(priors, widths, strict=True)):
        f = t % FRACTIONS
        histogram = histograms[t].copy()
        mirror = histograms[t - f + (FRACTIONS - f) % FRACTIONS]
        # Around a mean of 1 - f, value v is as likely as 1 - v around f.
        shift = 1 if f else 0
        other = len(mirror) // 2 - 1
        for v in range(-width, width + 1):
            w = shift - v
            if abs(w) <= other:
                histogram[v + width] += mirror[w + other]
        counts.append(normalise(histogram / 2 + PRIOR_WEIGHT * prior))
    return Tables(-reach, counts, escape=True)


def latent_tables(escape: bool) -> Tables:
    """Gaussian tables for each scale and fraction of the mean."""
    scales = latent_scale_of(torch.arange(LATENT_SCALES).double()).numpy()
    fractions = np.arange(LATENT_FRACTIONS) / LATENT_FRACTIONS
    return gaussian_tables(np.repeat(scales, LATENT_FRACTIONS), np.tile(fractions, LATENT_SCALES), escape=escape)
