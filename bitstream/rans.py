"""rANS in lanes, by constriction or by numpy: both write the words that FORMAT.md specifies.

A lane is a 64-bit state below a stack of 32-bit words, with 24-bit probabilities. The values of an array, in coding
order, go to the lanes in turn, RUN values at a time. So every lane gets its share of all tables, and constriction,
which codes what is under one table and in one lane, has enough to do at a call.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .tables import PRECISION, TOTAL, Tables

try:
    import constriction
except ImportError:  # there are platforms that it is not built for
    constriction = None

WORD = 32
RUN = 128
"""So many values go to one lane before the next one's turn."""
_FEW = 24
"""So many lanes at least are coded together by numpy: with fewer, its calls take longer than Python's loop."""
_PRECISION, _WORD, _ROOM = np.uint64(PRECISION), np.uint64(WORD), np.uint64(2 * WORD - PRECISION)
_MASK, _LOW = np.uint64(TOTAL - 1), np.uint64(1 << WORD)

Words = NDArray[np.uint32]
Symbols = NDArray[np.int32]

# Two threads may make the same model at once; which of the two is kept does not matter.
_models: WeakKeyDictionary[Tables, dict[int, Any]] = WeakKeyDictionary()


class Lanes(Protocol):
    """Made from the words of each lane, uint32 [N], the last not zero."""

    def __init__(self, lanes: Sequence[Words]) -> None: ...

    def push(self, symbols: Symbols, tables: Tables, used: NDArray[np.intp]) -> None:
        """Push symbols int32 [N] in coding order, of which the first used[0] are under table 0, and so on."""

    def pop(self, tables: Tables, used: NDArray[np.intp]) -> Symbols:
        """The inverse of `push`. An empty lane gives zeros for ever."""

    def words(self) -> list[Words]:
        """Of each lane the stack, then the state, low word first, without leading zeros."""

    def positions(self) -> list[tuple[int, int]]:
        """Of each lane the number of whole words, and the state above them."""


def kind_of_lanes() -> type[Lanes]:
    """What codes: constriction where it is installed, unless the environment asks for numpy. Raises ValueError if it
    asks for what is not there."""
    name = os.environ.get("VAECODEC_CODER", "constriction" if constriction else "numpy")
    if name not in ("constriction", "numpy"):
        raise ValueError(f"VAECODEC_CODER is {name!r}; constriction or numpy expected")
    if name == "constriction" and constriction is None:
        raise ValueError("VAECODEC_CODER is 'constriction', which is not installed")
    return NativeLanes if name == "constriction" else NumpyLanes


class NativeLanes:
    """By constriction, lane by lane."""

    def __init__(self, lanes: Sequence[Words]) -> None:
        self._coders = [constriction.stream.stack.AnsCoder(words) for words in lanes]

    def push(self, symbols: Symbols, tables: Tables, used: NDArray[np.intp]) -> None:
        for coder, model, start, stop in reversed(self._pieces(tables, used)):
            coder.encode_reverse(symbols[start:stop], model)

    def pop(self, tables: Tables, used: NDArray[np.intp]) -> Symbols:
        pieces = [coder.decode(model, stop - start) for coder, model, start, stop in self._pieces(tables, used)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def words(self) -> list[Words]:
        return [coder.get_compressed() for coder in self._coders]

    def positions(self) -> list[tuple[int, int]]:
        return [coder.pos() for coder in self._coders]

    def _pieces(self, tables: Tables, used: NDArray[np.intp]) -> list[tuple[Any, Any, int, int]]:
        """Coder, model, start and stop in the coding order of what one call codes."""
        stops = np.cumsum(used)
        begins = np.zeros(stops[-1], np.bool_)
        begins[(stops - used)[used > 0]] = True
        if len(self._coders) > 1:
            begins[::RUN] = True
        starts = np.flatnonzero(begins)
        models = _models.setdefault(tables, {})
        tabled = np.searchsorted(stops, starts, "right").tolist()
        for table in set(tabled) - models.keys():
            # Its cumulative sums are floor(cumsum * (2**24 - n) / sum) + i: with counts - 1 the scale is exactly 1 and
            # the sums are ours. `perfect=True` would be a hundred times slower to make.
            weights = (tables.counts[table] - 1).astype(np.float64)
            models[table] = constriction.stream.model.Categorical(weights, perfect=False)
        lanes, ends = starts // RUN % len(self._coders), np.append(starts, stops[-1])[1:]
        coders = [self._coders[lane] for lane in lanes.tolist()]
        return list(zip(coders, [models[t] for t in tabled], starts.tolist(), ends.tolist(), strict=True))


class NumpyLanes:
    """By numpy, a step of all lanes at a time: the reference, and the fallback where there is no constriction."""

    def __init__(self, lanes: Sequence[Words]) -> None:
        self._height = np.array([max(0, len(words) - 2) for words in lanes])
        self._state = np.zeros(len(lanes), np.uint64)
        self._stack = np.zeros((len(lanes), 1 + self._height.max()), np.uint32)
        for lane, words in enumerate(lanes):
            self._stack[lane, : self._height[lane]] = words[:-2]
            for word in words[-2:][::-1].tolist():
                self._state[lane] = int(self._state[lane]) << WORD | word

    def push(self, symbols: Symbols, tables: Tables, used: NDArray[np.intp]) -> None:
        entries = tables.entries(symbols, used)
        for turns in reversed(_turns(symbols.size, len(self._state))):
            self._reserve(turns.steps)
            push = self._push_each if turns.lanes < _FEW else self._push_together
            push(turns.first, turns.get(entries), tables)

    def pop(self, tables: Tables, used: NDArray[np.intp]) -> Symbols:
        ids = np.repeat(np.arange(len(used), dtype=np.uint64) << _PRECISION, used)
        entries = np.empty(ids.size, np.int64)
        for turns in _turns(ids.size, len(self._state)):
            pop = self._pop_each if turns.lanes < _FEW else self._pop_together
            turns.set(entries, pop(turns.first, turns.get(ids), tables))
        return (entries - np.repeat(tables.starts, used)).astype(np.int32)

    def words(self) -> list[Words]:
        lanes = []
        for height, state, stack in zip(self._height, self._state.tolist(), self._stack, strict=True):
            above = [state & 0xFFFFFFFF, state >> WORD][: -(-state.bit_length() // WORD)]
            lanes.append(np.append(stack[:height], np.array(above, np.uint32)))
        return lanes

    def positions(self) -> list[tuple[int, int]]:
        return list(zip(self._height.tolist(), self._state.tolist(), strict=True))

    def _reserve(self, steps: int) -> None:
        """Room for as many words more in each lane."""
        size, needed = self._stack.shape[1], self._height.max() + steps + 1
        if needed > size:
            self._stack = np.pad(self._stack, ((0, 0), (0, max(needed, 2 * size) - size)))

    # Entries and ids are [steps, lanes], those of the lanes from ``first`` on; ids are shifted, as in ``Tables.flat``.

    def _push_together(self, first: int, entries: NDArray[np.int64], tables: Tables) -> None:
        lefts, counts = (part[entries] for part in tables.flat)
        lefts &= _MASK
        lanes = slice(first, first + entries.shape[1])
        state, flat = self._state[lanes], self._stack.ravel()
        bottom = np.arange(len(self._state))[lanes] * self._stack.shape[1]
        top = bottom + self._height[lanes]
        for left, count in zip(lefts[::-1], counts[::-1], strict=True):
            flat[top] = state  # the low word; where the next lines do not count it, it is of no account
            full = state >> _ROOM >= count
            top += full
            state >>= full * _WORD
            quotient = state // count
            state -= quotient * count
            quotient <<= _PRECISION
            state += quotient
            state += left
        self._height[lanes] = top - bottom

    def _pop_together(self, first: int, ids: NDArray[np.uint64], tables: Tables) -> NDArray[np.int64]:
        lefts, counts = tables.flat
        lanes = slice(first, first + ids.shape[1])
        state, flat = self._state[lanes], self._stack.ravel()
        bottom = np.arange(len(self._state))[lanes] * self._stack.shape[1]
        top = bottom + self._height[lanes]
        entries = np.empty(ids.shape, np.int64)
        for table, entry in zip(ids, entries, strict=True):
            slot = state & _MASK
            slot |= table
            np.subtract(lefts.searchsorted(slot, "right"), 1, out=entry)
            slot -= lefts.take(entry)
            state >>= _PRECISION
            state *= counts.take(entry)
            state += slot
            low = (state < _LOW) & (top > bottom)
            top -= low
            state <<= low * _WORD
            state |= low * flat.take(top)
        self._height[lanes] = top - bottom
        return entries

    def _push_each(self, first: int, entries: NDArray[np.int64], tables: Tables) -> None:
        for lane, column in enumerate(entries.T, first):
            state, height, stack = int(self._state[lane]), int(self._height[lane]), self._stack[lane]
            lefts, counts = (part[column[::-1]].tolist() for part in tables.flat)
            for left, count in zip(lefts, counts, strict=True):
                if state >> (2 * WORD - PRECISION) >= count:  # the next state would exceed 64 bits
                    stack[height] = state & 0xFFFFFFFF
                    height += 1
                    state >>= WORD
                quotient, remainder = divmod(state, count)
                state = (quotient << PRECISION) + remainder + (left & TOTAL - 1)
            self._state[lane], self._height[lane] = state, height

    def _pop_each(self, first: int, ids: NDArray[np.uint64], tables: Tables) -> NDArray[np.int64]:
        lefts, counts = tables.flat_lists
        entries = np.empty(ids.shape, np.int64)
        for lane, (column, found) in enumerate(zip(ids.T, entries.T, strict=True), first):
            state, height, stack = int(self._state[lane]), int(self._height[lane]), self._stack[lane]
            popped = []
            for table in column.tolist():
                slot = state & TOTAL - 1 | table
                entry = bisect_right(lefts, slot) - 1
                state = counts[entry] * (state >> PRECISION) + slot - lefts[entry]
                if height and state < 1 << WORD:
                    height -= 1
                    state = state << WORD | int(stack[height])
                popped.append(entry)
            found[:] = popped
            self._state[lane], self._height[lane] = state, height
        return entries


@dataclass(frozen=True)
class _Turns:
    """A part of an array in coding order that goes to ``lanes`` lanes from ``first`` on, ``width`` values at a turn."""

    start: int
    stop: int
    first: int
    lanes: int
    width: int

    @property
    def steps(self) -> int:
        return (self.stop - self.start) // self.lanes

    def get(self, array: NDArray[Any]) -> NDArray[Any]:
        """Of an array in coding order these values, [steps, lanes]."""
        return np.ascontiguousarray(self._view(array)).reshape(self.steps, self.lanes)

    def set(self, array: NDArray[Any], values: NDArray[Any]) -> None:
        view = self._view(array)
        view[:] = values.reshape(view.shape)

    def _view(self, array: NDArray[Any]) -> NDArray[Any]:
        return array[self.start : self.stop].reshape(-1, self.lanes, self.width).swapaxes(1, 2)


def _turns(size: int, lanes: int) -> list[_Turns]:
    """All whole turns of all lanes, then those of the lanes that have one more, then what is left, for one lane."""
    whole, more = size - size % (lanes * RUN), size - size % RUN
    number = (more - whole) // RUN
    turns = (_Turns(0, whole, 0, lanes, RUN), _Turns(whole, more, 0, number, RUN))
    return [turn for turn in (*turns, _Turns(more, size, number, 1, size - more)) if turn.start < turn.stop]
