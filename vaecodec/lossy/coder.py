"""Pictures of lossy files: pixels -> latents -> tiles, and the way back.

A tile is coded on its own, see ``tile``. Only analysis and synthesis read a margin around it, which is wide enough that
the joint picture has no seams. What the networks are no good at is coded without them, and for analysis and synthesis
of the tiles around it the picture ends there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstream import NETWORK, PLAIN, RAW, SPARSE, Container, Header, Record, Tile, VersionError

from ..colour import channels_of, colours_of
from ..image import Pixels, grey_of
from ..plain_tiles import Samples, grey_samples, sample_type, samples_in, smaller_tile
from ..tiles import Box, Progress, Region, advance, box_of, forgiving, shares, tiles
from ..together import one_by_one
from . import misfits
from .grid import Band, Missing
from .numbers import PATCH, Steps, lagrangian_of, stream_of
from .tile import Floats, Networks, pop_tile, push_tile

METHODS = (NETWORK, SPARSE)
"""Of tiles with networks."""
PIXEL_STEPS = 16
"""Of a pixel, as it is rounded: integers from here on, so that 16 bits are as exact as 8."""


def needs_weights(container: Container, wanted: Box) -> bool:
    """Whether a file has tiles with networks."""
    return any(tile.method not in (PLAIN, RAW) for tile in container.tiles)


class LossyCoder:
    """The tiles of lossy files, with one set of weights; to decode files without networks, None will do."""

    def __init__(self, weights: Networks | None) -> None:
        self.weights = weights

    def encode(
        self, pixels: Pixels, header: Header, effort: int, progress: Progress, progressive: bool = False
    ) -> list[Tile]:
        """The tiles of a picture, in raster order. progressive: those with networks have parts."""
        assert self.weights is not None
        encoder = Encoder(self.weights, pixels, header, effort, progressive)
        each = one_by_one if effort else self.weights.side_by_side
        coded, boxes = dict[Box, Tile](), tiles(*grid_of(header), header.tile // PATCH)
        waiting = boxes
        while waiting:
            left_out = list[Box]()
            counts = [shares(area(box) if box not in coded else 0, steps_of(effort) + 1) for box in waiting]
            tasks = [(box, partial(advance, progress, count)) for box, count in zip(waiting, counts, strict=True)]
            pushed = each(lambda task: encoder.push_best(*task), tasks, lambda task: area(task[0]))
            for (box, stepped), push in zip(tasks, pushed, strict=True):
                coded[box] = tile = push()
                stepped()
                if tile.method not in METHODS:
                    left_out.append(box)
            # Their neighbours have counted on their latents.
            for box in left_out:
                encoder.missing.add(box)
            around = [box.grown(self.weights.margin) for box in left_out]
            waiting = [b for b in boxes if coded[b].method in METHODS and any(b & other for other in around)]
        return [coded[box] for box in boxes]

    def decode(
        self,
        container: Container,
        wanted: Box,
        progress: Progress,
        damaged: list[Region] | None,
        record: Record | None = None,
    ) -> Iterator[tuple[Box, Samples]]:
        """The boxes of tiles, as far as they are wanted, and their samples [h, w, C], each when it is decoded."""
        header, weights = container.header, self.weights
        margin, latents = (weights.margin, weights.config.latent) if weights else (0, 0)
        whole, grid, side = box_of(None, header.width, header.height), Box(0, 0, *grid_of(header)), header.tile // PATCH
        inner = Box(wanted.top // PATCH, wanted.left // PATCH, -(-wanted.bottom // PATCH), -(-wanted.right // PATCH))
        outer = inner.grown(margin) & grid
        boxes = list(zip(tiles(grid.rows, grid.columns, side), container.tiles, strict=True))
        needed = [(box, tile) for box, tile in boxes if box & outer]
        missing = Missing(side, {(b.top // side, b.left // side) for b, t in needed if t.method in (PLAIN, RAW)})
        # Tiles wait with their alpha, or all their samples, None if they are damaged, for the latents below them.
        band, waiting = Band(latents, outer), deque[tuple[Box, Tile, Samples | None]]()
        each = one_by_one if weights is None or record else weights.side_by_side
        coded = [(box, tile) for box, tile in needed if tile.method not in (PLAIN, RAW)]
        popped = each(lambda pair: self._pop(*pair, header, record), coded, lambda pair: area(pair[0]))
        for top, row in groupby(needed, lambda pair: pair[0].top):
            kept = (waiting[0][0].top if waiting else top) - margin
            band.move(max(kept, outer.top), min(top + side, outer.bottom))
            for box, tile in row:
                covered = box.times(PATCH) & whole
                samples: Samples | None = None
                with forgiving(covered, damaged):
                    if tile.method not in (PLAIN, RAW):
                        stream, samples = next(popped)()
                        part = box & outer
                        band.values[:, *part.within(band.box)] = stream[:, *part.within(box)]
                    elif box & inner:
                        shape = covered.rows, covered.columns, channels_of(header)
                        known = tile.held is None
                        samples = samples_in(tile, shape, header.depth) if known else grey_samples(shape, header.depth)
                if box & inner:
                    waiting.append((box, tile, samples))
            ready = list[tuple[Box, Tile, Samples | None]]()
            while waiting and min(waiting[0][0].bottom + margin, outer.bottom) <= band.box.bottom:
                ready.append(waiting.popleft())
            seen = [box & inner for box, tile, samples in ready if tile.method in METHODS and samples is not None]
            synthesised = each(lambda part: self.synthesised(band, part, header, missing), seen, area)
            for box, tile, samples in ready:
                part = box & inner
                if samples is not None:
                    shown = part.times(PATCH) & wanted
                    samples = samples[shown.within(box.times(PATCH))]
                    if tile.method in METHODS:
                        colours = next(synthesised)()[shown.within(part.times(PATCH))]
                        dtype = sample_type(header.depth)
                        samples = np.concatenate([colours, samples], 2, dtype=dtype, casting="unsafe")
                    yield shown, samples
                progress(area(part))

    def _pop(self, box: Box, tile: Tile, header: Header, record: Record | None) -> tuple[Steps, Samples]:
        """Of a tile with networks, what g_s reads of it, [M, rows, columns], and alpha. Raises CorruptError."""
        if tile.method not in METHODS:
            raise VersionError(f"unknown tile method {tile.method}")
        assert self.weights is not None
        covered = box.times(PATCH) & box_of(None, header.width, header.height)
        shape = (covered.rows, covered.columns, channels_of(header) - colours_of(header))
        quality = header.quality
        y_hat, alpha = pop_tile(self.weights, tile, box.rows, box.columns, quality, shape, header.depth, record)
        return stream_of(y_hat, self.weights.gains(quality), self.weights.config.bits), alpha

    def synthesised(self, band: Band, box: Box, header: Header, missing: Missing) -> NDArray[np.signedinteger[Any]]:
        """What g_s makes of a box, integers [H, W, 3 or 1] in 0..2**depth - 1, from a band that holds it and, as far as
        the picture reaches, the margin around it."""
        assert self.weights is not None
        outer = box.grown(self.weights.margin) & band.box
        stream = np.ascontiguousarray(band.values[:, *outer.within(band.box)])
        x_hat = self.weights.synthesise(stream, header.quality, missing.seen(outer))
        most = 2**header.depth - 1
        steps = x_hat[:, *box.times(PATCH).within(outer.times(PATCH))].clip(0, 255 * PIXEL_STEPS)
        steps *= 2 * most
        steps += 255 * PIXEL_STEPS
        steps //= 2 * 255 * PIXEL_STEPS
        pixels: NDArray[np.int32] = steps.transpose(1, 2, 0)
        return grey_of(pixels) if colours_of(header) == 1 else pixels


class Encoder:
    """One picture on its way into a file. missing: the tiles that turned out to be coded without networks."""

    def __init__(
        self, weights: Networks, pixels: Pixels, header: Header, effort: int, progressive: bool = False
    ) -> None:
        self.weights, self.pixels, self.header = weights, pixels, header
        self.effort, self.progressive = effort, progressive
        self.missing = Missing(header.tile // PATCH, set())

    def push_best(self, box: Box, stepped: Callable[[], None]) -> Tile:
        """A tile with networks or, where they cost more than they save, without."""
        weights, q, depth = self.weights, self.header.quality, self.header.depth
        whole = box_of(None, self.pixels.width, self.pixels.height)
        samples = self.pixels[(box.times(PATCH) & whole).within(whole)]
        outer = box.grown(weights.margin) & Box(0, 0, *grid_of(self.header))
        inside, colours = box.within(outer), colours_of(self.header)
        seen = self.missing.seen(outer)
        x = self.padded(outer)
        y = weights.analyse(x, q, seen)
        y = y if seen is None else y * seen
        if self.effort:
            y[:, *inside] = refining(weights).refined(x, y, inside, q, self.effort, seen, stepped)
        latents, alpha = np.ascontiguousarray(y[:, *inside]), samples[..., colours:]
        tile, y_hat = push_tile(weights, latents, q, alpha, depth, progressive=self.progressive)
        pixel = 8 / (samples.shape[0] * samples.shape[1])
        weight = lagrangian_of(q, weights.config.lambda_max)
        bits = len(tile.words) * pixel
        signs = misfits.signs(samples, depth)
        if not signs.doubtful(bits, weight):
            return tile
        around = np.rint(y / weights.config.unit).astype(np.int32)
        around[:, *inside] = y_hat
        stream = stream_of(around, weights.gains(q), weights.config.bits)
        x_hat = weights.synthesise(stream, q, seen).clip(0, 255 * PIXEL_STEPS) / np.float32(PIXEL_STEPS)
        error = (x_hat - x)[:, *box.times(PATCH).within(outer.times(PATCH))]
        error = error[:, : samples.shape[0], : samples.shape[1]]
        error = error.mean(0) if colours == 1 else error
        cost = bits + weight * float(np.square(error).mean())
        if cost < signs.bits:
            return tile
        exact = smaller_tile(samples, depth)
        return exact if len(exact.words) * pixel <= cost else tile

    def padded(self, outer: Box) -> Floats:
        """The pixels of a box of latents, float32 [3, H, W] in 0..255, repeated below and right of the picture."""
        whole = box_of(None, self.pixels.width, self.pixels.height)
        part = self.pixels[(outer.times(PATCH) & whole).within(whole)]
        colours = part[..., :3] if part.shape[2] > 2 else part[..., :1].repeat(3, 2)
        x = np.ascontiguousarray(colours.transpose(2, 0, 1), np.float32)
        if self.header.depth > 8:
            x *= np.float32(255 / (2**self.header.depth - 1))
        missing = (outer.rows * PATCH - x.shape[1], outer.columns * PATCH - x.shape[2])
        return np.pad(x, ((0, 0), (0, missing[0]), (0, missing[1])), "edge") if any(missing) else x


def refining(weights: Networks) -> Any:
    """The weights as torch has them: gradients are nothing that other engines know."""
    assert hasattr(weights, "refined")
    return weights


def steps_of(effort: int) -> int:
    """How many steps a tile is refined by."""
    if not effort:
        return 0
    from .refine import steps_of  # needs torch

    return steps_of(effort)


def area(box: Box) -> int:
    """Pixels of a box of latents."""
    return box.rows * box.columns * PATCH**2


def grid_of(header: Header) -> tuple[int, int]:
    """Rows and columns of latents."""
    return -(-header.height // PATCH), -(-header.width // PATCH)
