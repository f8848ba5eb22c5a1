"""Which latents of a lossy file are there, and those of them that are held."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..tiles import Box


@dataclass(frozen=True)
class Missing:
    """The tiles of a lossy file without latents, by row and column among the tiles. side: of a tile, in latents."""

    side: int
    places: set[tuple[int, int]]

    def add(self, box: Box) -> None:
        self.places.add((box.top // self.side, box.left // self.side))

    def seen(self, outer: Box, like: Tensor) -> Tensor | None:
        """See ``model.of_seen``, of a box of latents: [1, 1, h, w], or None if it has all of them."""
        rows = range(outer.top // self.side, -(-outer.bottom // self.side))
        columns = range(outer.left // self.side, -(-outer.right // self.side))
        found = [(i, j) for i in rows for j in columns if (i, j) in self.places]
        if not found:
            return None
        seen = like.new_ones(1, 1, outer.rows, outer.columns)
        for i, j in found:
            tile = Box(i * self.side, j * self.side, (i + 1) * self.side, (j + 1) * self.side)
            seen[..., *(tile & outer).within(outer)] = 0
        return seen


class Band:
    """Some rows of an array [M, rows, columns] of int16 that is never held as a whole: it moves from top to bottom.

    box: what the values are of.
    """

    def __init__(self, channels: int, outer: Box) -> None:
        self.box = replace(outer, bottom=outer.top)
        self.values = np.zeros((channels, 0, outer.columns), np.int16)

    def move(self, top: int, bottom: int) -> None:
        """Hold the rows top..bottom, zero where they are new."""
        box = replace(self.box, top=top, bottom=bottom)
        values = np.zeros((len(self.values), box.rows, box.columns), np.int16)
        if kept := box & self.box:
            values[:, *kept.within(box)] = self.values[:, *kept.within(self.box)]
        self.box, self.values = box, values
