"""Training pictures, and random crops of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .exact import QUALITY_MAX

SUFFIXES = {".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm"}


def load_images(folder: Path) -> list[Tensor]:
    """All pictures below ``folder`` as uint8 [3, H, W]. Raises ValueError if there are none."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"no pictures in {folder}")
    images = []
    for file in files:
        with Image.open(file) as picture:
            images.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous())
    return images


class Crops:
    """Random square crops, flipped and transposed, cut where the pictures lie (on the GPU, if there is one)."""

    def __init__(self, images: list[Tensor], crop: int, device: torch.device, seed: int) -> None:
        self.images = [i.to(device) for i in images if min(i.shape[1:]) >= crop]
        if not self.images:
            raise ValueError(f"no picture has {crop} pixels on both sides")
        self.crop = crop
        self.areas = torch.tensor([float(i.shape[1] * i.shape[2]) for i in self.images])
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def batch(self, size: int, side: int | None = None, step: int = 1) -> Tensor:
        """float32 [size, 3, side, side] in 0..255, of every ``step``-th pixel; by default ``crop`` pixels a side.

        Raises ValueError if no picture is large enough.
        """
        side = side or self.crop
        span = step * (side - 1) + 1
        areas = self.areas * torch.tensor([min(image.shape[1:]) >= span for image in self.images])
        if not areas.any():
            raise ValueError(f"no picture has {span} pixels on both sides")
        chosen = torch.multinomial(areas, size, replacement=True, generator=self.generator)
        crops = []
        for index in chosen.tolist():
            image = self.images[index]
            top, left = self.draw(0, image.shape[1] - span + 1), self.draw(0, image.shape[2] - span + 1)
            part = image[:, top : top + span : step, left : left + span : step]
            turn = self.draw(0, 8)
            part = part.flip(1) if turn & 1 else part
            part = part.flip(2) if turn & 2 else part
            crops.append(part.transpose(1, 2) if turn & 4 else part)
        return torch.stack(crops).float()

    def qualities(self, size: int) -> Tensor:
        """int64 [size]: one quality from each of ``size`` equal parts of the range, in random order."""
        spread = torch.randperm(size, generator=self.generator) + torch.rand(size, generator=self.generator)
        return (spread / size * QUALITY_MAX).round().long()
