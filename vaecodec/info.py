"""What a ``.vae`` file holds, without decoding it. Neither torch nor Pillow nor weights are needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from bitstream import Kind, Limits, unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Source = bytes | bytearray | memoryview | NDArray[Any] | Tensor | str | os.PathLike[str] | IO[bytes]
else:
    Source = Any
"""A file's bytes, in whatever holds bytes (an array or tensor of uint8, say), its path, or a binary file object, which
is read to its end."""

UNLIMITED = Limits(max_pixels=2**64, max_side=2**32, max_tiles=2**64)
"""For what allocates nothing, or is limited by others."""


@dataclass(frozen=True)
class Info:
    """The header of a file and the sizes of what it carries.

    kind: "lossy" or "lossless". width, height: pixels. mode: Pillow's name, or "RGB;16" and "RGBA;16". depth: bits a
    sample. quality: 0 to 100, None if lossless. tile: side of a tile in pixels; tiles: how many there are. model: the
    weights that decode it, as hexadecimal digits, None if it was made without any. bytes: size of the file, as far as
    it is there; bpp: in bits a pixel. missing: bytes that are cut off. previews: of a progressive file, after how many
    bytes each preview of the whole picture becomes possible. metadata: bytes of each section, "exif", "iccp", "xmp",
    "iptc", "png", "gain".
    """

    kind: str
    width: int
    height: int
    mode: str
    depth: int
    quality: float | None
    tile: int
    tiles: int
    model: str | None
    bytes: int
    bpp: float
    missing: int
    previews: list[int]
    metadata: dict[str, int]


def read_info(source: Source, *, preview: bool = False) -> Info:
    """What the header and the sections of a file say. No limit on the picture's size is applied.

    source: bytes, a path or a binary file object. preview: the file may end within the tiles. Raises CorruptError,
    TruncatedError, VersionError and, for huge metadata, LimitError.
    """
    data = bytes_of(source)
    container = unpack(data, UNLIMITED, preview=preview)
    header = container.header
    return Info(
        kind=header.kind.name.lower(),
        width=header.width,
        height=header.height,
        mode=header.mode.name,
        depth=header.depth,
        quality=header.quality / 100 if header.kind == Kind.LOSSY else None,
        tile=header.tile,
        tiles=header.tile_count,
        model=header.model.hex() if header.model != bytes(16) else None,
        bytes=len(data),
        bpp=round(8 * len(data) / (header.width * header.height), 4),
        missing=container.ends[-1] - len(data),
        previews=list(container.ends[:-1]),
        metadata={s.tag.decode().strip().lower(): len(s.payload) for s in container.sections},
    )


def what_is_there(data: bytes) -> str:
    """How much there is of a file that ends early, in words; "" if it is whole. Raises what ``unpack`` does."""
    container = unpack(data, UNLIMITED, preview=True)
    *ends, size = container.ends
    if len(data) == size:
        return ""
    if not any(tile.held is None or tile.words for tile in container.tiles):
        parts = "nothing of the picture is there yet"
    elif ends:
        parts = f"preview {sum(end <= len(data) for end in ends)} of {len(ends)}"
    else:
        parts = f"{sum(tile.held is None for tile in container.tiles)} of {len(container.tiles)} tiles"
    return f"{len(data)} of {size} bytes, {parts}"


def bytes_of(source: Source) -> memoryview:
    """The bytes of a source. Raises TypeError for what is none."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return memoryview(file.read())
    held: Any = source
    if hasattr(held, "numpy"):  # a tensor
        held = held.detach().cpu().numpy()
    elif hasattr(held, "read"):
        held = held.read()
    try:
        view = memoryview(held)
    except TypeError:
        raise TypeError(f"a path, bytes or a binary file expected, not {type(source).__name__}") from None
    if view.itemsize != 1:
        raise TypeError(f"bytes expected, not items of {view.itemsize} bytes")
    return (view if view.c_contiguous else memoryview(view.tobytes())).cast("B")
