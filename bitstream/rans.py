"""rANS in pure Python, for platforms without constriction: same words, same method names.

A 64-bit state below a stack of 32-bit words, 24-bit probabilities. FORMAT.md specifies it.
"""

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from .tables import PRECISION, TOTAL, Ints

WORD = 32


class Model:
    """One table in the forms that the loops below read; counts: int [n], summing to 2**24."""

    def __init__(self, counts: Ints) -> None:
        self.counts = counts
        self.lefts = np.cumsum(counts) - counts
        self.left_list: list[int] = self.lefts.tolist()
        self.count_list: list[int] = counts.tolist()


class RansCoder:
    """The subset of constriction's `AnsCoder` that coder.py uses; words: uint32 [N], the last not zero."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        self._words: list[int] = words.tolist()
        self._state = 0
        for _ in self._words[-2:]:
            self._state = self._state << WORD | self._words.pop()

    def encode_reverse(self, symbols: NDArray[np.int32], model: Model) -> None:
        """Push symbols int32 [N], each in 0..n-1, the last one first."""
        state, words, backward = self._state, self._words, symbols[::-1]
        lefts, counts = model.lefts[backward].tolist(), model.counts[backward].tolist()
        for left, count in zip(lefts, counts, strict=True):
            if state >> (2 * WORD - PRECISION) >= count:  # the new state would exceed 64 bits
                words.append(state & 0xFFFFFFFF)
                state >>= WORD
            quotient, remainder = divmod(state, count)
            state = (quotient << PRECISION) + remainder + left
        self._state = state

    def decode(self, model: Model, n: int) -> NDArray[np.int32]:
        """Pop n symbols, int32 [n]; an empty coder gives zeros for ever."""
        state, words, lefts, counts = self._state, self._words, model.left_list, model.count_list
        symbols = []
        for _ in range(n):
            slot = state & (TOTAL - 1)
            symbol = bisect_right(lefts, slot) - 1
            state = counts[symbol] * (state >> PRECISION) + slot - lefts[symbol]
            if words and state < 1 << WORD:
                state = state << WORD | words.pop()
            symbols.append(symbol)
        self._state = state
        return np.array(symbols, np.int32)

    def get_compressed(self) -> NDArray[np.uint32]:
        """All words: the stack, then the state, low word first, without leading zeros."""
        words, state = self._words.copy(), self._state
        while state:
            words.append(state & 0xFFFFFFFF)
            state >>= WORD
        return np.array(words, np.uint32)

    def pos(self) -> tuple[int, int]:
        """Number of whole words, and the state above them."""
        return len(self._words), self._state

    def is_empty(self) -> bool:
        """True if the state is zero, which leaves no words either."""
        return self._state == 0
