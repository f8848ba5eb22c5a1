"""Layers of a whole tile, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STRIPE = 64
"""Rows of a phase that are computed together: little enough that what lies between two layers stays in the caches."""


def in_stripes(
    f: Callable[..., Tensor | tuple[Tensor, ...]], margin: int, x: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    """f of tensors [..., h, w], stripe by stripe; f looks ``margin`` rows beyond each row. On a GPU they are one."""
    rows, inputs = x.shape[-2], (x, *others)
    whole: list[Tensor] = []
    height = STRIPE if x.device.type == "cpu" else rows
    for top in range(0, rows, height):
        first, last = max(top - margin, 0), min(top + height + margin, rows)
        parts = f(*(x[..., first:last, :] if x is not None else None for x in inputs))
        parts = (parts,) if isinstance(parts, Tensor) else parts
        scale = parts[0].shape[-2] // (last - first)
        whole = whole or [empty_like(part, scale * rows) for part in parts]
        inside = slice(scale * (top - first), scale * (top - first + height))
        for out, part in zip(whole, parts, strict=True):
            out[..., scale * top : scale * (top + height), :] = part[..., inside, :]
    return tuple(whole)


def empty_like(part: Tensor, rows: int) -> Tensor:
    """A tensor with the layout of ``part`` and that many rows."""
    last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
    size = (*part.shape[:-2], rows, part.shape[-1])
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=layout)
