"""What numpy and torch name differently, for code that runs on both: arrays on the host, tensors where a GPU codes.

Types are numpy's. Arithmetic is of integers, or of floats that hold them exactly, so that both give the same. torch is
imported only where there are tensors.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray


def on_host(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def put(x: NDArray[Any], like: Any) -> Any:
    """An array, where ``like`` is."""
    if on_host(like):
        return x
    return moved(x, like.device)


def moved(x: NDArray[Any], device: Any) -> Any:
    """A tensor of an array on a device."""
    import torch

    # What is not pinned is copied before this returns, so that nobody need wait for the device.
    return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)


_constants: dict[tuple[int, Any], Any] = {}


def constant(table: NDArray[Any], like: Any) -> Any:
    """An array that nobody changes, where ``like`` is; there it is kept as long as the array."""
    if on_host(like):
        return table
    key = id(table), like.device
    found = _constants.get(key)
    if found is None:
        # A copy: a tensor on the host would keep what it is made of. And tensors of uint16 cannot be indexed.
        found = _constants[key] = put(table.astype(np.int32 if table.dtype == np.uint16 else table.dtype), like)
        weakref.finalize(table, _constants.pop, key, None)
    return found


def taken(table: NDArray[Any], places: Any) -> Any:
    """Entries of an array that nobody changes, where ``places`` are."""
    return table.take(places) if on_host(places) else constant(table, places)[places]


def get(x: Any) -> NDArray[Any]:
    """An array on the host; of a tensor, after waiting for the device."""
    array: NDArray[Any] = x if on_host(x) else x.cpu().numpy()
    return array


def cast(x: Any, kind: type[Any]) -> Any:
    """x of another type, itself if it has that already."""
    return x.astype(kind, copy=False) if on_host(x) else x.to(_type(kind))


def zeros(shape: tuple[int, ...], kind: type[Any], like: Any) -> Any:
    if on_host(like):
        return np.zeros(shape, kind)
    import torch

    return torch.zeros(shape, dtype=_type(kind), device=like.device)


def stacked(parts: list[Any], kind: type[Any], like: Any) -> Any:
    """Parts of the shape of ``like``, maybe none, as one array [parts, ...]."""
    if on_host(like) or not parts:
        whole = zeros((len(parts), *like.shape), kind, like)
        for row, part in zip(whole, parts, strict=True):
            row[:] = part
        return whole
    import torch

    return torch.stack(parts).to(_type(kind))


def joined(kind: type[Any], *parts: Any) -> Any:
    """Parts [P, N] of any types as one array of a type."""
    if on_host(parts[0]):
        return np.concatenate(parts, dtype=kind)
    import torch

    return torch.cat([cast(part, kind) for part in parts])


def blocks(x: Any, size: int) -> list[slice]:
    """Columns of x [P, N] that are computed together: so many on the host, where they stay in the caches, or all."""
    count = x.shape[1]
    return [slice(first, first + size) for first in range(0, count, size)] if on_host(x) else [slice(0, count)]


def edged(x: Any, *margins: tuple[int, int]) -> Any:
    """x with margins before and behind in each dimension: what is at the edge again, or 0 where x is empty."""
    if on_host(x):
        return np.pad(x, margins, "edge" if x.size else "constant")
    if 0 in x.shape:
        return zeros(tuple(n + sum(margin) for n, margin in zip(x.shape, margins, strict=True)), np.int64, x).to(x)
    import torch

    for axis, (before, behind) in enumerate(margins):
        if before or behind:
            size = x.shape[axis]
            places = torch.arange(-before, size + behind, device=x.device).clamp(0, size - 1)
            x = x.index_select(axis, places)
    return x


def counted(x: Any, size: int, weights: Any = None) -> Any:
    """How often 0..size - 1 occur in x [N], int64 [size], or the sums of their weights, float64."""
    if on_host(x):
        return np.bincount(x, weights, size)
    import torch

    weights = torch.ones_like(x, dtype=torch.int64) if weights is None else weights
    return weights.new_zeros(size).index_add_(0, x.long(), weights)


def product(a: Any, b: Any) -> Any:
    """a @ b of integers, or of multiples of a power of two, whose sums are exact in the type of a. Of tensors it is
    float64, which no setting rounds to TF32 and which GPUs multiply, as they do no integers."""
    return a @ b if on_host(a) else a.double() @ b.double()


def floors(x: Any, low: int, high: int) -> Any:
    """x rounded down and kept in a range, in its place."""
    return np.floor(x, out=x).clip(low, high, out=x) if on_host(x) else x.floor_().clamp_(low, high)


def _type(kind: type[Any]) -> Any:
    import torch

    return getattr(torch, np.dtype(kind).name)
