"""The coder of ``bitstream.AnsStack`` on a GPU: symbols, table numbers and means stay there.

One launch codes an array, a thread for each lane. The words are those of FORMAT.md, as ``bitstream.rans`` writes them.
TRITON_INTERPRET=1 runs the kernels without a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from bitstream import AnsStack, CorruptError, Tables
from bitstream.rans import RUN, WORD

WARP = 32
_launching = threading.Lock()


@triton.jit
def _push(
    symbols,
    ids,
    size,
    steps,
    first,
    counts,
    lefts,
    state_of,
    height_of,
    stack,
    room,
    lanes,
    run: tl.constexpr,
    width: tl.constexpr,
):
    lane = tl.program_id(0) * width + tl.arange(0, width)
    own = lane < lanes
    state = tl.load(state_of + lane, own, 0).to(tl.uint64, bitcast=True)
    height = tl.load(height_of + lane, own, 0)
    for step in range(steps):
        i = steps - 1 - step
        p = (i // run * lanes + lane) * run + i % run  # in the coding order
        some = own & (p < size)
        entry = tl.load(first + tl.load(ids + p, some, 0), some, 0) + tl.load(symbols + p, some, 0)
        count = tl.load(counts + entry, some, 1).to(tl.uint64)
        full = some & ((state >> 40) >= count)
        tl.store(stack + lane.to(tl.int64) * room + height, state.to(tl.uint32).to(tl.int32, bitcast=True), full)
        height += full.to(tl.int32)
        state = tl.where(full, state >> 32, state)
        quotient = state // count
        left = tl.load(lefts + entry, some, 0).to(tl.uint64)
        state = tl.where(some, (quotient << 24) + (state - quotient * count) + left, state)
    tl.store(state_of + lane, state.to(tl.int64, bitcast=True), own)
    tl.store(height_of + lane, height, own)


@triton.jit
def _pop(
    symbols,
    ids,
    size,
    steps,
    first,
    sizes,
    bits,
    counts,
    lefts,
    state_of,
    height_of,
    stack,
    room,
    lanes,
    run: tl.constexpr,
    width: tl.constexpr,
):
    lane = tl.program_id(0) * width + tl.arange(0, width)
    own = lane < lanes
    state = tl.load(state_of + lane, own, 0).to(tl.uint64, bitcast=True)
    height = tl.load(height_of + lane, own, 0)
    for step in range(steps):
        p = (step // run * lanes + lane) * run + step % run
        some = own & (p < size)
        table = tl.load(ids + p, some, 0)
        start, entries = tl.load(first + table, some, 0), tl.load(sizes + table, some, 0)
        slot = (state & 0xFFFFFF).to(tl.int32)
        symbol = tl.zeros([width], tl.int32)
        for bit in range(bits):  # the last entry whose left is not above the slot
            other = symbol + (1 << (bits - 1 - bit))
            left = tl.load(lefts + start + other, some & (other < entries), 1 << 24)
            symbol = tl.where(left <= slot, other, symbol)
        tl.store(symbols + p, symbol, some)
        left = tl.load(lefts + start + symbol, some, 0)
        count = tl.load(counts + start + symbol, some, 0).to(tl.uint64)
        state = tl.where(some, count * (state >> 24) + (slot - left).to(tl.uint64), state)
        low = some & (height > 0) & (state < 4294967296)
        height -= low.to(tl.int32)
        word = tl.load(stack + lane.to(tl.int64) * room + height, low, 0).to(tl.uint32, bitcast=True)
        state = tl.where(low, (state << 32) | word.to(tl.uint64), state)
    tl.store(state_of + lane, state.to(tl.int64, bitcast=True), own)
    tl.store(height_of + lane, height, own)


class OnDevice:
    """Tables as the kernels read them. first, sizes, lows: of each table; counts, lefts, costs, entry_bits: entry."""

    def __init__(self, tables: Tables, device: torch.device) -> None:
        lefts, counts = tables.flat
        self.first, self.sizes, self.lows, self.counts, self.lefts = (
            torch.from_numpy(array.astype(np.int32)).to(device)
            for array in (tables.starts, tables.sizes, tables.lows, counts, lefts & np.uint64(0xFFFFFF))
        )
        self.costs, self.entry_bits = (torch.from_numpy(x).to(device) for x in (tables.costs, tables.entry_bits))
        self.bits = int(tables.sizes.max() - 1).bit_length()


_tables: WeakKeyDictionary[Tables, dict[torch.device, OnDevice]] = WeakKeyDictionary()


def on_device(tables: Tables, device: torch.device) -> OnDevice:
    found = _tables.setdefault(tables, {})
    if device not in found:
        found[device] = OnDevice(tables, device)
    return found[device]


class TritonLanes:
    """See ``bitstream.rans.Lanes``; symbols are tensors, and what is a tensor stays on its device."""

    def __init__(self, lanes: Sequence[NDArray[np.uint32]], device: torch.device) -> None:
        states, room = np.zeros(len(lanes), np.uint64), 1 + max(map(len, lanes))
        stack = np.zeros((len(lanes), room), np.uint32)
        for lane, words in enumerate(lanes):
            for word in words[-2:][::-1].tolist():
                states[lane] = int(states[lane]) << WORD | word
            stack[lane, : max(0, len(words) - 2)] = words[:-2]
        heights = np.array([max(0, len(words) - 2) for words in lanes], np.int32)
        self.highest = int(heights.max())  # that the words of a lane can be, without asking the device
        self.state = torch.from_numpy(states.view(np.int64)).to(device)
        self.height = torch.from_numpy(heights).to(device)
        self.stack = torch.from_numpy(stack.view(np.int32)).to(device)

    def push(self, symbols: Tensor, tables: Tables, ids: Tensor) -> None:
        """symbols, ids: int32 [N] in coding order."""
        steps, t = self._steps(len(ids)), on_device(tables, ids.device)
        self.highest += steps
        if self.highest > self.stack.shape[1]:
            more = max(self.highest, 2 * self.stack.shape[1]) - self.stack.shape[1]
            self.stack = torch.nn.functional.pad(self.stack, (0, more))
        self._launch(_push, symbols, ids, len(ids), steps, t.first, t.counts, t.lefts)

    def pop(self, tables: Tables, ids: Tensor) -> Tensor:
        """int32 [N] in coding order, as ids."""
        symbols, t = torch.empty_like(ids), on_device(tables, ids.device)
        sizes = (len(ids), self._steps(len(ids)))
        self._launch(_pop, symbols, ids, *sizes, t.first, t.sizes, t.bits, t.counts, t.lefts)
        return symbols

    def words(self) -> list[NDArray[np.uint32]]:
        stack, lanes = self.stack.cpu().numpy().view(np.uint32), []
        for (height, state), row in zip(self.positions(), stack, strict=True):
            above = [state & 0xFFFFFFFF, state >> WORD][: -(-state.bit_length() // WORD)]
            lanes.append(np.append(row[:height], np.array(above, np.uint32)))
        return lanes

    def positions(self) -> list[tuple[int, int]]:
        heights, states = torch.stack([self.height.long(), self.state]).cpu().numpy()  # at once: each waits
        return list(zip(heights.tolist(), states.view(np.uint64).tolist(), strict=True))

    def _steps(self, size: int) -> int:
        """The most values that a lane has of an array."""
        whole, rest = divmod(size, len(self.state) * RUN)
        return whole * RUN + min(rest, RUN)

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        lanes = len(self.state)
        lay = (self.state, self.height, self.stack, self.stack.shape[1], lanes)
        with _launching, torch.cuda.device(self.state.get_device()):  # which is where Triton launches
            kernel[(-(-lanes // WARP),)](*arguments, *lay, run=RUN, width=WARP, num_warps=1)


class DeviceStack(AnsStack):
    """An ``AnsStack`` that takes and gives tensors on a device: values, ids and locs [N], values as int32.

    Arrays of numpy are coded as well, alpha's for example. Values and ids must be in range.
    """

    def __init__(self, device: torch.device, data: bytes | memoryview | None = None, lanes: int | None = 1) -> None:
        self.device = device
        super().__init__(data, lanes)

    def _new(self, lanes: list[NDArray[np.uint32]]) -> Any:
        return TritonLanes(lanes, self.device)

    def _cost(self, symbols: Any, tables: Tables, ids: Any) -> Any:
        t = on_device(tables, self.device)
        return t.costs[t.first[ids] + symbols].sum()

    def _push(self, symbols: Any, tables: Tables, ids: Any) -> None:
        if isinstance(symbols, np.ndarray):
            symbols, ids = torch.from_numpy(symbols).to(self.device), self._ids(ids)
        super()._push(symbols, tables, ids)

    def _pop(self, tables: Tables, ids: Any) -> Any:
        popped: Any = self._lanes().pop(tables, self._ids(ids))
        return popped.cpu().numpy()

    def _lanes(self) -> Any:
        return super()._lanes()

    def _ids(self, used: NDArray[np.intp]) -> Tensor:
        return torch.from_numpy(np.repeat(np.arange(len(used), dtype=np.int32), used)).to(self.device)

    def push(self, values: Any, tables: Tables, ids: Any, locs: Any = None) -> None:
        if isinstance(ids, np.ndarray):
            return super().push(values, tables, ids, locs)
        t = on_device(tables, self.device)
        symbols = values.long() - t.lows[ids] - (0 if locs is None else locs)
        listed = t.sizes[ids] - int(tables.escape)
        outside = ((symbols < 0) | (symbols >= listed)).nonzero()[:, 0]
        if len(outside):
            if not tables.escape:
                raise ValueError("a value is not in its table, which has no escape")
            self._push_outside(symbols[outside].cpu().numpy(), listed[outside].cpu().numpy())
            symbols[outside] = listed[outside].long()
        ids, order = torch.sort(ids, stable=True)
        self._push(symbols[order].int(), tables, ids)

    def pop(self, tables: Tables, ids: Any, locs: Any = None) -> Any:
        if isinstance(ids, np.ndarray):
            return super().pop(tables, ids, locs)
        t = on_device(tables, self.device)
        grouped, order = torch.sort(ids, stable=True)
        symbols = torch.empty_like(ids)
        symbols[order] = self._lanes().pop(tables, grouped)
        shift = t.lows[ids] + (0 if locs is None else locs)
        if not tables.escape:
            return symbols + shift
        listed = t.sizes[ids] - 1
        outside = (symbols == listed).nonzero()[:, 0]
        values = symbols.long() + shift
        if len(outside):
            far = torch.from_numpy(self._pop_outside(listed[outside].cpu().numpy().astype(np.int64)))
            values[outside] += far.to(self.device) - symbols[outside]
            if int(values.min()) < -(2**31) or int(values.max()) >= 2**31:
                raise CorruptError("values beyond int32")
        return values.int()


def bits(tables: Tables, ids: Tensor, values: Tensor) -> Tensor:
    """``Tables.bits`` on a device: float64 [N] of ids and values, integers [N]."""
    t = on_device(tables, ids.device)
    symbols, last = values - t.lows[ids], t.sizes[ids] - 1
    outside = ((symbols < 0) | (symbols >= last)) & tables.escape
    excess = torch.where(symbols < 0, -symbols, symbols - last + 1).clamp(min=1)
    cost = t.entry_bits[t.first[ids] + torch.where(outside, last, symbols)]
    return cost + outside * (2 + 2 * excess.double().log2().floor())
