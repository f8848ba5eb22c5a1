"""Pictures as the chunks of arrays: a codec for numcodecs and, through it, for zarr (``zarr_format=2``).

    pictures = zarr.create_array(
        "pictures.zarr", shape=(1000, 512, 768, 3), chunks=(1, 512, 768, 3), dtype="uint8",
        zarr_format=2, compressors=VaeCodec(),
    )

Whoever reads such an array needs vaecodec installed and no import of it: numcodecs finds it by its entry point. torch
is imported when the first chunk is coded. Format 3 of zarr takes ``VaeSerializer``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ndarray_copy

from .image import ImageError, Samples


class VaeCodec(Codec):  # type: ignore[misc]
    """A chunk is one picture: [H, W] or [H, W, C], uint8 with 1 to 4 channels or uint16 with 1, 3 or 4, in C order;
    axes of length 1 may precede.

    quality: None keeps every sample; 0 (smallest) to 100 is lossy, for uint8 with 1 or 3 channels.
    """

    codec_id = "vaecodec"

    def __init__(self, quality: float | None = None) -> None:
        self.quality = quality

    def encode(self, buf: Any) -> bytes:
        """The bytes of a ``.vae`` file. Raises ImageError for arrays that are no such picture."""
        array = np.asarray(buf)
        if not array.flags.c_contiguous:
            # zarr's order="F" names the axes backwards: decoded samples would come back in the wrong places.
            raise ValueError("chunks have to be in C order")
        if not array.dtype.isnative:  # decoded samples are
            raise ImageError(f"an array of {array.dtype.str} is not supported: chunks have the machine's byte order")
        while array.ndim > 2 and array.shape[0] == 1 and (array.ndim > 3 or array.shape[2] > 4):
            array = array[0]
        from .codec import compress

        return compress(array, lossless=True) if self.quality is None else compress(array, quality=self.quality)

    def decode(self, buf: Any, out: Any = None) -> Samples:
        """The samples [H, W, C] of a file. Raises what ``vaecodec.Codec.decode_array`` raises."""
        from .codec import shared

        samples: Samples = ndarray_copy(shared().decode_array(memoryview(buf)), out)
        return samples
