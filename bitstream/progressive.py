"""The order of a progressive file's bytes: part by part over all tiles, and each tile from the top of its stack down,
so that any prefix is of use. Standard library only; FORMAT.md specifies it."""

from array import array
from collections.abc import Callable, Iterator, Sequence

from .errors import CorruptError

PARTS = b"PART"
PARTS_MAX = 128
"""Of a tile."""

Parts = Sequence[tuple[int, ...]]
"""Of each tile, the words of all its parts but the last; none of a tile that is one part."""


def write_index(parts: Parts, varint: Callable[[int], bytes]) -> bytes:
    """The payload of the section. Raises ValueError for too many parts."""
    if max(map(len, parts)) >= PARTS_MAX:
        raise ValueError(f"a tile of more than {PARTS_MAX} parts")
    return b"".join(varint(number) for tile in parts for number in (len(tile), *tile))


def read_index(payload: bytes, lengths: Sequence[int], read_varint: Callable[..., tuple[int, int]]) -> Parts:
    """The inverse, for tiles of so many bytes. Raises CorruptError."""
    parts, at, view = list[tuple[int, ...]](), 0, memoryview(payload)
    try:
        for length in lengths:
            count, at = read_varint(view, at)
            if count >= PARTS_MAX:
                raise CorruptError(f"a tile of more than {PARTS_MAX} parts")
            words = list[int]()
            for _ in range(count):
                number, at = read_varint(view, at)
                words.append(number)
            if words and (length % 4 or 4 * sum(words) > length):
                raise CorruptError("the parts of a tile are longer than the tile")
            parts.append(tuple(words))
    except IndexError:
        raise CorruptError("the index of parts is too short") from None
    if at != len(view) or not any(parts):
        raise CorruptError("the index of parts is too long, or there is but one of each tile")
    return parts


def ordered(lengths: Sequence[int], parts: Parts) -> Iterator[list[tuple[int, int]]]:
    """For the first parts of all tiles, for the second ones and so on: which tiles have any, and its size in bytes."""
    left, tiles, number = list(lengths), list(range(len(lengths))), 0
    while tiles:
        group = list[tuple[int, int]]()
        for tile in tiles:
            size = 4 * parts[tile][number] if number < len(parts[tile]) else left[tile]
            left[tile] -= size
            group.append((tile, size))
        yield group
        tiles = [tile for tile in tiles if len(parts[tile]) > number]
        number += 1


def reversed_words(data: bytes | memoryview) -> bytes:
    """Words of four bytes, the last one first; of what is no whole number of them, the last bytes are dropped."""
    words = array("I", bytes(data[: len(data) // 4 * 4]))
    words.reverse()
    return words.tobytes()
