"""How the lossy model starts, what a training step minimises, how it is validated, and its entropy tables."""

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

from bitstream import Tables, normalise

from ..exact import QUALITY_MAX
from ..lossy.layers import HYPER, PATCH, PIXEL_SCALE, SCALES, Config, lagrangian, scale_of
from ..lossy.model import LossyModel
from ..lossy.weights import save_lossy
from .calibrate import calibrate
from .crops import Crops
from .objective import FIT_BATCHES, PRIOR_WEIGHT, START_SIDE, Phase, centre, check_crop
from .ranks import share, shared

PCA_CROPS = 700
"""Crops that the model starts from."""
CALIBRATION_CROPS = 16
LOWPASS = 16
"""Pixels, along one side, that a mean of the error is taken over where it weighs more."""
VALIDATION_QUALITIES = (0, 2500, 5000, 7500, 10000)


def start_from_pca(model: LossyModel, x: Tensor) -> None:
    """Make the untrained model the linear codec it generalises: a two-level Karhunen-Loeve transform.

    The residual blocks start at zero, so g_a is then its first two 1x1 layers and g_s the transposes: principal
    components of 8x8x3 pixels, then of 2x2 of those. Streams carry each component divided by the square root of its
    standard deviation: half-way to whitening, so that no channel drowns in its grid or leaves its range.
    x: crops [B, 3, H, W] in 0..255.
    """
    c = model.config
    x = (x.cpu().double() - 128) / PIXEL_SCALE

    def components(features: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        values, vectors = values.flip(0)[:keep].clamp(min=1e-6), vectors.flip(1)[:, :keep].T
        deviation = values.sqrt()
        return vectors, deviation.sqrt() * deviation.mean().sqrt()

    unshuffled = F.pixel_unshuffle(x, 8)
    first, scale_1 = components(unshuffled, c.width)
    fine = torch.einsum("oc,bchw->bohw", first, unshuffled)
    second, scale_2 = components(F.pixel_unshuffle(fine, 2), c.latent)
    spread = scale_1.repeat_interleave(4)
    with torch.no_grad():
        model.g_a.stem.weight.copy_(first / scale_1[:, None])
        model.g_a.down.weight.copy_(second * spread / scale_2[:, None])
        model.g_s.up.weight.copy_((second / spread).T * scale_2)
        model.g_s.head.weight.copy_(first.T * scale_1)
        # Quantiser step at high rate: minimise -3 log2(step) + lambda * step^2 / 12 over the step.
        weight = lagrangian(torch.linspace(0, QUALITY_MAX, c.knots), c.lambda_max)
        step = (18 / (math.log(2) * weight)).sqrt() / PIXEL_SCALE
        gain = scale_2[None, :] / step[:, None]
        model.log_inverse.copy_(-gain.log())


def rate_distortion_loss(
    model: nn.Module,
    x: Tensor,
    quality: Tensor,
    power: float,
    largest: float,
    lowpass: float = 0.0,
    hard: bool = False,
) -> Tensor:
    """Mean over the batch of (bpp + lambda * MSE) / lambda^power, MSE on the 0..255 scale.

    largest: lambda at quality 100. lowpass: how much more the error of means of LOWPASS pixels weighs at quality 0; at
    quality 100 it is nothing.
    """
    out = model(x, quality, hard=hard, draw=shared(torch.rand_like))
    bpp = out.bits / (x.shape[2] * x.shape[3])
    error = out.x_hat - x
    mse = error.square().mean((1, 2, 3))
    if lowpass:
        patches = F.avg_pool2d(error, LOWPASS).square().mean((1, 2, 3))
        mse = mse + lowpass * (1 - quality / QUALITY_MAX).square() * patches
    weight = lagrangian(quality, largest)
    loss: Tensor = ((bpp + weight * mse) / weight**power).mean()
    return loss


@torch.no_grad()
def validate(model: LossyModel, images: list[Tensor], device: torch.device) -> list[tuple[int, float, float]]:
    """(quality, mean bpp, mean PSNR) of rounded latents on centre crops of at most 512 x 512."""
    rows = []
    for quality in VALIDATION_QUALITIES:
        bits, psnr = [], []
        for image in images:
            x = centre(image, PATCH * HYPER, device)
            out = model(x, torch.tensor([quality], device=device), hard=True)
            mse = (out.x_hat.clamp(0, 255).round() - x).square().mean()
            bits.append(float(out.bits) / (x.shape[2] * x.shape[3]))
            psnr.append(10 * math.log10(255**2 / max(float(mse), 1e-9)))
        rows.append((quality, sum(bits) / len(bits), sum(psnr) / len(psnr)))
    return rows


@dataclass(frozen=True)
class LossyObjective:
    """Rate and distortion of Balle et al. 2018 (arXiv:1802.01436): bits per pixel + lambda * MSE, with a quality drawn
    for each sample."""

    config: Config
    loss_power: float = 0.4
    lowpass: float = 0.0
    configuration = Config
    name = "lossy"
    stride = PATCH * HYPER

    def build(self) -> LossyModel:
        return LossyModel(self.config)

    def check(self, phase: Phase, crops: Crops) -> None:
        check_crop(phase, PATCH, crops)

    def start(self, model: LossyModel, crops: Crops, side: int) -> None:
        start_from_pca(model, crops.batch(PCA_CROPS, min(side, START_SIDE)))

    def calibrate(self, model: LossyModel, crops: Crops, side: int) -> None:
        calibrate(model, crops.batch(CALIBRATION_CROPS, side), crops.qualities(CALIBRATION_CROPS))

    def frozen(self, model: LossyModel) -> list[nn.Parameter]:
        return [*model.g_a.parameters(), *model.h_a.parameters(), model.log_ratio]

    def loss(self, model: nn.Module, crops: Crops, phase: Phase) -> Tensor:
        x, quality = share(crops.resized(phase.batch, phase.crop)), share(crops.qualities(phase.batch))
        largest = self.config.lambda_max
        return rate_distortion_loss(model, x, quality, self.loss_power, largest, self.lowpass, phase.hard)

    def validate(self, model: LossyModel, images: list[Tensor], device: torch.device) -> dict[str, float]:
        return {
            f"{name}_{quality // 100}": value
            for quality, bpp, psnr in validate(model, images, device)
            for name, value in (("bpp", bpp), ("psnr", psnr))
        }

    def export(self, out: Path, model: LossyModel, crops: Crops, side: int) -> None:
        model.exact(True)
        save_lossy(out, model, fit_tables(model, crops, side))

    def plot(self, axes: Any, rows: list[dict[str, str]]) -> None:
        for i, row in enumerate(rows):
            points = [(float(row[f"bpp_{q // 100}"]), float(row[f"psnr_{q // 100}"])) for q in VALIDATION_QUALITIES]
            label = f"{float(row['minutes']):.0f} min" if i in (0, len(rows) - 1) else None
            axes.plot(*zip(*points, strict=True), color=(0.2, i / max(1, len(rows) - 1), 0.5), label=label)
        axes.set(xlabel="bits per pixel", ylabel="PSNR, dB", title="validation, rounded latents")
        axes.legend()


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
def fit_tables(model: LossyModel, crops: Crops, side: int) -> Tables:
    """One table for each scale index: the histogram of training latents, symmetric, on a Gaussian prior.

    side: pixels of the crops, at most; a multiple of 16 is taken.
    """
    side -= side % PATCH
    sigmas = scale_of(torch.arange(SCALES).double()).tolist()
    widths = np.array([reach(s) for s in sigmas])
    histograms = [np.zeros(2 * w + 2) for w in widths]
    for _ in range(FIT_BATCHES):
        out = model(crops.batch(4, side), crops.qualities(4), hard=True)
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
