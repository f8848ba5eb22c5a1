"""What is minimised: how each kind of model starts, what a training step's loss is, and how it is validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lossless, model
from .crops import Crops
from .exact import QUALITY_MAX
from .lossless import LosslessModel, start_from_linear
from .model import PIXEL_SCALE, LossyModel, lagrangian
from .ranks import share

PCA_CROPS = 700
VALIDATION_QUALITIES = (0, 2500, 5000, 7500, 10000)


class Objective(Protocol):
    """One kind of model: its configuration and how it is trained."""

    @property
    def name(self) -> str:
        """ "lossy" or "lossless"."""

    @property
    def config(self) -> Any:
        """The configuration of the model."""

    def build(self) -> nn.Module:
        """An untrained model; it has a method ``exact(on)``."""

    def start(self, model: Any, crops: Crops) -> None:
        """Set the untrained model's linear parts to what is best on some crops."""

    def loss(self, run: nn.Module, crops: Crops, batch: int, device: torch.device) -> Tensor:
        """The loss of this process's share of one batch."""

    def validate(self, model: Any, images: list[Tensor], device: torch.device) -> dict[str, float]:
        """Columns of the training curve."""

    def plot(self, axes: Any, rows: list[dict[str, str]]) -> None:
        """The training curve."""


def start_from_pca(model: LossyModel, crops: Crops) -> None:
    """Make the untrained model the linear codec it generalises: a two-level Karhunen-Loeve transform.

    The residual blocks start at zero, so g_a is then its first two 1x1 layers and g_s the transposes: principal
    components of 8x8x3 pixels, then of 2x2 of those. Streams carry each component divided by the square root of its
    standard deviation: half-way to whitening, so that no channel drowns in its grid or leaves its range.
    """
    c = model.config
    x = (crops.batch(PCA_CROPS).cpu().double() - 128) / PIXEL_SCALE

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


def rate_distortion_loss(model: nn.Module, x: Tensor, quality: Tensor, power: float, largest: float) -> Tensor:
    """Mean over the batch of (bpp + lambda * MSE) / lambda^power, MSE on the 0..255 scale."""
    out = model(x, quality)
    bpp = out.bits / (x.shape[2] * x.shape[3])
    mse = (out.x_hat - x).square().mean((1, 2, 3))
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
            _, height, width = image.shape
            h, w = min(height // 64 * 64, 512), min(width // 64 * 64, 512)
            top, left = (height - h) // 2, (width - w) // 2
            x = image[None, :, top : top + h, left : left + w].to(device).float()
            out = model(x, torch.tensor([quality], device=device), hard=True)
            mse = (out.x_hat.clamp(0, 255).round() - x).square().mean()
            bits.append(float(out.bits) / (h * w))
            psnr.append(10 * math.log10(255**2 / float(mse)))
        rows.append((quality, sum(bits) / len(bits), sum(psnr) / len(psnr)))
    return rows


@dataclass(frozen=True)
class Lossy:
    """Rate and distortion of Balle et al. 2018 (arXiv:1802.01436): bits per pixel + lambda * MSE, with a quality drawn
    for each sample."""

    config: model.Config
    loss_power: float = 0.4
    name = "lossy"

    def build(self) -> LossyModel:
        return LossyModel(self.config)

    def start(self, model: LossyModel, crops: Crops) -> None:
        start_from_pca(model, crops)

    def loss(self, run: nn.Module, crops: Crops, batch: int, device: torch.device) -> Tensor:
        x, quality = (share(drawn).to(device) for drawn in (crops.batch(batch), crops.qualities(batch)))
        return rate_distortion_loss(
            run, x.contiguous(memory_format=torch.channels_last), quality, self.loss_power, self.config.lambda_max
        )

    def validate(self, model: LossyModel, images: list[Tensor], device: torch.device) -> dict[str, float]:
        return {
            f"{name}_{quality // 100}": value
            for quality, bpp, psnr in validate(model, images, device)
            for name, value in (("bpp", bpp), ("psnr", psnr))
        }

    def plot(self, axes: Any, rows: list[dict[str, str]]) -> None:
        for i, row in enumerate(rows):
            points = [(float(row[f"bpp_{q // 100}"]), float(row[f"psnr_{q // 100}"])) for q in VALIDATION_QUALITIES]
            label = f"{float(row['minutes']):.0f} min" if i in (0, len(rows) - 1) else None
            axes.plot(*zip(*points, strict=True), color=(0.2, i / max(1, len(rows) - 1), 0.5), label=label)
        axes.set(xlabel="bits per pixel", ylabel="PSNR, dB", title="validation, rounded latents")
        axes.legend()


@dataclass(frozen=True)
class Lossless:
    """The negative ELBO, in bits per sub-pixel.

    The crops that suit the finest level leave a few pixels of the coarsest image, all at their edge. So the VAE, which
    shares nothing with the levels, gets its own: ``coarse_batch`` of ``coarse_crop`` pixels a side.
    """

    config: lossless.Config
    coarse_batch: int = 2
    coarse_crop: int = 48
    name = "lossless"

    def build(self) -> LosslessModel:
        return LosslessModel(self.config)

    def start(self, model: LosslessModel, crops: Crops) -> None:
        start_from_linear(model, crops, crops.batch(lossless.LINEAR_CROPS, self.coarse_crop, self.step))

    @property
    def step(self) -> int:
        """Pixels to one of the coarsest image, along one side."""
        step: int = 2**self.config.levels
        return step

    def loss(self, run: nn.Module, crops: Crops, batch: int, device: torch.device) -> Tensor:
        x, coarse = (
            share(part).to(device).contiguous(memory_format=torch.channels_last)
            for part in (crops.batch(batch), crops.batch(self.coarse_batch, self.coarse_crop, self.step))
        )
        levels, *vae = run(x, coarse)
        level_bits = sum(phase.bits().sum() for phases in levels for phase in phases)
        vae_bits = sum(part.sum() for name, part in bits(([], *vae)).items())
        loss: Tensor = level_bits / x.numel() + vae_bits / (coarse.numel() * self.step**2)
        return loss

    @torch.no_grad()
    def validate(self, model: LosslessModel, images: list[Tensor], device: torch.device) -> dict[str, float]:
        """Mean over centre crops of at most 512 x 512, in bits per sub-pixel, in all and by part."""
        step = self.step * 2 ** len(self.config.latents)
        rows = []
        for image in images:
            h, w = (min(side // step * step, 512) for side in image.shape[1:])
            top, left = (image.shape[1] - h) // 2, (image.shape[2] - w) // 2
            x = image[None, :, top : top + h, left : left + w].to(device).float()
            rows.append({name: float(part.sum()) / x.numel() for name, part in bits(model(x)).items()})
        parts = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {"bpsp": sum(parts.values()), **parts}

    def plot(self, axes: Any, rows: list[dict[str, str]]) -> None:
        axes.plot([float(row["minutes"]) for row in rows], [float(row["bpsp"]) for row in rows], marker="o")
        axes.set(xlabel="minutes", ylabel="bits per sub-pixel", title="validation")


def bits(out: tuple[list[list[lossless.Phase]], lossless.Phase, list[lossless.Latent]]) -> dict[str, Tensor]:
    """The parts of -ELBO in bits: phases of the levels (level 1 is the finest), coarsest image given its latents, and
    KL divergences."""
    levels, coarsest, latents = out
    parts = {
        f"{name}_{len(levels) - i}": phase.bits()
        for i, phases in enumerate(levels)
        for name, phase in zip(lossless.PHASES, phases, strict=True)
    }
    parts["x_given_z"] = coarsest.bits()
    return parts | {f"kl_{len(latents) - i}": latent.kl() for i, latent in enumerate(latents)}
