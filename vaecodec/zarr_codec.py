"""Pictures as the chunks of zarr arrays of format 3, where a codec from array to bytes is called the serializer.

    pictures = zarr.create_array(
        "pictures.zarr", shape=(1000, 512, 768, 3), chunks=(1, 512, 768, 3), dtype="uint8",
        serializer=VaeSerializer(), compressors=None,
    )

zarr finds it by its entry point. Other implementations of zarr cannot read such an array. Format 2 takes ``VaeCodec``,
whose word on chunks at the edges holds here too.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from bitstream import CorruptError

from .array_codec import VaeCodec, checked_quality, picture_shape
from .image import ImageError


@dataclass(frozen=True)
class VaeSerializer(ArrayBytesCodec):  # type: ignore[misc]
    """A chunk is one picture, of the shapes and types that ``VaeCodec`` takes; quality as there."""

    quality: float | None = None
    is_fixed_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "quality", checked_quality(self.quality))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VaeSerializer:
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        return {"name": VaeCodec.codec_id, "configuration": {"quality": self.quality}}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Raises ImageError if no order of the axes, which codecs before this one may change, makes chunks pictures."""
        axes = tuple(getattr(chunk_grid, "chunk_shape", shape))
        native = dtype.to_native_dtype().newbyteorder("=")
        longer = [n for n in axes if n != 1]
        orders = itertools.permutations(longer) if len(longer) <= 3 else [axes]
        if not any(is_picture((1,) * (len(axes) - len(longer)) + order, native) for order in orders):
            picture_shape(axes, native)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError  # it depends on the pixels

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        """The bytes of a ``.vae`` file. Raises ImageError for chunks that are no such picture."""
        array = chunk_array.as_numpy_array()
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        data = await asyncio.to_thread(VaeCodec(self.quality).encode, array)
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        """The samples in the chunk's shape. Raises what ``vaecodec.Codec.decode_array`` raises, and CorruptError for
        samples of another shape or type."""
        samples = await asyncio.to_thread(VaeCodec().decode, chunk_data.to_bytes())
        dtype = chunk_spec.dtype.to_native_dtype()
        expected = picture_shape(chunk_spec.shape, dtype.newbyteorder("="))
        if (samples.shape, samples.dtype) != (expected, dtype.newbyteorder("=")):
            raise CorruptError(
                f"a chunk holds {samples.dtype} {list(samples.shape)} where {dtype} {list(expected)} belongs"
            )
        samples = samples.reshape(chunk_spec.shape).astype(dtype, copy=False)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(samples)


def is_picture(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    try:
        picture_shape(shape, dtype)
    except ImageError:
        return False
    return True
