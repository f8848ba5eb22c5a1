"""The entropy primitive: a stack of integers, each coded under one table. FORMAT.md specifies the words.

What is pushed last is popped first. Every `push` has an exact inverse `pop`, and the other way round: popping
from any stack and pushing the result restores it, which is what bits-back coding rests on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .container import LANES, read_varint, varint
from .errors import CorruptError
from .rans import WORD, Lanes, kind_of_lanes
from .tables import TOTAL, Ints, Tables

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

_NONE = np.zeros(0, np.uint32)
_LANE_COST = 256 * 56
"""What a lane makes a tile longer by, in 1/256 bit: its length, and what its first and last words leave open."""
_LANES_SHARE = 500
"""Lanes may make a tile longer by one part of so many."""


class AnsStack:
    """A last-in, first-out stack of integers in ANS words.

    data: bytes-like, as `to_bytes` gives them; without any, the stack is new and empty. lanes: 1, 2, 4 ... 256. A new
    stack may leave their number open, None: what is pushed is kept until something is asked of the stack, and the
    number is then the largest at which lanes cost at most 0.2 % of it. Raises CorruptError if the bytes are no whole
    words, if the lanes do not make up all of them, or if a lane ends in a zero word. Other damage goes unnoticed, and
    so does popping from an empty stack: compare a checksum of what was popped and check `is_empty()`.

    Words are coded by constriction, or by numpy where that is not installed or the environment variable VAECODEC_CODER
    is `numpy`; the words are the same. One stack must not be used by two threads at once.
    """

    def __init__(self, data: bytes | bytearray | memoryview | None = None, lanes: int | None = 1) -> None:
        self._coder: Lanes | None = None
        if lanes is not None:
            self._coder = self._new([_NONE] * lanes if data is None else _split(data, lanes))
        self._waiting: list[tuple[NDArray[np.int32], Tables, NDArray[np.intp]]] = []

    def _new(self, lanes: list[NDArray[np.uint32]]) -> Lanes:
        return kind_of_lanes()(lanes)

    def _cost(self, symbols: NDArray[np.int32], tables: Tables, used: NDArray[np.intp]) -> int:
        """Of symbols in coding order, in 1/256 bit."""
        return int(tables.costs[tables.entries(symbols, used)].sum())

    def _lanes(self) -> Lanes:
        """What codes; by now the number of lanes has to be known."""
        if self._coder is None:
            cost = int(sum(self._cost(*pushed) for pushed in self._waiting))  # on a GPU, waiting for it once
            allowed = cost // (_LANE_COST * _LANES_SHARE)
            number = max(lanes for lanes in LANES if lanes <= max(1, allowed))
            self._coder = self._new([_NONE] * number)
            for pushed in self._waiting:
                self._coder.push(*pushed)
            self._waiting.clear()
        return self._coder

    @property
    def lanes(self) -> int:
        """How many lanes the stack has."""
        return len(self._lanes().positions())

    def to_bytes(self) -> bytes:
        """The stack as little-endian 32-bit words, after a table of their number in each lane if there are several;
        leaves the stack as it is."""
        lanes = self._lanes().words()
        sizes = b"".join(varint(len(words)) for words in lanes) if len(lanes) > 1 else b""
        return sizes + np.concatenate(lanes).astype("<u4").tobytes()

    def is_empty(self) -> bool:
        """True if nothing is left to pop in any lane."""
        return all(not words and not state for words, state in self._lanes().positions())

    def bits(self) -> float:
        """What the stack holds, as a number of bits: pushing and popping change it by -log2 of the probability."""
        return sum(self._bits())

    def least(self) -> float:
        """What the lane holds that has the least, in bits."""
        return min(self._bits())

    def _bits(self) -> list[float]:
        return [
            WORD * int(words) + (math.log2(int(state)) if state else 0.0) for words, state in self._lanes().positions()
        ]

    def words(self) -> int:
        """How many words lie below the state of a stack of one lane."""
        return int(self._lanes().positions()[0][0])

    def push(self, values: Ints, tables: Tables, ids: Ints, locs: Ints | None = None) -> None:
        """Push integers so that `pop` with the same tables, ids and locs returns them in this order.

        values: int [N]; what is coded is `value - loc`, with locs int [N], zero if not given; all in int32. ids: int
        [N], 0 <= id < T, the table of each value. Before pushing anything, raises ValueError for what is beyond int32,
        values that a table without escape lacks, unknown ids and unequal shapes, and TypeError for arrays that are not
        integer.
        """
        order, used = _groups(tables, ids)
        if values.shape != ids.shape:
            raise ValueError(f"{values.shape} values for {ids.shape} table ids")
        if locs is not None:
            values = _int32(values, ValueError).astype(np.int64) - _int32(locs, ValueError)
        # In coding order, what tables say is repeated, which is faster than to look it up for each value.
        symbols = _int32(values, ValueError)[order].astype(np.int64) - tables.lows.repeat(used)
        listed = (tables.sizes - tables.escape).repeat(used)
        outside = np.flatnonzero((symbols < 0) | (symbols >= listed))
        if outside.size:
            outside = outside[np.argsort(order[outside])]
            if not tables.escape:
                first = order[outside[0]]
                raise ValueError(f"value {values[first]} is not in table {ids[first]}, which has no escape")
            self._push_outside(symbols[outside], listed[outside])
            symbols[outside] = listed[outside]
        self._push(symbols.astype(np.int32), tables, used)

    def _push(self, symbols: NDArray[np.int32], tables: Tables, used: NDArray[np.intp]) -> None:
        """Push symbols [N] in coding order, see ``Lanes``, or keep them."""
        if self._coder is None:
            self._waiting.append((symbols, tables, used))
        else:
            self._coder.push(symbols, tables, used)

    def _pop(self, tables: Tables, used: NDArray[np.intp]) -> NDArray[np.int32]:
        return self._lanes().pop(tables, used)

    def pop(self, tables: Tables, ids: Ints, locs: Ints | None = None) -> NDArray[np.int32]:
        """Pop one integer for each id: the inverse of `push`.

        ids: int [N], 0 <= id < T; locs as in `push`. Returns int32 [N]. Raises CorruptError if a value is beyond
        int32, and ValueError or TypeError for ids and locs as `push` does.
        """
        order, used = _groups(tables, ids)
        symbols = self._pop(tables, used)
        values: Ints = np.empty(ids.size, np.int64)
        values[order] = symbols + tables.lows.repeat(used)
        if tables.escape:
            outside = np.sort(order[symbols == (tables.sizes - 1).repeat(used)])
            if outside.size:
                tabled = ids[outside]
                values[outside] = self._pop_outside(tables.sizes[tabled] - 1) + tables.lows[tabled]
                _int32(values, CorruptError)
        if locs is not None:
            values = _int32(values + _int32(locs, ValueError), CorruptError)
        return values.astype(np.int32)

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

    def push(stack: AnsStack, values: Ints) -> None:
        stack.push(values, tables, ids, locs)

    def pop(stack: AnsStack) -> NDArray[np.int32]:
        if len(ids) >= MANY and stack.is_empty():
            raise CorruptError("a tile has fewer bytes than its values need")
        return stack.pop(tables, ids, locs)

    def guess() -> Any:
        return ids * 0 if locs is None else locs

    return Codec(push, pop, guess)


def _split(data: bytes | bytearray | memoryview, lanes: int) -> list[NDArray[np.uint32]]:
    """The words of each lane of a stack. Raises CorruptError."""
    view, at, ends = memoryview(data), 0, [0]
    if lanes > 1:
        try:
            for _ in range(lanes):
                size, at = read_varint(view, at)
                ends.append(ends[-1] + size)
        except IndexError:
            raise CorruptError("a tile ends within its lane lengths") from None
    else:
        ends.append(len(view) // 4)
    if 4 * ends[-1] != len(view) - at:
        raise CorruptError(f"{len(view) - at} bytes for {ends[-1]} words")
    words = np.frombuffer(view[at:], "<u4").astype(np.uint32)
    split = [words[start:stop] for start, stop in pairwise(ends)]
    if any(part.size and part[-1] == 0 for part in split):
        raise CorruptError("ANS data ends in a zero word")
    return split


def _groups(tables: Tables, ids: Ints) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The coding order (by table, then by position) and how many values each table has in it, [T]."""
    _integer(ids)
    if ids.ndim != 1 or (ids.size and not (ids.min() >= 0 and ids.max() < len(tables.counts))):
        raise ValueError(f"table ids must have one dimension and be in 0..{len(tables.counts) - 1}")
    keys = ids.astype(np.uint16)  # which numpy sorts by radix
    return np.argsort(keys, kind="stable"), np.bincount(keys, minlength=len(tables.counts))


def _integer(array: Ints) -> None:
    if array.dtype.kind not in "iu":
        raise TypeError(f"an integer array expected, not {array.dtype}")


def _int32(array: Ints, error: type[Exception]) -> Ints:
    _integer(array)
    if not np.can_cast(array.dtype, np.int32) and array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise error("values beyond int32")
    return array
