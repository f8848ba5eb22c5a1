"""Photographs without a network: linear predictions that the encoder fits to the picture. FORMAT.md specifies it.

A phase of a plane (see `plain`) is predicted from known samples around it, of this plane and of those before it, by
weights that the encoder finds by least squares and states. So is the size of the error, from errors that are known.
What is left is coded under tables of a fixed family, by scale, shape and the fraction of the prediction.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptError
from .tables import TOTAL, Ints, Tables

Code = Callable[[Ints, Tables, Ints], Ints]
"""Takes values, tables and ids, gives the values: the encoder's takes note of them, the decoder's does not read them
but pops them."""
Numbers = NDArray[Any]
Floats = NDArray[np.floating[Any]]
"""Integers: float32 for planes of up to 8 bits, where no sum reaches 2**24, else float64, where none reaches 2**53."""

SIDE, MANY = 16, 1 << 15
"""Rows and columns, and samples, of a grid for which it is worth while to state weights."""
NEAR, ALL = 4, 12
EDGE = 3
"""How far the neighbours of a sample reach."""
WEIGHT, WEIGHTS_MAX = 1024, 1 << 14
"""Steps to 1 in weights of predictions, and the largest sum of their magnitudes."""
ERROR_WEIGHT, ERROR_WEIGHTS_MAX = 256, 1 << 11
EIGHTHS = 8

_SCALES, _SHAPES = 32, 3
_CONTEXTS = 80
_FIRST = 30  # quarter octaves below the first context
_MOVES = 16  # scales that a context's table may be moved by, less 8
_ESCAPED = 64
_REACH = 150  # of the encoder's histograms; no table reaches further
_ROOTS = (41, 58)  # 4096 times the square of 0.1, and that times the root of 2

_WEIGHT_BITS = 3  # of weights, coded as they are
_SAMPLED, _ROUNDS = 4096, 3  # of the encoder's fit


@cache
def _family() -> Tables:
    """Tables of differences: 32 scales, four to an octave, by 3 shapes by 8 fractions of the prediction."""
    lows, counts = [], []
    for i in range(_SCALES):
        reach = 8 + (1 << i // 4)
        value = np.arange(-reach, reach + 1, dtype=np.int64)[:, None]
        for shape in (1, 2, 3):
            square = ((2 << shape) - 1) * _ROOTS[i % 2] << i // 2
            for fraction in range(EIGHTHS):
                distance = 4 * (16 * value + np.arange(-7, 8, 2) - 2 * fraction)
                mass = (square << 30) // (square + distance**2)
                for _ in range(shape):
                    mass = mass * mass >> 30
                weights = mass.sum(1)
                table = 1 + weights * (TOTAL - _ESCAPED - len(weights)) // weights.sum()
                table[reach] += TOTAL - _ESCAPED - table.sum()
                lows.append(-reach)
                counts.append(np.append(table, _ESCAPED))
    return Tables(np.array(lows), counts, escape=True)


def _moves() -> NDArray[np.int64]:
    """Counts of how a context's table is moved, by scale and shape; most are not."""
    likely = np.array([1 << 18 - abs(move - _MOVES // 2) for move in range(_MOVES)])
    counts: NDArray[np.int64] = np.stack([likely, 2 * likely, likely], 1).ravel()
    counts[_UNMOVED] += TOTAL - counts.sum()
    return counts


_UNMOVED = _MOVES // 2 * _SHAPES + 1
_MOVED = Tables(np.zeros(1, int), [_moves()], escape=False)
_RANGE = Tables(np.zeros(1, int), [np.array([TOTAL // 128] * 128)], escape=False)
UNIFORM = Tables(np.zeros(16, int), [np.full(1 << w, TOTAL >> w) for w in range(1, 17)], escape=False)


class Known(NamedTuple):
    """What is known of a plane: samples [H, W], and their errors in eighths, 0 where they are not known. Arrays are
    floats that hold integers."""

    samples: Floats
    errors: Floats

    def every(self, step: int) -> "Known":
        """Every so many rows and columns."""
        return Known(self.samples[::step, ::step], self.errors[::step, ::step])


def pays(shape: tuple[int, ...]) -> bool:
    """Whether a grid is large enough for weights to be stated."""
    return min(shape) >= SIDE and math.prod(shape) >= MANY


Phases = Sequence[tuple[tuple[int, int], Sequence[tuple[int, int]]]]


def code_grid(code: Code, phases: Phases, plane: Known, before: Sequence[Known], limit: int, encoding: bool) -> None:
    """Code the samples of a plane that are not in even rows and columns, and set them and their errors.

    phases: of each the first sample, and the twelve neighbours, the nearest four first. before: the planes that are
    known. encoding: whether the samples are there. Raises CorruptError if they are not below the limit.
    """
    padded, *others = (Known(*(np.pad(array, EDGE, "reflect") for array in known)) for known in (plane, *before))
    inside = np.s_[EDGE:-EDGE, EDGE:-EDGE]
    for start, offsets in phases:
        here = np.s_[start[0] :: 2, start[1] :: 2]
        values, errors = _code_phase(code, start, offsets, padded, others, limit, encoding)
        for array, known, new in zip(plane, padded, (values, errors), strict=True):
            array[here] = known[inside][here] = new
            _mirror(known)


def _code_phase(
    code: Code,
    start: tuple[int, int],
    offsets: Sequence[tuple[int, int]],
    plane: Known,
    before: Sequence[Known],
    limit: int,
    encoding: bool,
) -> tuple[Ints, Ints]:
    """Code every second sample in every second row. Returns them and their errors. Planes have mirrored edges."""
    true = plane.samples[EDGE + start[0] : -EDGE : 2, EDGE + start[1] : -EDGE : 2]
    shape, whole = true.shape, true.dtype.type
    values: Ints = true.astype(np.int32).ravel()
    x = np.empty(((ALL + 2) * (1 + len(before)) - 1, *shape), whole)
    e = np.empty((3 + 2 * len(before), *shape), whole)
    own, guides = x[:ALL], x[ALL + 1 :].reshape(len(before), ALL + 2, *shape)
    around(plane.samples, start, offsets, own)
    x[ALL], e[0] = middle(own[:NEAR])
    around(plane.errors, start, offsets[:NEAR], near := np.empty((NEAR, *shape), whole))
    e[1], e[2] = near.sum(0), EIGHTHS
    for other, guide, errors in zip(before, guides, e[3:].reshape(-1, 2, *shape), strict=True):
        around(other.samples, start, offsets, guide[:ALL])
        around(other.samples, start, ((0, 0),), guide[ALL:])
        guide[ALL + 1] = middle(own[:NEAR] - guide[:NEAR])[0] + 2 * guide[ALL]
        around(other.errors, start, offsets[:NEAR], near)
        around(other.errors, start, ((0, 0),), errors)
        errors[1] = near.sum(0)
    x, e = x.reshape(len(x), -1), e.reshape(len(e), -1)
    spread = e[0]

    weights = _code_weights(code, _fit(x, values, spread) if encoding else None, len(x), WEIGHTS_MAX)
    sums = weights.astype(whole) @ x
    mean = np.clip(np.floor(sums / whole(WEIGHT // EIGHTHS) + whole(0.5)), 0, EIGHTHS * (limit - 1)).astype(np.int32)
    found = _fit_errors(e, np.abs(EIGHTHS * values - mean), spread) if encoding else None
    weights = _code_weights(code, found, len(e), ERROR_WEIGHTS_MAX)
    values = _code_values(code, values, mean, _contexts(weights.astype(whole) @ e), encoding)
    if values.min() < 0 or values.max() >= limit:
        raise CorruptError("sample beyond the limit")
    return values.reshape(shape), np.abs(EIGHTHS * values - mean).reshape(shape)


def around(padded: Numbers, start: tuple[int, int], offsets: Sequence[tuple[int, int]], neighbours: Numbers) -> None:
    """Set neighbours [offsets or more, h, w] of every second sample in every second row of a grid with edges."""
    height, width = neighbours.shape[1:]
    for plane, (dy, dx) in zip(neighbours, offsets, strict=False):
        y, x = start[0] + EDGE + dy, start[1] + EDGE + dx
        plane[:] = padded[y : y + 2 * height : 2, x : x + 2 * width : 2]


def _mirror(padded: Numbers) -> None:
    """Set the edges from what is inside, as `np.pad` does, of a grid of more than EDGE rows and columns."""
    for array in (padded, padded.T):
        array[:EDGE] = array[2 * EDGE : EDGE : -1]
        array[-EDGE:] = array[-EDGE - 2 : -2 * EDGE - 2 : -1]


def middle(near: Numbers) -> tuple[Numbers, Numbers]:
    """The sum of the two middle ones of four, and how far the four lie apart."""
    a, b = np.minimum(near[0], near[1]), np.maximum(near[0], near[1])
    c, d = np.minimum(near[2], near[3]), np.maximum(near[2], near[3])
    one, two = np.maximum(a, c), np.minimum(b, d)
    spread: Numbers = np.maximum(b, d) - np.minimum(a, c) + np.abs(one - two)
    return one + two, spread


def _contexts(sums: Floats) -> NDArray[np.int64]:
    """Quarter octaves of the expected error: exponent and the two upper bits of the mantissa of a positive number."""
    whole, shift, bias = (np.int32, 21, 127) if sums.dtype == np.float32 else (np.int64, 50, 1023)
    words: Ints = np.maximum(sums, 1).view(whole)
    contexts: NDArray[np.int64] = np.clip((words >> shift) - (4 * bias + _FIRST), 0, _CONTEXTS - 1)
    return contexts


def _code_weights(code: Code, weights: Ints | None, count: int, most: int) -> Ints:
    """Code integers [count] of which the magnitudes sum to no more than `most`."""
    if weights is None:
        weights = np.zeros(count, np.int64)
    wide = np.full(count, _ids(_SCALES - 1, 2, 0))
    upper = code(weights >> _WEIGHT_BITS, _family(), wide)
    lower = code(weights & (1 << _WEIGHT_BITS) - 1, UNIFORM, np.full(count, _WEIGHT_BITS - 1))
    weights = (upper.astype(np.int64) << _WEIGHT_BITS) + lower
    if np.abs(weights).sum() > most:
        raise CorruptError("weights are too large")
    return weights


def _ids(scale: Any, shape: Any, fraction: Any) -> Any:
    return (scale * _SHAPES + shape) * EIGHTHS + fraction


def _code_values(code: Code, values: Ints, mean: Ints, contexts: Ints, encoding: bool) -> Ints:
    """Code values from their predictions in eighths; contexts say how large the error may be."""
    locs, fractions = mean >> 3, mean & 7
    used = np.flatnonzero(np.bincount(contexts))
    first, last = (int(end) for end in code(used[[0, -1]], _RANGE, np.zeros(2, int)))
    if not first <= used[0] <= used[-1] <= last < _CONTEXTS:
        raise CorruptError("contexts out of range")
    # Large errors leave low bits open, which are coded as they are.
    scales = np.arange(first, last + 1)
    opened = np.maximum(scales - (_SCALES - 4), 0) // 4
    scales -= 4 * opened
    contexts = contexts - first
    bits = opened[contexts] if opened[-1] else np.zeros(1, np.int64)
    differences: Ints = values - locs
    upper: Ints = differences >> bits
    moves = _best_moves(upper, fractions, contexts, scales) if encoding else scales
    by, shapes = np.divmod(code(moves, _MOVED, np.zeros(len(moves), int)), _SHAPES)
    tables = _ids(np.clip(scales + by - _MOVES // 2, 0, _SCALES - 1), shapes, 0)
    upper = code(upper, _family(), tables.astype(np.int32)[contexts] + fractions)
    some = np.flatnonzero(bits)
    lower = code(differences[some] & (1 << bits[some]) - 1, UNIFORM, bits[some] - 1)
    result = (upper << bits) + locs
    result[some] += lower
    return result


@cache
def _costs() -> Floats:
    """Bits of differences -REACH..REACH under the family, [32 * 3, 8 * (2 REACH + 1)]."""
    tables = _family()
    every = np.arange(-_REACH, _REACH + 1)
    ids = np.arange(len(tables.lows))
    costs = tables.bits(np.repeat(ids, every.size), np.tile(every, ids.size))
    return costs.reshape(_SCALES * _SHAPES, -1)


def _best_moves(differences: Ints, fractions: Ints, contexts: Ints, scales: Ints) -> Ints:
    """The table of each context under which its differences take the fewest bits."""
    width = 2 * _REACH + 1
    keys = (contexts * EIGHTHS + fractions) * width + np.clip(differences, -_REACH, _REACH) + _REACH
    counts = np.bincount(keys, minlength=len(scales) * EIGHTHS * width).reshape(len(scales), -1)
    costs = (counts.astype(np.float64) @ _costs().T).reshape(len(scales), _SCALES, _SHAPES)
    every = np.clip(scales[:, None] + np.arange(_MOVES) - _MOVES // 2, 0, _SCALES - 1)
    stated = _MOVED.bits(np.zeros(_MOVES * _SHAPES, int), np.arange(_MOVES * _SHAPES))
    costs = np.take_along_axis(costs, every[..., None], 1).reshape(len(scales), -1) + stated
    best: Ints = costs.argmin(1)
    return best


def _fit(inputs: Floats, values: Ints, spread: Floats) -> Ints:
    """Weights [K] of the prediction, in steps: least squares of differences from the local mean, where large errors and
    rough places count less (iteratively reweighted, towards least absolute errors)."""
    some = slice(None, None, len(values) // _SAMPLED | 1)
    x, rough = inputs[:, some].astype(np.float32), spread[some].astype(np.float32) + 2
    # How often each input holds the level of each plane, own first; those of the others are guide, centre and middle.
    levels = np.zeros((1 + (len(x) - ALL - 1) // (ALL + 2), len(x)))
    levels[0, : ALL + 1] = [1] * ALL + [2]
    for i in range(1, len(levels)):
        first = ALL + 1 + (i - 1) * (ALL + 2)
        levels[i, first : first + ALL + 1], levels[0, first + ALL + 1] = 1, 2
    nearest = [int(row.argmax()) for row in levels]
    means = np.stack([x[k : k + NEAR].mean(0) for k in nearest])
    x, target = x - levels.T @ means, values[some] - means[0]
    weighting, solved = 1 / rough, np.zeros(len(x), x.dtype)
    for _ in range(_ROUNDS):
        solved = _least_squares(x, target, weighting)
        weighting = 1 / (rough * np.sqrt(np.abs(target - solved @ x) + 1))
    rest = np.eye(len(levels))[0] - levels @ solved
    for k, left in zip(nearest, rest, strict=True):
        solved[k : k + NEAR] += left / NEAR
    weights = np.rint(WEIGHT * solved).astype(np.int64)
    weights[nearest] += np.rint(WEIGHT * np.eye(len(levels))[0] - levels @ weights).astype(np.int64)
    return weights if np.abs(weights).sum() <= WEIGHTS_MAX else _mean_of(len(x))


def _mean_of(count: int) -> Ints:
    """Weights of the mean of the nearest."""
    weights = np.zeros(count, np.int64)
    weights[:NEAR] = WEIGHT // NEAR
    return weights


def _fit_errors(sizes: Floats, errors: Ints, spread: Floats) -> Ints:
    """Weights [K] of the size of the error, in steps, by least squares; none is negative."""
    some = slice(None, None, len(errors) // _SAMPLED | 1)
    solved = _least_squares(sizes[:, some].astype(np.float64), errors[some], 1 / (spread[some] + 2.0) ** 2)
    weights: Ints = np.rint(ERROR_WEIGHT * solved.clip(0, 1)).astype(np.int64)
    # They may not sum to more than eight.
    return np.minimum(weights, ERROR_WEIGHTS_MAX // len(weights)) if weights.sum() > ERROR_WEIGHTS_MAX else weights


def _least_squares(x: Floats, target: Numbers, weighting: Floats) -> Floats:
    """Weights [K] of x [K, N] for target [N]."""
    normal: Numbers = (x * weighting) @ x.T
    normal[np.diag_indices_from(normal)] += 1e-4 * normal.trace() / len(normal) + 1e-9
    solved: Floats = np.linalg.solve(normal, (x * weighting) @ target)
    return solved
