"""What the processes of one training run share: all draw the same, and each keeps its part."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def share(batch: Tensor) -> Tensor:
    """This process's samples [B / processes, ...] of a batch [B, ...] that all have drawn alike.

    Raises ValueError if the parts were not equal: the mean of their losses would not be the batch's.
    """
    processes = count()
    if len(batch) % processes:
        raise ValueError(f"a batch of {len(batch)} cannot be shared out evenly to {processes} processes")
    return batch if processes == 1 else batch.chunk(processes)[dist.get_rank()]


def shared(draw: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Noise of which this process gets its share of what ``draw``, such as torch.rand_like, draws for all."""
    return lambda like: share(draw(torch.cat([like] * count()))) if count() > 1 else draw(like)


@torch.no_grad()
def mean(values: list[Tensor]) -> None:
    """Replace tensors that every process has by their means over the processes, in one message."""
    if count() > 1:
        flat = torch.cat([value.flatten() for value in values])
        dist.all_reduce(flat)
        parts = torch.split_with_sizes(flat / count(), [value.numel() for value in values])
        torch._foreach_copy_(values, [part.view_as(value) for part, value in zip(parts, values, strict=True)])


@torch.no_grad()
def alike(values: list[Tensor]) -> None:
    """Replace every process's tensors by those of the first."""
    for value in values if count() > 1 else ():
        dist.broadcast(value, 0)


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
