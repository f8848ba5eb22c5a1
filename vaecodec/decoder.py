"""The bytes of ``.vae`` files to pictures, arrays, tensors, and parts of them.

Bytes come from ``bitstream``; what lies between them and the pixels, the tiles, is the affair of the wing that a file's
kind has in ``kinds``. No layer and no network is named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bitstream import (
    PLAIN,
    RAW,
    TILE_MAX,
    Container,
    CorruptError,
    Header,
    Kind,
    Limits,
    Record,
    VersionError,
    unpack,
)

from .colour import GREY, coloured
from .engines import ENGINES, device_named, torch_for
from .guest import public
from .image import (
    CHANNELS,
    info_of,
    picture_of,
    refuse_deep_colour,
)
from .info import Source, bytes_of
from .kinds import WINGS, Shelf, arithmetic
from .plain_tiles import Samples, sample_type
from .tiles import Box, Progress, Region, box_of, ignore
from .together import ROOM, at_once, one_by_one

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Decoder:
    """The half of ``Codec`` that reads files. weights: exported files of any kinds, see there."""

    def __init__(self, device: str, weights: Sequence[Path], engine: str) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine {engine!r} is none of {', '.join(ENGINES)}")
        self.device, self.engine = "cpu" if engine == "onnx" and device == "auto" else device_named(str(device)), engine
        if engine == "onnx" and self.device != "cpu":
            raise ValueError(f"the engine on ONNX Runtime is for CPUs, not for device {device}")
        self._shelf = Shelf(weights, self.device, engine)
        self._each = at_once if self.device.startswith("cuda") else one_by_one

    @public
    def decompress(
        self,
        data: Source,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        region: Region | None = None,
        damaged: list[Region] | None = None,
        preview: bool = False,
    ) -> Image.Image:
        """The picture in a ``.vae`` file, in the mode and with the metadata it had.

        data: the file's bytes, its path, or a binary file object. limits: what to accept, of the whole picture; by
        default ``Limits()``. region: (x, y, width, height) in pixels, the part that is wanted: equal to that part of
        the whole, but only the tiles that it needs are decoded. damaged: given a list, tiles that are cut off or fail
        their checksum are no error, but zero, and the regions of such tiles are appended to it; in lossy files pixels
        up to 32 beside them may be wrong. preview: the file may end within the tiles, and what is there is drawn: of
        progressive files a coarser picture, of others the tiles that are whole. What is missing is what the networks
        expect, or grey; alpha that is missing is opaque. Raises CorruptError, TruncatedError, VersionError or
        LimitError, WeightsError if the file was made with other weights, ImageError for 16-bit colour, which Pillow
        has no mode for, ValueError for a region that is not inside the picture.
        """
        return self._drawn(unpacked(data, limits, damaged, preview), progress or ignore, region, damaged)

    @public
    def decompress_batch(self, files: Iterable[Source], limits: Limits | None = None) -> list[Image.Image]:
        """The picture in each file, as ``decompress`` gives it. On a GPU files are decoded at once, up to 16
        megapixels, and the networks of their tiles of equal size run as one batch. Raises what ``decompress`` does for
        a single file."""
        containers = (unpacked(file, limits, None, False) for file in files)
        return [drawn() for drawn in self._each(self._drawn, containers, lambda container: room_of(container.header))]

    def _drawn(
        self,
        container: Container,
        progress: Progress = ignore,
        region: Region | None = None,
        damaged: list[Region] | None = None,
    ) -> Image.Image:
        refuse_deep_colour(container.header.mode)
        wanted = box_of(region, container.header.width, container.header.height)
        parts = self._decode(container, wanted, progress, damaged)
        picture = Image.new(container.header.mode.name, (wanted.columns, wanted.rows))
        picture.info |= info_of(container.sections)
        if region:
            picture.info.pop("gain_map", None)  # which is of the whole
        for box, samples in parts:
            picture.paste(picture_of(samples), (box.left - wanted.left, box.top - wanted.top))
        return picture

    @public
    def decode_array(
        self,
        data: Source,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        region: Region | None = None,
        damaged: list[Region] | None = None,
        preview: bool = False,
    ) -> Samples:
        """The samples of a file [H, W, C], uint8, or uint16 if it holds more than 8 bits a sample.

        Arguments and errors are those of ``decompress``, but 16-bit colour is no error.
        """
        container = unpacked(data, limits, damaged, preview)
        header = container.header
        wanted = box_of(region, header.width, header.height)
        parts = self._decode(container, wanted, progress or ignore, damaged)
        whole: Samples = np.zeros((wanted.rows, wanted.columns, CHANNELS[header.mode]), sample_type(header.depth))
        for box, samples in parts:
            whole[box.within(wanted)] = samples
        return whole

    @public
    def decode_tiles(
        self,
        data: Source,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        damaged: list[Region] | None = None,
        preview: bool = False,
    ) -> Iterator[tuple[Region, Samples]]:
        """The picture in parts, each when it is decoded, for what is too large to be held as a whole.

        Yields for each tile its region (x, y, width, height) and what ``decode_array`` gives for it. Arguments and
        errors are those of ``decode_array``; some parts may have come before a CorruptError. Damaged tiles do not come.
        """
        container = unpacked(data, limits, damaged, preview)
        whole = box_of(None, container.header.width, container.header.height)
        parts = self._decode(container, whole, progress or ignore, damaged)

        @public
        def following() -> tuple[Region, Samples] | None:
            for box, samples in parts:
                return box.region, samples
            return None

        return iter(following, None)

    @public
    def decode_tensor(
        self,
        data: Source,
        device: torch.device | str | None = None,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        region: Region | None = None,
        damaged: list[Region] | None = None,
        preview: bool = False,
    ) -> Tensor:
        """The same as a tensor [C, H, W] on a device, by default the codec's."""
        torch = torch_for("a tensor")
        samples: Tensor = torch.from_numpy(
            self.decode_array(data, limits, progress, region=region, damaged=damaged, preview=preview)
        )
        return samples.permute(2, 0, 1).contiguous().to(device or self.device)

    @public
    def account(self, data: Source) -> dict[str, float]:
        """Where the bits of a file went: by part, in bits; what a posterior gives back is negative."""
        view, bits = bytes_of(data), dict[str, float]()
        container = unpack(view)

        def record(name: str, count: float) -> None:
            bits[name] = bits.get(name, 0.0) + count

        whole = box_of(None, container.header.width, container.header.height)
        for _ in self._decode(container, whole, ignore, None, record):
            pass
        other = 8 * sum(len(tile.words) for tile in container.tiles if tile.method in (PLAIN, RAW))
        if other:
            bits["tiles without networks"] = other
        bits["metadata"] = 8 * sum(len(section.payload) for section in container.sections)
        bits["overhead"] = 8 * len(view) - sum(bits.values())
        return bits

    @public
    def arithmetic(self, data: Source) -> str:
        """What decodes a file: a kernel and its engine, such as "8-bit integers (onnx)"."""
        header = (container := unpack(bytes_of(data))).header
        if header.kind not in WINGS:
            raise VersionError(f"kind {header.kind.name} is not supported by this version")
        whole = box_of(None, header.width, header.height)
        needed = WINGS[header.kind].needs_weights(container, whole)
        return arithmetic(self._shelf.named(header.kind, header.model) if needed else None)

    def _decode(
        self,
        container: Container,
        wanted: Box,
        progress: Progress,
        damaged: list[Region] | None,
        record: Record | None = None,
    ) -> Iterator[tuple[Box, Samples]]:
        """The boxes of tiles, as far as they are wanted, and their samples [h, w, C], each when it is decoded."""
        header = container.header
        if header.kind not in WINGS:
            raise VersionError(f"kind {header.kind.name} is not supported by this version")
        if header.colour not in (0, GREY):
            raise VersionError(f"colour transform {header.colour} is not supported by this version")
        if header.colour == GREY and CHANNELS[header.mode] < 3:
            raise CorruptError(f"colours of mode {header.mode.name} are not there to be equal")
        if header.tile > TILE_MAX:
            raise CorruptError(f"tile size {header.tile} is larger than {TILE_MAX}")
        wing = WINGS[header.kind]
        needed = wing.needs_weights(container, wanted)
        weights = self._shelf.named(header.kind, header.model) if needed else None
        parts = wing.coder(weights).decode(container, wanted, progress, damaged, record)
        return parts if header.colour != GREY else ((box, coloured(samples)) for box, samples in parts)


def room_of(header: Header) -> int:
    """What a picture takes of the room there is for several at once: without networks that run as batches it gains
    nothing from company, and takes all."""
    batched = header.kind in (Kind.LOSSY, Kind.LOSSLESS) and header.model != bytes(16)
    return header.width * header.height if batched else ROOM


def unpacked(data: Source, limits: Limits | None, damaged: list[Region] | None, preview: bool) -> Container:
    """A file that may be cut off, if damaged tiles are to be listed or what is there is to be drawn."""
    return unpack(bytes_of(data), limits or Limits(), partial=damaged is not None, preview=preview)
