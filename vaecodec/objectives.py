"""What is minimised: how each kind of model starts, what a training step's loss is, and how it is validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lossless, model
from .calibrate import calibrate
from .crops import Crops
from .exact import QUALITY_MAX
from .lossless import LosslessModel, start_from_linear
from .model import HYPER, PATCH, PIXEL_SCALE, LossyModel, lagrangian
from .ranks import share

PCA_CROPS, START_SIDE = 700, 128
"""Crops that a lossy model starts from, and their largest side: for either kind, larger ones only take memory."""
CALIBRATION_CROPS = 16
LOWPASS = 16
"""Pixels, along one side, that a mean of the error is taken over where it weighs more."""
VALIDATION_SIDE = 512
VALIDATION_QUALITIES = (0, 2500, 5000, 7500, 10000)


@dataclass(frozen=True)
class Phase:
    """Part of a training run, ``until`` a part of its time: how many crops of how many pixels a side are a step.

    exact: with everything rounded that the decoder rounds. hard: the latents really rounded, and the encoder, which
    would learn nothing good from that, left as it is.
    """

    until: float = 1.0
    batch: int = 8
    crop: int = 128
    exact: bool = False
    hard: bool = False


class Objective(Protocol):
    """One kind of model: its configuration and how it is trained."""

    @property
    def name(self) -> str:
        """ "lossy" or "lossless"."""

    @property
    def config(self) -> Any:
        """The configuration of the model."""

    @property
    def stride(self) -> int:
        """What sides of validation pictures are cut to multiples of."""

    def build(self) -> nn.Module:
        """An untrained model; it has a method ``exact(on)``."""

    def check(self, phase: Phase, crops: Crops) -> None:
        """Raises ValueError if a step of the phase is impossible."""

    def start(self, model: Any, crops: Crops, side: int) -> None:
        """Set the untrained model's linear parts to what is best on some crops."""

    def calibrate(self, model: Any, crops: Crops, side: int) -> None:
        """Set what rounding needs to know of the activations, before anything is rounded."""

    def frozen(self, model: Any) -> list[nn.Parameter]:
        """What a phase with ``hard`` leaves as it is."""

    def loss(self, model: nn.Module, crops: Crops, phase: Phase) -> Tensor:
        """The loss of this process's share of one batch."""

    def validate(self, model: Any, images: list[Tensor], device: torch.device) -> dict[str, float]:
        """Columns of the training curve."""

    def plot(self, axes: Any, rows: list[dict[str, str]]) -> None:
        """The training curve."""


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
    out = model(x, quality, hard=hard)
    bpp = out.bits / (x.shape[2] * x.shape[3])
    error = out.x_hat - x
    mse = error.square().mean((1, 2, 3))
    if lowpass:
        patches = F.avg_pool2d(error, LOWPASS).square().mean((1, 2, 3))
        mse = mse + lowpass * (1 - quality / QUALITY_MAX).square() * patches
    weight = lagrangian(quality, largest)
    loss: Tensor = ((bpp + weight * mse) / weight**power).mean()
    return loss


def check_crop(phase: Phase, unit: int, crops: Crops) -> None:
    """Raises ValueError where crops have the wrong size, no picture holds one, or processes cannot share a batch."""
    if phase.crop % unit:
        raise ValueError(f"crops of {phase.crop} pixels: {unit} must divide them")
    crops.chances(phase.crop)
    share(torch.empty(phase.batch))


def centre(image: Tensor, stride: int, device: torch.device) -> Tensor:
    """The middle of a picture uint8 [3, H, W], for validation: float32 [1, 3, h, w], multiples of ``stride``."""
    h, w = (min(side // stride * stride, VALIDATION_SIDE) for side in image.shape[1:])
    top, left = (image.shape[1] - h) // 2, (image.shape[2] - w) // 2
    return image[None, :, top : top + h, left : left + w].to(device).float()


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
class Lossy:
    """Rate and distortion of Balle et al. 2018 (arXiv:1802.01436): bits per pixel + lambda * MSE, with a quality drawn
    for each sample."""

    config: model.Config
    loss_power: float = 0.4
    lowpass: float = 0.0
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
    worn: float = 0.0  # part of the crops that are made softer, noisier or poorer in colour
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
        count = lossless.LINEAR_CROPS
        x = crops.batch(count, min(side, START_SIDE // 2))
        start_from_linear(model, x, crops.batch(count, self.coarse_crop, self.step))

    def calibrate(self, model: LosslessModel, crops: Crops, side: int) -> None:
        """All units are fixed."""

    def frozen(self, model: LosslessModel) -> list[nn.Parameter]:
        return []

    def loss(self, model: nn.Module, crops: Crops, phase: Phase) -> Tensor:
        x = share(crops.worn(phase.batch, phase.crop, self.worn))
        coarse = share(crops.batch(self.coarse_batch, self.coarse_crop, self.step))
        levels, *vae = model(x, coarse)
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
