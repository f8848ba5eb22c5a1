"""From a trained model to the file that ships: entropy tables fitted to its latents, then integers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitstream import Tables, normalise

from .model import SCALES, Config, LossyModel, scale_of
from .train import Crops, load_images
from .weights import save

FIT_BATCHES = 80
PRIOR_WEIGHT = 300.0
"""How many observed latents the Gaussian counts for, in each table."""


def load_checkpoint(path: Path) -> LossyModel:
    """The averaged model of a training checkpoint, exact."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    config = state["config"]
    model = LossyModel(Config(**{**config, "blocks": tuple(config["blocks"])}))
    model.load_state_dict(state["average"])
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


def export(checkpoint: Path, data: Path, out: Path) -> None:
    """Write the weights file for a checkpoint; ``data``: training pictures to fit the tables on."""
    model = load_checkpoint(checkpoint)
    images = load_images(data)
    side = min(256, max(min(image.shape[1:]) for image in images) // 64 * 64)
    save(out, model, fit_tables(model, Crops(images, side, torch.device("cpu"), seed=2)))
