"""Is the arithmetic exact on this machine? What `vaecodec selftest` runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from .codec import Codec
from .weights import WeightsError

WIDTH, HEIGHT = 200, 136
QUALITIES = (0.0, 61.8, 100.0)


def sample() -> Image.Image:
    """The same picture everywhere: slopes, an edge and fine texture, in integers."""
    y, x, c = np.mgrid[:HEIGHT, :WIDTH, :3]
    texture = (x * 73856093 ^ y * 19349663 ^ c * 83492791) % 31
    return Image.fromarray(((x * (c + 1) + 2 * y + 90 * (x > y) + texture) // 3 % 256).astype(np.uint8))


def checks(codec: Codec) -> Iterator[str]:
    """What was found on the codec's device, line by line; the reference is float64 on the CPU, where the sums are far
    from any limit.

    Raises WeightsError where no arithmetic is exact or a file decodes to other pixels than under the reference.
    """
    reference = Codec("cpu")
    for name in ("lossy", "lossless"):
        mine, own = getattr(codec, name), getattr(reference, name)
        own.to(torch.device("cpu"), torch.float64)
        yield f"{name} networks {mine.identity.hex()}: known answer in {arithmetic(mine)} on {codec.device}"
    picture = sample()
    for quality in QUALITIES:
        for encoder in (codec, reference):
            data = encoder.compress(picture, quality)
            if not np.array_equal(codec.decode_array(data), reference.decode_array(data)):
                raise WeightsError(f"a file of quality {quality:g} decodes to other pixels than in float64 on the CPU")
        yield f"quality {quality:g}: decoded as in float64 on the CPU"
    files = [each.compress(picture, lossless=True) for each in (codec, reference)]
    if files[0] != files[1] or codec.decompress(files[1]).tobytes() != picture.tobytes():
        raise WeightsError("a lossless file differs from that in float64 on the CPU")
    yield f"lossless: every pixel equal, SHA-256 of the file {hashlib.sha256(files[0]).hexdigest()}"


def arithmetic(weights: Any) -> str:
    """Of the loaded networks: "float32", or "float64" where float32 was not exact."""
    return str(next(weights.model.parameters()).dtype).removeprefix("torch.")
