"""Samples under the tables that the networks choose, and what a tile says to make them fit.

Arrays of samples are numpy's or, where the coder runs on a GPU, tensors there; see ``arrays``. What a tile says are
some numbers, and numpy's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitstream import NEAR, AnsStack, Codec, Tables, table_codec

from ..arrays import cast, counted, get, product, put, stacked, taken
from .numbers import FRACTIONS, SCALES, SHAPES
from .refine import ERROR_MAX, INVERSES, PASSES, Layers, Passes, Shorts, name_of

if TYPE_CHECKING:
    from .tile import Networks

Values = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Prediction = tuple[Values, Values, Values]
"""Means in eighths, scale indices and shapes [N]."""

OFTEN = 64
"""Values that a group of scale indices must have to be moved."""
OFFSETS = np.arange(-4, 5, dtype=np.int32)
OFFSET_TABLES = Tables(
    OFFSETS[:1], [np.array([2 ** (22 - abs(k)) if k else 2**23 + 2**19 for k in OFFSETS])], escape=False
)
TO_MOVE, TO_REFINE = 16384, 8192
"""About so many values, two thirds to twice, are enough to choose offsets by, and what to do with a pass."""
PLAIN, REFINED, WEIGHED = range(3)
"""What a tile may do with a pass: leave it, refine it, and weigh errors around it as well."""
MODE_TABLES = Tables(np.array([PLAIN]), [np.array([2**21, 2**22, 2**24 - 2**22 - 2**21])], escape=False)
WEIGHT_MAX = 16
_weights = np.abs(np.arange(-WEIGHT_MAX, WEIGHT_MAX + 1))
_counts = 2 ** (21 - _weights // 2)
_counts[WEIGHT_MAX] += 2**24 - _counts.sum()
WEIGHT_TABLES = Tables(np.array([-WEIGHT_MAX]), [_counts], escape=False)
"""Weights of errors around a sample, in 32nds."""


def entries(steps: Values, scales: Values, shapes: Values) -> tuple[Values, Values]:
    """Tables of samples, and what their values are counted from."""
    floors = steps // FRACTIONS
    return (scales * SHAPES + shapes) * FRACTIONS + (steps - floors * FRACTIONS), floors


def rounded(steps: Values) -> Values:
    """Means to whole grey levels: what samples are taken for that are missing."""
    levels: Values = (steps + FRACTIONS // 2) // FRACTIONS
    return levels


def looked_at(values: Values, enough: int) -> slice:
    return slice(None, None, len(values) // enough | 1)


def places(ids: Values, floors: Values, values: Values) -> Values:
    """Where ``Tables.near`` has what samples cost; their distances from whole means are never larger."""
    there: Values = ids * (2 * NEAR) + (values - floors + NEAR)
    return there


class PixelCodec:
    """Samples [N] of one phase and colour, or of its first pass. prediction: int32 [3, ...], mean in eighths, scale
    index and shape.

    Scales are what the training pictures taught. Where a tile's residuals are larger or smaller, it says so before
    them: by an offset for each group of indices that occurs often.
    """

    def __init__(self, weights: Networks, prediction: Values) -> None:
        self.tables, self.groups = weights.pixel_tables, weights.config.groups
        self.steps, self.scales, self.shapes = (part.ravel() for part in prediction)
        self.offsets: Values | None = None
        if self.groups:
            self.group_of = np.arange(SCALES, dtype=np.int32) * self.groups // SCALES
            often = get(counted(self.scales, SCALES))
            self.often = np.flatnonzero(np.bincount(self.group_of, often, self.groups) >= OFTEN)
            self.offset_codec = table_codec(OFFSET_TABLES, np.zeros(len(self.often), np.int32))

    def codec(self) -> Codec[Values]:
        return Codec(self._push, self._pop, lambda: rounded(self.steps))

    def moving(self, values: Values) -> Values:
        """int32 [SCALES]: the index that takes the place of each; known after popping, or from the values."""
        every = np.arange(SCALES, dtype=np.int32)
        if not self.groups:
            return every
        if self.offsets is None:
            self.offsets = self._best(values)
        by = np.zeros(self.groups, np.int32)
        by[self.often] = self.offsets
        moved: Values = np.clip(every + by[self.group_of], 0, SCALES - 1)
        return moved

    def _best(self, values: Values) -> Values:
        some = looked_at(values, TO_MOVE)
        scales, costs = self.scales[some], []
        under = places(*entries(self.steps[some], 0 * scales, self.shapes[some]), values[some])
        every, groups = np.arange(SCALES), scales * self.groups // SCALES
        for offset in OFFSETS.tolist():
            moved = np.clip(every + offset, 0, SCALES - 1) * (SHAPES * FRACTIONS * 2 * NEAR)
            costs.append(counted(groups, self.groups, taken(self.tables.near, put(moved, scales)[scales] + under)))
        prices = OFFSET_TABLES.costs
        whole = some.step * get(stacked(costs, np.float64, costs[0]))[:, self.often] + prices[:, None]
        offsets: Values = OFFSETS[np.argmin(whole, 0)]
        return offsets

    def push_offsets(self, stack: AnsStack) -> None:
        if self.offsets is not None:
            self.offset_codec.push(stack, self.offsets)

    def pop_offsets(self, stack: AnsStack) -> None:
        if self.groups:
            self.offsets = self.offset_codec.pop(stack)

    def _under(self, moving: Values) -> Codec[Values]:
        return table_codec(self.tables, *entries(self.steps, put(moving, self.scales)[self.scales], self.shapes))

    def _push(self, stack: AnsStack, values: Values) -> None:
        self._under(self.moving(values)).push(stack, values)
        self.push_offsets(stack)

    def _pop(self, stack: AnsStack) -> Values:
        self.pop_offsets(stack)
        return self._under(self.moving(self.steps)).pop(stack)


def passes_parts(
    weights: Networks, name: str, number: int, passes: Passes, inside: Bytes
) -> Generator[tuple[str, Codec[Values]], Values, None]:
    """One colour of one phase of the level ``number``, pass by pass, into its samples ``inside`` [h, w]."""
    colour = passes.colour
    for index in range(len(PASSES)):
        refiner = weights.refiners[name_of(number, passes.phase.name, colour, index)]
        if index == 0:
            first = PixelCodec(weights, passes.of(0, passes.prediction))
            values = yield name, first_codec(first, passes, refiner)
            passes.move(first.moving(values))
        else:
            codec = partial(refined_codec, weights.pixel_tables, passes, index, refiner)
            values = yield name, when_used(codec, partial(missing, passes, index))
        view = passes.of(index, inside)
        view[:] = values.reshape(view.shape).clip(0, 255)
        passes.see(index, view)


def first_codec(first: PixelCodec, passes: Passes, refiner: Layers) -> Codec[Values]:
    """Samples [N] of pass 0, with the offsets of ``first``, which hold for all passes."""

    def push(stack: AnsStack, values: Values) -> None:
        refined_codec(first.tables, passes, 0, refiner).push(stack, values)
        first.push_offsets(stack)

    def pop(stack: AnsStack) -> Values:
        first.pop_offsets(stack)
        passes.move(first.moving(first.steps))
        return refined_codec(first.tables, passes, 0, refiner).pop(stack)

    return Codec(push, pop, lambda: rounded(first.steps))


def when_used(make: Callable[[], Codec[Values]], guess: Callable[[], Values]) -> Codec[Values]:
    """A codec that is made when it is used: encoders ask for those of all passes before they use any, and what
    refiners see is large."""
    return Codec(lambda stack, values: make().push(stack, values), lambda stack: make().pop(stack), guess)


def missing(passes: Passes, index: int) -> Values:
    """What samples [N] of a pass are taken for."""
    return rounded(passes.of(index, passes.mean).ravel())


def refined_codec(tables: Tables, passes: Passes, index: int, refiner: Layers) -> Codec[Values]:
    """Samples [N] of a pass. Before them the tile says what to do, and the weights of ``WEIGHED``."""
    seen, activations, around = passes.inputs(index)
    mode_codec = table_codec(MODE_TABLES, np.zeros(1, np.int32))
    weight_codec = table_codec(WEIGHT_TABLES, np.zeros(len(around), np.int32))

    def under(prediction: Prediction) -> Codec[Values]:
        return table_codec(tables, *entries(*prediction))

    def weighed(outputs: Values, weights: Values, around: Shorts) -> Values:
        outputs = outputs + 0
        outputs[0] += cast(product(put(weights, around), around), np.int32) << 5
        return outputs

    def cost(prediction: Prediction, values: Values) -> Any:
        """In 1/256 bit, [1]."""
        return cast(taken(tables.near, places(*entries(*prediction), values)), np.int64).sum(0, keepdims=True)

    def fitted(prediction: Prediction, values: Values, around: Shorts) -> Values:
        """Weights by least squares of the errors that are left."""
        means, scales, _ = prediction
        errors = (FRACTIONS * values - means) * taken(INVERSES, scales) >> 10
        inputs = cast(around, np.float64)
        both = stacked([*inputs, errors.clip(-ERROR_MAX, ERROR_MAX)], np.float64, errors)
        sums = get(inputs @ both.T)  # of integers, so that they are exact
        weights = np.linalg.solve(sums[:, :-1] + np.eye(len(sums)), sums[:, -1])
        steps: Values = np.rint(32 * weights).clip(-WEIGHT_MAX, WEIGHT_MAX).astype(np.int32)
        return steps

    def push(stack: AnsStack, values: Values) -> None:
        some, outputs = looked_at(values, TO_REFINE), refiner.outputs(seen, activations)
        few, fewer, beside = values[some], outputs[:, some], around[:, some]
        ways = [passes.moved(index, None, some), passes.moved(index, fewer, some)]
        weights = fitted(ways[REFINED], few, beside)
        ways.append(passes.moved(index, weighed(fewer, weights, beside), some))
        sums = [cost(way, few) for way in ways]
        costs = some.step * get(stacked(sums, np.int64, sums[0]))[:, 0]
        costs[WEIGHED] += WEIGHT_TABLES.costs[weights + WEIGHT_MAX].sum()
        mode = int(np.argmin(costs))
        by = None if mode == PLAIN else outputs if mode == REFINED else weighed(outputs, weights, around)
        under(passes.moved(index, by)).push(stack, values)
        if mode == WEIGHED:
            weight_codec.push(stack, weights)
        mode_codec.push(stack, np.array([mode]))

    def pop(stack: AnsStack) -> Values:
        mode, outputs = mode_codec.pop(stack)[0], None
        if mode != PLAIN:
            outputs = refiner.outputs(seen, activations)
            if mode == WEIGHED:
                outputs = weighed(outputs, weight_codec.pop(stack), around)
        return under(passes.moved(index, outputs)).pop(stack)

    return Codec(push, pop)
