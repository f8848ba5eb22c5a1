"""Pictures whose colours are equal are coded as one of them: the colour transform GREY."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from bitstream import Header

from .image import CHANNELS, Pixels, Samples

GREY = 1  # colour transform: the colours are equal, and one of them is coded


class GreyPixels(Pixels):
    """A picture whose colours are equal, as one of them and its alpha."""

    def __getitem__(self, part: tuple[slice, slice]) -> Samples:
        return super().__getitem__(part)[..., 2:]


def grey_pixels(pixels: Pixels) -> GreyPixels | None:
    """If its colours are equal. Of most pictures the first rows tell that they are not."""
    if CHANNELS[pixels.mode] < 3:
        return None
    for top in range(0, pixels.height, 16):
        part = pixels[top : min(top + 16, pixels.height), 0 : pixels.width]
        if (part[..., 0] != part[..., 1]).any() or (part[..., 1] != part[..., 2]).any():
            return None
    return GreyPixels(*(getattr(pixels, field.name) for field in fields(pixels)))


def coloured(samples: Samples) -> Samples:
    """[h, w, 3 and alpha] from a grey and alpha."""
    return np.concatenate([samples[..., :1].repeat(3, 2), samples[..., 1:]], 2)


def channels_of(header: Header) -> int:
    """How many channels are coded."""
    return CHANNELS[header.mode] - (2 if header.colour == GREY else 0)


def colours_of(header: Header) -> int:
    """How many are coded without alpha."""
    return 3 if channels_of(header) > 2 else 1
