"""Pictures of lossless files: samples -> tiles, and the way back."""

from __future__ import annotations

from collections.abc import Iterator

from bitstream import BITS_BACK, ROUNDED, Container, Header, Record, Tile

from ..colour import channels_of
from ..image import Pixels, Samples
from ..tiles import Box, Progress, Region, box_of, forgiving, tiles
from ..together import one_by_one
from .tile import Networks, TileCoder


def needs_weights(container: Container, wanted: Box) -> bool:
    """Whether a wanted part of a file has tiles with networks."""
    return container.header.depth == 8 and any(
        tile.method in (BITS_BACK, ROUNDED) for _, tile in needed_of(container, wanted)
    )


def needed_of(container: Container, wanted: Box) -> list[tuple[Box, Tile]]:
    header = container.header
    grid = zip(tiles(header.height, header.width, header.tile), container.tiles, strict=True)
    return [(box, tile) for box, tile in grid if box & wanted]


class LosslessCoder:
    """The tiles of lossless files, with one set of weights; to decode files without networks, None will do."""

    def __init__(self, weights: Networks | None) -> None:
        self.weights = weights

    def encode(
        self, pixels: Pixels, header: Header, effort: int, progress: Progress, progressive: bool = False
    ) -> list[Tile]:
        """The tiles of a picture, in raster order; the networks are for samples of 8 bits."""
        weights, coded = self.weights if header.depth == 8 else None, list[Tile]()
        coder = TileCoder(weights, header.depth, effort > 0, progressive)
        whole = box_of(None, header.width, header.height)
        boxes = tiles(header.height, header.width, header.tile)
        each = weights.side_by_side if weights else one_by_one
        for box, push in zip(boxes, each(lambda box: coder.push(pixels[box.within(whole)]), boxes, area), strict=True):
            coded.append(push())
            progress(area(box))
        return coded

    def decode(
        self,
        container: Container,
        wanted: Box,
        progress: Progress,
        damaged: list[Region] | None,
        record: Record | None = None,
    ) -> Iterator[tuple[Box, Samples]]:
        """The boxes of tiles, as far as they are wanted, and their samples [h, w, C], each when it is decoded."""
        header = container.header
        coder, channels = TileCoder(self.weights, header.depth), channels_of(header)
        needed = needed_of(container, wanted)

        def pop(pair: tuple[Box, Tile]) -> Samples:
            box, tile = pair
            return coder.pop(tile, (box.rows, box.columns, channels), record)

        each = self.weights.side_by_side if self.weights and not record else one_by_one
        for (box, _), popped in zip(needed, each(pop, needed, lambda pair: area(pair[0])), strict=True):
            part = box & wanted
            samples: Samples | None = None
            with forgiving(box, damaged):
                samples = popped()
            if samples is not None:
                yield part, samples[part.within(box)]
            progress(area(part))


def area(box: Box) -> int:
    """Pixels of a box."""
    return box.rows * box.columns
