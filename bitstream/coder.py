"""The entropy primitive: a stack of integers, each coded under one table. FORMAT.md specifies the words.

What is pushed last is popped first. Every `push` has an exact inverse `pop`, and the other way round: popping
from any stack and pushing the result restores it, which is what bits-back coding rests on.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptError
from .rans import WORD, Model, RansCoder
from .tables import TOTAL, Ints, Tables

try:
    import constriction
except ImportError:  # there are platforms that it is not built for
    constriction = None

T = TypeVar("T")

MANY = 4096
"""So many values are all the first entry of their tables only where nobody has coded them; see `table_codec`."""

# Escape code: 2k + side under _PREFIX, where 2**k <= distance + 1 < 2**(k + 1), then the k bits below the
# leading one in chunks of eight, lowest first, under _BITS[width - 1]. The probability of k, 2**-(k + 1), is
# that of the unary part of an Exp-Golomb code; as k is coded under a table, no input can make it run on.
_PREFIX_COUNTS = np.array([max(1, 1 << 22 >> k) - 8 * (k == 0) for k in range(32) for _ in range(2)])
_PREFIX = Tables(np.array([0]), [_PREFIX_COUNTS], escape=False)
_BITS = Tables(np.zeros(8, int), [np.full(1 << w, TOTAL >> w) for w in range(1, 9)], escape=False)
_SHIFTS = np.arange(0, 32, 8)

# Two threads may make the same model at once; which of the two is kept does not matter.
_models: WeakKeyDictionary[Tables, dict[tuple[str, int], Any]] = WeakKeyDictionary()


class AnsStack:
    """A last-in, first-out stack of integers in ANS words.

    data: bytes-like, little-endian 32-bit words as `to_bytes` gives them; empty for an empty stack. Raises
    CorruptError if the length is no multiple of four or the last word is zero. Other damage goes unnoticed,
    and so does popping from an empty stack: compare a checksum of what was popped and check `is_empty()`.

    Words are coded by constriction, or in pure Python where that is not installed or the environment variable
    VAECODEC_CODER is `python`; the words are the same. One stack must not be used by two threads at once.
    """

    def __init__(self, data: bytes | bytearray | memoryview = b"") -> None:
        if len(data) % 4:
            raise CorruptError(f"ANS data of {len(data)} bytes is no whole number of 32-bit words")
        words = np.frombuffer(data, "<u4").astype(np.uint32)
        if words.size and words[-1] == 0:
            raise CorruptError("ANS data ends in a zero word")
        self._backend = os.environ.get("VAECODEC_CODER", "constriction" if constriction else "python")
        if self._backend not in ("constriction", "python"):
            raise ValueError(f"VAECODEC_CODER is {self._backend!r}; constriction or python expected")
        python = self._backend == "python"
        self._coder: Any = RansCoder(words) if python else constriction.stream.stack.AnsCoder(words)

    def to_bytes(self) -> bytes:
        """The stack as little-endian 32-bit words; leaves the stack as it is."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())

    def is_empty(self) -> bool:
        """True if nothing is left to pop."""
        return bool(self._coder.is_empty())

    def bits(self) -> float:
        """What the stack holds, as a number of bits: pushing and popping change it by -log2 of the probability."""
        words, state = self._coder.pos()
        return WORD * int(words) + (math.log2(int(state)) if state else 0.0)

    def words(self) -> int:
        """How many words lie below the state."""
        return int(self._coder.pos()[0])

    def push(self, values: Ints, tables: Tables, ids: Ints) -> None:
        """Push integers so that `pop` with the same tables and ids returns them in this order.

        values: int [N], in int32. ids: int [N], 0 <= id < T, the table of each value. Before pushing
        anything, raises ValueError for values beyond int32, values that a table without escape lacks, unknown
        ids and unequal shapes, and TypeError for arrays that are not integer.
        """
        order, groups = _groups(tables, ids)
        if values.shape != ids.shape:
            raise ValueError(f"{values.shape} values for {ids.shape} table ids")
        symbols = _int32(values, ValueError).astype(np.int64) - tables.lows[ids]
        listed = tables.sizes[ids] - tables.escape
        outside = np.flatnonzero((symbols < 0) | (symbols >= listed))
        if outside.size:
            if not tables.escape:
                first = outside[0]
                raise ValueError(f"value {values[first]} is not in table {ids[first]}, which has no escape")
            self._push_outside(symbols[outside], listed[outside])
            symbols[outside] = listed[outside]
        grouped = symbols.astype(np.int32)[order]
        for table, start, stop in reversed(groups):
            self._coder.encode_reverse(grouped[start:stop], self._model(tables, table))

    def pop(self, tables: Tables, ids: Ints) -> NDArray[np.int32]:
        """Pop one integer for each id: the inverse of `push`.

        ids: int [N], 0 <= id < T. Returns int32 [N]. Raises CorruptError if an escaped value is beyond int32,
        and ValueError or TypeError for ids as `push` does.
        """
        order, groups = _groups(tables, ids)
        grouped = np.empty(ids.size, np.int64)
        for table, start, stop in groups:
            grouped[start:stop] = self._coder.decode(self._model(tables, table), stop - start)
        symbols = np.empty_like(grouped)
        symbols[order] = grouped
        if tables.escape:
            listed = tables.sizes[ids] - 1
            outside = np.flatnonzero(symbols == listed)
            if outside.size:
                symbols[outside] = self._pop_outside(listed[outside])
        return _int32(symbols + tables.lows[ids], CorruptError).astype(np.int32)

    def _push_outside(self, symbols: NDArray[np.int64], listed: NDArray[np.int64]) -> None:
        """Push symbols < 0 or >= listed; `_pop_outside` is the inverse."""
        above = symbols >= listed
        number = np.where(above, symbols - listed, -1 - symbols) + 1  # 1 <= number < 2**32
        k = np.frexp(number.astype(np.float64))[1].astype(np.int64) - 1  # exact: float64 holds 53 bits
        widths = np.clip(k[:, None] - _SHIFTS, 0, 8)
        chunks = (number - (1 << k))[:, None] >> _SHIFTS & 255
        self.push(chunks[widths > 0], _BITS, widths[widths > 0] - 1)
        self.push(2 * k + above, _PREFIX, np.zeros_like(k))

    def _pop_outside(self, listed: NDArray[np.int64]) -> NDArray[np.int64]:
        k, above = np.divmod(self.pop(_PREFIX, np.zeros_like(listed)).astype(np.int64), 2)
        widths = np.clip(k[:, None] - _SHIFTS, 0, 8)
        chunks = np.zeros_like(widths)
        chunks[widths > 0] = self.pop(_BITS, widths[widths > 0] - 1)
        distance = (1 << k) + (chunks << _SHIFTS).sum(1) - 1
        symbols: NDArray[np.int64] = np.where(above == 1, listed + distance, -1 - distance)
        return symbols

    def _model(self, tables: Tables, table: int) -> Any:
        """The backend's object for one table, made on first use and kept as long as the tables are."""
        models = _models.setdefault(tables, {})
        model = models.get((self._backend, table))
        if model is None:
            counts = tables.counts[table]
            if self._backend == "python":
                model = Model(counts)
            else:
                # Its cumulative sums are floor(cumsum * (2**24 - n) / sum) + i: with counts - 1 the scale is
                # exactly 1 and the sums are ours. `perfect=True` would be a hundred times slower to make.
                weights = (counts - 1).astype(np.float64)
                model = constriction.stream.model.Categorical(weights, perfect=False)
            models[self._backend, table] = model
        return model


@dataclass(frozen=True)
class Codec(Generic[T]):
    """A way to code one thing. `push` and `pop` are inverse on the data and on the stack, in both orders.

    guess: what to take it for where it is not on the stack.
    """

    push: Callable[[AnsStack, T], None]
    pop: Callable[[AnsStack], T]
    guess: Callable[[], T] | None = None


def table_codec(tables: Tables, ids: Ints, locs: Ints | None = None) -> Codec[NDArray[np.int32]]:
    """The codec that codes `v - loc` under table `id`; its guess is `loc`.

    ids: int [N]; locs: int [N] in int32, zero if not given. Values and their differences from locs must be in
    int32; errors are those of `AnsStack.push` and `pop`, and popping MANY values from an empty stack is CorruptError:
    networks give the tables, and no honest file makes them work on for values that are all entry 0.
    """
    shift = np.zeros(ids.shape, np.int64) if locs is None else _int32(locs, ValueError).astype(np.int64)

    def push(stack: AnsStack, values: Ints) -> None:
        stack.push(_int32(values, ValueError).astype(np.int64) - shift, tables, ids)

    def pop(stack: AnsStack) -> NDArray[np.int32]:
        if ids.size >= MANY and stack.is_empty():
            raise CorruptError("a tile has fewer bytes than its values need")
        return _int32(stack.pop(tables, ids) + shift, CorruptError).astype(np.int32)

    return Codec(push, pop, lambda: shift.astype(np.int32))


def _groups(tables: Tables, ids: Ints) -> tuple[NDArray[np.intp], list[tuple[int, int, int]]]:
    """The coding order (by table, then by position) and each used table with its start and stop in it."""
    _integer(ids)
    if ids.ndim != 1 or (ids.size and not (ids.min() >= 0 and ids.max() < len(tables.counts))):
        raise ValueError(f"table ids must have one dimension and be in 0..{len(tables.counts) - 1}")
    keys = ids.astype(np.uint16)  # which numpy sorts by radix
    used = np.bincount(keys)
    stops = np.cumsum(used)
    starts = stops - used
    groups = [(int(t), int(starts[t]), int(stops[t])) for t in np.flatnonzero(used)]
    return np.argsort(keys, kind="stable"), groups


def _integer(array: Ints) -> None:
    if array.dtype.kind not in "iu":
        raise TypeError(f"an integer array expected, not {array.dtype}")


def _int32(array: Ints, error: type[Exception]) -> Ints:
    _integer(array)
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise error("values beyond int32")
    return array
