"""Tiles without networks, which files of either kind may have: samples as they are, or by ``bitstream``'s own model."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstream import PLAIN, RAW, AnsStack, CorruptError, Tile, pop_plain, push_plain

Samples = NDArray[np.unsignedinteger[Any]]


def sample_type(depth: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if depth == 8 else np.uint16


def crc_of(samples: Samples) -> int:
    """CRC-32 of the samples, row by row, little-endian."""
    return zlib.crc32(raw(samples))


def raw(samples: Samples) -> bytes:
    return samples.astype(samples.dtype.newbyteorder("<"), copy=False).tobytes()


def raw_tile(samples: Samples) -> Tile:
    return Tile(RAW, crc_of(samples), raw(samples))


def plain_tile(samples: Samples, depth: int) -> Tile:
    stack = AnsStack(lanes=None)
    push_plain(stack, samples, depth)
    return Tile(PLAIN, crc_of(samples), stack.to_bytes(), stack.lanes)


def smaller_tile(samples: Samples, depth: int) -> Tile:
    """The smaller of both for samples [h, w, C] of ``depth`` bits."""
    return min(raw_tile(samples), plain_tile(samples, depth), key=lambda tile: len(tile.words))


def samples_in(tile: Tile, shape: tuple[int, int, int], depth: int) -> Samples:
    """The samples of a tile of method PLAIN or RAW. Raises CorruptError."""
    dtype = sample_type(depth)
    samples: Samples
    if tile.method == RAW:
        if tile.lanes > 1 or len(tile.words) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise CorruptError("a raw tile has the wrong size, or lanes")
        samples = np.frombuffer(tile.words, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)
    else:
        stack = AnsStack(tile.words, tile.lanes)
        samples = pop_plain(stack, shape, depth).astype(dtype)
        check_empty(stack)
    return checked(samples, tile)


def grey_samples(shape: tuple[int, int, int], depth: int) -> Samples:
    """Samples [h, w, C] of which nothing is known: middle grey, opaque."""
    samples: Samples = np.full(shape, 2 ** (depth - 1), sample_type(depth))
    if shape[2] in (2, 4):
        samples[..., -1] = 2**depth - 1
    return samples


def check_empty(stack: AnsStack) -> None:
    """Raises CorruptError if something is left of a tile."""
    if not stack.is_empty():
        raise CorruptError("a tile fails its checksum")


def checked(samples: Samples, tile: Tile) -> Samples:
    """The samples, if they are those that were coded. Raises CorruptError."""
    if crc_of(samples) != tile.crc:
        raise CorruptError("a tile fails its checksum")
    return samples
