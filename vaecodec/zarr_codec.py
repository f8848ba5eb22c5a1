"""Pictures as the chunks of zarr arrays of format 3, where a codec from array to bytes is called the serializer.

    pictures = zarr.create_array(
        "pictures.zarr", shape=(1000, 512, 768, 3), chunks=(1, 512, 768, 3), dtype="uint8",
        serializer=VaeSerializer(), compressors=None,
    )

zarr finds it by its entry point. Other implementations of zarr cannot read such an array. Format 2 takes ``VaeCodec``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from .array_codec import VaeCodec


@dataclass(frozen=True)
class VaeSerializer(ArrayBytesCodec):  # type: ignore[misc]
    """A chunk is one picture, of the shapes and types that ``VaeCodec`` takes; quality as there."""

    quality: float | None = None
    is_fixed_size: ClassVar[bool] = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VaeSerializer:
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        return {"name": VaeCodec.codec_id, "configuration": {"quality": self.quality}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError  # it depends on the pixels

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        """The bytes of a ``.vae`` file. Raises ImageError for chunks that are no such picture."""
        array = np.ascontiguousarray(chunk_array.as_numpy_array())
        data = await asyncio.to_thread(VaeCodec(self.quality).encode, array)
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        """The samples in the chunk's shape. Raises what ``vaecodec.Codec.decode_array`` raises."""
        samples = await asyncio.to_thread(VaeCodec().decode, chunk_data.to_bytes())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(samples.reshape(chunk_spec.shape))
