"""Gain maps of JPEG files: a second, small picture that says how much brighter each place is on a screen of high
dynamic range (Ultra HDR, ISO 21496-1, and Apple's). It follows the first in the file, whose MPF index (CIPA DC-007)
says where. It is kept as it is, and written behind a new first picture."""

from __future__ import annotations

import struct
from typing import IO, Any

START, APP0, APP2 = b"\xff\xd8", 0xFFE0, 0xFFE2
ISO = b"urn:iso:std:iso:ts:21496:-1\0"
MARKS = (b"http://ns.adobe.com/hdr-gain-map/1.0/", ISO, b"urn:com:apple:photo:2020:aux:hdrgainmap")
"""One of them stands in the segments of each gain map."""
INDEX, MPF = 0xB002, b"MPF\0"
MOST = 16  # other pictures that are looked at
FIRST = 0x030000  # the type of the picture that others belong to


def other_pictures(picture: Any, file: IO[bytes]) -> list[bytes]:
    """The JPEG files that follow the first picture in one, as its MPF index says; none where that is damaged.

    picture: what Pillow has opened from the file.
    """
    index = picture.info.get("mp")
    if picture.format not in ("JPEG", "MPO") or not isinstance(index, bytes):
        return []
    order = ">" if index.startswith(b"MM") else "<"
    try:
        (at,) = struct.unpack_from(f"{order}I", index, 4)
        (count,) = struct.unpack_from(f"{order}H", index, at)
        fields = [struct.unpack_from(f"{order}HHII", index, at + 2 + 12 * number) for number in range(count)]
        size, entries = next((size, value) for tag, _, size, value in fields if tag == INDEX)
        places = [
            struct.unpack_from(f"{order}II", index, entries + at + 4)
            for at in range(16, min(size, 16 * (1 + MOST)), 16)
        ]
    except (struct.error, StopIteration):
        return []
    file.seek(0)
    data = file.read()
    base = data.find(MPF + index) + len(MPF)
    found = (data[base + offset : base + offset + length] for length, offset in places)
    return [jpeg for (length, _), jpeg in zip(places, found, strict=True) if len(jpeg) == length and jpeg[:2] == START]


def gain_map_of(picture: Any, file: IO[bytes]) -> bytes:
    """The gain map of a picture that Pillow has opened from a file, a JPEG file of its own, or nothing."""
    for data in other_pictures(picture, file):
        if any(mark in data[: pixels_at(data)] for mark in MARKS):
            return data
    return b""


def pixels_at(jpeg: bytes) -> int:
    """Where the segments end that begin a JPEG file: those of applications, and comments."""
    at = 2
    while at + 4 <= len(jpeg):
        marker, length = struct.unpack_from(">HH", jpeg, at)
        if not (APP0 <= marker <= APP0 + 15 or marker == 0xFFFE):
            break
        at += 2 + length
    return min(at, len(jpeg))


def with_gain_map(jpeg: bytes, gain_map: bytes) -> bytes:
    """A JPEG file, and the gain map behind it."""
    at, segments = pixels_at(jpeg), b""
    if ISO in gain_map[: pixels_at(gain_map)]:  # the first picture says which version it takes to read the map
        segments += segment(APP2, ISO + bytes(4))
    index = len(MPF) + 50 + 32  # bytes
    base = at + len(segments) + 4 + len(MPF)
    size = len(jpeg) + len(segments) + 4 + index
    fields = struct.pack(">HHI4s", 0xB000, 7, 4, b"0100") + struct.pack(">HHII", 0xB001, 4, 1, 2)
    fields += struct.pack(">HHII", INDEX, 7, 32, 50)
    entries = struct.pack(">IIIHH", FIRST, size, 0, 0, 0) + struct.pack(">IIIHH", 0, len(gain_map), size - base, 0, 0)
    segments += segment(APP2, MPF + b"MM\0*" + struct.pack(">IH", 8, 3) + fields + bytes(4) + entries)
    return jpeg[:at] + segments + jpeg[at:] + gain_map


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">HH", marker, len(data) + 2) + data
