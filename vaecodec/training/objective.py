"""What is minimised: how each kind of model starts, what a training step's loss is, and how it is validated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .crops import Crops
from .ranks import share

START_SIDE = 128
"""Largest side of crops that a model starts from: larger ones only take memory."""
VALIDATION_SIDE = 512
FIT_BATCHES, FIT_SIDE = 80, 256
"""Batches of four crops on which tables are fitted, and their side where pictures are as large."""
PRIOR_WEIGHT = 300.0
"""How many observed latents the Gaussian counts for, in each table."""


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

    def export(self, out: Path, model: Any, crops: Crops, side: int) -> None:
        """Write the weights file of a trained model, its entropy tables fitted on crops of at most ``side`` pixels.
        Raises ValueError if the weights do not fit into integers."""


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
