"""A second decoder, written from FORMAT.md alone: it shares no line with the library and needs no package.

It reads the container, and the tiles that need no networks: plain and raw ones.
"""

import struct
import zlib
from bisect import bisect_right
from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any

from second_fitted import Sample, pop_phase

TOTAL = 2**24
CHANNELS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 1, 6: 3, 7: 4}  # by mode

Header = namedtuple("Header", "kind mode depth colour quality tile width height model")
Tile = namedtuple("Tile", "method crc data lanes parts")
Plane = list[list[int]]
Picture = list[list[list[int]]]  # rows of pixels of samples


class RefusedError(Exception):
    """What FORMAT.md calls corrupt, truncated, version or limit, which is the first argument."""


def require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise RefusedError(name, what)


# Container


def varint(data: bytes, at: int, end: str) -> tuple[int, int]:
    """The number at a place and the place after it; `end` names the error if the data ends first."""
    value = 0
    for i in range(10):
        require(at + i < len(data), end, "it ends within a number")
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            require(value < 2**64 and (byte > 0 or i == 0), "corrupt", "number")
            return value, at + i + 1
    raise RefusedError("corrupt", "number")


def read_header(data: bytes) -> Header:
    require(bytes.fromhex("8b5641450d0a1a0a").startswith(data[:8]), "corrupt", "magic")
    require(data[8:10] <= b"\0\4", "version", "version")
    require(len(data) >= 46, "truncated", "header")
    require(data[8:10] >= b"\0\1", "corrupt", "version")
    require(zlib.crc32(data[:42]) == int.from_bytes(data[42:46], "little"), "corrupt", "CRC of the header")
    h = Header(*struct.unpack_from("<4BHHII16s", data, 10))
    require(1 <= h.kind <= 3 and 1 <= h.mode <= 7, "version", "kind or mode")
    require(h.depth == 8 if h.mode <= 4 else 9 <= h.depth <= 16, "corrupt", "depth")
    require(h.quality <= 10_000 and h.tile % 64 == 0 < min(h.tile, h.width, h.height), "corrupt", "header")
    require(h.width * h.height <= 178_956_970 and max(h.width, h.height) <= 131_072, "limit", "size")
    return h


def read(data: bytes) -> tuple[Header, dict[bytes, bytes], list[Tile]]:
    """Header, sections and tiles of a file, under the default limits."""
    header, at, tag, sections = read_header(data), 46, b"", dict[bytes, bytes]()
    count = -(-header.width // header.tile) * -(-header.height // header.tile)
    while tag != b"TILE":
        start, tag = at, data[at : at + 4]
        require(len(data) >= at + 5, "truncated", "section")
        length, body = varint(data, at + 5, "truncated")
        require(length <= {b"TILE": 2**64, b"ICCP": 2**22}.get(tag, 2**24), "limit", "section")
        end = body + length
        at = end + 4
        require(len(data) >= at, "truncated", "section")
        require(tag != b"TILE" or 6 * count <= length <= 15 * count, "corrupt", "directory")
        require(zlib.crc32(data[start:end]) == int.from_bytes(data[end:at], "little"), "corrupt", "CRC")
        require(data[start + 4] <= 1, "version", "flags")
        require(tag not in (b"TILE", b"PART") or data[start + 4] == 1, "corrupt", "directory")
        require(all(0x20 <= byte <= 0x7E for byte in tag), "corrupt", "tag")
        known = tag in (b"TILE", b"PART", b"EXIF", b"ICCP", b"XMP ", b"IPTC", b"PNG ", b"GAIN")
        require(known or data[start + 4] == 0, "version", "critical section")
        require(tag not in sections, "corrupt", "the section occurs twice")
        require(b"PART" not in sections or tag == b"TILE", "corrupt", "PART is not before TILE")
        sections[tag] = data[body:end]
        require(len(sections) <= 64 or tag in (b"PART", b"TILE"), "limit", "sections")
    directory, place, entries = sections.pop(b"TILE"), 0, []
    for _ in range(count):
        require(place < len(directory), "corrupt", "directory")
        exponent, method = divmod(directory[place], 16)
        require(exponent <= 8, "version", "lanes")
        length, crc = varint(directory, place + 1, "corrupt")
        require(len(directory) >= crc + 4, "corrupt", "directory")
        entries.append((method, 2**exponent, length, int.from_bytes(directory[crc : crc + 4], "little")))
        place = crc + 4
    require(place == len(directory), "corrupt", "directory")
    lengths = [length for _, _, length, _ in entries]
    size = at + sum(lengths)
    require(len(data) >= size, "truncated", "tile")
    require(len(data) == size, "corrupt", "more bytes than tiles")
    cuts = read_parts(sections.pop(b"PART"), lengths) if b"PART" in sections else [[] for _ in entries]
    pieces = [b""] * count
    for k in range(128):
        for i, own in enumerate(cuts):
            if k <= len(own):
                end = at + (4 * own[k] if k < len(own) else lengths[i] - len(pieces[i]))
                pieces[i], at = pieces[i] + data[at:end], end
    tiles = []
    for (method, lanes, _, crc), own, piece in zip(entries, cuts, pieces, strict=True):
        require(not own or lanes == 1, "corrupt", "a tile of several lanes in parts")
        words = [piece[at : at + 4] for at in range(0, len(piece), 4)][:: -1 if own else 1]
        tiles.append(Tile(method, crc, b"".join(words), lanes, tuple(own)))
    return header, sections, tiles


def read_parts(index: bytes, lengths: list[int]) -> list[list[int]]:
    """The words of all parts of each tile but the last."""
    at, tiles = 0, []
    for length in lengths:
        cuts, at = varint(index, at, "corrupt")
        require(cuts <= 127, "corrupt", "parts")
        words = []
        for _ in range(cuts):
            number, at = varint(index, at, "corrupt")
            words.append(number)
        require(not words or (length % 4 == 0 and 4 * sum(words) <= length), "corrupt", "parts")
        tiles.append(words)
    require(at == len(index) and any(tiles), "corrupt", "index of parts")
    return tiles


# Words and arrays. A table is the list of its `left`, with 2^24 at the end.


class Lane:
    def __init__(self, data: bytes) -> None:
        require(len(data) % 4 == 0, "corrupt", "length of the words")
        self.stack = list(struct.unpack(f"<{len(data) // 4}I", data))
        require(not self.stack or self.stack[-1] > 0, "corrupt", "last word")
        self.state = 0
        for _ in self.stack[-2:]:
            self.state = self.state << 32 | self.stack.pop()

    def pop(self, table: Sequence[int]) -> int:
        slot = self.state % TOTAL
        i = bisect_right(table, slot) - 1
        self.state = (table[i + 1] - table[i]) * (self.state >> 24) + slot - table[i]
        if self.state < 2**32 and self.stack:
            self.state = self.state << 32 | self.stack.pop()
        return i


class Coder:
    def __init__(self, data: bytes, lanes: int = 1) -> None:
        at, ends = 0, [0]
        for _ in range(lanes if lanes > 1 else 0):
            words, at = varint(data, at, "corrupt")
            ends.append(ends[-1] + 4 * words)
        ends = ends if lanes > 1 else [0, len(data)]
        require(at + ends[-1] == len(data), "corrupt", "length of the words")
        self.lanes = [Lane(data[at + start : at + stop]) for start, stop in pairwise(ends)]

    @property
    def empty(self) -> bool:
        return not any(lane.state or lane.stack for lane in self.lanes)

    def order(self, ids: Sequence[int]) -> list[tuple[int, Lane]]:
        """Positions in coding order, each with its lane."""
        places = sorted(range(len(ids)), key=lambda i: ids[i])
        return [(i, self.lanes[p // 128 % len(self.lanes)]) for p, i in enumerate(places)]

    def array(self, tables: dict[int, Sequence[int]], ids: Sequence[int]) -> list[int]:
        """Entries."""
        entries = [0] * len(ids)
        for i, lane in self.order(ids):
            entries[i] = lane.pop(tables[ids[i]])
        return entries

    def fixed(self, bits: int) -> int:
        if bits < 16:
            return self.array(UNIFORM, [bits])[0]
        upper, lower = self.array(UNIFORM, [8, 8])
        return 256 * upper + lower


UNIFORM: dict[int, Sequence[int]] = {bits: range(0, TOTAL + 1, TOTAL >> bits) for bits in range(1, 17)}
PREFIX = [0, *accumulate(max(1, 2**22 >> k) - 8 * (k == 0) for k in range(32) for side in (0, 1))]


def pop_values(coder: Coder, lows: list[int], counts: list[list[int]], escape: bool, ids: list[int]) -> list[int]:
    """An array of values."""
    entries = coder.array({t: [0, *accumulate(c)] for t, c in enumerate(counts)}, ids)
    values = [lows[t] + entry for t, entry in zip(ids, entries, strict=True)]
    outside = [i for i, t in enumerate(ids) if escape and entries[i] == len(counts[t]) - 1]
    prefixes = coder.array({0: PREFIX}, [0] * len(outside))
    widths = [[min(8, prefix // 2 - start) for start in range(0, prefix // 2, 8)] for prefix in prefixes]
    chunks = iter(coder.array(UNIFORM, [w for one in widths for w in one]))
    for i, prefix, one in zip(outside, prefixes, widths, strict=True):
        e = 2 ** (prefix // 2) + sum(next(chunks) << 8 * place for place in range(len(one)))
        values[i] = values[i] - 1 + e if prefix % 2 else lows[ids[i]] - e
    require(all(-(2**31) <= value < 2**31 for value in values), "corrupt", "value")
    return values


# Plain pictures

STATEMENTS = [0, *range(16_515_136, TOTAL + 1, 840)]
CORNERS = ((-1, -1), (1, 1), (-1, 1), (1, -1))
PHASES = (
    (1, 1, (*CORNERS, (-3, -1), (-3, 1), (-1, -3), (-1, 3), (1, -3), (1, 3), (3, -1), (3, 1))),
    (0, 1, ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -2), (-1, 2), (1, -2), (1, 2), (-2, -1), (-2, 1), (2, -1), (2, 1))),
    (1, 0, ((-1, 0), (1, 0), (0, -1), (0, 1), *CORNERS, (-1, -2), (-1, 2), (1, -2), (1, 2))),
)


def weight(a: int, r: int) -> int:
    if a < 9:
        return int(r < 2 ** (1, 2, 4, 6, 8, 10, 12, 14, 16)[a])
    if a < 12:
        return 2**40 // (r + (0, 1, 16)[a - 9]) ** 2
    c = 3 * 2 ** (a - 12)
    t = 2**30 * c // (c + (r + 1) // 2)
    for _ in range(3):
        t = t**2 // 2**30
    return t


@cache
def weights_of_entries(a: int) -> list[int]:
    sums = [0] * 288
    for r in range(1, 2**16):
        k = r.bit_length() - 1
        sums[r if r < 256 else 4 * k + (r >> k - 2) + 220] += weight(a, r)
    return sums


@cache
def rank_table(number: int) -> list[int]:
    a, b = divmod(number, 12)
    m = 2 ** (9 + 2 * b) if b < 8 else TOTAL - 2 ** (22, 21, 20, 18)[b - 8]
    sums = weights_of_entries(a)
    rest = [1 + w * (m - 287) // sum(sums) for w in sums[1:]]
    return [0, *accumulate([TOTAL - sum(rest), *rest])]


def pop_ranks(coder: Coder, numbers: Sequence[int], limit: int) -> list[int]:
    ranks = coder.array({number: rank_table(number) for number in set(numbers)}, numbers)
    far = [i for i, entry in enumerate(ranks) if entry >= 256]
    opens = [(ranks[i] - 224) // 4 - 2 for i in far]
    for i, bits, low in zip(far, opens, coder.array(UNIFORM, opens), strict=True):
        ranks[i] = ((ranks[i] - 224) % 4 + 4 << bits) + low
    require(max(ranks) < limit, "corrupt", "rank")
    return ranks


def mirrored(y: int, x: int, s: int, rows: int, columns: int) -> tuple[int, int]:
    """The place in a grid with step s that stands for one outside."""
    y, x = y % max(1, 2 * s * (rows - 1)), x % max(1, 2 * s * (columns - 1))
    return min(y, 2 * s * (rows - 1) - y), min(x, 2 * s * (columns - 1) - x)


Slots = dict[int, tuple[int, int, int]]


def look_up(memory: tuple[Slots, Slots], n: list[int]) -> tuple[int, int, list[tuple[int, int]]]:
    """A sample's guess and state, and its slot and key on each level."""
    guess, state, h, places = n[2] if n[2] == n[3] else n[0], 0, 0, []
    for i in range(12):
        h = (h + n[i]) * 0x9E3779B1 % 2**32
        if i in (3, 11):
            places.append(divmod(h, 2**16))
    for level, (slot, key) in enumerate(places):
        held, successes, value = memory[level].get(slot, (0, 0, 0))
        if held == key:
            state, guess = 1 + 6 * level + 2 * successes + (value == guess), value
    return guess, state, places


def pop_memory(
    coder: Coder, memory: tuple[Slots, Slots], seen: list[int], chosen: list[int], phase: int, around: list[list[int]]
) -> tuple[list[int], list[int]]:
    """The ranks and values of a phase."""
    order = sorted(range(len(seen)), key=lambda value: (-seen[value], value))
    place = {value: i for i, value in enumerate(order)}
    ranks, values = list[int](), list[int]()
    for start in range(0, len(around), 2048):
        run = [(*look_up(memory, n), n[:4]) for n in around[start : start + 2048]]
        numbers = [chosen[3 * (5 * state + near.count(guess)) + phase] for guess, state, _, near in run]
        entries: tuple[Slots, Slots] = {}, {}
        ranks += pop_ranks(coder, numbers, len(order))
        for rank, (guess, _, places, _) in zip(ranks[start:], run, strict=True):
            values.append(order[rank - (rank <= place[guess])] if rank else guess)
            for held, new, (slot, key) in zip(memory, entries, places, strict=True):
                old_key, successes, old = held.get(slot, (0, 0, 0))
                entry = key, min(successes + 1, 2) if (old_key, old) == (key, values[-1]) else 0, values[-1]
                new[slot] = max(new.get(slot, entry), entry)
        for held, new in zip(memory, entries, strict=True):
            held.update(new)
    for value in values:
        seen[value] += 1
    return ranks, values


def pop_group(coder: Coder, height: int, width: int, count: int, limit: int) -> list[Plane]:
    """A group of planes."""
    planes: list[Plane] = []
    here = [[0] * width for _ in range(height)]  # ranks, first those of the plane before
    errors: list[Plane] = []
    for number in range(count):
        before, plane = [row[:] for row in here], [[0] * width for _ in range(height)]
        errors.append([[0] * width for _ in range(height)])
        kind, plane[0][0] = coder.fixed(2), coder.fixed(16)
        require(not (kind == 1 and number == 0) and plane[0][0] < limit, "corrupt", "plane")
        guide, guided = (planes or [plane])[0], kind == 1 or (kind == 3 and number > 0)
        statements = coder.array({0: STATEMENTS}, [0] * 513)
        chosen = list(accumulate(statements, lambda last, t: t - 1 if t else last, initial=0))[1:]
        memory: tuple[Slots, Slots] = {}, {}
        seen = [int(value == plane[0][0]) for value in range(limit)]
        s = 1 << (max(height, width) - 1).bit_length()
        while s := s // 2:
            rows, columns = -(-height // s), -(-width // s)
            for phase, (top, left, offsets) in enumerate(PHASES):
                offsets = offsets[:2] * 6 if 1 in (rows, columns) else offsets
                places = [(s * y, s * x) for y in range(top, rows, 2) for x in range(left, columns, 2)]
                near = [[mirrored(y + s * j, x + s * i, s, rows, columns) for j, i in offsets] for y, x in places]
                if not places:
                    continue
                if kind == 3 and rows * columns >= 2**15 and min(rows, columns) >= 16:
                    around = [(place, n) for place, n in zip(places, near, strict=True)]
                    pop_fitted(coder, plane, planes, errors, around, limit)
                    continue
                if kind == 2:
                    around = [[plane[y][x] for y, x in n] for n in near]
                    ranks, values = pop_memory(coder, memory, seen, chosen, phase, around)
                else:
                    tables, predictions = [], []
                    for (y, x), n in zip(places, near, strict=True):
                        a, b, c, d = sorted(plane[j][i] - guided * guide[j][i] for j, i in n[:4])
                        q = (before[y][x].bit_length() + 1) // 2
                        tables.append(chosen[27 * (d - a + c - b).bit_length() + 3 * q + phase])
                        predictions.append(min(max((b + c + 1) // 2 + guided * guide[y][x], 0), limit - 1))
                    ranks = pop_ranks(coder, tables, limit)
                    steps = (r // 2 if r % 2 == 0 else -(r + 1) // 2 for r in ranks)
                    values = [(p + step) % limit for p, step in zip(predictions, steps, strict=True)]
                for (y, x), rank, value in zip(places, ranks, values, strict=True):
                    here[y][x], plane[y][x], errors[-1][y][x] = rank, value, 8 * ((rank + 1) // 2)
        planes.append(plane)
    return planes


def pop_fitted(
    coder: Coder, plane: Plane, planes: list[Plane], errors: list[Plane], around: list[Any], limit: int
) -> None:
    def of(array: Plane, places: list[tuple[int, int]]) -> list[int]:
        return [array[y][x] for y, x in places]

    def values(lows: list[int], counts: list[list[int]], escape: bool, ids: list[int]) -> list[int]:
        return pop_values(coder, lows, counts, escape, ids)

    samples = []
    for (y, x), n in around:
        others = [(of(p, n), of(e, n), p[y][x], e[y][x]) for p, e in zip(planes, errors, strict=False)]
        samples.append(Sample(of(plane, n), of(errors[-1], n), others))
    popped = pop_phase(values, samples, limit)
    require(popped is not None, "corrupt", "fitted phase")
    for ((y, x), _), (value, error) in zip(around, popped or [], strict=True):
        plane[y][x], errors[-1][y][x] = value, error


def pop_plain(coder: Coder, height: int, width: int, channels: int, depth: int) -> Picture:
    layout, limit, lists = coder.fixed(2), 2**depth, list[Plane]()
    require(layout < 3, "corrupt", "layout")
    if layout:
        n = coder.fixed(16) + 1
        lists, limit = pop_group(coder, 1, n, channels if layout == 1 else 1, limit), n
    planes = pop_group(coder, height, width, 1 if layout == 1 else channels, limit)
    if layout:
        planes = [[[values[i] for i in row] for row in plane] for (values,) in lists for plane in planes]
    placed = planes if channels <= 2 else [planes[1], planes[0], *planes[2:]]
    return [[list(pixel) for pixel in zip(*rows, strict=True)] for rows in zip(*placed, strict=True)]


# Files


def decode(data: bytes) -> Picture:
    """The picture of a file whose tiles are plain or raw."""
    header, _, tiles = read(data)
    require(header.kind in (1, 2) and header.colour in (0, 1), "version", "kind or colour transform")
    require(header.tile <= 2048, "corrupt", "tile size")
    channels, grey = CHANNELS[header.mode], header.colour == 1
    require(channels > 2 or not grey, "corrupt", "no colours to be equal")
    picture: Picture = [[] for _ in range(header.height)]
    left = iter(tiles)
    for top in range(0, header.height, header.tile):
        for x in range(0, header.width, header.tile):
            height, width = min(header.tile, header.height - top), min(header.tile, header.width - x)
            part = decode_tile(next(left), height, width, channels - 2 * grey, header.depth)
            for row, pixels in zip(picture[top:], part, strict=False):
                row += [pixel[:1] * 3 + pixel[1:] for pixel in pixels] if grey else pixels
    return picture


def decode_tile(tile: Tile, height: int, width: int, channels: int, depth: int) -> Picture:
    form = f"<{height * width * channels}{'B' if depth == 8 else 'H'}"
    if tile.method == 3:
        require(len(tile.data) == struct.calcsize(form) and tile.lanes == 1, "corrupt", "raw tile")
        samples = iter(struct.unpack(form, tile.data))
        picture = [[[next(samples) for _ in range(channels)] for _ in range(width)] for _ in range(height)]
    else:
        require(tile.method == 2, "version", "no networks here")
        coder = Coder(tile.data, tile.lanes)
        picture = pop_plain(coder, height, width, channels, depth)
        require(coder.empty, "corrupt", "the coder is not empty")
    flat = chain.from_iterable(chain.from_iterable(picture))
    require(zlib.crc32(struct.pack(form, *flat)) == tile.crc, "corrupt", "CRC of a tile")
    return picture
