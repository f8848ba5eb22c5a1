"""What the fuzzers run: each target takes bytes and raises only where the library is wrong.

A target returns whether it came past the header, or past the first check of its input.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import second_decoder as second

from bitstream import (
    RAW,
    VERSION,
    AnsStack,
    Container,
    CorruptError,
    Kind,
    LimitError,
    Limits,
    Tables,
    TruncatedError,
    VaeError,
    VersionError,
    gaussian_tables,
    normalise,
    pack,
    pop_plain,
    push_plain,
    read_header,
    unpack,
)

if TYPE_CHECKING:
    from vaecodec import Codec

NAMES = {CorruptError: "corrupt", TruncatedError: "truncated", VersionError: "version", LimitError: "limit"}
SMALL = Limits(max_pixels=100 * 100)


def container(data: bytes) -> bool:
    """A file is read and written again as it was, or refused; the second decoder says the same of one in eight."""
    verdict = ""
    try:
        file = unpack(data)
    except VaeError as error:
        verdict = NAMES[type(error)]
    else:
        if tuple(data[8:10]) == VERSION:  # older ones are written anew
            assert pack(file.header, file.tiles, file.sections) == data
    if zlib.crc32(data) % 8 == 0:
        other = ""
        try:
            second.read(data)
        except second.RefusedError as error:
            other = error.args[0]
        assert verdict == other, (verdict, other)
        if not verdict:
            lanes(file)
        with contextlib.suppress(VaeError):
            unpack(data, partial=True)
        with contextlib.suppress(VaeError):
            tiles = unpack(data, preview=True).tiles
            assert all(tile.held is None or tile.held <= len(tile.parts) for tile in tiles)
    return not verdict or past_header(data)


def lanes(file: Container) -> None:
    """The lengths of lanes are believed by both, or by neither, and are written as they were."""
    for tile in file.tiles:
        if tile.method != RAW:
            try:
                stack = AnsStack(tile.words, tile.lanes)
            except CorruptError:
                with contextlib.suppress(second.RefusedError):
                    second.Coder(bytes(tile.words), tile.lanes)
                    raise AssertionError("lanes") from None
            else:
                second.Coder(bytes(tile.words), tile.lanes)
                assert stack.to_bytes() == tile.words


def past_header(data: bytes) -> bool:
    try:
        read_header(data)
    except VaeError:
        return False
    return True


def coder(data: bytes) -> bool:
    """Any words under any tables: both coders pop the same, and pushing it restores the words."""
    rng = np.random.default_rng(list(data[:4]))  # what need not be searched for: sizes, ids
    choice, body = data[:1], data[4:]
    words = body[-4 * rng.integers(0, 1 + len(body) // 4) :] if len(body) > 3 else b""
    if choice and choice[0] % 4 == 0:
        return plain(words, rng)
    tables = tables_of(body[: len(body) - len(words)], rng)
    if tables is None:
        return False
    ids = rng.integers(0, len(tables.counts), rng.integers(0, 60) ** rng.integers(1, 3))
    lanes = int(1 << rng.integers(0, 5))
    if lanes > 1:
        sizes = rng.multinomial(len(words) // 4, np.full(lanes, 1 / lanes))
        words = bytes(sizes.astype(np.uint8)) + words
    results = list[object]()
    for name in ("constriction", "numpy"):
        os.environ["VAECODEC_CODER"] = name
        try:
            stack = AnsStack(words, lanes)
            values = stack.pop(tables, ids)
        except CorruptError:
            results.append("corrupt")
            continue
        finally:
            del os.environ["VAECODEC_CODER"]
        left = stack.to_bytes()
        stack.push(values, tables, ids)
        assert stack.to_bytes() == words
        results.append((values.tolist(), left, tables.bits(ids, values).tolist()))
    assert results[0] == results[1]
    return results[0] != "corrupt"


def tables_of(data: bytes, rng: np.random.Generator) -> Tables | None:
    """Tables from bytes: stored arrays that break a rule, or normalised weights."""
    escape, whole = bool(rng.integers(2)), np.frombuffer(data[: len(data) // 4 * 4], "<u4").astype(np.int64)
    try:
        if rng.integers(4) == 0:
            cuts = np.sort(rng.integers(0, len(whole) + 1, 2))
            lows, sizes, counts = np.split(whole, cuts)
            return Tables.from_arrays({"lows": lows, "sizes": sizes, "counts": counts, "escape": np.array([escape])})
        if rng.integers(4) == 0:
            return gaussian_tables(1e-3 + np.frombuffer(data, np.uint8)[:20] / 16, rng.integers(-9, 9), escape=escape)
        weights = np.frombuffer(data, np.uint8)
        pieces = np.array_split(weights.astype(float), rng.integers(1, 5))
        lows = rng.integers(-(2**31), 2**31 - 300, len(pieces)) >> rng.integers(0, 32)
        tables = Tables(lows, [normalise(piece) for piece in pieces], escape)
        assert Tables.from_arrays(tables.to_arrays()).digest_bytes() == tables.digest_bytes()
        return tables
    except (ValueError, TypeError):
        return None


def plain(words: bytes, rng: np.random.Generator) -> bool:
    """Any words as a plain picture, and what comes out there and back."""
    height, width, channels, depth = (int(rng.integers(low, high)) for low, high in ((1, 20), (1, 20), (1, 5), (8, 17)))
    try:
        samples = pop_plain(AnsStack(words), (height, width, channels), depth)
    except CorruptError:
        return False
    assert samples.shape == (height, width, channels) and samples.max() >> depth == 0
    stack = AnsStack(words)
    push_plain(stack, samples, depth)
    assert (pop_plain(stack, samples.shape, depth) == samples).all() and stack.to_bytes() == words
    return True


@cache
def codec() -> Codec:
    """With the small frozen models, both of them."""
    import torch
    from conftest import TINY, TINY_LOSSLESS

    from vaecodec import Codec

    torch.set_num_threads(1)
    return Codec("cpu", [TINY, TINY_LOSSLESS], tile=64)


def decode(data: bytes) -> bool:
    """A whole file: only what every tile's checksum confirms comes out."""
    if zlib.crc32(data) % 4 == 0:  # nothing confirms what a preview shows
        with contextlib.suppress(VaeError):
            codec().decode_array(data[: len(data) * 3 // 4], SMALL, preview=True)
    try:
        samples = codec().decode_array(data, SMALL)
    except VaeError:
        return past_header(data)
    header = read_header(data)
    assert samples.shape[:2] == (header.height, header.width)
    assert samples.dtype == (np.uint8 if header.depth == 8 else np.uint16)
    side, tiles = header.tile, unpack(data).tiles
    corners = [(y, x) for y in range(0, header.height, side) for x in range(0, header.width, side)]
    if header.kind == Kind.LOSSLESS:
        for (y, x), tile in zip(corners, tiles, strict=True):
            assert zlib.crc32(samples[y : y + side, x : x + side].tobytes()) == tile.crc
    else:
        y, x = header.height // 3, header.width // 2
        part = codec().decode_array(data, SMALL, region=(x, y, header.width - x, header.height - y))
        assert (part == samples[y:, x:]).all()
    return True
