"""One tile of a lossy file: latents -> integers -> ANS words, and the way back.

What both ways share is written once, as a generator that names the parts of a tile in the order in which they are
decoded and is sent their values; ``bitstream.chain`` runs it forwards to pop and backwards to push.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitstream import (
    NEAR,
    SPARSE,
    AnsStack,
    Codec,
    CorruptError,
    Depths,
    Parts,
    Record,
    Tables,
    Tile,
    chain,
    pop_plain,
    push_plain,
    table_codec,
)

from ..plain_tiles import Samples
from .numbers import BANDS, HYPER, STEP_ORDER, STEPS, UNIT, Config, Steps

SYMBOL_MAX = 2**17  # a decoded latent, in steps of 1/64 at the finest, then fits in float32's 24 bits
RATE_WEIGHT = 0.025  # squared error, in steps of the quantiser, that the encoder takes for a bit less

T = TypeVar("T")
R = TypeVar("R")

Symbols = NDArray[np.int32]
Floats = NDArray[np.float32]


class Networks(Protocol):
    """The lossy networks, whatever runs them: those of ``weights`` by torch, those of ``engine`` by ONNX Runtime.

    Arrays are [channels, rows, columns]; quality is in hundredths; y_hat and means are in steps of ``config.unit``.
    Symbols that come from ``put`` and ``context``, and go to ``features``, ``context`` and ``stack``, are tensors where
    the coder runs on a GPU.
    """

    tables: Tables
    identity: bytes

    @property
    def config(self) -> Config: ...

    @property
    def margin(self) -> int:
        """How many latents around a tile analysis and synthesis see."""

    def stack(self, data: bytes | memoryview | None = None, lanes: int | None = 1) -> AnsStack:
        """A stack for this engine's symbols."""

    def put(self, x: NDArray[Any]) -> Any:
        """An array where the coder runs."""

    def get(self, x: Any) -> NDArray[Any]:
        """The inverse of ``put``."""

    def side_by_side(
        self, function: Callable[[T], R], items: Iterable[T], size: Callable[[T], int]
    ) -> Iterator[Callable[[], R]]:
        """A function that codes tiles, for each of some: one by one or, on a GPU, at once; see ``together``."""

    def quantised(self, residual: Any, ids: Symbols) -> Symbols:
        """See ``tile.quantised``."""

    def gains(self, quality: int) -> NDArray[np.int64]:
        """Of g_s's input, int64 [M], see ``numbers.stream_of``."""

    def prior(self, quality: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of z: means in steps of 1/16 and table numbers, int64 [C_z] both."""

    def analyse(self, x: Floats, quality: int, seen: Floats | None = None) -> Floats:
        """g_a: x [3, H, W] in 0..255, H and W multiples of 16, to y [M, H / 16, W / 16] in steps of the quantiser.

        seen: 0 where there are no latents, else 1, [H / 16, W / 16]; without any there are all.
        """

    def hyper_analyse(self, y: Floats, quality: int) -> Floats:
        """h_a: y [M, h, w] in steps of the quantiser, h and w multiples of 4, to z [C_z, h / 4, w / 4]."""

    def features(self, z: Symbols, quality: int) -> Any:
        """h_s: z_hat [C_z, h, w] in steps of 1/16 to the features [hyper, 4 h, 4 w] that ``context`` takes."""

    def context(self, step: int, features: Any, y_hat: Symbols, quality: int) -> tuple[Symbols, Symbols]:
        """One context step: features [hyper, h, w] and y_hat [M, h, w] to means and table indices [M / 4, h, w]."""

    def synthesise(self, stream: Steps, quality: int, seen: Floats | None = None) -> Symbols:
        """g_s: stream [M, h, w] in steps of 1/128 to x_hat [3, 16 h, 16 w] in sixteenths of a grey level, not clamped
        to its range. seen: see ``analyse``."""


class Walk:
    """The latents y_hat int32 [M, rows, columns] on their way, one step after the other; 0 where they are not known."""

    def __init__(self, networks: Networks, rows: int, columns: int) -> None:
        config = networks.config
        self.y_hat: Symbols = networks.put(np.zeros((config.latent, rows, columns), np.int32))
        self.unit = config.unit
        self.mean: Symbols = networks.put(np.zeros((config.latent // STEPS, rows, columns), np.int32))

    def quarter(self, y: NDArray[Any], step: int) -> NDArray[Any]:
        """Of y [M, rows, columns] the quarter of the channels that a step decodes at each position: a copy."""
        picked = y[: len(y) // STEPS] + 0
        for parity in range(STEPS):
            place = (..., slice(parity // 2, None, 2), slice(parity % 2, None, 2))
            picked[place] = y.reshape(STEPS, -1, *y.shape[1:])[STEP_ORDER[step] ^ parity][place]
        return picked

    def take(self, values: Symbols, step: int) -> None:
        """Values [M / 4, rows, columns] of the latents of a step."""
        quarters = self.y_hat.reshape(STEPS, -1, *self.y_hat.shape[1:])
        for parity in range(STEPS):
            place = (..., slice(parity // 2, None, 2), slice(parity % 2, None, 2))
            quarters[STEP_ORDER[step] ^ parity][place] = values[place]

    def left(self, y: Floats, step: int) -> Floats:
        """Of latents y, in steps of the quantiser, those of a step, less their means."""
        left: Floats = self.quarter(y, step)
        left -= self.mean * self.unit
        return left


Bands = list[NDArray[Any]]
Choose = Callable[[Walk, int, Symbols, Bands], None]


def parts_of(
    networks: Networks,
    rows: int,
    columns: int,
    quality: int,
    method: int,
    progressive: bool,
    choose: Choose | None = None,
) -> Generator[tuple[str, Codec[Symbols]], Symbols, Symbols]:
    """z, then the latents of each step. Returns y_hat int32 [M, rows, columns] in steps of the configuration's unit.

    method, progressive: see ``bands_of``. choose: the encoder's. It is called before the symbols of a step are asked
    for, with their table numbers and bands: what is left for them to say depends on the steps before.
    """
    config, tables = networks.config, networks.tables
    likeliest = networks.put(tables.likeliest)
    shape = (config.hyper_latent, -(-rows // HYPER), -(-columns // HYPER))
    z_mean, z_ids = (np.broadcast_to(x[:, None, None], shape).astype(np.int32) for x in networks.prior(quality))
    z = checked((yield "z", table_codec(tables, networks.put(z_ids.ravel())))).reshape(shape)
    features = networks.features(z * round(1 / UNIT) + networks.put(z_mean), quality)[:, :rows, :columns]
    walk = Walk(networks, rows, columns)
    for step in range(STEPS):
        walk.mean, index = networks.context(step, features, walk.y_hat, quality)
        ids = index.ravel()
        bands = bands_of(networks, ids, method, progressive)
        if choose is not None:
            choose(walk, step, ids, bands)
        symbols = likeliest[ids]
        for band in bands:
            symbols[band] = yield f"y_{step + 1}", table_codec(tables, ids[band])
        walk.take((checked(symbols).reshape(index.shape) << config.bits) + walk.mean, step)
    return walk.y_hat


def bands_of(networks: Networks, ids: Symbols, method: int, progressive: bool) -> Bands:
    """Which latents of a step are coded together, from their table numbers [N]: all of method NETWORK; of SPARSE but
    those under tables that are all but certain. In progressive files those with the largest scales come first. They say
    by far the most for their bits."""
    certain = networks.tables.certain if method == SPARSE else np.zeros(len(networks.tables.sizes), np.bool_)
    if not progressive:
        coded = ~networks.put(certain)[ids]
        return [np.flatnonzero(coded) if isinstance(coded, np.ndarray) else coded]
    numbers = networks.get(ids)
    coded = np.flatnonzero(~certain[numbers])
    order = coded[np.argsort(-numbers[coded], kind="stable")]
    return [*np.split(order, [order.size // part for part in BANDS])]


def checked(symbols: Symbols) -> Symbols:
    """Raises CorruptError if one is out of range."""
    if symbols.min() < -SYMBOL_MAX or symbols.max() > SYMBOL_MAX:
        raise CorruptError("a latent is out of range")
    return symbols


def push_tile(
    networks: Networks,
    y: Floats,
    quality: int,
    alpha: Samples,
    depth: int,
    lanes: int | None = None,
    method: int = SPARSE,
    progressive: bool = False,
) -> tuple[Tile, Symbols]:
    """Quantise and code latents [M, h, w], in steps of the quantiser, and alpha [H, W, 1 or 0] of ``depth`` bits.
    What the decoder needs first is pushed last. lanes: see ``AnsStack``. method: see ``bands_of``. progressive: in one
    lane, and with parts. Gives the tile and y_hat, as ``parts_of``."""
    rows, columns = y.shape[1:]
    missing = (-rows % HYPER, -columns % HYPER)
    padded = np.pad(y, ((0, 0), (0, missing[0]), (0, missing[1])), "edge") if any(missing) else y
    z_mean = (networks.prior(quality)[0][:, None, None] * UNIT).astype(np.float32)
    z = np.rint(networks.hyper_analyse(padded, quality) - z_mean).clip(-SYMBOL_MAX, SYMBOL_MAX)
    chosen, y_hat, here = [networks.put(z.astype(np.int32).ravel())], list[Symbols](), networks.put(y)

    def choose(walk: Walk, step: int, ids: Symbols, bands: Bands) -> None:
        residual = walk.left(here, step).ravel()
        for band in bands:
            chosen.append(networks.quantised(residual[band].clip(-SYMBOL_MAX, SYMBOL_MAX), ids[band]))

    def parts() -> Parts:
        y_hat.append((yield from parts_of(networks, rows, columns, quality, method, progressive, choose)))

    stack = networks.stack(lanes=1 if progressive else lanes)
    if alpha.size:
        push_plain(stack, alpha, depth)
    depths = Depths(stack) if progressive else None
    chain(parts, depths).push(stack, chosen)  # the list grows as its parts are asked for
    cuts = depths.parts() if depths else ()
    crc = checksum([*map(networks.get, chosen), alpha])
    return Tile(method, crc, stack.to_bytes(), stack.lanes, cuts), networks.get(y_hat[0])


def pop_tile(
    networks: Networks,
    tile: Tile,
    rows: int,
    columns: int,
    quality: int,
    shape: tuple[int, int, int],
    depth: int,
    record: Record | None = None,
) -> tuple[Symbols, Samples]:
    """y_hat, as ``parts_of``, and alpha of the shape given: [H, W, 1 or 0]. Raises CorruptError.

    Of a tile that is cut off, latents that are missing are their means, alpha is opaque, and no checksum is compared.
    """
    stack, y_hat = networks.stack(tile.words, tile.lanes), list[Symbols]()

    def parts() -> Parts:
        y_hat.append((yield from parts_of(networks, rows, columns, quality, tile.method, bool(tile.parts))))

    values, before = chain(parts, record, tile.held).pop(stack), stack.bits()
    if tile.held is not None:
        return networks.get(y_hat[0]), np.full(shape, 2**depth - 1, np.uint16)
    alpha: Samples = pop_plain(stack, shape, depth) if shape[2] else np.empty(shape, np.uint16)
    if record and shape[2]:
        record("alpha", before - stack.bits())
    if checksum([*map(networks.get, values), alpha]) != tile.crc or not stack.is_empty():
        raise CorruptError("a tile fails its checksum")
    return networks.get(y_hat[0]), alpha


def quantised(tables: Tables, residual: Floats, ids: Symbols) -> Symbols:
    """Integers [N] for what is left of N latents, in steps: rounded, or one nearer to 0 where that saves
    more bits than its squared error is worth."""
    residual = residual.ravel()
    symbols: Symbols = np.rint(residual).astype(np.int32)
    size, whole = abs(residual), abs(symbols)
    # The squared error grows by one more than twice this: most integers are not worth a look.
    above = size - whole
    most = (RATE_WEIGHT * tables.savings.max() - 1) / 2
    some = np.flatnonzero(((above < most) | (whole >= NEAR)) & (whole > 0))
    near, ids = symbols[some], ids[some]
    saved = tables.savings.take(ids * (2 * NEAR) + (near + NEAR), mode="clip")
    far = np.flatnonzero(whole[some] >= NEAR)
    saved[far] = tables.bits(ids[far], near[far]) - tables.bits(ids[far], near[far] - np.sign(near[far]))
    lower = some[2 * above[some] + 1 < RATE_WEIGHT * saved]
    symbols[lower] -= np.sign(symbols[lower])
    return symbols


def checksum(arrays: list[NDArray[np.integer[Any]]]) -> int:
    """CRC-32 of little-endian int32, one array after the other."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.astype("<i4", copy=False).tobytes(), crc)
    return crc
