"""The rectangles that a picture is coded in, and what is told while they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bitstream import CorruptError

TILE = 1024
Progress = Callable[[int], None]
Region = tuple[int, int, int, int]


@dataclass(frozen=True)
class Box:
    """Part of a grid: rows top..bottom, columns left..right (ends excluded)."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    def __and__(self, other: Box) -> Box:
        """What two boxes share."""
        return Box(
            max(self.top, other.top),
            max(self.left, other.left),
            min(self.bottom, other.bottom),
            min(self.right, other.right),
        )

    def __bool__(self) -> bool:
        return self.rows > 0 and self.columns > 0

    def grown(self, margin: int) -> Box:
        """With a margin on all sides."""
        return Box(self.top - margin, self.left - margin, self.bottom + margin, self.right + margin)

    def times(self, factor: int) -> Box:
        """On a grid that is finer by a factor."""
        return Box(self.top * factor, self.left * factor, self.bottom * factor, self.right * factor)

    @property
    def region(self) -> Region:
        return self.left, self.top, self.columns, self.rows

    def within(self, outer: Box) -> tuple[slice, slice]:
        """Index of this box in an array [H, W] that holds ``outer``."""
        return (
            slice(self.top - outer.top, self.bottom - outer.top),
            slice(self.left - outer.left, self.right - outer.left),
        )


def tiles(rows: int, columns: int, side: int) -> list[Box]:
    """The tiles of a grid in raster order."""
    return [
        Box(top, left, min(top + side, rows), min(left + side, columns))
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


def box_of(region: Region | None, width: int, height: int) -> Box:
    """The region (x, y, width, height) of a picture; without one, all of it. Raises ValueError if it sticks out."""
    if region is None:
        return Box(0, 0, height, width)
    x, y, w, h = region
    if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
        raise ValueError(f"region {region} is not inside the picture of {width} x {height} pixels")
    return Box(y, x, y + h, x + w)


@contextlib.contextmanager
def forgiving(box: Box, damaged: list[Region] | None) -> Iterator[None]:
    """With a list, a CorruptError ends the body and no more: the region of the box is appended to the list."""
    try:
        yield
    except CorruptError:
        if damaged is None:
            raise
        damaged.append(box.region)


def shares(count: int, parts: int) -> Iterator[int]:
    """As many whole numbers as there are parts, equal as far as may be, that sum to a count."""
    return (count * (k + 1) // parts - count * k // parts for k in range(parts))


def advance(progress: Progress, parts: Iterator[int]) -> None:
    if count := next(parts):
        progress(count)


def ignore(_count: int) -> None:
    """Progress that nobody follows."""
