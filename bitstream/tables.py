"""Integer probability tables: the only distributions that the coder knows.

Tables are made once, at export, shipped as integers and hashed with the weights. Floating point occurs in
`normalise` and `gaussian_tables` alone, and neither runs while coding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PRECISION = 24
TOTAL = 1 << PRECISION
MAX_TABLES = 1024
NEAR = 256
"""So far from 0 ``Tables.near`` reaches."""

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Tables:
    """T tables; entry i of table t is the count, out of 2**24, of the value `lows[t] + i`.

    With `escape`, the last entry of every table stands for all values that the table does not list.

    lows: int32 [T], 1 <= T <= 1,024, the smallest value of each table.
    counts: T int64 arrays, each of at least two entries >= 1 that sum to 2**24.
    sizes: int64 [T], the number of entries of each table.

    Arrays of any integer type are accepted and copied. Raises TypeError if they are not integers and
    ValueError if they break a rule above or a table reaches beyond int32.
    """

    lows: Ints
    counts: Sequence[Ints]
    escape: bool
    sizes: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        lows, counts = self.lows, self.counts
        if any(array.dtype.kind not in "iu" for array in (lows, *counts)):
            raise TypeError("tables must be integer arrays")
        if lows.shape != (len(counts),) or not 1 <= len(counts) <= MAX_TABLES:
            raise ValueError(f"{len(counts)} tables for lows of shape {lows.shape}; at most {MAX_TABLES} allowed")
        for t, (low, table) in enumerate(zip(lows.tolist(), counts, strict=True)):
            if table.ndim != 1 or len(table) < 2:
                raise ValueError(f"table {t}: at least two entries in one dimension expected")
            # Bounding the entries first keeps the sum from wrapping.
            if not (table.min() >= 1 and table.max() < TOTAL and table.sum() == TOTAL):
                raise ValueError(f"table {t}: counts must be at least 1 and sum to {TOTAL}")
            if low < -(2**31) or low + len(table) > 2**31:
                raise ValueError(f"table {t}: values reach beyond int32")
        frozen = tuple(table.astype(np.int64) for table in counts)
        sizes = np.array([len(table) for table in frozen], np.int64)
        object.__setattr__(self, "lows", lows.astype(np.int32))
        object.__setattr__(self, "counts", frozen)
        object.__setattr__(self, "sizes", sizes)
        for array in (self.lows, self.sizes, *self.counts):
            array.setflags(write=False)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64 [T]: where the entries of each table begin among those of all tables, one table after the other."""
        starts: NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        return starts

    @cached_property
    def flat(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """uint64 [entries of all tables], twice: ``t << 24 | left``, which ascends, and the count."""
        counts = np.concatenate(self.counts)
        lefts = np.cumsum(counts) - counts  # each table adds 2**24
        return lefts.astype(np.uint64), counts.astype(np.uint64)

    @cached_property
    def flat_lists(self) -> tuple[list[int], list[int]]:
        """`flat` as Python has it."""
        lefts, counts = self.flat
        return lefts.tolist(), counts.tolist()

    def entries(self, symbols: Ints, used: Ints) -> NDArray[np.int64]:
        """int64 [N]: where `flat` has symbols [N], of which the first used[0] are of table 0, and so on."""
        return np.repeat(self.starts, used) + symbols

    @cached_property
    def likeliest(self) -> NDArray[np.int32]:
        """int32 [T]: of each table the value that is most likely of those it lists, the first of equals."""
        listed = [int(np.argmax(counts[: len(counts) - self.escape])) for counts in self.counts]
        values: NDArray[np.int32] = (self.lows + np.array(listed)).astype(np.int32)
        return values

    @cached_property
    def certain(self) -> NDArray[np.bool_]:
        """bool [T]: whether that value has a probability of 1 - 2**-8 or more."""
        most = [int(counts[: len(counts) - self.escape].max()) for counts in self.counts]
        return np.array(most) >= TOTAL - (TOTAL >> 8)

    @cached_property
    def entry_bits(self) -> NDArray[np.float64]:
        """float64 [entries of all tables]: what each costs in bits, in steps of 2**-20: sums of many are exact."""
        bits: NDArray[np.float64] = PRECISION - np.log2(np.concatenate(self.counts))
        whole: NDArray[np.float64] = np.rint(bits * 2**20)
        whole /= 2**20
        return whole

    @cached_property
    def costs(self) -> NDArray[np.int64]:
        """int64 [entries of all tables]: what each costs in 1/256 bit. Sums are exact, so the same everywhere."""
        costs: NDArray[np.int64] = np.rint(256 * self.entry_bits).astype(np.int64)
        return costs

    @cached_property
    def near(self) -> NDArray[np.uint16]:
        """uint16 [T * 2 NEAR]: what the values -NEAR ... NEAR - 1 of each table cost in 1/256 bit, as ``bits`` has it,
        one table after the other. To choose by, it is several times as fast. For tables with an escape."""
        values = np.arange(-NEAR, NEAR)
        ids = np.arange(len(self.sizes)).repeat(len(values))
        costs: NDArray[np.uint16] = np.rint(256 * self.bits(ids, np.tile(values, len(self.sizes)))).astype(np.uint16)
        return costs

    @cached_property
    def savings(self) -> NDArray[np.float64]:
        """float64 [T * 2 NEAR]: in the same order, how many bits each value costs more than the one beside it that is
        nearer to 0."""
        values = np.tile(np.arange(-NEAR, NEAR), len(self.sizes))
        ids = np.arange(len(self.sizes)).repeat(2 * NEAR)
        return self.bits(ids, values) - self.bits(ids, values - np.sign(values))

    def bits(self, ids: Ints, values: Ints) -> NDArray[np.float64]:
        """What coding each value under its table costs, in bits [N].

        ids, values: integers [N], values in the int64 range. An escaped value costs its Exp-Golomb code as well;
        without ``escape`` every value must be listed.
        """
        values = values.astype(np.int64)
        symbols, last = values - self.lows[ids], self.sizes[ids] - 1
        outside = ((symbols < 0) | (symbols >= last)) & self.escape
        bits: NDArray[np.float64] = self.entry_bits[self.starts[ids] + np.where(outside, last, symbols)]
        excess = np.where(symbols < 0, -symbols, symbols - last + 1)[outside]
        bits[outside] += 2 + 2 * np.floor(np.log2(excess))
        return bits

    def to_arrays(self) -> dict[str, Ints]:
        """Arrays to store: lows int32 [T], sizes uint32 [T], counts uint32 [their sum], escape uint8 [1]."""
        return {
            "lows": self.lows.copy(),
            "sizes": self.sizes.astype(np.uint32),
            "counts": np.concatenate(self.counts).astype(np.uint32),
            "escape": np.array([self.escape], np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Ints]) -> "Tables":
        """The inverse of `to_arrays`. Raises ValueError or TypeError if the arrays are no valid tables."""
        missing = {"lows", "sizes", "counts", "escape"} - arrays.keys()
        if missing:
            raise ValueError(f"tables lack {sorted(missing)}")
        sizes, escape = arrays["sizes"].tolist(), arrays["escape"].tolist()
        if escape not in ([0], [1]):
            raise ValueError(f"escape is {escape}, [0] or [1] expected")
        if arrays["counts"].shape != (sum(sizes),) or min(sizes, default=0) < 2:
            raise ValueError("sizes and counts of the tables disagree")
        return cls(arrays["lows"], np.split(arrays["counts"], np.cumsum(sizes)[:-1]), bool(escape[0]))

    def digest_bytes(self) -> bytes:
        """Canonical bytes to hash: u8 escape, u32 T, i32 lows, u32 sizes, u32 counts; little-endian."""
        head = bytes([self.escape]) + len(self.counts).to_bytes(4, "little")
        parts = (self.lows.astype("<i4"), self.sizes.astype("<u4"), np.concatenate(self.counts).astype("<u4"))
        return head + b"".join(part.tobytes() for part in parts)


def normalise(weights: ArrayLike) -> NDArray[np.int64]:
    """Counts >= 1 that sum to 2**24, in proportion to frequencies.

    weights: n >= 2 finite, nonnegative numbers, not all zero. Every entry gets one count; the rest is shared
    by largest remainder, ties to the lower index. Returns int64 [n]. Raises ValueError for other weights.
    """
    w = np.asarray(weights, np.float64)
    if w.ndim != 1 or not 2 <= w.size < TOTAL:
        raise ValueError(f"weights of shape {w.shape}; one dimension of 2 or more expected")
    if not np.isfinite(w).all() or w.min() < 0 or w.max() == 0:
        raise ValueError("weights must be finite, nonnegative and not all zero")
    # 38-bit integers, so that the products below are exact in int64 and the result the same everywhere.
    whole = np.rint(w / w.max() * 2**38).astype(np.int64)
    quotient, remainder = np.divmod(whole * (TOTAL - w.size), whole.sum())
    share: NDArray[np.int64] = quotient + 1
    share[np.argsort(-remainder, kind="stable")[: TOTAL - share.sum()]] += 1
    return share


def gaussian_tables(sigmas: ArrayLike, means: ArrayLike = 0.0, *, escape: bool) -> Tables:
    """Tables of rounded Gaussians, for export: each reaches five standard deviations from its mean.

    sigmas: float > 0 [T]; means: float [T] or one for all. With `escape` the tails go to the escape entry,
    without it they are cut off. Raises ValueError for other arguments. erf comes from the platform and may
    differ in its last bit: store the tables, do not make them again.
    """
    lows, counts = [], []
    sigmas, means = np.broadcast_arrays(np.asarray(sigmas, np.float64), np.asarray(means, np.float64))
    if not (np.isfinite(means).all() and np.isfinite(sigmas).all() and (sigmas > 0).all()):
        raise ValueError("means must be finite, sigmas finite and positive")
    for sigma, mean in zip(sigmas.tolist(), means.tolist(), strict=True):
        low, high = math.floor(mean - 5 * sigma), math.ceil(mean + 5 * sigma)
        cdf = [(1 + math.erf((v - 0.5 - mean) / (sigma * math.sqrt(2)))) / 2 for v in range(low, high + 2)]
        mass = np.diff(cdf)
        counts.append(normalise(np.append(mass, max(0.0, 1 - mass.sum())) if escape else mass))
        lows.append(low)
    return Tables(np.array(lows, np.int64), counts, escape)
