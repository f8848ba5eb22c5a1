"""Is the arithmetic exact on this machine? What `vaecodec selftest` runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from .codec import Codec
from .engines import installed
from .kinds import arithmetic
from .weights import WeightsError

WIDTH, HEIGHT = 200, 136
QUALITIES = (0.0, 61.8, 100.0)


def sample() -> Image.Image:
    """The same picture everywhere: slopes, an edge and fine texture, in integers."""
    y, x, c = np.mgrid[:HEIGHT, :WIDTH, :3]
    texture = (x * 73856093 ^ y * 19349663 ^ c * 83492791) % 31
    return Image.fromarray(((x * (c + 1) + 2 * y + 90 * (x > y) + texture) // 3 % 256).astype(np.uint8))


def checks(codec: Codec) -> Iterator[str]:
    """What was found on the codec's device, line by line; the reference is torch in float64 on the CPU, where the sums
    are far from any limit. Without torch, the known answers of the weights, which are float64's, have to do.

    Raises WeightsError where no arithmetic is exact or a file decodes to other pixels than under the reference.
    """
    codecs = [codec]
    for name in ("lossy", "lossless"):
        mine = getattr(codec, name)
        yield f"{name} networks {mine.identity.hex()}: known answer in {arithmetic(mine)} on {codec.device}"
    if installed("torch"):
        codecs.append(reference())
    picture = sample()
    for quality in QUALITIES:
        for encoder in codecs:
            data = encoder.compress(picture, quality)
            if not all(np.array_equal(codec.decode_array(data), other.decode_array(data)) for other in codecs):
                raise WeightsError(f"a file of quality {quality:g} decodes to other pixels than in float64 on the CPU")
        yield f"quality {quality:g}: decoded{' as in float64 on the CPU' if codecs[1:] else ''}"
    files = [each.compress(picture, lossless=True) for each in codecs]
    if files[0] != files[-1] or codec.decompress(files[-1]).tobytes() != picture.tobytes():
        raise WeightsError("a lossless file differs from that in float64 on the CPU")
    yield f"lossless: every pixel equal, SHA-256 of the file {hashlib.sha256(files[0]).hexdigest()}"


def reference() -> Codec:
    """torch in float64 on the CPU."""
    import torch

    codec = Codec("cpu", engine="torch")
    for networks in (codec.lossy, codec.lossless):
        networks.to(torch.device("cpu"), torch.float64)
    return codec
