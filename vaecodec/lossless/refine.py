"""Refinement: a phase and colour in four passes, each of which knows the samples of those before it.

The networks predict all samples of a phase and colour at once. Their errors still have something in common with those
of their neighbours: an edge that was missed, or noise that is stronger here. So at the finest levels every second row
and column comes first, then what lies between them; and before each pass a small network, for each sample alone, moves
mean, scale index and shape by what the errors around the sample say, and by the state that the phase was predicted
from: it knows in what direction errors have something in common. Integers throughout.

Arrays are numpy's or, where the coder runs on a GPU, tensors there; see ``arrays``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import blocks, cast, constant, counted, edged, floors, get, joined, product, put, stacked, taken, zeros
from .numbers import CHANNEL_ORDER, FRACTIONS, PHASES, SCALE_MAX, SCALE_MIN, SCALES, SHAPES, Config

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

PASSES = ((0, 0), (1, 1), (0, 1), (1, 0))
"""First row and column of each pass; the others are two apart."""
SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))
CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
NEIGHBOURS = ((), CORNERS, SIDES, SIDES + CORNERS)
"""Of a sample of each pass, those that are known."""
BESIDE = {"B": (((-1, 0), (0, 0)),), "C": (((0, -1), (0, 0)), ((0, 0), (0, 1), (1, 0), (1, 1)))}
"""Row and column, relative to a sample of phase B or C, of the samples of the phases before it that touch it."""

ERROR_MAX = 80
"""Errors, in sixteenths of a scale, are kept to this."""
PIXEL_MAX, USAGE_MAX = 64, 64
INPUT_MAX, STATE_MAX, HIDDEN_MAX = 80, 255, 255
BLOCK = 512
"""Samples whose hidden activations are computed together: they stay in the caches."""
MEAN_MAX = 1024
"""Steps of 1/256 of a scale by which a mean can be moved."""
_scales = [SCALE_MIN * (SCALE_MAX / SCALE_MIN) ** (n / (SCALES - 1)) for n in range(SCALES)]
UNITS = np.array([round(128 * s) for s in _scales], np.int32)
"""Scales by index, in 128ths of a grey level; no value of this or the next is near a tie."""
INVERSES = np.array([round(2048 / s) for s in _scales], np.int32)
STEPS = np.repeat(np.array([1, 2, 4], np.int32), [16, 8, 16])
"""By scale index: of a mean, in eighths. Passes are short and their tables many, and where scales are large fractions
need not be as fine."""


class Layers(NamedTuple):
    """A refiner: w_1 [H, F + W] and b_1 [H, 1], w_2 [K, H] and b_2 [K, 1], w_3 [3, K] and b_3 [3, 1]; float32, of
    integers in steps of a hidden activation: 1/256 and 1/512 in the first two layers."""

    w_1: Floats
    b_1: Floats
    w_2: Floats
    b_2: Floats
    w_3: Floats
    b_3: Floats

    def outputs(self, seen: Shorts, activations: Bytes) -> Ints:
        """int32 [3, N] of what is seen [F, N] and activations [N, W], see ``Passes.inputs``: in 2**-14, mean in scales,
        scale index in fours, shape."""
        w_1, b_1, w_2, b_2, w_3, b_3 = (constant(part, seen) for part in self)
        outputs: Ints = zeros((3, seen.shape[1]), np.int32, seen)
        for block in blocks(seen, BLOCK):
            hidden = product(w_1, joined(np.float32, seen[:, block], activations[block].T))
            hidden += b_1
            further = product(w_2, floors(hidden, 0, HIDDEN_MAX))
            further += b_2
            outputs[:, block] = product(w_3, floors(further, 0, HIDDEN_MAX)) + b_3
        return outputs


def name_of(number: int, phase: str, colour: int, index: int) -> str:
    """Of a refiner: number of the level, 1 the finest; place of the colour in coding order; pass."""
    return f"refine.{number}.{phase}.{colour}.{index}"


def layers_of(decoder: Mapping[str, NDArray[Any]], config: Config) -> dict[str, Layers]:
    """The refiners by their names. Raises ValueError for tensors that do not fit or that break the bounds of exact
    sums."""
    refiners = {}
    for place in all_of(config.refined):
        name = name_of(*place)
        parts = Layers(*(decoder[f"{name}.{part}"].astype(np.float32) for part in Layers._fields))
        first, second, inputs = len(parts.w_1), len(parts.w_2), input_count(*place[1:])
        sizes = [(first, inputs + config.width), (first, 1), (second, first), (second, 1), (3, second), (3, 1)]
        if [part.shape for part in parts] != sizes:
            raise ValueError(f"{name} does not fit")
        most = np.repeat([INPUT_MAX, STATE_MAX], [inputs, config.width])
        for weight, bias, limit in ((*parts[:2], most), (*parts[2:4], HIDDEN_MAX), (*parts[4:], HIDDEN_MAX)):
            if ((limit * abs(weight)).sum(1, np.float64, keepdims=True) + abs(bias)).max(initial=0) >= 2**24:
                raise ValueError(f"sums of {name} are not exact")
        units = 256, 256, 512, 512, 1, 1
        refiners[name] = Layers(*(part / np.float32(unit) for part, unit in zip(parts, units, strict=True)))
    return refiners


def all_of(refined: int) -> Iterator[tuple[int, str, int, int]]:
    """Number of the level, phase, colour and pass of each refiner."""
    return itertools.product(range(1, refined + 1), PHASES, range(len(CHANNEL_ORDER)), range(len(PASSES)))


def input_count(phase: str, colour: int, index: int) -> int:
    beside = sum(len(places) for places in BESIDE.get(phase, ()))
    return len(NEIGHBOURS[index]) * (1 + (phase == "D")) + (index > 0) + (index > 2) + 2 * colour + beside + 6


def usage_of(a: NDArray[np.uint8]) -> Ints:
    """How often values occur in the samples of one colour of phase A: 16 log2(8 + count), int32 [256].

    Pictures from scanners, or with curves applied, use some values more than those beside them.
    """
    counts = get(counted(a.ravel(), 256))
    usage: Ints = np.rint(16 * np.log2(8 + counts)).astype(np.int32)  # no count is near a tie
    return usage


@dataclass
class Phase:
    """What is known of a phase, by colour in coding order. size: rows and columns of phase A, which no other exceeds.

    errors: int16 [rows + 2, columns + 2] each, in sixteenths of a scale; 0 where there is no sample or it is not known.
    """

    name: str
    size: tuple[int, ...]
    errors: list[Shorts] = field(default_factory=list)


class Passes:
    """The passes of one phase and colour.

    prediction: mean in eighths, scale index and shape, int32 [3, rows, columns]. before: the phases of this level that
    are known; phase: this one, with the colours that are known, to which this one is added. usage: see ``usage_of``.
    activations: uint8 [rows, columns, W], see ``tile.State``.
    """

    def __init__(
        self, prediction: Ints, phase: Phase, before: tuple[Phase, ...], usage: Ints, activations: Bytes
    ) -> None:
        self.prediction, self.activations = prediction, activations
        self.mean, self.scale, self.shape = prediction
        self.phase, self.before, self.colour = phase, before, len(phase.errors)
        rows, columns = phase.size
        self.errors = zeros((rows + 2, columns + 2), np.int16, prediction)
        self.steps = edged(cast(self.mean, np.int16), (1, 1), (1, 1))
        """What is known of samples, in eighths: themselves or their means."""
        more = np.diff(np.pad(usage, (1, 2), "edge")).clip(-USAGE_MAX, USAGE_MAX).astype(np.int16)
        self.usage = put(np.lib.stride_tricks.sliding_window_view(more, 256), prediction)
        """int16 [3, 256]: how much more often values one above v - 1, v and v + 1 occur than these."""
        phase.errors.append(self.errors)

    def move(self, moving: Ints) -> None:
        """Take other scale indices, ``moving`` [SCALES] of those that the networks gave."""
        self.scale = put(moving, self.scale)[self.prediction[1]]

    def at(self, index: int, plane: NDArray[Any], row: int = 0, column: int = 0) -> NDArray[Any]:
        """Of a plane with a margin of 1, the samples of a pass, moved."""
        (top, left), (rows, columns) = PASSES[index], self.mean.shape
        return plane[1 + top + row : 1 + rows + row : 2, 1 + left + column : 1 + columns + column : 2]

    def of(self, index: int, plane: NDArray[Any]) -> NDArray[Any]:
        """Of a plane without, [..., rows, columns]."""
        top, left = PASSES[index]
        return plane[..., top::2, left::2]

    def see(self, index: int, values: NDArray[np.uint8]) -> None:
        """The samples of a pass [h, w]."""
        mean, scale = self.of(index, self.mean), self.of(index, self.scale)
        steps = FRACTIONS * cast(values, np.int32)
        errors = (steps - mean) * taken(INVERSES, scale) + 512 >> 10
        self.at(index, self.errors)[:] = errors.clip(-ERROR_MAX, ERROR_MAX)
        self.at(index, self.steps)[:] = steps

    def inputs(self, index: int) -> tuple[Shorts, Bytes, Shorts]:
        """What a refiner sees of the samples of a pass, int16 [F, N], and the activations there, uint8 [N, W]; and
        errors that a tile can weigh, int16 [G, N]."""
        # Copies, in one piece, as they are read more than once.
        mean, scale, shape = (self.of(index, plane) + 0 for plane in (self.mean, self.scale, self.shape))
        around = [self.at(index, self.errors, *place) + 0 for place in NEIGHBOURS[index]]
        parts, own = list(around), list[Shorts]()
        if self.phase.name == "D":
            inverses = taken(INVERSES, scale)
            for place in NEIGHBOURS[index]:
                apart = (self.at(index, self.steps, *place) - mean) * inverses + 2048 >> 12
                parts.append(apart.clip(-PIXEL_MAX, PIXEL_MAX))
        for first in range(0, len(around), 4):
            a, b, c, d = around[first : first + 4]
            parts.append((abs(a) + abs(b) + abs(c) + abs(d) >> 2) - 16)
            own.append(a + b + c + d + 2 >> 2)
        for errors in self.phase.errors[: self.colour]:
            same = self.at(index, errors) + 0
            parts += [same, abs(same)]
            own.append(same)
        for phase, places in zip(self.before, BESIDE.get(self.phase.name, ()), strict=True):
            touching = [self.at(index, phase.errors[self.colour], *place) for place in places]
            parts += touching
            own.append(sum(touching[1:], touching[0]) // len(touching))
        parts += [2 * scale - 32, 16 * shape - 16]
        levels = mean // FRACTIONS
        parts += [more[levels] for more in self.usage] + [4 * (mean - levels * FRACTIONS) - 16]
        (top, left), (rows, columns) = PASSES[index], mean.shape
        activations = self.activations[top::2, left::2].reshape(rows * columns, self.activations.shape[2])
        return flat(stacked(parts, np.int16, mean)), activations, flat(stacked(own, np.int16, mean))

    def moved(self, index: int, outputs: Ints | None, some: slice = slice(None)) -> tuple[Ints, Ints, Ints]:
        """Mean, scale index and shape of the samples of a pass, or of some, by a refiner's outputs for them."""
        mean, scale, shape = (self.of(index, plane).ravel()[some] for plane in (self.mean, self.scale, self.shape))
        if outputs is not None:
            by = (outputs[0] + 32 >> 6).clip(-MEAN_MAX, MEAN_MAX)
            mean = (mean + (by * taken(UNITS, scale) + 2048 >> 12)).clip(0, 255 * FRACTIONS)
            scale = (scale + (outputs[1] + 2048 >> 12)).clip(0, SCALES - 1)
            shape = (shape + (outputs[2] + 8192 >> 14)).clip(0, SHAPES - 1)
        step = taken(STEPS, scale)
        return mean + (step >> 1) & -step, scale, shape


def flat(planes: NDArray[Any]) -> NDArray[Any]:
    """[P, N] of planes [P, rows, columns]."""
    return planes.reshape(len(planes), planes.shape[1] * planes.shape[2])
