"""Pictures as the chunks of arrays: a codec for numcodecs and, through it, for zarr (``zarr_format=2``).

    pictures = zarr.create_array(
        "pictures.zarr", shape=(1000, 512, 768, 3), chunks=(1, 512, 768, 3), dtype="uint8",
        zarr_format=2, compressors=VaeCodec(),
    )

Whoever reads such an array needs vaecodec installed and no import of it: numcodecs finds it by its entry point. What
runs the networks is imported when the first chunk is coded. Format 3 of zarr takes ``VaeSerializer``.

zarr fills chunks that reach beyond the array up to their full size, with its fill value, before a codec sees them. They
cost more than their part of the picture: choose chunks that divide it, or are as large as it is.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_ndarray_like, ndarray_copy

from .image import ImageError, Samples

CHANNELS = {np.dtype(np.uint8): (1, 2, 3, 4), np.dtype(np.uint16): (1, 3, 4)}


def picture_shape(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """[H, W, C] of the picture that a chunk is. Raises ImageError if it is none."""
    inner = shape
    while len(inner) > 2 and inner[0] == 1 and (len(inner) > 3 or inner[2] > 4):
        inner = inner[1:]
    height, width, channels = (*inner, 1) if len(inner) == 2 else inner if len(inner) == 3 else (0, 0, 0)
    if not height or not width or channels not in CHANNELS.get(dtype, ()):
        raise ImageError(
            f"a chunk of {dtype} {list(shape)} is no picture: [H, W] or [H, W, C] after axes of length 1, "
            "uint8 with 1 to 4 channels or uint16 with 1, 3 or 4, in the machine's byte order"
        )
    return height, width, channels


def checked_quality(quality: Any) -> float | None:
    """Raises ValueError for what is neither None nor a number from 0 to 100."""
    if quality is None:
        return None
    if not isinstance(quality, Real) or not 0 <= float(quality) <= 100:
        raise ValueError(f"quality {quality!r} is no number from 0 to 100")
    return float(quality)


class VaeCodec(Codec):  # type: ignore[misc]
    """A chunk is one picture: [H, W] or [H, W, C], uint8 with 1 to 4 channels or uint16 with 1, 3 or 4, in C order;
    axes of length 1 may precede.

    quality: None keeps every sample; 0 (smallest) to 100 is lossy, but for alpha.
    """

    codec_id = "vaecodec"

    def __init__(self, quality: float | None = None) -> None:
        self.quality = checked_quality(quality)

    def encode(self, buf: Any) -> bytes:
        """The bytes of a ``.vae`` file. Raises ImageError for arrays that are no such picture."""
        array = np.asarray(buf)
        if array.flags.f_contiguous and not array.flags.c_contiguous:
            # zarr's order="F" names the axes backwards: decoded samples would come back in the wrong places.
            raise ValueError('chunks have to be in C order: numpy.ascontiguousarray, or order="C" of zarr')
        array = np.ascontiguousarray(array).reshape(picture_shape(array.shape, array.dtype))
        from .codec import compress

        return compress(array, lossless=True) if self.quality is None else compress(array, quality=self.quality)

    def decode(self, buf: Any, out: Any = None) -> Samples:
        """The samples [H, W, C] of a file. Raises what ``vaecodec.Codec.decode_array`` raises.

        out: an array of the samples' type whose shape is that of a chunk that they are, in any order and with any
        strides; or a flat buffer of as many bytes, which takes them in C order. Raises ValueError for any other.
        """
        from .codec import shared

        samples: Samples = shared().decode_array(memoryview(buf))
        if out is None:
            return samples
        target = ensure_ndarray_like(out)
        if target.ndim == 1 and target.nbytes == samples.nbytes:
            ndarray_copy(samples, target)
        elif target.dtype == samples.dtype and samples.shape == picture_shape(target.shape, target.dtype):
            np.copyto(target, samples.reshape(target.shape))
        else:
            raise ValueError(f"{samples.dtype} {list(samples.shape)} does not fit {target.dtype} {list(target.shape)}")
        return out  # type: ignore[no-any-return]
