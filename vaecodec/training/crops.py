"""Training pictures, and random crops of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitstream import VaeError

from .. import folders
from ..exact import QUALITY_MAX
from ..folders import PICTURES, entries_of, special
from ..image import DeepPicture, open_picture, pixels_of
from ..saving import load_plugins

RESIZED = ((1 / 8, 1.5), (1 / 8, 1.25), (1 / 10, 0.75))
"""Shares of a batch that are not cut at their size, and from how many times its side they are resized."""
NOISE = 3.0
"""Largest standard deviation, in grey levels, of the noise on worn crops."""

Say = Callable[[str], None]


class FolderError(VaeError):
    """A folder of pictures cannot be read, or not all of it."""


def picture_files(folder: Path, say: Say) -> list[Path]:
    """What `compress -r` would take for pictures below ``folder``, by name; what it would leave out is said.

    Raises FolderError if a folder cannot be read: nobody knows what training would miss.
    """
    paths, unreadable = list[Path](), 0
    for entry in entries_of(str(folder), recursive=True):
        if entry.problem:
            unreadable += 1
            say(f"vaecodec: {entry.path}: {entry.problem}")
        elif entry.note or (entry.path.suffix.lower() in PICTURES and special(entry.path)):
            say(f"vaecodec: {entry.path}: {entry.note or 'no regular file'}: left out")
        elif entry.path.suffix.lower() in PICTURES:
            paths.append(entry.path)
    if unreadable:
        raise FolderError(f"{folder}: {unreadable} folder{'s' * (unreadable > 1)} cannot be read")
    return sorted(paths)


def read_picture(path: Path) -> Tensor:
    """uint8 [3, H, W]: deeper samples scaled, grey as three equal channels, alpha left out. Raises VaeError."""
    with path.open("rb") as file:
        picture = open_picture(file)
        pixels = pixels_of(picture)
        samples = np.asarray(pixels[0 : pixels.height, 0 : pixels.width])
    if pixels.bits > 8:
        white = 2**picture.depth - 1 if isinstance(picture, DeepPicture) and picture.full else 65535
        samples = (samples * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)
    colour = samples[..., :3] if samples.shape[2] >= 3 else np.repeat(samples[..., :1], 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(colour.transpose(2, 0, 1)))


def load_images(folder: Path, quiet: bool = False) -> list[Tensor]:
    """All pictures below ``folder`` as uint8 [3, H, W]. Files that are none are named, counted and left out.

    Raises ValueError if no picture is left, FolderError if a folder cannot be read.
    """
    say = silent if quiet else folders.say
    load_plugins()
    images, left_out = list[Tensor](), 0
    for path in picture_files(folder, say):
        try:
            images.append(read_picture(path))
        except (VaeError, OSError, MemoryError) as error:
            left_out += 1
            say(f"vaecodec: {path}: left out: {str(error) or 'out of memory'}")
    if left_out:
        say(f"vaecodec: {folder}: {len(images)} pictures, {left_out} files left out")
    if not images:
        raise ValueError(f"no pictures in {folder}")
    return images


def silent(_line: str) -> None:
    """For all processes but the first."""


def keep_large(images: list[Tensor], side: int, what: str) -> list[Tensor]:
    """Those of at least ``side`` pixels on both sides; a word on the others. Raises ValueError if none is left."""
    kept = [image for image in images if min(image.shape[1:]) >= side]
    if not kept:
        raise ValueError(f"none of {len(images)} {what} pictures has {side} pixels on both sides")
    if len(kept) < len(images):
        few = len(images) - len(kept)
        folders.say(f"vaecodec: {few} of {len(images)} {what} pictures are smaller than {side} pixels: left out")
    return kept


class Crops:
    """Random square crops, flipped and transposed, gathered from one buffer that holds all pictures on ``device``.

    Everything random is drawn from the device's default generator, and nothing waits for the device: the methods can
    be part of a CUDA graph, once they have been called with the same arguments.
    """

    def __init__(self, images: list[Tensor], device: torch.device) -> None:
        """images: uint8 [3, H, W] each."""
        heights, widths = (torch.tensor([image.shape[d] for image in images]) for d in (1, 2))
        areas = heights * widths
        ends = areas.cumsum(0)
        self.device = device
        self.pixels = torch.empty(int(ends[-1]), 3, dtype=torch.uint8, device=device)
        for image, end, area in zip(images, ends.tolist(), areas.tolist(), strict=True):
            self.pixels[end - area : end] = image.permute(1, 2, 0).reshape(-1, 3).to(device)
        self.heights, self.widths, self.starts = (x.to(device) for x in (heights, widths, ends - areas))
        self._areas, self._sides = areas.double(), torch.minimum(heights, widths)
        self._chances: dict[int, Tensor] = {}

    def largest(self) -> int:
        """Side of the largest square that a picture holds."""
        return int(self._sides.max())

    def smaller(self, side: int) -> int:
        """How many pictures hold no square of ``side`` pixels."""
        return int((self._sides < side).sum())

    def described(self) -> str:
        return f"{len(self.starts)} pictures of {len(self.pixels) / 1e6:.3g} megapixels"

    def chances(self, span: int) -> Tensor:
        """float64 [pictures]: the cumulative areas of those that have ``span`` pixels on both sides, as parts of all.

        Raises ValueError if there are none.
        """
        if span not in self._chances:
            areas = torch.where(self._sides >= span, self._areas, 0)
            if not areas.any():
                raise ValueError(f"no picture has {span} pixels on both sides")
            upto = areas.cumsum(0)
            self._chances[span] = (upto / upto[-1]).to(self.device)  # by itself: the last is 1, whatever is rounded
        return self._chances[span]

    def batch(self, size: int, side: int, step: int = 1) -> Tensor:
        """float32 [size, 3, side, side] in 0..255, of every ``step``-th pixel, channels last.

        Raises ValueError if no picture is large enough.
        """
        span = step * (side - 1) + 1
        where = torch.rand(size, dtype=torch.float64, device=self.device)
        chosen = torch.searchsorted(self.chances(span), where, right=True)
        height, width, start = self.heights[chosen], self.widths[chosen], self.starts[chosen]
        top, left = (
            (torch.rand(size, dtype=torch.float64, device=self.device) * (extent - span + 1)).long()
            for extent in (height, width)
        )
        flip = torch.rand(3, size, 1, device=self.device) < 0.5
        run = torch.arange(side, device=self.device)[None]
        rows, columns = (
            first[:, None] + step * torch.where(turned, side - 1 - run, run)
            for first, turned in ((top, flip[0]), (left, flip[1]))
        )
        rows = start[:, None] + rows * width[:, None]
        across, down = rows[:, :, None] + columns[:, None, :], rows[:, None, :] + columns[:, :, None]
        return self.pixels[torch.where(flip[2, :, :, None], down, across)].permute(0, 3, 1, 2).float()

    def resized(self, size: int, side: int) -> Tensor:
        """As ``batch``; some crops are made smaller or larger (``RESIZED``), where the pictures have room for them."""
        parts = []
        for share, factor in RESIZED:
            count, inner = round(size * share), round(side * factor)
            if count and inner <= self.largest():
                x = F.interpolate(self.batch(count, inner), (side, side), mode="bicubic", antialias=factor > 1)
                parts.append(x.round().clamp(0, 255))
        parts.append(self.batch(size - sum(map(len, parts)), side))
        return torch.cat(parts).contiguous(memory_format=torch.channels_last)

    def worn(self, size: int, side: int, part: float) -> Tensor:
        """As ``batch``; a crop goes through ``wear`` with the probability ``part``."""
        x = self.batch(size, side)
        if not part:
            return x
        return torch.where(chance(x, part), wear(x), x).contiguous(memory_format=torch.channels_last)

    def qualities(self, size: int) -> Tensor:
        """int64 [size]: one quality from each of ``size`` equal parts of the range, in random order."""
        drawn = torch.rand(2, size, device=self.device)
        return ((drawn[0].argsort() + drawn[1]) * (QUALITY_MAX / size)).round().long()


def chance(x: Tensor, part: float) -> Tensor:
    """bool [B, 1, 1, 1]: true with the probability ``part``, for each of x [B, ...]."""
    hit: Tensor = torch.rand(len(x), 1, 1, 1, device=x.device) < part
    return hit


def wear(x: Tensor) -> Tensor:
    """Crops [B, 3, H, W], 0..255, as the world has them: each of enlarged by up to two, with noise and with colour at
    half the resolution half of the time. Pictures that were reduced to train on them are none of these."""
    part = 1 / (1 + chance(x, 0.5) * torch.rand(len(x), 1, 1, 1, device=x.device))[..., 0]
    down, across = ((2 * torch.arange(n, device=x.device) + 1) / n - 1 for n in x.shape[2:])
    # Not by affine_grid: its product of matrices may run in TF32, in which there are not enough pixels.
    size = (len(x), len(down), len(across))
    places = torch.stack([(part * across).expand(size), (part * down[:, None]).expand(size)], 3)
    x = F.grid_sample(x, places, mode="bicubic", padding_mode="border", align_corners=False)
    amount = NOISE * torch.rand(len(x), 1, 1, 1, device=x.device) * chance(x, 0.5)
    x = x + torch.randn_like(x) * amount
    return torch.where(chance(x, 0.5), half_colour(x), x).round().clamp(0, 255)


def half_colour(x: Tensor) -> Tensor:
    """x [B, 3, H, W] with its differences from luma (BT.601) at half the resolution, as JPEG and Photo CD keep them."""
    luma = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    colour = F.avg_pool2d(x - luma, 2, ceil_mode=True, count_include_pad=False)
    return luma + F.interpolate(colour, x.shape[2:], mode="bilinear")
