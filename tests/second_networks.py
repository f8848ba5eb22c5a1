"""The second decoder's networks, written from FORMAT.md alone, in plain numpy: tiles that need a weights file.

It shares no line with the library. Every number is a float64 that holds a multiple of a power of two.
"""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import second_decoder as second
from numpy.typing import NDArray
from second_decoder import Coder, Header, Picture, Tile, require

Array = NDArray[Any]
Set = tuple[list[int], list[list[int]], bool]
TOTAL = 2**24


# The weights file


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    """Metadata, and the decoder's tensors by name, of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + size])
    metadata, tensors = entries.pop("__metadata__"), {}
    types = {"I8": "|i1", "U8": "|u1", "I16": "<i2", "I32": "<i4", "F32": "<f4", "F16": "<f2"}
    for name, entry in entries.items():
        first, last = (8 + size + place for place in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], types[entry["dtype"]]).reshape(entry["shape"])
    return metadata, {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}


def identity(metadata: dict[str, str], tensors: dict[str, Array]) -> bytes:
    digest = hashlib.sha256(metadata["config"].encode())
    for name in sorted(tensors):
        shape = ", ".join(map(str, tensors[name].shape)) + "," * (tensors[name].ndim == 1)
        digest.update(f"{name} {tensors[name].dtype.str} ({shape})".encode() + tensors[name].tobytes())
    return digest.digest()[:16]


def interpolated(knots: Array, quality: int) -> Array:
    k, wide = len(knots), knots.astype(np.int64)
    if k == 1:
        return wide[0]
    left = min(quality * (k - 1) // 10_000, k - 2)
    part = quality * (k - 1) - 10_000 * left
    return (wide[left] * (10_000 - part) + wide[left + 1] * part + 5000) // 10_000


class Weights:
    def __init__(self, path: Path, quality: int) -> None:
        metadata, self.tensors = read_weights(path)
        self.config, self.kind = json.loads(metadata["config"]), metadata["kind"]
        self.identity, self.quality = identity(metadata, self.tensors), quality

    def units(self, name: str, usual: float) -> Array:
        if name in self.tensors:
            return 2.0 ** self.tensors[name].astype(float)[:, None, None]
        return np.array(usual)

    def layer(self, name: str, x: Array, units: tuple[float, float], limits: tuple[int, int], pad: int = -1) -> Array:
        """Outputs for inputs x [C, H, W]; pad: zeros around, by default as many as keep the size."""
        weight, bias, scale = (self.tensors[f"{name}.{part}"] for part in ("weight", "bias", "scale"))
        side = math.isqrt(weight.shape[1] // len(x))
        steps = x / self.units(f"{name}.in_units", units[0])
        assert (steps == np.rint(steps)).all()
        pad = side // 2 if pad < 0 else pad
        padded = np.pad(steps, ((0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2))
        kernel = weight.astype(float).reshape(len(weight), len(x), side, side)
        sums = np.einsum("ocij,chwij->ohw", kernel, windows, optimize=True)
        sums = sums + interpolated(bias, self.quality)[:, None, None]
        assert abs(sums).max(initial=0) < TOTAL
        out = np.rint(sums.astype(np.float32) * scale[:, None, None]).astype(float)
        return np.clip(out, *limits) * self.units(f"{name}.out_units", units[1])

    def tables(self, name: str) -> Set:
        lows, sizes, counts = (self.tensors[f"{name}.{part}"].tolist() for part in ("lows", "sizes", "counts"))
        ends = list(accumulate(sizes))
        lists = [counts[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return lows, lists, bool(self.tensors[f"{name}.escape"].any())


def grid(x: Array, unit: float, low: float, high: float) -> Array:
    return np.clip(np.rint(x / unit) * unit, low, high)


def shuffled(x: Array, n: int) -> Array:
    c, h, w = x.shape
    return x.reshape(c // n**2, n, n, h, w).transpose(0, 3, 1, 4, 2).reshape(c // n**2, n * h, n * w)


def unshuffled(x: Array, n: int) -> Array:
    c, h, w = x.shape
    return x.reshape(c, h // n, n, w // n, n).transpose(0, 2, 4, 1, 3).reshape(c * n**2, h // n, w // n)


def repeated(x: Array, top: int, left: int, bottom: int, right: int) -> Array:
    return np.pad(x, ((0, 0), (top, bottom), (left, right)), mode="edge")


# Lossy tiles


def synthesis(weights: Weights, stream: Array, seen: Array) -> Array:
    """Pixels [3, 16 h, 16 w] of a stream [M, h, w], which ``seen`` [h, w] has where there are latents."""
    limit = 2047 / 128

    def block(name: str, x: Array, seen: Array) -> Array:
        x = x * seen
        h = grid(x, weights.units(f"{name}.conv_3.in_units", 0), -np.inf, np.inf)
        units = weights.units(f"{name}.conv_3.in_units", 0)
        h = weights.layer(f"{name}.conv_3", np.clip(h, -128 * units, 127 * units), (0, 0), (0, 255))
        return np.clip(x + weights.layer(f"{name}.conv_1", h, (0, 0), (-128, 127)), -limit, limit)

    fine, coarse = weights.config["blocks"]
    for i in range(coarse):
        stream = block(f"g_s.coarse.{i}", stream, seen)
    stream = shuffled(weights.layer("g_s.up", stream, (1 / 128, 1 / 128), (-2047, 2047)), 2)
    for i in range(fine):
        stream = block(f"g_s.fine.{i}", stream, seen.repeat(2, 0).repeat(2, 1))
    return shuffled(weights.layer("g_s.head", stream, (1 / 128, 1 / 1024), (1 - 2**17, 2**17 - 1)), 8) * 64 + 128


def latents(weights: Weights, coder: Coder, h: int, w: int, tile: Tile) -> tuple[Array, int]:
    """Latents [M, h, w] of a tile, which may be in parts, and the CRC-32 of what was popped."""
    c, crc = weights.config, 0
    tables, u = weights.tables("tables"), 2.0 ** -c["bits"]
    lows, listed = tables[0], [counts[: len(counts) - tables[2]] for counts in tables[1]]
    certain = np.array([max(counts) >= 2**24 - 2**16 for counts in listed])
    likeliest = np.array([low + counts.index(max(counts)) for low, counts in zip(lows, listed, strict=True)])
    m, wide, hidden = c["latent"], 2**17 - 1, (0, round(255 / 16 / u))

    def pop(ids: Array) -> Array:
        nonlocal crc
        values = second.pop_values(coder, *tables, ids.astype(int).ravel().tolist())
        require(max(map(abs, values), default=0) <= 2**17, "corrupt", "latent")
        crc = zlib.crc32(struct.pack(f"<{len(values)}i", *values), crc)
        return np.array(values, float).reshape(ids.shape)

    shape = (c["hyper_latent"], -(-h // 4), -(-w // 4))
    index = interpolated(weights.tensors["z_index"], weights.quality)[:, None, None]
    z = (
        pop(np.broadcast_to(index, shape))
        + interpolated(weights.tensors["z_mean"], weights.quality)[:, None, None] / 16
    )
    x = weights.layer("h_s.conv_a", np.clip(z, -511 / 16, 511 / 16), (u, u), hidden)
    x = weights.layer("h_s.conv_c", shuffled(weights.layer("h_s.conv_b", x, (u, u), hidden), 2), (u, u), hidden)
    features = shuffled(weights.layer("h_s.conv_d", x, (u, u), hidden), 2)[:, :h, :w]
    y = np.zeros((m, h, w))
    channel, row, column = np.ogrid[:m, :h, :w]
    for k, s in enumerate((0, 3, 1, 2)):
        seen = grid(y / 4, u, -511 / 16, 511 / 16)
        x = weights.layer(f"context.{k}.conv_a", np.concatenate([features, seen]), (u, u), hidden)
        x = weights.layer(f"context.{k}.conv_b", x, (u, u), hidden)
        x = weights.layer(f"context.{k}.conv_c", x, (u, u), (-wide, wide))
        mean = np.clip(x[:m], -2047, 2047)
        index = np.rint(np.clip(16 * x[m:], 0, 63))
        mine = channel // (m // 4) == s ^ (2 * (row % 2) + column % 2)
        quarters = [part.reshape(4, m // 4, h, w) for part in (mean, index, mine)]
        picked = [np.where(quarters[2], part, 0).sum(0) for part in quarters[:2]]
        ids = picked[1].ravel().astype(int)
        v, coded = likeliest[ids].astype(float), np.flatnonzero(~certain[ids] | (tile.method == 0))
        order = coded[np.argsort(-ids[coded] * bool(tile.parts), kind="stable")]
        n = order.size
        for array in np.split(order, [n // 64, n // 16, n // 4]) if tile.parts else [order]:
            v[array] = pop(ids[array])
        values = v.reshape(picked[1].shape) + picked[0]
        y = np.where(mine, np.broadcast_to(values, (4, *values.shape)).reshape(m, h, w), y)
    return y, crc


def decode_lossy(header: Header, tiles: Sequence[Tile], weights: Weights) -> Picture:
    rows, columns, side = -(-header.height // 16), -(-header.width // 16), header.tile // 16
    channels = second.CHANNELS[header.mode] - 2 * header.colour
    colours = 3 if channels > 2 else 1
    y, seen, left = np.zeros((weights.config["latent"], rows, columns)), np.zeros((rows, columns)), iter(tiles)
    whole = np.zeros((header.height, header.width, channels), int)
    for top in range(0, rows, side):
        for start in range(0, columns, side):
            tile, h, w = next(left), min(side, rows - top), min(side, columns - start)
            part = whole[16 * top : 16 * (top + h), 16 * start : 16 * (start + w)]
            if tile.method > 1:
                part[:] = second.decode_tile(tile, *part.shape, header.depth)
                continue
            coder = Coder(tile.data, tile.lanes)
            y[:, top : top + h, start : start + w], crc = latents(weights, coder, h, w, tile)
            seen[top : top + h, start : start + w] = 1
            clear = part[..., colours:]
            if channels > colours:
                clear[:] = second.pop_plain(coder, *clear.shape, header.depth)
            require(coder.empty, "corrupt", "end")
            require(zlib.crc32(clear.astype("<i4").tobytes(), crc) == tile.crc, "corrupt", "CRC")
    steps = (y * 2 ** weights.config["bits"]).astype(np.int64)
    inverse = interpolated(weights.tensors["inverse"], weights.quality)[:, None, None]
    divisor = 2**20 // 128 * 2 ** weights.config["bits"]
    stream = np.clip((steps * inverse + divisor // 2) // divisor, -2047, 2047) / 128
    n = np.clip(16 * synthesis(weights, stream, seen), 0, 4080).astype(np.int64)[:, : header.height, : header.width]
    samples = ((2 * n * (2**header.depth - 1) + 4080) // 8160).transpose(1, 2, 0)
    samples = samples if colours == 3 else (samples.sum(2, keepdims=True) + 1) // 3
    by_network = seen.repeat(16, 0).repeat(16, 1)[: header.height, : header.width, None] > 0
    whole[..., :colours] = np.where(by_network, samples, whole[..., :colours])
    picture: Picture = np.concatenate([whole[..., :1]] * (2 * header.colour) + [whole], 2).tolist()
    return picture


# Lossless tiles

INVERSES = [round(256 * 0.5 / (0.07 * (40 / 0.07) ** (i / 39))) for i in range(40)]
SCALES = [0.07 * (40 / 0.07) ** (i / 39) for i in range(40)]
WIDE = np.array([round(128 * scale) for scale in SCALES])
SHARP = np.array([round(2048 / scale) for scale in SCALES])
MODES: Set = ([0], [[2**21, 2**22, 2**24 - 2**22 - 2**21]], False)
_counts = [2 ** (21 - abs(w) // 2) * (w != 0) for w in range(-16, 17)]
WEIGHTS: Set = ([-16], [[count or 2**24 - sum(_counts) for count in _counts]], False)
SIDES, CORNERS = [(-1, 0), (1, 0), (0, -1), (0, 1)], [(-1, -1), (-1, 1), (1, -1), (1, 1)]
PASSES = [((0, 0), []), ((1, 1), [CORNERS]), ((0, 1), [SIDES]), ((1, 0), [SIDES, CORNERS])]
BESIDE = {"D": [], "B": [[(-1, 0), (0, 0)]], "C": [[(0, -1), (0, 0)], [(0, 0), (0, 1), (1, 0), (1, 1)]]}
OFFSETS: Set = ([-4], [[2 ** (22 - abs(k)) if k else 2**23 + 2**19 for k in range(-4, 5)]], False)
GREEN_FIRST = (1, 0, 2)


def act(x: Array) -> Array:
    return np.clip(x, 0, 511 / 32)


def coarse(x: Array) -> Array:
    return grid(x / 8, 1 / 32, -16, 16)


def logarithm(x: Array) -> Array:
    n = np.minimum(abs(x) * 8, 4095)
    return np.rint(32 * np.log2(1 + n / 8)) / 32


def local_mean(x: Array) -> Array:
    x = repeated(x, 1, 1, 1, 1)
    x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    x = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return grid(x / 16, 1 / 4, -np.inf, np.inf)


def in_steps(x: Array) -> Array:
    """Activations in steps of 1/32."""
    n: Array = (32 * x).astype(int)
    assert (n == 32 * x).all()
    return n


def one_byte(x: Array) -> Array:
    return np.clip(in_steps(x), 0, 255)


def two_bytes(x: Array) -> Array:
    return np.concatenate([one_byte(x), one_byte(-x)])


def three_bytes(x: Array) -> Array:
    half, left = np.divmod(in_steps(x), 2)
    return np.concatenate([np.clip(half, 0, 255), np.clip(-half, 0, 255), left])


class Pusher(Coder):
    """A coder that can push, too."""

    def push_values(self, tables: Set, ids: list[int], values: list[int]) -> None:
        """An array under tables without escape."""
        lows, counts, _ = tables
        for i, lane in reversed(self.order(ids)):
            entry = values[i] - lows[ids[i]]
            require(0 <= entry < len(counts[ids[i]]), "corrupt", "posterior")
            count, left = counts[ids[i]][entry], sum(counts[ids[i]][:entry])
            if lane.state >> 40 >= count:
                lane.stack.append(lane.state % 2**32)
                lane.state >>= 32
            lane.state = (lane.state // count << 24) + lane.state % count + left


class Lossless:
    """One tile of h x w pixels under the networks."""

    def __init__(self, weights: Weights, coder: Pusher, colours: int, rounded: bool) -> None:
        self.weights, self.coder, self.colours, self.rounded = weights, coder, colours, rounded
        self.pixels, self.prior, self.posterior = (weights.tables(name) for name in ("pixels", "prior", "posterior"))
        self.groups = len(weights.config["latents"])
        self.in_bytes = weights.config.get("activation_bits", 16) == 8

    # Layers, by what they give

    def hidden(self, name: str, x: Array, low: int = 0, high: int = 511, unit: float = 1 / 32) -> Array:
        return self.weights.layer(name, x, (unit, 1 / 32), (low, high))

    def residual(self, name: str, h: Array, *more: Array) -> Array:
        return act(h + self.hidden(f"{name}.conv", np.concatenate([h, *more]), -511))

    def of_bytes(self, name: str, *x: Array) -> Array:
        return self.weights.layer(name, np.concatenate(x), (1, 1), (0, 255))

    def last(self, name: str, x: Array, unit: float = 1 / 32) -> Array:
        return self.weights.layer(name, x, (unit, 1 / 256), (-(2**14), 2**14))

    # Samples

    def offsets(self, scales: Array) -> Array:
        """What is added to each scale."""
        groups, moved = self.weights.config["groups"], np.zeros(40, int)
        if groups:
            counts = np.bincount(scales.ravel() * groups // 40, minlength=groups)
            often = np.flatnonzero(counts >= 64)
            by = np.zeros(groups, int)
            by[often] = second.pop_values(self.coder, *OFFSETS, [0] * len(often))
            moved = by[np.arange(40) * groups // 40]
        return moved

    def pop_samples(self, eighths: Array, scales: Array, shapes: Array) -> Array:
        return self.pop_under(eighths, np.clip(scales + self.offsets(scales)[scales], 0, 39), shapes)

    def pop_under(self, eighths: Array, scales: Array, shapes: Array) -> Array:
        ids = (scales * 3 + shapes) * 8 + eighths % 8
        values = second.pop_values(self.coder, *self.pixels, ids.ravel().tolist())
        return np.array(values, int).reshape(eighths.shape) + eighths // 8

    def passes(
        self, place: str, parts: tuple[Array, Array, Array], errors: dict[tuple[str, int], Array], a: Array, h: Array
    ) -> Array:
        """Samples of one colour of a phase, and their errors into ``errors``; these have a margin of one, and more.
        a: the colour's samples of A; h: the phase's activations."""
        _, phase, colour = place.split(".")
        k, (m, i, shapes) = int(colour), parts
        rows, columns = m.shape
        units = (h if self.in_bytes else in_steps(h))[:, :rows, :columns].astype(int)
        x, e = np.zeros((rows, columns), int), np.zeros((rows + 3, columns + 3), int)
        y = np.pad(m, 1, "edge") if m.size else np.zeros((rows + 2, columns + 2), int)
        t = [round(16 * math.log2(8 + int((a == v).sum()))) for v in range(256)]
        t = [t[0], *t, t[-1], t[-1]]
        more = np.clip(np.diff(t), -64, 64)
        for j, ((top, left), fours) in enumerate(PASSES):
            mine = (slice(top, None, 2), slice(left, None, 2))

            def at(plane: Array, row: int = 0, column: int = 0, top: int = top, left: int = left) -> Array:
                whole = np.zeros((rows + 3, columns + 3), int)
                part = plane[: rows + 3, : columns + 3]
                whole[: part.shape[0], : part.shape[1]] = part
                whole = whole[1 + row : 1 + row + rows, 1 + column : 1 + column + columns]
                return whole[top::2, left::2]

            if j == 0:
                moves = self.offsets(i[mine])
                i = np.clip(i + moves[i], 0, 39)
            mean, scale, shape = m[mine], i[mine], shapes[mine]
            places = [place for four in fours for place in four]
            inputs, f = [at(e, *place) for place in places], []
            if phase == "D":
                inputs += [np.clip((at(y, *p) - mean) * SHARP[scale] + 2048 >> 12, -64, 64) for p in places]
            for four in fours:
                inputs.append((sum(abs(at(e, *p)) for p in four) >> 2) - 16)
                f.append(sum(at(e, *p) for p in four) + 2 >> 2)
            for earlier in range(k):
                f.append(at(errors[phase, earlier]))
                inputs += [f[-1], abs(f[-1])]
            for other, touching in zip("DB", BESIDE[phase], strict=False):
                found = [at(errors[other, k], *p) for p in touching]
                inputs += found
                f.append(sum(found) // len(found))
            inputs += [2 * scale - 32, 16 * shape - 16]
            inputs += [more[mean // 8 + v] for v in range(3)] + [4 * (mean % 8) - 16]
            mode, *_ = second.pop_values(self.coder, *MODES, [0])
            if mode:
                name = f"refine.{place}.{j}"
                inputs += [np.minimum(plane, 255) for plane in units[:, *mine]]
                w_1, b_1, w_2, b_2, w_3, b_3 = (
                    self.weights.tensors[f"{name}.{part}_{n}"].astype(np.int64) for n in (1, 2, 3) for part in "wb"
                )
                one = np.clip(w_1 @ np.stack(inputs).reshape(len(inputs), mean.size) + b_1 >> 8, 0, 255)
                two = np.clip(w_2 @ one + b_2 >> 9, 0, 255)
                o = (w_3 @ two + b_3).reshape(3, *mean.shape)
                if mode == 2:
                    own = second.pop_values(self.coder, *WEIGHTS, [0] * len(f))
                    o[0] += 32 * sum((w * part for w, part in zip(own, f, strict=True)), start=np.zeros_like(mean))
                by = np.clip(o[0] + 32 >> 6, -1024, 1024)
                mean = np.clip(mean + (by * WIDE[scale] + 2048 >> 12), 0, 2040)
                scale = np.clip(scale + (o[1] + 2048 >> 12), 0, 39)
                shape = np.clip(shape + (o[2] + 8192 >> 14), 0, 2)
            step = np.where(scale < 16, 1, np.where(scale < 24, 2, 4))
            x[mine] = self.pop_under((mean + step // 2) // step * step, scale, shape)
            x[mine] = np.clip(x[mine], 0, 255)
            e[1 : 1 + rows, 1 : 1 + columns][mine] = np.clip((8 * x - m) * SHARP[i] + 512 >> 10, -80, 80)[mine]
            y[1 : 1 + rows, 1 : 1 + columns][mine] = 8 * x[mine]
        errors[phase, k] = e
        return x

    def phase(
        self,
        name: str,
        h: Array,
        centre: Array,
        span: float,
        linear: Array | None,
        spread: Array | None,
        outside: Array,
        inside: tuple[int, int],
        errors: dict[tuple[str, int], Array] | None = None,
    ) -> tuple[Array, Array]:
        """Samples and normalised residuals [3, h, w]. errors: of the level, by phase and colour, if it has passes."""
        x, residuals, normal = outside.copy(), list[Array](), list[Array]()
        rows, columns = inside
        in_bytes = self.in_bytes and spread is not None
        if not in_bytes:
            entered = self.hidden(f"{name}.hidden", h if spread is None else np.concatenate([h, spread]), -1024, 1024)
        filters = self.weights.config["filters"] if linear is not None else 0
        for k, c in enumerate(GREEN_FIRST):
            earlier = [(r[None], e[None]) for r, e in zip(residuals, normal, strict=True)]
            if in_bytes:
                assert spread is not None
                told = [(three_bytes(coarse(r)), two_bytes(e), one_byte(logarithm(r))) for r, e in earlier]
                inputs = [h, one_byte(spread), *(part for parts in told for part in parts)]
                out = self.last(f"{name}.out.{k}", self.of_bytes(f"{name}.hidden.{k}", *inputs), 1)
            else:
                state = np.split(entered, 3)[k]
                if k:
                    parts = [part for r, e in earlier for part in (coarse(r), e, logarithm(r))]
                    state = state + self.hidden(f"{name}.given.{k - 1}", np.concatenate(parts), -512, 512)
                out = self.last(f"{name}.out.{k}", act(state))
            out = np.clip(out, -16, 16)
            gates, shares = grid(out[3 : 3 + filters] / 8, 1 / 256, -2, 2), grid(out[3 + filters :] / 2, 1 / 256, -2, 2)
            mean = centre[c] + (x[1] if k and linear is not None else 0) + span * out[0]
            if linear is not None:
                own = np.split(linear, 3)[k]
                mean = mean + own[0] + (own[1:] * gates).sum(0)
            mean = mean + sum(share * r for share, r in zip(shares, residuals, strict=True))
            mean = grid(mean, 1 / 8, 0, 255)
            index, shape = np.rint(np.clip(16 + 4 * out[1], 0, 39)), np.rint(np.clip(1 + 2 * out[2], 0, 2))
            if k < self.colours:
                part = (slice(rows), slice(columns))
                ints = (8 * mean[part]).astype(int), index[part].astype(int), shape[part].astype(int)
                if errors is None:
                    x[c][part] = np.clip(self.pop_samples(*ints), 0, 255)
                else:
                    place = f"{self.weights.config['levels'] - int(name[7])}.{name[-1]}.{k}"
                    x[c][part] = self.passes(place, ints, errors, outside[c], h)
            else:
                x[c] = x[1]
            residuals.append(x[c] - mean)
            inverse = np.array(INVERSES)[index.astype(int)] / 256
            normal.append(grid(residuals[k] * inverse, 1 / 32, -8, 8))
        return x, np.stack(normal)

    def level(self, d: int, a: Array, features: Array | None, rows: int, columns: int) -> tuple[Array, Array | None]:
        """The finer picture [3, rows, columns] and what it hands on."""
        name, last = f"levels.{d}", self.weights.config["levels"] - 1
        m = local_mean(a)
        bands = np.concatenate([coarse(a - m), coarse(m - 128), coarse(2 * (m - local_mean(m)))])
        passed = [] if features is None else [features]
        if self.in_bytes:
            h = self.of_bytes(f"{name}.entry", *passed, three_bytes(bands))
        else:
            h = self.hidden(f"{name}.entry", np.concatenate([bands, *passed]))
        for i in range(self.weights.config["blocks"] + 2 * (last - d)):
            block = f"{name}.blocks.{i}"
            h = self.of_bytes(f"{block}.conv", h) if self.in_bytes else self.residual(block, h)
        known, fine = [a], np.zeros((3, 2 * a.shape[1], 2 * a.shape[2]))
        errors: dict[tuple[str, int], Array] | None = {} if last - d < self.weights.config.get("refined", 0) else None
        fine[:, ::2, ::2] = a
        for phase, row, column in (("D", 1, 1), ("B", 0, 1), ("C", 1, 0)):
            differences = [np.stack([p[0] - p[1], p[1], p[2] - p[1]]) for p in known]
            around = [repeated(p, 1, 1, 1, 1) for p in differences]
            at = lambda i, y, x, around=around: around[i][:, 1 + y : 1 + y + a.shape[1], 1 + x : 1 + x + a.shape[2]]  # noqa: E731
            four = {
                "D": [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)],
                "B": [(0, 0, 0), (0, 0, 1), (1, -1, 0), (1, 0, 0)],
                "C": [(0, 0, 0), (0, 1, 0), (1, 0, -1), (1, 0, 0)],
            }[phase]
            ordered = np.sort(np.stack([at(*place) for place in four]), 0)
            pixels = repeated(np.concatenate(known) - 128, 2, 2, 2, 2)
            base = f"{name}.heads.{phase}.base"
            linear = self.weights.layer(base, pixels, (1, 1 / 8), (-2040, 2040), pad=0)
            inside = (rows + 1 - row) // 2, (columns + 1 - column) // 2
            spread = logarithm(ordered[3] - ordered[0])
            centre = (ordered[1] + ordered[2]) / 2
            x, normal = self.phase(f"{name}.heads.{phase}", h, centre, 8, linear, spread, a, inside, errors)
            fine[:, row::2, column::2] = x
            known.append(x)
            update = f"{name}.updates.{phase}"
            if f"{update}.conv.weight" in self.weights.tensors and self.in_bytes:
                h = self.of_bytes(f"{update}.conv", h, three_bytes(coarse(x - m)), two_bytes(normal))
            elif f"{update}.conv.weight" in self.weights.tensors:
                h = self.residual(update, h, coarse(x - m), normal)
        if d == last:
            return fine[:, :rows, :columns], None
        up = self.of_bytes(f"{name}.up", h) if self.in_bytes else self.hidden(f"{name}.up", h)
        return fine[:, :rows, :columns], shuffled(up, 2)[:, :rows, :columns]

    # Latents

    def gauss(self, name: str, x: Array, linear: Array) -> tuple[Array, Array]:
        """Means in quarters of a step, and indices."""
        mean, index = np.split(self.last(f"{name}.conv", x), 2)
        mean = grid(mean + linear, 1 / 64, -511 / 16, 511 / 16)
        return mean * 64, np.rint(np.clip(24 + 8 * index, 0, 47))

    def coarsest(self, rows: int, columns: int) -> Array:
        block, above, found = 2**self.groups, None, dict[int, Array]()
        high, wide = -(-rows // block) * block, -(-columns // block) * block
        states: dict[int, tuple[Array, Array] | None] = {self.groups - 1: None}
        for g in reversed(range(self.groups)):
            if above is None:
                size = self.weights.config["latents"][g], high // 2 ** (g + 1), wide // 2 ** (g + 1)
                top = (self.weights.tensors[f"top_{part}"][:, None, None] for part in ("mean", "index"))
                mean, index = (np.broadcast_to(part, size).astype(float) for part in top)
            else:
                mean, index = self.gauss(f"vae.prior.{g}", *above)
            quarters = mean.astype(int)
            ids = (index.astype(int) * 4 + quarters % 4).ravel().tolist()
            values = second.pop_values(self.coder, *self.prior, ids)
            found[g] = np.array(values).reshape(mean.shape) + quarters // 4
            seen = np.clip(found[g], -511, 511) / 16
            h = act(self.hidden(f"vae.take.{g}", seen, -511, unit=1 / 16) + (0 if above is None else above[0]))
            for i in range(self.weights.config["vae_blocks"]):
                h = self.residual(f"vae.top_down.{g}.{i}", h)
            linear = self.last(f"vae.expand.{g}", seen, 1 / 16)
            above = shuffled(self.hidden(f"vae.up.{g}", h), 2), shuffled(linear, 2)
            states[g - 1] = above
        assert above is not None
        h, zeros = self.residual("vae.last", above[0]), np.zeros((3, high, wide))
        x, _ = self.phase("vae.head", h, 128 + 128 * above[1], 64, None, None, zeros, (rows, columns))
        x = x[:, :rows, :columns]
        if not self.rounded:
            self.give_back(repeated(x, 0, 0, high - rows, wide - columns), states, found)
        return x

    def give_back(self, x: Array, states: dict[int, tuple[Array, Array] | None], found: dict[int, Array]) -> None:
        """Push the latents under the posterior."""
        h = self.hidden("vae.entry", unshuffled(grid((x - 128) / 8, 1 / 32, -16, 16), 2))
        for g in range(self.groups):
            if g:
                h = self.hidden(f"vae.down.{g - 1}", unshuffled(h, 2))
            for i in range(self.weights.config["vae_blocks"]):
                h = self.residual(f"vae.bottom_up.{g}.{i}", h)
            linear = self.last(f"vae.project.{g}", unshuffled((x - 128) / 128, 2 ** (g + 1)), 1 / 128)
            above = states[g]
            inputs = h if above is None else np.concatenate([h, above[0]])
            mean, index = self.gauss(f"vae.posterior.{g}", inputs, linear)
            quarters = mean.astype(int)
            ids = (index.astype(int) * 4 + quarters % 4).ravel().tolist()
            values = found[g] - quarters // 4
            self.coder.push_values(self.posterior, ids, values.ravel().tolist())

    def tile(self, height: int, width: int) -> Array:
        """Samples [3, height, width]."""
        levels, features = self.weights.config["levels"], None
        x = self.coarsest(-(-height // 2**levels), -(-width // 2**levels))
        for d in range(levels):
            s = 2 ** (levels - 1 - d)
            x, features = self.level(d, x, features, -(-height // s), -(-width // s))
        return x


def decode_lossless_tile(weights: Weights, tile: Tile, height: int, width: int, channels: int) -> Picture:
    coder = Pusher(tile.data, tile.lanes)
    colours = 3 if channels > 2 else 1
    x = Lossless(weights, coder, colours, tile.method == 1).tile(height, width)
    samples = (x if colours == 3 else x[1:2]).transpose(1, 2, 0).astype(int)
    if channels in (2, 4):
        samples = np.concatenate([samples, np.array(second.pop_plain(coder, height, width, 1, 8))], 2)
    require(coder.empty, "corrupt", "end")
    require(zlib.crc32(samples.astype(np.uint8).tobytes()) == tile.crc, "corrupt", "CRC")
    picture: Picture = samples.tolist()
    return picture
