"""Changes to `.vae` files that know the format: of a field, a section or a tile, under repaired checksums."""

import struct
import zlib
from dataclasses import dataclass
from random import Random

HEAD = struct.Struct("<8s6B2H2I16s")
SIZES = (6, 8, 1, 2, 63, 64, 65, 128, 1024, 2048, 4096, 65_535, 131_072, 2**31, 2**32 - 1)
TAGS = (b"EXIF", b"ICCP", b"XMP ", b"TILE", b"new ", b"\x7f\0\0\0")
RAW = 3


@dataclass
class Part:
    """A section: tag, flags and payload. A tile: its method, its CRC and its words."""

    name: bytes | int
    number: int
    body: bytes


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def number_at(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            break
    return value, at


def split(data: bytes) -> tuple[list[int | bytes], list[Part], list[Part]]:
    """Fields, sections and tiles, as far as they can be told. Raises IndexError or struct.error for a stump."""
    fields, sections, tiles, at = list(HEAD.unpack_from(data)), list[Part](), list[Part](), HEAD.size + 4
    directory = b""
    while len(data) > at + 5 and len(sections) < 100:
        tag, flags = data[at : at + 4], data[at + 4]
        length, body = number_at(data, at + 5)
        at = body + length + 4
        if tag == b"TILE":
            directory = data[body : body + length]
            break
        sections.append(Part(tag, flags, data[body : body + length]))
    place = 0
    while place < len(directory) and len(tiles) < 1000:
        length, end = number_at(directory, place + 1)
        crc = int.from_bytes(directory[end : end + 4], "little")
        tiles.append(Part(directory[place], crc, data[at : at + length]))
        place, at = end + 4, at + length
    return fields, sections, tiles


def framed(tag: bytes, flags: int, payload: bytes) -> bytes:
    body = tag + bytes([flags]) + varint(len(payload)) + payload
    return body + struct.pack("<I", zlib.crc32(body))


def joined(fields: list[int | bytes], sections: list[Part], tiles: list[Part]) -> bytes:
    head = HEAD.pack(*fields)
    directory = b"".join(bytes([t.name]) + varint(len(t.body)) + struct.pack("<I", t.number) for t in tiles)
    rest = [framed(bytes(s.name), s.number, s.body) for s in sections] + [framed(b"TILE", 1, directory)]
    return b"".join([head, struct.pack("<I", zlib.crc32(head)), *rest, *(t.body for t in tiles)])


def scarred(data: bytes, rng: Random) -> bytes:
    """Bytes flipped, left out, put in, repeated or cut off; words stay whole half the time."""
    step = rng.choice((1, 4))
    at = rng.randrange(len(data) + 1) // step * step
    n = step * rng.choice((1, 1, 1, 2, 4, 16))
    match rng.randrange(7):
        case 0 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + rng.randbytes(n) + data[at + n :]
        case 2:
            return data[:at] + data[at + n :]
        case 3:
            return data[:at] + bytes([rng.choice((0, 1, 127, 128, 255))]) * n + data[at:]
        case 4:
            return data[:at] + data[at : at + n] + data[at:]
        case 5:
            return data[:at]
        case _:
            return data + rng.randbytes(n)


def mutated(data: bytes, seed: int, most: int = 2**16) -> bytes:
    """A changed file: of four, three with right checksums of the header and the sections."""
    rng = Random(seed)
    try:
        fields, sections, tiles = split(data)
    except (IndexError, struct.error):
        return scarred(data, rng)[:most]
    for _ in range(rng.choice((1, 1, 2, 3))):
        change(fields, sections, tiles, rng)
    try:
        result = joined(fields, sections, tiles)
    except struct.error:  # a field does not fit
        result = data
    if rng.random() < 0.25:
        result = scarred(result, rng)
    return result[:most]


def change(fields: list[int | bytes], sections: list[Part], tiles: list[Part], rng: Random) -> None:
    choice = rng.randrange(10)
    if choice == 0:
        at = rng.randrange(1, 11)
        fields[at] = rng.randrange(8) if at < 7 else rng.choice(SIZES) + rng.randrange(-1, 2) * (rng.random() < 0.3)
        fields[at] = max(0, fields[at]) & (255 if at < 7 else 65_535 if at < 9 else 2**32 - 1)
    elif choice == 1:
        fields[rng.choice((9, 10))] = rng.randrange(1, 80)
    elif choice == 2:
        part = Part(rng.choice(TAGS), rng.choice((0, 0, 0, 1, 2)), rng.randbytes(rng.randrange(9)))
        sections.insert(rng.randrange(len(sections) + 1), part)
    elif choice == 3 and sections:
        section = rng.choice(sections)
        section.body, section.number = scarred(section.body, rng), rng.choice((0, 0, 1, 128))
        if rng.random() < 0.3:
            sections.remove(section)
    elif tiles:
        tile = rng.choice(tiles)
        if choice == 4:
            tile.name = rng.choice((0, 1, 2, 3, 4, 255)) ^ rng.choice((0, 0, 1, 2, 4, 8, 9)) << 4 & 255
        elif choice == 5:
            tile.number ^= 1 << rng.randrange(32)
        elif choice == 6:
            tiles.append(tile) if rng.random() < 0.5 else tiles.remove(tile)
        elif choice == 7 and rng.random() < 0.5:  # lengths of lanes, of which some add up
            lengths = [rng.randrange(3) for _ in range(rng.choice((2, 4, 8)))]
            tile.name = tile.name & 15 | len(lengths).bit_length() - 1 << 4
            tile.body = b"".join(map(varint, lengths)) + rng.randbytes(4 * sum(lengths))
        elif choice == 7:
            tile.body = rng.choice((b"", tile.body[: rng.randrange(9) * 4], tile.body[-4 * rng.randrange(1, 9) :]))
        else:
            tile.body = scarred(tile.body, rng)
        if tile.name == RAW:
            tile.number = zlib.crc32(tile.body)
