"""Pictures of the linear codec: how far a linear transform goes with the same coder and container.

    pixels -> blocks of 8 x 8 -> principal components -> dead-zone quantiser -> ANS words -> container
                                       ^ prediction and scale of each
                                       | linear, in integers, from the components coded before, here and around

The means of the three colours are components of their own: they make up a small picture, which is coded first, coarse
to fine. The other components follow in groups, in order of variance: each group first in the blocks of one colour of a
chessboard, then in the others. No networks: every matrix comes from an eigenvalue problem or from least squares.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bitstream import AnsStack, Container, CorruptError, Header, Record, Tile, VersionError

from ..image import ImageError, Pixels, grey_of
from ..plain_tiles import Samples, check_empty
from ..tiles import Box, Progress, Region, box_of, forgiving, tiles
from .walk import UNIT, Decoder, Encoder
from .weights import Floats, LinearWeights, lengths_of

SIDE = 8
SIZE = 3 * SIDE * SIDE

COARSEST, FINEST = 160.0, 8.0  # steps at quality 0 and 100; a quality between them is a power between them


def step_of(quality: float) -> float:
    """The quantiser's step for a quality of 0 to 100."""
    return float(COARSEST * (FINEST / COARSEST) ** (quality / 100))


def blocks_of(pixels: NDArray[np.uint8]) -> Floats:
    """float32 [rows, columns, 192] of uint8 [H, W, 3], a block in the order row, column, colour; edges are repeated."""
    rows, columns = -(-pixels.shape[0] // SIDE), -(-pixels.shape[1] // SIDE)
    missing = (rows * SIDE - pixels.shape[0], columns * SIDE - pixels.shape[1])
    padded = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")
    blocks = padded.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2)
    return blocks.reshape(rows, columns, SIZE).astype(np.float32)


def pixels_from(blocks: Floats) -> NDArray[np.uint8]:
    """uint8 [8 rows, 8 columns, 3], the inverse of ``blocks_of``, rounded."""
    rows, columns, _ = blocks.shape
    rounded = np.floor(blocks + 0.5).clip(0, 255).astype(np.uint8)
    picture: NDArray[np.uint8] = rounded.reshape(rows, columns, SIDE, SIDE, 3).swapaxes(1, 2)
    return picture.reshape(rows * SIDE, columns * SIDE, 3)


def boxes_of(header: Header) -> list[Box]:
    """The tiles, in blocks."""
    return tiles(-(-header.height // SIDE), -(-header.width // SIDE), header.tile // SIDE)


def needs_weights(container: Container, wanted: Box) -> bool:
    """Every tile does."""
    return True


class LinearCoder:
    """The tiles of files of kind PCA, 8-bit grey and colour."""

    def __init__(self, weights: LinearWeights | None) -> None:
        assert weights is not None
        self.weights = weights

    def encode(
        self, pixels: Pixels, header: Header, effort: int, progress: Progress, progressive: bool = False
    ) -> list[Tile]:
        """The tiles of a picture, in raster order, which have no parts. Raises ImageError for other modes."""
        if header.mode.name not in ("L", "RGB") or header.colour:
            raise ImageError(f"files of kind PCA hold 8-bit grey and colour, not {header.mode.name}")
        weights, count, step = self._at(header)
        mean, lengths, coded = np.tile(self.weights.mean, SIDE * SIDE), lengths_of(self.weights.tables), []
        whole = box_of(None, header.width, header.height)
        for box in boxes_of(header):
            samples = pixels[(box.times(SIDE) & whole).within(whole)]
            blocks = blocks_of(np.broadcast_to(samples, (*samples.shape[:2], 3)).astype(np.uint8, copy=False))
            targets = (blocks.reshape(-1, SIZE) - mean) @ self.weights.basis[:, :count] / step
            shape = (1, box.rows, box.columns)
            encoder = Encoder(weights, self.weights.shrink, shape, count, targets, lengths)
            encoder.run()
            stack, crc = AnsStack(lanes=None), 0
            for integers, _ in encoder.coded:
                crc = zlib.crc32(integers.astype("<i4").tobytes(), crc)
            for integers, ids in reversed(encoder.coded):
                stack.push(integers, self.weights.tables, ids)
            coded.append(Tile(0, crc, stack.to_bytes(), stack.lanes))
            progress(samples.shape[0] * samples.shape[1])
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
        if header.mode.name not in ("L", "RGB") or header.colour:
            raise VersionError(f"mode {header.mode.name}: not a PCA file of this version")
        whole = box_of(None, header.width, header.height)
        for grid, tile in zip(boxes_of(header), container.tiles, strict=True):
            box = grid.times(SIDE) & whole
            if not (part := box & wanted):
                continue
            pixels: NDArray[np.uint8] | None = None
            with forgiving(box, damaged):
                pixels = self._pop(tile, header, grid, record)[: box.rows, : box.columns]
            if pixels is not None:
                samples = grey_of(pixels).astype(np.uint8) if header.mode.name == "L" else pixels
                yield part, samples[part.within(box)]
            progress(part.rows * part.columns)

    def _pop(self, tile: Tile, header: Header, grid: Box, record: Record | None) -> NDArray[np.uint8]:
        """The pixels of a tile's blocks [8 rows, 8 columns, 3]. Raises CorruptError."""
        if tile.method != 0:
            raise CorruptError(f"tile method {tile.method} is unknown")
        if tile.held is not None:  # nothing is there
            return np.full((grid.rows * SIDE, grid.columns * SIDE, 3), 128, np.uint8)
        weights, count, step = self._at(header)
        shape, stack = (1, grid.rows, grid.columns), AnsStack(tile.words, tile.lanes)
        before = stack.bits()
        decoder = Decoder(weights, self.weights.shrink, shape, count, stack, self.weights.tables)
        values = decoder.run()
        if record:
            record("components", before - stack.bits())
        check_empty(stack)
        if decoder.crc != tile.crc:
            raise CorruptError("a tile fails its checksum")
        mean = np.tile(self.weights.mean, SIDE * SIDE)
        blocks = (values.astype(np.float32) * step) @ self.weights.basis[:, :count].T + mean
        return pixels_from(blocks.reshape(*shape[1:], SIZE))

    def _at(self, header: Header) -> tuple[dict[str, Floats], int, np.float32]:
        """Weights, number of components and a sixteenth of the quantiser's step, of a file's quality."""
        step = np.float32(step_of(header.quality / 100) / UNIT)
        return self.weights.at(header.quality), self.weights.count(header.quality), step
