"""What AVIF and HEIF files say of their colours beside an ICC profile, as PNG's chunks."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

Chunk = tuple[bytes, bytes]
PLAIN = (frozenset({1, 2}), frozenset({2, 13}))
"""Primaries and transfer functions that say no more than that it is sRGB, or nothing at all."""
NITS = 10_000  # PNG's luminances are in ten-thousandths of a candela a square metre


def boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, and where the body begins and ends, of the boxes in a part of the data."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if size == 1 and at + 16 <= end:
            (size,), body = struct.unpack_from(">Q", data, at + 8), at + 16
        stop = at + size if size else end
        if not body <= stop <= end:
            return
        yield kind, body, stop
        at = stop


def meta_of(file: IO[bytes]) -> bytes:
    """The body of the box that describes the pictures in a file; nothing where there is none."""
    file.seek(0)
    data = file.read()
    return next((data[body + 4 : stop] for kind, body, stop in boxes(data, 0, len(data)) if kind == b"meta"), b"")


def properties(meta: bytes) -> list[tuple[bytes, bytes]]:
    """Type and body of what is said of the primary picture. Raises struct.error or IndexError for damaged data."""
    primary, listed, numbers = None, list[tuple[bytes, bytes]](), list[int]()
    for kind, body, stop in boxes(meta, 0, len(meta)):
        if kind == b"pitm":
            primary = int.from_bytes(meta[body + 4 : body + (8 if meta[body] else 6)])
        for inner, start, last in boxes(meta, body, stop) if kind == b"iprp" else ():
            if inner == b"ipco":
                listed = [(name, meta[a:b]) for name, a, b in boxes(meta, start, last)]
            elif inner == b"ipma":
                numbers += associated(meta[start:last], primary)
    return [listed[number - 1] for number in numbers if 0 < number <= len(listed)]


def associated(body: bytes, item: int | None) -> list[int]:
    """Numbers of an item's properties."""
    wide, long = body[0] > 0, body[3] & 1
    (count,), at, numbers = struct.unpack_from(">I", body, 4), 8, list[int]()
    for _ in range(count):
        (name,) = struct.unpack_from(">I" if wide else ">H", body, at)
        at += 4 if wide else 2
        width, parts = (2 if long else 1), body[at]
        for place in range(at + 1, at + 1 + parts * width, width):
            number = int.from_bytes(body[place : place + width]) & (0x7FFF if long else 0x7F)
            numbers += [number] if name == item else []
        at += 1 + parts * width
    return numbers


def colour_chunks(file: IO[bytes]) -> list[Chunk]:
    """cICP, cLLI and mDCV of the primary picture of an AVIF or HEIF file. Without an ICC profile colours are those of
    cICP, with one only a transfer function of high dynamic range (PQ, HLG) says more."""
    chunks = list[Chunk]()
    try:
        said = properties(meta_of(file))
        icc = any(kind == b"colr" and body[:4] in (b"prof", b"rICC") for kind, body in said)
        for kind, body in said:
            if kind == b"colr" and body[:4] == b"nclx":
                primaries, transfer = struct.unpack_from(">HH", body, 4)
                plain = primaries in PLAIN[0] and transfer in PLAIN[1]
                if max(primaries, transfer) < 256 and not plain and (not icc or transfer in (16, 18)):
                    chunks.append((b"cICP", bytes([primaries, transfer, 0, 1])))
            elif kind == b"clli":
                chunks.append((b"cLLI", struct.pack(">II", *(NITS * part for part in struct.unpack(">HH", body)))))
            elif kind == b"mdcv":  # which begins with green
                parts = struct.unpack(">8H2I", body)
                chunks.append((b"mDCV", struct.pack(">8H2I", *parts[4:6], *parts[:4], *parts[6:])))
    except (struct.error, IndexError):
        return []
    return chunks


def has_gain_map(file: IO[bytes]) -> bool:
    """Whether an AVIF or HEIF file holds one."""
    meta = meta_of(file)
    return b"hdrgainmap" in meta or b"tmap" in meta
