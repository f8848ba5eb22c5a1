"""The components of blocks in coding order: each is predicted, and coded under a table, from those before it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bitstream import AnsStack, Tables

from .weights import FIRST_OCTAVE, LEVELS, TABLES, Floats, Ints

GROUPS = [(3, 5), (5, 8), (8, 12), (12, 17), (17, 24), (24, 34), (34, 48), (48, 68), (68, 96), (96, 136), (136, 192)]
UNIT = 16  # values are multiples of 1/16 step
PREDICTORS = 12  # components that predictions look at, in nine blocks
PREDICTION_BITS, SCALE_BITS = 12, 14
BESIDE = [1, 3, 5, 7]  # of nine blocks, those that share an edge with the fifth
MAGNITUDE_MAX = 127  # as contexts see it

RATE_WEIGHT = 0.12 * UNIT**2  # squared error worth a bit; 0.116 steps^2 in theory, for fine steps
DEAD_ZONE = 0.4 * UNIT  # what is smaller becomes 0 whatever the tables say


@dataclass
class Walk:
    """Goes through the components of N pictures of the same size in coding order, with predictions and contexts.

    Subclasses say in ``choose`` where the integers come from, and ``Trainer`` in ``fit`` where the weights do. All
    arithmetic is on whole numbers that float64 holds exactly.

    weights: of one quality. shrink: see ``LinearWeights``. shape: N, rows and columns of blocks. components: how many.
    """

    weights: dict[str, Floats]
    shrink: Ints
    shape: tuple[int, int, int]
    components: int

    def choose(self, blocks: Ints, columns: slice, prediction: Floats, ids: Ints) -> Ints:
        """Integers [n, c] for blocks [n] and components ``columns``. prediction: [n, c] in 1/16 step; ids: [n, c]."""
        raise NotImplementedError

    def fit(self, name: str, blocks: Ints, columns: slice, inputs: Floats, prediction: Floats | None) -> None:
        """Called before weights are used; without a prediction they are those of one."""

    def run(self) -> Floats:
        """The reconstructed components, float64 [N * rows * columns, components], in 1/16 step."""
        self.values = np.zeros((math.prod(self.shape), self.components))
        self._others(self._means())
        return self.values

    def _code(self, name: str, blocks: Ints, columns: slice, prediction: Floats, contexts: Floats) -> Floats:
        """Codes components; returns their magnitudes."""
        self.fit(f"scale.{name}", blocks, columns, contexts, prediction)
        scales = contexts @ self.weights[f"scale.{name}"]
        # The exponent and the first two bits of the mantissa.
        octaves = (np.maximum(scales, 1.0).view(np.int64) >> 50) - 4 * (1023 + FIRST_OCTAVE)
        ids = octaves.clip(0, TABLES - 1)
        integers = self.choose(blocks, columns, prediction, ids)
        magnitudes = np.abs(integers)
        levels = UNIT * magnitudes - self.shrink[ids, np.minimum(magnitudes, 3)]
        self.values[blocks, columns] = prediction + np.sign(integers) * levels
        return np.minimum(magnitudes, MAGNITUDE_MAX).astype(np.float64)

    def _means(self) -> Floats:
        """Codes the first three components, coarse to fine; returns their magnitudes."""
        magnitudes = np.zeros((len(self.values), 3))
        for phase, blocks, neighbours, inside in passes(self.shape):
            around = self.values[neighbours, :3] * inside[..., None]
            count = np.maximum(inside.sum(0), 1)[:, None]
            mean = np.floor((2 * around.sum(0) + count) / (2 * count))
            spread = np.floor((np.abs(around - mean) * inside[..., None]).sum(0) / (2 * count))
            for k in range(3):
                contexts = np.column_stack([np.ones(len(blocks)), spread, magnitudes[blocks, :k]])
                column = slice(k, k + 1)
                magnitudes[blocks, column] = self._code(f"{phase}.{k}", blocks, column, mean[:, column], contexts)
        return magnitudes

    def _others(self, magnitudes: Floats) -> None:
        """Codes the other components, group by group."""
        odd = np.indices(self.shape)[1:].sum(0).ravel() % 2
        # Rows of the contexts are by colour of the chessboard, so that what a phase sees need not be gathered.
        order, half = np.argsort(odd, kind="stable"), int((odd == 0).sum())
        contexts = np.zeros((len(order), 4 + 2 * self.components))
        nine = nine_of(self.values[:, :3], self.shape)
        spread = np.abs(nine - nine[4])[BESIDE].sum(0) // 8
        contexts[:, 0], contexts[:, 1:4] = 1, spread[order]
        inputs: Floats = np.empty((0, 0))
        for group, (start, end) in enumerate([(0, 3), *GROUPS]):
            if start >= self.components:
                break
            columns, known = slice(start, end), 4 + 2 * start
            if group:
                seen = min(start, PREDICTORS)
                if inputs.shape[1] < 9 * seen:
                    inputs = np.concatenate(list(nine_of(self.values[:, :seen], self.shape)), 1)[order]
                self.fit(f"predict.{group}", order, columns, inputs, None)
                sums = inputs @ self.weights[f"predict.{group}"]
                prediction = np.floor(sums * 2.0**-PREDICTION_BITS + 0.5)
                magnitudes = np.zeros((len(order), end - start))
                for phase, rows in enumerate((slice(0, half), slice(half, None))):
                    blocks, width = order[rows], known
                    if phase:
                        width += end - start
                        contexts[rows, known:width] = nine_of(magnitudes, self.shape)[BESIDE].sum(0)[blocks]
                    magnitudes[blocks] = self._code(
                        f"{group}.{phase}", blocks, columns, prediction[rows], contexts[rows, :width]
                    )
            nine = nine_of(magnitudes, self.shape)
            around = nine.sum(0) + nine[BESIDE].sum(0) - nine[4]
            contexts[:, known : known + 2 * (end - start)] = np.column_stack([magnitudes, around])[order]


def nine_of(planes: Floats, shape: tuple[int, int, int]) -> Floats:
    """[9, n, C] of [n, C]: the components of the block above on the left, above, ..., below on the right.

    Beyond the edges of its picture a block sees the nearest inside.
    """
    _, rows, columns = shape
    padded = np.pad(planes.reshape(*shape, -1), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    nine: Floats = np.stack(shifted).reshape(9, *planes.shape)
    return nine


def passes(shape: tuple[int, int, int]) -> Iterator[tuple[str, Ints, Ints, Ints]]:
    """Coarse to fine: name, blocks [n], four neighbours of each [4, n] that come before, and which exist [4, n]."""
    pictures, rows, columns = shape
    numbers = np.arange(math.prod(shape)).reshape(shape)
    i, j = np.indices(shape[1:])
    corner = numbers[:, 0, 0]
    yield "first", corner, np.tile(corner, (4, 1)), np.zeros((4, pictures), np.int64)
    step = 1 << (max(rows, columns) - 1).bit_length() >> 1
    while step:
        on_grid = (i % step == 0) & (j % step == 0)
        odd_row, odd_column = i // step % 2 == 1, j // step % 2 == 1
        diagonal, straight = on_grid & odd_row & odd_column, on_grid & (odd_row != odd_column)
        for name, mask, offsets in (
            ("diagonal", diagonal, ((-1, -1), (-1, 1), (1, -1), (1, 1))),
            ("straight", straight, ((-1, 0), (0, -1), (0, 1), (1, 0))),
        ):
            near = [(i[mask] + step * down, j[mask] + step * right) for down, right in offsets]
            inside = np.array([(r >= 0) & (r < rows) & (c >= 0) & (c < columns) for r, c in near], np.int64)
            found = [numbers[:, r.clip(0, rows - 1), c.clip(0, columns - 1)].ravel() for r, c in near]
            yield name, numbers[:, mask].ravel(), np.array(found), np.tile(inside, pictures)
        step //= 2


@dataclass
class Encoder(Walk):
    """Chooses integers and keeps them, with their tables, for the coder.

    targets: float32 [n, 192], the components in 1/16 step. lengths: see ``lengths_of``.
    """

    targets: Floats
    lengths: Floats
    coded: list[tuple[Ints, Ints]] = field(default_factory=list)

    def choose(self, blocks: Ints, columns: slice, prediction: Floats, ids: Ints) -> Ints:
        difference = (self.targets[blocks, columns] - prediction).ravel()
        # Rate and distortion decide between the two magnitudes around the value and 0.
        some = np.flatnonzero(np.abs(difference) > DEAD_ZONE)
        value, table = np.abs(difference[some]), ids.ravel()[some]
        floor = (value / UNIT).astype(np.int64)
        cost, best = value**2 + RATE_WEIGHT * self.lengths[table, 0], np.zeros_like(floor)
        for magnitude in (floor, floor + 1):
            error = value - UNIT * magnitude + self.shrink[table, np.minimum(magnitude, 3)]
            other = error**2 + RATE_WEIGHT * self.lengths[table, np.minimum(magnitude, LEVELS - 1)]
            best, cost = np.where(other < cost, magnitude, best), np.minimum(other, cost)
        chosen = np.zeros(ids.size, np.int64)
        chosen[some] = np.where(difference[some] < 0, -best, best)
        self.coded.append((chosen, ids.ravel()))
        return chosen.reshape(ids.shape)


@dataclass
class Decoder(Walk):
    """Pops integers from a coder."""

    stack: AnsStack
    tables: Tables
    crc: int = 0

    def choose(self, blocks: Ints, columns: slice, prediction: Floats, ids: Ints) -> Ints:
        integers = self.stack.pop(self.tables, ids.ravel())
        self.crc = zlib.crc32(integers.astype("<i4").tobytes(), self.crc)
        return integers.astype(np.int64).reshape(ids.shape)
