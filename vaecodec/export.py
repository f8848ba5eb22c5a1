"""From a trained model to the file that ships: entropy tables fitted to its latents, then integers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitstream import Tables, gaussian_tables, normalise

from . import lossless
from .crops import Crops, load_images
from .lossless import LosslessModel
from .model import SCALES, Config, LossyModel, scale_of
from .weights import save_lossless, save_lossy

FIT_BATCHES = 80
PRIOR_WEIGHT = 300.0
"""How many observed latents the Gaussian counts for, in each table."""


def load_checkpoint(path: Path) -> LossyModel | LosslessModel:
    """The averaged model of a training checkpoint, exact."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    config: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()}
    kind = state.get("kind", "lossy")
    model: LossyModel | LosslessModel
    model = LosslessModel(lossless.Config(**config)) if kind == "lossless" else LossyModel(Config(**config))
    model.load_state_dict(state["average"] if "average" in state else state["model"])
    model.exact(True)
    return model.eval()


def reach(sigma: float) -> int:
    """Half-width of a table: what lies beyond is escaped."""
    return math.ceil(4.5 * sigma) + 2


def gaussian_mass(sigma: float, half_width: int) -> NDArray[np.float64]:
    """Probabilities of -half_width..half_width, then of all the rest, with a little weight in the tails: latents are
    no perfect Gaussians."""
    edges = np.arange(-half_width, half_width + 2) - 0.5
    mass = np.zeros(2 * half_width + 1)
    for weight, spread in ((0.98, 1.0), (0.02, 3.0)):
        cdf = np.array([(1 + math.erf(e / (sigma * spread * math.sqrt(2)))) / 2 for e in edges])
        mass += weight * np.diff(cdf)
    return np.append(mass, max(1e-7, 1 - mass.sum()))


@torch.no_grad()
def fit_tables(model: LossyModel, crops: Crops) -> Tables:
    """One table for each scale index: the histogram of training latents, symmetric, on a Gaussian prior."""
    sigmas = scale_of(torch.arange(SCALES).double()).tolist()
    widths = np.array([reach(s) for s in sigmas])
    histograms = [np.zeros(2 * w + 2) for w in widths]
    for _ in range(FIT_BATCHES):
        out = model(crops.batch(4), crops.qualities(4), hard=True)
        index = out.scale_index.flatten().long().numpy()
        value = out.residual.flatten().round().long().numpy()
        inside = np.abs(value) <= widths[index]
        slot = np.where(inside, value + widths[index], 2 * widths[index] + 1)
        for t in np.unique(index):
            histograms[t] += np.bincount(slot[index == t], minlength=len(histograms[t]))
    counts = []
    for sigma, width, histogram in zip(sigmas, widths, histograms, strict=True):
        histogram[:-1] = (histogram[:-1] + histogram[-2::-1]) / 2
        counts.append(normalise(histogram + PRIOR_WEIGHT * gaussian_mass(sigma, int(width))))
    return Tables(-widths, counts, escape=True)


PIXEL_FRACTIONS, LATENT_FRACTIONS = 8, 4
TABLE_REACH = 1e-5
"""Pixel tables end where less than this lies outside; what does is escaped."""


def pixel_mass(scale: float, shape: int, half_width: int, fraction: float) -> NDArray[np.float64]:
    """Probabilities of -half_width..half_width around a mean of ``fraction``, then of all the rest."""
    values = torch.arange(-half_width, half_width + 1, dtype=torch.float64) - fraction
    index = lossless.index_of(torch.tensor(scale, dtype=torch.float64))
    mass = torch.exp2(-lossless.pixel_bits(values, index, torch.tensor(float(shape)))).numpy()
    return np.append(mass, max(1e-6, 1 - mass.sum()))


@torch.no_grad()
def fit_pixel_tables(model: LosslessModel, crops: Crops) -> Tables:
    """One table for each scale, shape and fraction of the mean: the histogram of training samples on the density that
    the model was trained with. A fraction f and its mirror image 1 - f share their samples."""
    f8 = PIXEL_FRACTIONS
    scales = lossless.scale_of(torch.arange(lossless.SCALES).double()).tolist()
    priors, widths = [], []
    for scale in scales:
        for shape in range(lossless.SHAPES):
            for f in range(f8):
                width = 255
                mass = pixel_mass(scale, shape, width, f / f8)
                tail = np.cumsum((mass[:-1] + mass[-2::-1])[: width + 1])
                width = max(2, int(width - np.searchsorted(tail, TABLE_REACH)))
                widths.append(width)
                priors.append(pixel_mass(scale, shape, width, f / f8))
    reach = np.array(widths)
    histograms = [np.zeros(2 * w + 2) for w in widths]
    for _ in range(FIT_BATCHES):
        levels, coarsest, _ = model(crops.batch(4))
        for phase in [coarsest, *(phase for phases in levels for phase in phases)]:
            residual = phase.residual.flatten().double().numpy()
            # value = residual + mean, so the mean's fraction is minus the residual's
            fraction = np.round(-residual * f8).astype(np.int64) % f8
            index, shape_ = (part.flatten().round().long().numpy() for part in (phase.scale, phase.shape))
            table = (index * lossless.SHAPES + shape_) * f8 + fraction
            offset = np.round(residual + fraction / f8).astype(np.int64)
            order = np.argsort(table, kind="stable")
            tables, starts = np.unique(table[order], return_index=True)
            for t, part in zip(tables, np.split(offset[order], starts[1:]), strict=True):
                slot = np.where(np.abs(part) <= reach[t], part + reach[t], 2 * reach[t] + 1)
                histograms[t] += np.bincount(slot, minlength=len(histograms[t]))
    counts = []
    for t, (prior, width) in enumerate(zip(priors, widths, strict=True)):
        f = t % f8
        histogram = histograms[t].copy()
        mirror = histograms[t - f + (f8 - f) % f8]
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
    scales = lossless.latent_scale_of(torch.arange(lossless.LATENT_SCALES).double()).numpy()
    fractions = np.arange(LATENT_FRACTIONS) / LATENT_FRACTIONS
    return gaussian_tables(
        np.repeat(scales, LATENT_FRACTIONS), np.tile(fractions, lossless.LATENT_SCALES), escape=escape
    )


def export(checkpoint: Path, data: Path, out: Path) -> None:
    """Write the weights file for a checkpoint, with its graphs; ``data``: training pictures to fit the tables on."""
    from .graphs import add_graphs  # onnx is not needed for the rest

    model = load_checkpoint(checkpoint)
    images = load_images(data)
    side = min(256, max(min(image.shape[1:]) for image in images) // 64 * 64)
    crops = Crops(images, side, torch.device("cpu"), seed=2)
    torch.manual_seed(2)  # for the latents
    if isinstance(model, LosslessModel):
        save_lossless(out, model, fit_pixel_tables(model, crops), latent_tables(True), latent_tables(False))
    else:
        save_lossy(out, model, fit_tables(model, crops))
    add_graphs(out)
