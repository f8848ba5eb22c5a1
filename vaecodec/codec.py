"""The lossy codec: picture -> latents -> integers -> ANS words -> container, and below it the way back.

A tile is coded on its own. Its entropy networks see nothing outside it; only analysis and synthesis read a margin
around it, which is wide enough that the joint picture has no seams.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bitstream import (
    AnsStack,
    CorruptError,
    Header,
    Kind,
    Limits,
    Tile,
    VersionError,
    pack,
    unpack,
)

from .exact import UNIT, interpolate
from .image import Pixels, metadata_of, picture_of, pixels_of
from .model import pick, place, step_quarters
from .weights import Lossy, WeightsError, load, packaged

PATCH = 16  # pixels to a latent, along one side
HYPER = 4  # latents to a hyper-latent, along one side
NETWORK = 0  # the only tile method of lossy files
TILE = 1024
TILE_MAX = 2048  # it bounds the memory and the work that a tile costs before its checksum is known

SYMBOL_MAX = 2**19  # a decoded latent in steps of 1/16 then fits in float32's 24 bits

Symbols = NDArray[np.int32]


@dataclass(frozen=True)
class Box:
    """Part of the latent grid: rows top..bottom, columns left..right (ends excluded)."""

    top: int
    left: int
    bottom: int
    right: int

    def grown(self, margin: int, rows: int, columns: int) -> Box:
        """With a margin on all sides, as far as the grid of rows x columns reaches."""
        return Box(
            max(self.top - margin, 0),
            max(self.left - margin, 0),
            min(self.bottom + margin, rows),
            min(self.right + margin, columns),
        )


def tiles(rows: int, columns: int, side: int) -> list[Box]:
    """The tiles of a latent grid in raster order."""
    return [
        Box(top, left, min(top + side, rows), min(left + side, columns))
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast, and on CUDA plain matrix products instead of cuDNN's algorithms (TF32, Winograd)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class Codec:
    """Loads the weights once; ``compress`` and ``decompress`` may be called from several threads.

    device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N". weights: an exported file; by default the one in
    the package. Raises WeightsError if they are missing, damaged or not exact on the device.
    """

    def __init__(self, device: str = "auto", weights: Path | None = None) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        with exact_arithmetic(self.device):
            self.lossy: Lossy = load(weights or packaged(), self.device)
        blocks = self.lossy.model.config.blocks
        # Each 3x3 reaches one sample further; two samples at 1/8 are one latent.
        self.margin = blocks[1] + -(-blocks[0] // 2)

    def compress(
        self, picture: Image.Image, quality: float = 75.0, progress: Callable[[int], None] | None = None
    ) -> bytes:
        """The bytes of a ``.vae`` file.

        picture: 8-bit grey or colour. quality: 0 (smallest) to 100, in hundredths. progress: called with the number of
        pixels done after each tile. Raises ImageError for pictures that are not supported, ValueError for a quality
        out of range, LimitError for a picture that no reader would accept.
        """
        if not 0 <= quality <= 100:
            raise ValueError(f"quality {quality} is not in 0..100")
        hundredths = round(quality * 100)
        pixels, mode = pixels_of(picture)
        height, width, _ = pixels.shape
        header = Header(Kind.LOSSY, mode, width, height, 8, hundredths, 0, TILE, self.lossy.identity)
        Limits().check(header)
        coded = []
        with exact_arithmetic(self.device):
            q = torch.tensor([hundredths], device=self.device)
            for box in tiles(-(-height // PATCH), -(-width // PATCH), TILE // PATCH):
                y = self._analyse(pixels, box, q)
                coded.append(self._push_tile(y, q))
                if progress:
                    progress((box.bottom - box.top) * (box.right - box.left) * PATCH**2)
        return pack(header, coded, metadata_of(picture))

    def decompress(
        self, data: bytes, limits: Limits | None = None, progress: Callable[[int], None] | None = None
    ) -> Image.Image:
        """The picture in a ``.vae`` file, in the mode and with the metadata it had.

        Raises CorruptError, TruncatedError, VersionError or LimitError (see ``bitstream``) and WeightsError if the
        file was made with other weights.
        """
        container = unpack(data, limits or Limits())
        header = container.header
        if header.kind != Kind.LOSSY or header.colour != 0 or header.mode.name not in ("L", "RGB"):
            raise VersionError(f"kind {header.kind.name}, mode {header.mode.name} is not supported by this version")
        if header.tile > TILE_MAX:
            raise CorruptError(f"tile size {header.tile} is larger than {TILE_MAX}")
        if header.model != self.lossy.identity:
            raise WeightsError(f"made with weights {header.model.hex()}, these are {self.lossy.identity.hex()}")
        rows, columns = -(-header.height // PATCH), -(-header.width // PATCH)
        boxes = tiles(rows, columns, header.tile // PATCH)
        latents = np.empty((self.lossy.model.config.latent, rows, columns), np.int32)
        pixels = np.empty((rows * PATCH, columns * PATCH, 3), np.uint8)
        with exact_arithmetic(self.device):
            q = torch.tensor([header.quality], device=self.device)
            for box, tile in zip(boxes, container.tiles, strict=True):
                latents[:, box.top : box.bottom, box.left : box.right] = self._pop_tile(tile, box, q)
            for box in boxes:
                self._synthesise(latents, box, q, pixels)
                if progress:
                    progress((box.bottom - box.top) * (box.right - box.left) * PATCH**2)
        return picture_of(pixels[: header.height, : header.width], header.mode, container.sections)

    def _analyse(self, pixels: Pixels, box: Box, q: Tensor) -> Tensor:
        """y of one tile in steps of the quantiser: float [1, M, h, w]."""
        rows, columns = -(-pixels.shape[0] // PATCH), -(-pixels.shape[1] // PATCH)
        outer = box.grown(self.margin, rows, columns)
        part = pixels[outer.top * PATCH : outer.bottom * PATCH, outer.left * PATCH : outer.right * PATCH]
        x = torch.from_numpy(np.array(part)).to(self.device).permute(2, 0, 1)[None].float()
        missing = ((outer.right - outer.left) * PATCH - x.shape[3], (outer.bottom - outer.top) * PATCH - x.shape[2])
        x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
        model = self.lossy.model
        x = x.to(model.log_ratio.dtype).contiguous(memory_format=torch.channels_last)
        y = self.lossy.quantiser_units(model.g_a(x, q), q)
        top, left = box.top - outer.top, box.left - outer.left
        return y[:, :, top : top + box.bottom - box.top, left : left + box.right - box.left]

    def _push_tile(self, y: Tensor, q: Tensor) -> Tile:
        """Quantise and code one tile. What the decoder needs first is pushed last."""
        model = self.lossy.model
        rows, columns = y.shape[2:]
        padded = F.pad(y, (0, -columns % HYPER, 0, -rows % HYPER), mode="replicate")
        z_mean = interpolate(self.lossy.z_mean, q)[:, :, None, None]
        z = torch.round(model.h_a(padded, q) - z_mean * UNIT).clamp(-SYMBOL_MAX, SYMBOL_MAX).long()
        parts = [(flat(z), self._z_tables(z, q))]
        features = self._features(z, z_mean, q, rows, columns)
        y_hat = torch.zeros_like(y)
        for step, context in enumerate(model.context):
            quarters = step_quarters(rows, columns, step, y.device)
            mean, index = context(features, y_hat, q)
            symbols = torch.round(pick(y, quarters) - mean).clamp(-SYMBOL_MAX, SYMBOL_MAX)
            y_hat = place(y_hat, quarters, symbols + mean)
            parts.append((flat(symbols), flat(index)))
        crc, stack = 0, AnsStack()
        for values, _ in parts:
            crc = checksum(values, crc)
        for values, ids in reversed(parts):
            stack.push(values, self.lossy.tables, ids)
        return Tile(NETWORK, crc, stack.to_bytes())

    def _pop_tile(self, tile: Tile, box: Box, q: Tensor) -> NDArray[np.int32]:
        """The latents of one tile: int32 [M, h, w] in steps of 1/16. Raises CorruptError."""
        if tile.method != NETWORK:
            raise VersionError(f"unknown tile method {tile.method}")
        model, stack = self.lossy.model, AnsStack(tile.words)
        c, device, dtype = model.config, self.device, model.log_ratio.dtype
        rows, columns = box.bottom - box.top, box.right - box.left
        crc = 0

        def pop(tables: Symbols) -> Tensor:
            nonlocal crc
            symbols = stack.pop(self.lossy.tables, tables)
            crc = checksum(symbols, crc)
            if symbols.min() < -SYMBOL_MAX or symbols.max() > SYMBOL_MAX:
                raise CorruptError("a latent is out of range")
            return torch.from_numpy(symbols).to(device)

        z_mean = interpolate(self.lossy.z_mean, q)[:, :, None, None]
        z = torch.empty((1, c.hyper_latent, -(-rows // HYPER), -(-columns // HYPER)), dtype=torch.long, device=device)
        z = pop(self._z_tables(z, q)).long().view(z.shape)
        features = self._features(z, z_mean, q, rows, columns)
        y_hat = torch.zeros((1, c.latent, rows, columns), dtype=dtype, device=device)
        for step, context in enumerate(model.context):
            mean, index = context(features, y_hat, q)
            symbols = pop(flat(index)).to(dtype).view(mean.shape)
            y_hat = place(y_hat, step_quarters(rows, columns, step, device), symbols + mean)
        if crc != tile.crc or not stack.is_empty():
            raise CorruptError("a tile fails its checksum")
        return flat(y_hat / UNIT).reshape(c.latent, rows, columns)

    def _z_tables(self, z: Tensor, q: Tensor) -> Symbols:
        return flat(interpolate(self.lossy.z_index, q)[:, :, None, None].expand(z.shape))

    def _features(self, z: Tensor, z_mean: Tensor, q: Tensor, rows: int, columns: int) -> Tensor:
        z_hat = (z * round(1 / UNIT) + z_mean).to(self.lossy.model.log_ratio.dtype) * UNIT
        features: Tensor = self.lossy.model.h_s(z_hat, q)
        return features[:, :, :rows, :columns]

    def _synthesise(self, latents: NDArray[np.int32], box: Box, q: Tensor, pixels: Pixels) -> None:
        """Write one tile's pixels into uint8 [H, W, 3]."""
        outer = box.grown(self.margin, *latents.shape[1:])
        part = latents[:, outer.top : outer.bottom, outer.left : outer.right]
        y_hat = torch.from_numpy(np.array(part)).to(self.device)[None].long()
        stream = self.lossy.stream(y_hat, q).contiguous(memory_format=torch.channels_last)
        x_hat = torch.floor(self.lossy.model.g_s(stream, q) + 0.5).clamp(0, 255).to(torch.uint8)
        top, left = (box.top - outer.top) * PATCH, (box.left - outer.left) * PATCH
        height, width = (box.bottom - box.top) * PATCH, (box.right - box.left) * PATCH
        inner = x_hat[0, :, top : top + height, left : left + width].permute(1, 2, 0).cpu().numpy()
        pixels[box.top * PATCH : box.bottom * PATCH, box.left * PATCH : box.right * PATCH] = inner


def flat(x: Tensor) -> Symbols:
    """int32 [N] in the order channel, row, column."""
    symbols: Symbols = x.to(torch.int32).flatten().cpu().numpy()
    return symbols


def checksum(symbols: Symbols, crc: int) -> int:
    """CRC-32 of little-endian int32, continued."""
    return zlib.crc32(symbols.astype("<i4", copy=False).tobytes(), crc)
