"""Training pictures, and random crops of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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


def half_colour(x: Tensor) -> Tensor:
    """x [B, 3, H, W] with its differences from luma (BT.601) at half the resolution, as JPEG and Photo CD keep them."""
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).to(x).view(3, 1, 1)).sum(1, keepdim=True)
    colour = F.avg_pool2d(x - luma, 2, ceil_mode=True, count_include_pad=False)
    return luma + F.interpolate(colour, x.shape[2:], mode="bilinear")


class Crops:
    """Random square crops, flipped and transposed, cut where the pictures lie (on the GPU, if there is one).

    ``worn``: the part of the crops that go through ``wear``.
    """

    def __init__(self, images: list[Tensor], crop: int, device: torch.device, seed: int, worn: float = 0.0) -> None:
        self.images = [i.to(device) for i in images if min(i.shape[1:]) >= crop]
        if not self.images:
            raise ValueError(f"no picture has {crop} pixels on both sides")
        self.crop, self.worn = crop, worn
        self.areas = torch.tensor([float(i.shape[1] * i.shape[2]) for i in self.images])
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def chance(self) -> float:
        return float(torch.rand((), generator=self.generator))

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
            if self.worn and step == 1 and self.chance() < self.worn:
                part = self.wear(part)
            turn = self.draw(0, 8)
            part = part.flip(1) if turn & 1 else part
            part = part.flip(2) if turn & 2 else part
            crops.append(part.transpose(1, 2) if turn & 4 else part)
        return torch.stack([crop.float() for crop in crops])

    def wear(self, part: Tensor) -> Tensor:
        """A crop [3, H, W], 0..255, as the world has them: each of enlarged, with noise and with colour at half the
        resolution half of the time. Pictures that were reduced to train on them are none of these."""
        side = part.shape[-1]
        x = part[None].float()
        if self.chance() < 0.5:
            inner = round(side / (1 + self.chance()))
            x = F.interpolate(x[..., :inner, :inner], (side, side), mode="bicubic")
        if self.chance() < 0.5:
            noise = torch.randn(x.shape, generator=self.generator).to(x)
            x = x + noise * (3 * self.chance())
        if self.chance() < 0.5:
            x = half_colour(x)
        return x[0].round().clamp(0, 255)

    def qualities(self, size: int) -> Tensor:
        """int64 [size]: one quality from each of ``size`` equal parts of the range, in random order."""
        spread = torch.randperm(size, generator=self.generator) + torch.rand(size, generator=self.generator)
        return (spread / size * QUALITY_MAX).round().long()
