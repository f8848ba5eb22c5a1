"""One tile of a lossy file: latents -> integers -> ANS words, and the way back.

What both ways share is written once, as a generator that names the parts of a tile in the order in which they are
decoded and is sent their values; ``bitstream.chain`` runs it forwards to pop and backwards to push.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bitstream import (
    NETWORK,
    AnsStack,
    Codec,
    CorruptError,
    Parts,
    Record,
    Tile,
    chain,
    pop_plain,
    push_plain,
    table_codec,
)

from ..exact import flat, interpolate
from ..plain_tiles import Samples
from .layers import HYPER, UNIT
from .model import Walk
from .weights import LossyWeights

SYMBOL_MAX = 2**17  # a decoded latent, in steps of 1/64 at the finest, then fits in float32's 24 bits
RATE_WEIGHT = 0.025  # squared error, in steps of the quantiser, that the encoder takes for a bit less

Symbols = NDArray[np.int32]
Choose = Callable[[Walk, Symbols], None]


def parts_of(
    weights: LossyWeights, rows: int, columns: int, quality: Tensor, choose: Choose | None = None
) -> Generator[tuple[str, Codec[Symbols]], Symbols, Tensor]:
    """z, then the latents of each step. Returns y_hat [1, M, rows, columns].

    choose: the encoder's. It is called before the symbols of a step are asked for: what is left for them to say depends
    on the steps before.
    """
    model = weights.model
    c, device, dtype = model.config, quality.device, model.log_ratio.dtype

    def tensor(symbols: Symbols) -> Tensor:
        if symbols.min() < -SYMBOL_MAX or symbols.max() > SYMBOL_MAX:
            raise CorruptError("a latent is out of range")
        return torch.from_numpy(symbols).to(device)

    shape = (1, c.hyper_latent, -(-rows // HYPER), -(-columns // HYPER))
    z_mean = interpolate(weights.z_mean, quality)[:, :, None, None]
    z_ids = flat(interpolate(weights.z_index, quality)[:, :, None, None].expand(shape))
    z = tensor((yield "z", table_codec(weights.tables, z_ids))).long().view(shape)
    z_hat = (z * round(1 / UNIT) + z_mean).to(dtype) * UNIT
    features = model.h_s(z_hat, quality)[:, :, :rows, :columns]
    walk = Walk(model.context, features, torch.zeros((1, c.latent, rows, columns), dtype=dtype, device=device), quality)
    for number, (mean, index) in enumerate(walk, 1):
        ids = flat(index)
        if choose is not None:
            choose(walk, ids)
        symbols = yield f"y_{number}", table_codec(weights.tables, ids)
        walk.take(tensor(symbols).to(dtype).view(mean.shape) + mean)
    return walk.y_hat


def push_tile(weights: LossyWeights, y: Tensor, quality: Tensor, alpha: Samples, depth: int) -> tuple[Tile, Tensor]:
    """Quantise and code latents [1, M, h, w], in steps of the quantiser, and alpha [H, W, 1 or 0] of ``depth`` bits.
    What the decoder needs first is pushed last. Gives the tile and y as the decoder gets it."""
    model = weights.model
    rows, columns = y.shape[2:]
    padded = F.pad(y, (0, -columns % HYPER, 0, -rows % HYPER), mode="replicate")
    z_mean = interpolate(weights.z_mean, quality)[:, :, None, None]
    z = torch.round(model.h_a(padded, quality) - z_mean * UNIT).clamp(-SYMBOL_MAX, SYMBOL_MAX)
    chosen, y_hat = [flat(z)], list[Tensor]()

    def choose(walk: Walk, ids: Symbols) -> None:
        residual = walk.left(y)
        chosen.append(quantised(weights, residual.clamp(-SYMBOL_MAX, SYMBOL_MAX), ids))

    def parts() -> Parts:
        y_hat.append((yield from parts_of(weights, rows, columns, quality, choose)))

    stack = AnsStack()
    if alpha.size:
        push_plain(stack, alpha, depth)
    chain(parts).push(stack, chosen)  # the list grows as its parts are asked for
    return Tile(NETWORK, checksum([*chosen, alpha]), stack.to_bytes()), y_hat[0]


def pop_tile(
    weights: LossyWeights,
    tile: Tile,
    rows: int,
    columns: int,
    quality: Tensor,
    shape: tuple[int, int, int],
    depth: int,
    record: Record | None = None,
) -> tuple[Tensor, Samples]:
    """y_hat [1, M, rows, columns], and alpha of the shape given: [H, W, 1 or 0]. Raises CorruptError."""
    stack, y_hat = AnsStack(tile.words), list[Tensor]()

    def parts() -> Parts:
        y_hat.append((yield from parts_of(weights, rows, columns, quality)))

    values, before = chain(parts, record).pop(stack), stack.bits()
    alpha: Samples = pop_plain(stack, shape, depth) if shape[2] else np.empty(shape, np.uint16)
    if record and shape[2]:
        record("alpha", before - stack.bits())
    if checksum([*values, alpha]) != tile.crc or not stack.is_empty():
        raise CorruptError("a tile fails its checksum")
    return y_hat[0], alpha


def quantised(weights: LossyWeights, residual: Tensor, ids: Symbols) -> Symbols:
    """Integers [N] for what is left of latents, in steps [1, M / 4, h, w]: rounded, or one nearer to 0 where that saves
    more bits than its squared error is worth."""
    values = residual.flatten().double().cpu().numpy()
    symbols = np.rint(values)
    some = np.flatnonzero(symbols)
    value, near, tables = values[some], symbols[some], weights.tables
    lower = near - np.sign(near)
    worse = (value - lower) ** 2 - (value - near) ** 2
    saved = tables.bits(ids[some], near.astype(int)) - tables.bits(ids[some], lower.astype(int))
    symbols[some] = np.where(worse < RATE_WEIGHT * saved, lower, near)
    integers: Symbols = symbols.astype(np.int32)
    return integers


def checksum(arrays: list[NDArray[np.integer[Any]]]) -> int:
    """CRC-32 of little-endian int32, one array after the other."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.astype("<i4", copy=False).tobytes(), crc)
    return crc
