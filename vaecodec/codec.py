"""Picture -> latents -> integers -> ANS words -> container, and below it the way back.

A tile is coded on its own. Its entropy networks see nothing outside it; only analysis and synthesis of the lossy codec
read a margin around it, which is wide enough that the joint picture has no seams. The tiles of lossless files are in
``lossless_codec.py``.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
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
    Container,
    CorruptError,
    Header,
    Kind,
    Limits,
    Mode,
    Record,
    Section,
    Tile,
    VersionError,
    pack,
    unpack,
)

from .exact import UNIT, interpolate
from .image import CHANNELS, Pixels, metadata_of, picture_of, picture_of_samples, pixels_of, samples_of
from .lossless_codec import BITS_BACK, PLAIN, RAW, ROUNDED, Samples, TileCoder, sample_type
from .model import pick, place, step_quarters
from .weights import Lossless, Lossy, WeightsError, load, packaged

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
    """Loads the weights when they are first needed; ``compress`` and ``decompress`` may be called from several threads.

    device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N". weights: an exported file of either kind, in place
    of the one in the package. Weights that are missing, damaged or not exact on the device raise WeightsError.
    """

    def __init__(self, device: str = "auto", weights: Path | None = None) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        torch.empty(0, device=self.device)  # raises if there is none
        self._loading = threading.Lock()
        self._loaded: dict[Kind, Lossy | Lossless] = {}
        if weights is not None:
            self._load(weights)

    def _load(self, path: Path) -> Lossy | Lossless:
        with exact_arithmetic(self.device):
            loaded = load(path, self.device)
        self._loaded[Kind.LOSSY if isinstance(loaded, Lossy) else Kind.LOSSLESS] = loaded
        return loaded

    @property
    def lossy(self) -> Lossy:
        with self._loading:
            weights = self._loaded.get(Kind.LOSSY) or self._load(packaged("lossy"))
        if not isinstance(weights, Lossy):
            raise WeightsError("the packaged weights are not those of a lossy model")
        return weights

    @property
    def lossless(self) -> Lossless:
        with self._loading:
            weights = self._loaded.get(Kind.LOSSLESS) or self._load(packaged("lossless"))
        if not isinstance(weights, Lossless):
            raise WeightsError("the packaged weights are not those of a lossless model")
        return weights

    def compress(
        self,
        picture: Image.Image,
        quality: float = 75.0,
        progress: Callable[[int], None] | None = None,
        *,
        lossless: bool = False,
    ) -> bytes:
        """The bytes of a ``.vae`` file.

        picture: for lossy 8-bit grey or colour; for lossless any picture of Pillow's that holds integers. quality: 0
        (smallest) to 100, in hundredths, of lossy files. progress: called with the number of pixels done after each
        tile. Raises ImageError for pictures that are not supported, ValueError for a quality out of range, LimitError
        for a picture that no reader would accept.
        """
        if not 0 <= quality <= 100:
            raise ValueError(f"quality {quality} is not in 0..100")
        sections = metadata_of(picture)
        if lossless:
            samples, mode, depth = samples_of(picture)
            return self.compress_array(samples, mode, depth, sections, progress)
        pixels, mode = pixels_of(picture)
        height, width, _ = pixels.shape
        hundredths = round(quality * 100)
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
        return pack(header, coded, sections)

    def compress_array(
        self,
        samples: Samples,
        mode: Mode,
        depth: int = 8,
        sections: Sequence[Section] = (),
        progress: Callable[[int], None] | None = None,
    ) -> bytes:
        """A lossless file of samples [H, W, C], uint8 for 8 bits and uint16 for a depth of 9 to 16.

        Raises ValueError if samples, mode and depth do not fit each other, LimitError for too large a picture.
        """
        fits = samples.ndim == 3 and samples.shape[2] == CHANNELS[mode] and samples.dtype == sample_type(depth)
        if not fits or samples.max(initial=0) >= 2**depth:
            raise ValueError(f"samples {samples.shape} {samples.dtype} do not fit mode {mode.name} of {depth} bits")
        height, width, _ = samples.shape
        header = Header(Kind.LOSSLESS, mode, width, height, depth, 0, 0, TILE, self.lossless.identity)
        Limits().check(header)
        coder, coded = TileCoder(self.lossless if depth == 8 else None, depth), []
        with exact_arithmetic(self.device):
            for box in tiles(height, width, TILE):
                coded.append(coder.push(samples[box.top : box.bottom, box.left : box.right]))
                if progress:
                    progress((box.bottom - box.top) * (box.right - box.left))
        return pack(header, coded, sections)

    def decompress(
        self, data: bytes, limits: Limits | None = None, progress: Callable[[int], None] | None = None
    ) -> Image.Image:
        """The picture in a ``.vae`` file, in the mode and with the metadata it had.

        Raises CorruptError, TruncatedError, VersionError or LimitError (see ``bitstream``), WeightsError if the file
        was made with other weights, and ImageError for 16-bit colour, which Pillow has no mode for.
        """
        container = unpack(data, limits or Limits())
        header = container.header
        if header.kind == Kind.LOSSLESS:
            return picture_of_samples(self._decode_lossless(container, progress), header.mode, container.sections)
        if header.kind != Kind.LOSSY:
            raise VersionError(f"kind {header.kind.name} is not supported by this version")
        pixels = self._decode_lossy(container, progress)
        return picture_of(pixels, header.mode, container.sections)

    def decompress_array(
        self, data: bytes, limits: Limits | None = None, progress: Callable[[int], None] | None = None
    ) -> Samples:
        """The samples of a lossless file [H, W, C], uint8 or uint16. Raises what ``decompress`` raises."""
        container = unpack(data, limits or Limits())
        if container.header.kind != Kind.LOSSLESS:
            raise VersionError("not a lossless file")
        return self._decode_lossless(container, progress)

    def account(self, data: bytes) -> dict[str, float]:
        """Where the bits of a lossless file went: by part, in bits; what the posterior gives back is negative."""
        container, bits = unpack(data), dict[str, float]()
        if container.header.kind != Kind.LOSSLESS:
            raise VersionError("not a lossless file")

        def record(name: str, count: float) -> None:
            bits[name] = bits.get(name, 0.0) + count

        self._decode_lossless(container, None, record)
        other = 8 * sum(len(tile.words) for tile in container.tiles if tile.method in (PLAIN, RAW))
        if other:
            bits["tiles without networks"] = other
        bits["metadata"] = 8 * sum(len(section.payload) for section in container.sections)
        bits["overhead"] = 8 * len(data) - sum(bits.values())
        return bits

    def _decode_lossless(
        self, container: Container, progress: Callable[[int], None] | None, record: Record | None = None
    ) -> Samples:
        header = container.header
        if header.colour != 0:
            raise VersionError(f"colour transform {header.colour} is not supported by this version")
        if header.tile > TILE_MAX:
            raise CorruptError(f"tile size {header.tile} is larger than {TILE_MAX}")
        network = header.depth == 8 and any(tile.method in (BITS_BACK, ROUNDED) for tile in container.tiles)
        if network and header.model != self.lossless.identity:
            raise WeightsError(f"made with weights {header.model.hex()}, these are {self.lossless.identity.hex()}")
        coder = TileCoder(self.lossless if network else None, header.depth)
        shape = (header.height, header.width, CHANNELS[header.mode])
        samples: Samples = np.empty(shape, sample_type(header.depth))
        with exact_arithmetic(self.device):
            for box, tile in zip(tiles(*shape[:2], header.tile), container.tiles, strict=True):
                inside = samples[box.top : box.bottom, box.left : box.right]
                inside[:] = coder.pop(tile, (box.bottom - box.top, box.right - box.left, shape[2]), record)
                if progress:
                    progress((box.bottom - box.top) * (box.right - box.left))
        return samples

    def _decode_lossy(self, container: Container, progress: Callable[[int], None] | None) -> Pixels:
        header = container.header
        if header.colour != 0 or header.mode.name not in ("L", "RGB"):
            raise VersionError(f"mode {header.mode.name} of lossy files is not supported by this version")
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
        return pixels[: header.height, : header.width]

    def _analyse(self, pixels: Pixels, box: Box, q: Tensor) -> Tensor:
        """y of one tile in steps of the quantiser: float [1, M, h, w]."""
        rows, columns = -(-pixels.shape[0] // PATCH), -(-pixels.shape[1] // PATCH)
        outer = box.grown(self.lossy.margin, rows, columns)
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
        outer = box.grown(self.lossy.margin, *latents.shape[1:])
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
