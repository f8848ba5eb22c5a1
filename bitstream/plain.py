"""Pictures without a network: interlaced prediction, fitted or not, and a memory for graphics. FORMAT.md specifies it.

A picture becomes planes of values below a limit: its channels or, if few colours or few values occur, indices into
a list of them. A plane is coded from its coarsest grid to its finest. On each grid the samples in even rows and
columns are known, and the others follow in three phases. Each is predicted from known samples around it:

    smooth   by the mean of the two middle ones of four neighbours; for small photographs
    memory   by what stood between the same neighbours before; for text and drawings
    fitted   by weights that the encoder states, where samples are many, see `fitted`; for photographs

Where nothing is fitted, what is coded is the rank of the value in the order of likelihood that the prediction implies,
under a table of a fixed family. The encoder picks a table for each context and states its number.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import fitted
from .coder import AnsStack
from .errors import CorruptError
from .fitted import UNIFORM, Floats, Known
from .tables import TOTAL, Ints, Tables

_Plane = NDArray[np.uint16]
_Values = NDArray[np.int32]
_Push = tuple[Ints, Tables, Ints]

_CHANNELS, _COLOURS, _VALUES = range(3)  # what the planes are: channels, indices of colours, indices of values
_SMOOTH, _GUIDED, _MEMORY, _FITTED = range(4)  # guided: smooth in the difference to the first plane
_CONTEXTS = 19 * 9 * 3

# Of each phase: its first sample in the grid, then four near and eight far neighbours, as (row, column).
_DIAGONAL = ((-1, -1), (1, 1), (-1, 1), (1, -1))
_KNIGHT = ((-1, -2), (-1, 2), (1, -2), (1, 2), (-2, -1), (-2, 1), (2, -1), (2, 1))
_PHASES = (
    ((1, 1), (*_DIAGONAL, (-3, -1), (-3, 1), (-1, -3), (-1, 3), (1, -3), (1, 3), (3, -1), (3, 1))),
    ((0, 1), ((0, -1), (0, 1), (-1, 0), (1, 0), *_KNIGHT)),
    ((1, 0), ((-1, 0), (1, 0), (0, -1), (0, 1), *_DIAGONAL, *_KNIGHT[:4])),
)
_NEAR, _ALL = 4, 12
_RUN = 2048  # samples that are looked up before the memory learns from them

# Ranks below _DIRECT are entries of their tables; four entries share each octave above, the low bits being open.
_DIRECT, _ENTRIES = 256, 288
_TABLES = 26 * 12
_STATED = TOTAL // 64 // _TABLES
_NUMBERS = Tables(np.zeros(1, int), [np.array([TOTAL - _STATED * _TABLES] + [_STATED] * _TABLES)], escape=False)


@cache
def _family() -> Tables:
    """The tables of ranks: 26 shapes of the tail by 12 probabilities that the rank is not 0."""
    rank = np.arange(1, 1 << 16, dtype=np.int64)
    tails = [(rank < 1 << k).astype(np.int64) for k in (1, 2, 4, 6, 8, 10, 12, 14, 16)]
    tails += [(1 << 40) // (rank + c) ** 2 for c in (0, 1, 16)]
    for c in (3 << i for i in range(14)):
        tail = (c << 30) // (c + (rank + 1) // 2)
        for _ in range(3):
            tail = tail * tail >> 30
        tails.append(tail)
    octaves = np.arange(_DIRECT, _ENTRIES)
    starts = np.append(np.arange(1, _DIRECT), _joined(octaves, np.zeros_like(octaves)))
    counts = []
    for tail in tails:
        weights = np.add.reduceat(tail, starts - 1).tolist()
        total = sum(weights)
        for missed in [512 << 2 * i for i in range(8)] + [TOTAL - (TOTAL >> i) for i in (2, 3, 4, 6)]:
            rest = [1 + weight * (missed - len(weights)) // total for weight in weights]
            counts.append(np.array([TOTAL - sum(rest), *rest]))
    return Tables(np.zeros(_TABLES, int), counts, escape=False)


def _costs(tables: Tables) -> NDArray[np.float64]:
    """[entries, tables], in whole 1/256 bits, so that sums are exact."""
    costs: NDArray[np.float64] = np.rint(256 * (24 - np.log2(np.stack(tables.counts, 1))))
    return costs


def _open_bits(entries: Ints) -> Ints:
    """How many bits of its ranks an entry from _DIRECT on leaves open."""
    return entries // 4 - 58


def _joined(entries: Ints, low: Ints) -> Ints:
    return (entries % 4 + 4 << _open_bits(entries)) + low


def _bit_length(values: Ints) -> Ints:
    """Of integers 0 <= value < 2**24."""
    exponents: Ints = np.frexp(values.astype(np.float32))[1]
    return exponents


class _ByDistance(NamedTuple):
    """The order of values by distance from a prediction, around a ring of `limit` values, the lower one first."""

    prediction: _Values
    limit: int

    def ranks(self, values: _Values) -> _Values:
        up = values - self.prediction
        up = np.where(up < 0, up + self.limit, up)
        return np.where(2 * up < self.limit, 2 * up, 2 * (self.limit - up) - 1)

    def values(self, ranks: _Values) -> _Values:
        values = self.prediction + np.where(ranks % 2, -(ranks + 1) // 2, ranks // 2)
        values = np.where(values < 0, values + self.limit, values)
        return np.where(values >= self.limit, values - self.limit, values)


class _ByFrequency(NamedTuple):
    """The order of values that begins with a guess and goes on as `order`; place is the inverse of order."""

    guess: _Values
    order: _Values
    place: _Values

    def ranks(self, values: _Values) -> _Values:
        ranks = np.zeros_like(values)
        missed = np.flatnonzero(values != self.guess)
        place = self.place[values[missed]]
        ranks[missed] = place + (place < self.place[self.guess[missed]])
        return ranks

    def values(self, ranks: _Values) -> _Values:
        values = self.guess.copy()
        missed = np.flatnonzero(ranks)
        place = ranks[missed] - 1
        values[missed] = self.order[place + (place >= self.place[self.guess[missed]])]
        return values


_Order = _ByDistance | _ByFrequency

# Called with values, contexts and an order, returns ranks: the encoder's those of the values, the decoder's those
# that it pops, after setting the values.
_Code = Callable[[_Values, Ints, _Order], _Values]


class _Memory:
    """What stood between the same four near neighbours, or the same twelve, and how often each value occurred."""

    def __init__(self, limit: int) -> None:
        self._slots = np.zeros((2, 1 << 16), np.int64)  # 16 bits of hash, 2 bits of successes, 16 bits of value
        self._seen = np.zeros(limit, np.int64)

    def count(self, values: Ints) -> None:
        self._seen += np.bincount(values, minlength=self._seen.size)

    def code_phase(self, values: _Values, around: _Values, phase: int, code: _Code) -> _Values:
        """Code values int32 [N] between neighbours int32 [12, N], run by run. Returns the ranks."""
        order = np.argsort(-self._seen, kind="stable").astype(np.int32)
        place = np.empty_like(order)
        place[order] = np.arange(order.size)
        ranks = np.empty_like(values)
        for start in range(0, values.size, _RUN):
            run = np.s_[start : start + _RUN]
            guess, state, entries = self._recall(around[:, run])
            near = sum((neighbour == guess).view(np.int8) for neighbour in around[:_NEAR, run])
            ranks[run] = code(values[run], (state * 5 + near) * 3 + phase, _ByFrequency(guess, order, place))
            for level, (slot, key, known, old, successes) in zip(self._slots, entries, strict=True):
                successes = np.where(known & (old == values[run]), np.minimum(successes + 1, 2), 0)
                level[slot] = 0  # then of entries for the same slot the largest stays, whatever their order
                np.maximum.at(level, slot, key << 18 | successes << 16 | values[run])
        self.count(values)
        return ranks

    def _recall(self, around: _Values) -> tuple[_Values, Ints, list[tuple[Ints, ...]]]:
        """Guesses, 0 to 12 for what they rest on, and the entries that belong to the neighbours."""
        guess = np.where(around[2] == around[3], around[2], around[0])
        state = np.zeros_like(guess)
        hashed = np.zeros(guess.shape, np.uint32)
        entries: list[tuple[Ints, ...]] = []
        for i, neighbour in enumerate(around, 1):
            hashed = (hashed + neighbour.view(np.uint32)) * np.uint32(0x9E3779B1)
            if i in (_NEAR, _ALL):
                slot, key = (hashed >> 16).astype(np.intp), hashed.astype(np.int64) & 65535
                entry = self._slots[len(entries), slot]
                known, successes, old = entry >> 18 == key, entry >> 16 & 3, (entry & 65535).astype(np.int32)
                state = np.where(known, 1 + 6 * len(entries) + 2 * successes + (old == guess), state)
                guess = np.where(known, old, guess)
                entries.append((slot, key, known, old, successes))
        return guess, state, entries


def _around(grid: Floats, start: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> _Values:
    """Neighbours, int32 [offsets, N], of every second sample in every second row; the edges are mirrors."""
    if 1 in grid.shape:  # across a line there are none
        offsets = (list(offsets[:2]) * 6)[: len(offsets)]
    around = np.empty((len(offsets), *grid[start[0] :: 2, start[1] :: 2].shape), np.int32)
    fitted.around(np.pad(grid, fitted.EDGE, "reflect"), start, offsets, around)
    return around.reshape(len(offsets), -1)


def _known(plane: Ints, limit: int) -> Known:
    """A plane of which nothing is said yet but its samples."""
    samples: Floats = plane.astype(np.float32 if limit <= 256 else np.float64)
    return Known(samples, np.zeros_like(samples))


def _code_plane(
    plane: Known,
    limit: int,
    kind: int,
    before: Sequence[Known],
    sizes: _Plane,
    code: _Code,
    fit: fitted.Code,
    encoding: bool,
) -> None:
    """Code a plane of which the first sample is known.

    before: the planes of the picture that are known. sizes: classes of the ranks in the plane before; set to those of
    this one. fit: codes what is said in fitted phases.
    """
    memory = _Memory(limit)
    memory.count(plane.samples[0, :1].astype(np.int32))
    step = 1 << (max(plane.samples.shape) - 1).bit_length()
    while step := step // 2:
        here_known, *others = (known.every(step) for known in (plane, *before))
        (grid, errors), grid_sizes = here_known, sizes[::step, ::step]
        if kind == _FITTED and fitted.pays(grid.shape):
            fitted.code_grid(fit, _PHASES, here_known, others, limit, encoding)
            continue
        for phase, ((y, x), offsets) in enumerate(_PHASES):
            here = np.s_[y::2, x::2]
            if not grid[here].size:
                continue
            values, size = grid[here].astype(np.int32).ravel(), grid_sizes[here].ravel()
            if kind == _MEMORY:
                ranks = memory.code_phase(values, _around(grid, (y, x), offsets), phase, code)
            else:
                near, base = _around(grid, (y, x), offsets[:_NEAR]), np.zeros_like(values)
                if before and kind != _SMOOTH:
                    near -= _around(others[0].samples, (y, x), offsets[:_NEAR])
                    base = others[0].samples[here].astype(np.int32).ravel()
                twice, spread = fitted.middle(near)
                prediction = np.clip((twice + 1 >> 1) + base, 0, limit - 1)
                ranks = code(values, (_bit_length(spread) * 9 + size) * 3 + phase, _ByDistance(prediction, limit))
            grid[here] = values.reshape(grid[here].shape)
            errors[here] = (ranks + 1 >> 1 << 3).reshape(grid[here].shape)
            grid_sizes[here] = (_bit_length(ranks) + 1 >> 1).reshape(grid[here].shape)


def _chosen(stated: Ints) -> Ints:
    """The table number of each context, from 0 for that of the context before or 1 + number."""
    last = np.maximum.accumulate(np.where(stated > 0, np.arange(_CONTEXTS), 0))
    chosen: Ints = np.maximum(stated[last] - 1, 0)
    return chosen


def _fixed(value: int, bits: int) -> _Push:
    """A number of up to 8 bits, or 16 bits in two bytes, the upper one first."""
    parts = divmod(value, 256) if bits == 16 else (value,)
    return np.array(parts), UNIFORM, np.full(len(parts), min(bits, 8) - 1)


def _pop_fixed(stack: AnsStack, bits: int) -> int:
    return int.from_bytes(
        stack.pop(UNIFORM, np.full(-(-bits // 8), min(bits, 8) - 1)).astype(np.uint8).tobytes(), "big"
    )


def _plane_pushes(
    plane: Ints, limit: int, kind: int, before: Sequence[Known], sizes: _Plane, compared: bool
) -> tuple[float, list[_Push], Known, _Plane]:
    """The cost of a plane in 1/256 bit, what to push, in the order of popping, the plane as the next ones know it, and
    the new sizes."""
    known, sizes = _known(plane, limit), sizes.copy()
    parts: list[tuple[Ints, ...]] = [(np.zeros(0, np.int32),) * 4]
    fits: list[_Push] = []

    def code(values: _Values, contexts: Ints, order: _Order) -> _Values:
        ranks = order.ranks(values)
        entries, far = ranks.copy(), np.flatnonzero(ranks >= _DIRECT)
        width = _bit_length(ranks[far]) - 3
        entries[far] = (ranks[far] >> width) + 4 * width + _DIRECT - 28
        parts.append((contexts, entries, ranks[far] & (1 << width) - 1, width))
        return ranks

    def fit(values: Ints, tables: Tables, ids: Ints) -> Ints:
        fits.append((values, tables, ids))
        return values

    _code_plane(known, limit, kind, before, sizes, code, fit, encoding=True)
    contexts, entries, _, widths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    counts = np.bincount(contexts * _ENTRIES + entries, minlength=_CONTEXTS * _ENTRIES).reshape(_CONTEXTS, -1)
    used = np.flatnonzero(counts.any(1))
    same, other = _costs(_NUMBERS)[:2, 0]
    stated, number = np.zeros(_CONTEXTS, np.int64), 0
    cost = 256.0 * widths.sum() + same * _CONTEXTS
    for context, costs in zip(used, counts[used].astype(np.float64) @ _costs(_family()), strict=True):
        best = int(costs.argmin())
        if costs[best] + other < costs[number] + same:
            stated[context], number, cost = 1 + best, best, cost + other - same
        cost += costs[number]
    chosen = _chosen(stated)
    pushes = [_fixed(kind, 2), _fixed(int(plane[0, 0]), 16), (stated, _NUMBERS, np.zeros(_CONTEXTS, int))]
    for contexts, entries, low, width in parts:
        pushes += [(entries, _family(), chosen[contexts]), (low, UNIFORM, width - 1)]
    if compared:  # which takes longer than coding them
        cost += 256.0 * sum(float(tables.bits(ids, values).sum()) for values, tables, ids in fits)
    return cost, pushes + fits, known, sizes


def _planes_pushes(planes: Ints, limit: int) -> list[_Push]:
    """What to push for planes [N, H, W], each in its cheapest kind."""
    pushes: list[_Push] = []
    before: list[Known] = []
    sizes = np.zeros_like(planes[0])
    for plane in planes:
        flat = plane.ravel()
        drawn = 8 * np.count_nonzero(flat[1:] == flat[:-1]) > 3 * flat.size
        large = fitted.pays(plane.shape)
        kinds = [_FITTED] * large
        if drawn or not large:
            kinds += [_SMOOTH, _GUIDED][: 1 + len(before)]
        if drawn:
            kinds.append(_MEMORY)  # which is the slow one
        drafts = [_plane_pushes(plane, limit, kind, before, sizes, len(kinds) > 1) for kind in kinds]
        _, best, known, sizes = min(drafts, key=lambda draft: draft[0])
        pushes += best
        before.append(known)
    return pushes


def _push_all(stack: AnsStack, pushes: list[_Push]) -> None:
    """Push what is popped in this order."""
    for push in reversed(pushes):
        stack.push(*push)


def _pop_planes(stack: AnsStack, shape: tuple[int, int], count: int, limit: int) -> list[_Plane]:
    planes: list[Known] = []
    sizes = np.zeros(shape, np.uint16)
    for i in range(count):
        kind, first = _pop_fixed(stack, 2), _pop_fixed(stack, 16)
        if first >= limit or (kind == _GUIDED and not i):
            raise CorruptError(f"plane of kind {kind} begins with {first}")
        plane = _known(np.zeros(shape, np.uint16), limit)
        plane.samples[0, 0] = first
        chosen = _chosen(stack.pop(_NUMBERS, np.zeros(_CONTEXTS, int)))

        def code(values: _Values, contexts: Ints, order: _Order, chosen: Ints = chosen) -> _Values:
            ranks = stack.pop(_family(), chosen[contexts])
            far = np.flatnonzero(ranks >= _DIRECT)
            ranks[far] = _joined(ranks[far], stack.pop(UNIFORM, _open_bits(ranks[far]) - 1))
            if ranks.max() >= limit:
                raise CorruptError("sample beyond the limit")
            values[:] = order.values(ranks)
            return ranks

        def fit(_: Ints, tables: Tables, ids: Ints) -> Ints:
            return stack.pop(tables, ids)

        _code_plane(plane, limit, kind, planes, sizes, code, fit, encoding=False)
        planes.append(plane)
    return [plane.samples.astype(np.uint16) for plane in planes]


def _order(channels: int) -> list[int]:
    return [1, 0, 2, 3][:channels] if channels > 2 else [0, 1][:channels]


def _different(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Those that occur, in order; np.unique would hash, which takes longer."""
    ordered = np.sort(keys, axis=None)
    different: NDArray[np.uint64] = ordered[np.append(True, ordered[1:] != ordered[:-1])]
    return different


def push_plain(stack: AnsStack, samples: Ints, depth: int) -> None:
    """Push a picture. samples: integers [H, W, C], 1 <= C <= 4, 0 <= sample < 2**depth; depth: 8 to 16.

    Raises ValueError or TypeError for anything else, before pushing.
    """
    if samples.dtype.kind not in "iu":
        raise TypeError(f"integer samples expected, not {samples.dtype}")
    if samples.ndim != 3 or not samples.size or samples.shape[2] > 4 or not 8 <= depth <= 16:
        raise ValueError(f"picture of shape {samples.shape} and depth {depth}")
    if samples.min() < 0 or samples.max() >> depth:
        raise ValueError(f"samples beyond {depth} bits")
    channels, limit = np.moveaxis(samples[..., _order(samples.shape[2])], 2, 0).astype(np.uint16), 1 << depth
    keys = np.zeros(channels[0].shape, np.uint64)
    for channel in channels:
        keys = keys << np.uint64(depth) | channel
    most = min(keys.size // 16, 4096, limit ** len(channels) // 2)
    colours = _different(keys.ravel()[: 4 * most + 1])  # if these are too many, all are
    colours = colours if len(colours) > most else _different(keys)
    values = np.flatnonzero(np.bincount(channels.ravel()))
    layout, planes, listed = _CHANNELS, channels, np.zeros((0, 1, limit), np.uint16)
    if len(colours) <= most:
        layout, planes = _COLOURS, np.searchsorted(colours, keys).astype(np.uint16)[None]
        listed = np.zeros((len(channels), 1, len(colours)), np.uint16)
        listed[:, 0, planes[0]] = channels
    elif len(values) <= min(keys.size // 16, limit // 2):
        layout, planes = _VALUES, np.searchsorted(values, channels).astype(np.uint16)
        listed = values.astype(np.uint16)[None, None]
    pushes = [_fixed(layout, 2)]
    if layout != _CHANNELS:
        pushes += [_fixed(listed.shape[2] - 1, 16), *_planes_pushes(listed, limit)]
    _push_all(stack, pushes + _planes_pushes(planes, listed.shape[2]))


def pop_plain(stack: AnsStack, shape: tuple[int, int, int], depth: int) -> NDArray[np.uint16]:
    """Pop a picture: the inverse of `push_plain`. Returns uint16 [H, W, C]. Raises CorruptError."""
    height, width, channels = shape
    limit, listed = 1 << depth, []
    layout = _pop_fixed(stack, 2)
    if layout > _VALUES:
        raise CorruptError(f"unknown layout {layout}")
    if layout != _CHANNELS:
        count = _pop_fixed(stack, 16) + 1
        listed = _pop_planes(stack, (1, count), channels if layout == _COLOURS else 1, limit)
        limit = count
    planes = _pop_planes(stack, (height, width), 1 if layout == _COLOURS else channels, limit)
    if listed:
        planes = [array[0, plane] for array in listed for plane in planes]
    return np.stack([planes[i] for i in np.argsort(_order(channels))], -1)
