"""Picture -> latents -> integers -> ANS words -> container, and below it the way back.

A tile is coded on its own. Its entropy networks see nothing outside it; only analysis and synthesis of the lossy codec
read a margin around it, which is wide enough that the joint picture has no seams. What the networks are no good at is
coded without them, and for analysis and synthesis of the tiles around it the picture ends there. The tiles of lossless
files are in ``lossless_codec.py``.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any

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
    Record,
    Tile,
    VersionError,
    pack,
    pop_plain,
    push_plain,
    table_codec,
    unpack,
)

from . import misfits
from .exact import STREAM_UNIT, UNIT, interpolate
from .guest import public
from .image import (
    CHANNELS,
    DeepPicture,
    ImageError,
    Pixels,
    depth_used,
    grey_of,
    info_of,
    metadata_of,
    open_picture,
    picture_of,
    pixels_of,
    refuse_deep_colour,
)
from .info import Source, bytes_of
from .lossless_codec import BITS_BACK, PLAIN, RAW, ROUNDED, Samples, TileCoder, sample_type
from .model import HYPER, PATCH, lagrangian, of_seen, pick, place, step_quarters
from .refine import ANNEALING, refined, steps_of
from .weights import Lossless, Lossy, WeightsError, load, packaged

NETWORK = 0  # tile method of lossy files; others are PLAIN and RAW
GREY = 1  # colour transform: the colours are equal, and one of them is coded
TILE = 1024
TILE_MAX = 2048  # it bounds the memory and the work that a tile costs before its checksum is known

SYMBOL_MAX = 2**17  # a decoded latent, in steps of 1/64 at the finest, then fits in float32's 24 bits

RATE_WEIGHT = 0.025  # squared error, in steps of the quantiser, that the encoder takes for a bit less

Symbols = NDArray[np.int32]
Progress = Callable[[int], None]
Region = tuple[int, int, int, int]

Picture = Image.Image | DeepPicture | NDArray[Any] | Tensor | bytes | str | os.PathLike[str] | IO[bytes]
"""Pillow's; or an array [H, W] or [H, W, C], uint8 with 1 to 4 channels or uint16 with 1, 3 or 4; or such a tensor
[C, H, W], on any device; or a picture's file: its path, its bytes or a binary file object. Only from a file can colour
of more than 8 bits be had with its metadata."""


@dataclass(frozen=True)
class Box:
    """Part of a grid: rows top..bottom, columns left..right (ends excluded)."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    def __and__(self, other: Box) -> Box:
        """What two boxes share."""
        return Box(
            max(self.top, other.top),
            max(self.left, other.left),
            min(self.bottom, other.bottom),
            min(self.right, other.right),
        )

    def __bool__(self) -> bool:
        return self.rows > 0 and self.columns > 0

    def grown(self, margin: int) -> Box:
        """With a margin on all sides."""
        return Box(self.top - margin, self.left - margin, self.bottom + margin, self.right + margin)

    def times(self, factor: int) -> Box:
        """On a grid that is finer by a factor."""
        return Box(self.top * factor, self.left * factor, self.bottom * factor, self.right * factor)

    @property
    def region(self) -> Region:
        return self.left, self.top, self.columns, self.rows

    def within(self, outer: Box) -> tuple[slice, slice]:
        """Index of this box in an array [H, W] that holds ``outer``."""
        return (
            slice(self.top - outer.top, self.bottom - outer.top),
            slice(self.left - outer.left, self.right - outer.left),
        )


def tiles(rows: int, columns: int, side: int) -> list[Box]:
    """The tiles of a grid in raster order."""
    return [
        Box(top, left, min(top + side, rows), min(left + side, columns))
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


class GreyPixels(Pixels):
    """A picture whose colours are equal, as one of them and its alpha."""

    def __getitem__(self, part: tuple[slice, slice]) -> Samples:
        return super().__getitem__(part)[..., 2:]


def grey_pixels(pixels: Pixels) -> GreyPixels | None:
    """If its colours are equal. Of most pictures the first rows tell that they are not."""
    if CHANNELS[pixels.mode] < 3:
        return None
    for top in range(0, pixels.height, 16):
        part = pixels[top : min(top + 16, pixels.height), 0 : pixels.width]
        if (part[..., 0] != part[..., 1]).any() or (part[..., 1] != part[..., 2]).any():
            return None
    return GreyPixels(*(getattr(pixels, field.name) for field in fields(pixels)))


@dataclass(frozen=True)
class Missing:
    """The tiles of a lossy file without latents, by row and column among the tiles. side: of a tile, in latents."""

    side: int
    places: set[tuple[int, int]]

    def add(self, box: Box) -> None:
        self.places.add((box.top // self.side, box.left // self.side))

    def seen(self, outer: Box, like: Tensor) -> Tensor | None:
        """See ``model.of_seen``, of a box of latents: [1, 1, h, w], or None if it has all of them."""
        rows = range(outer.top // self.side, -(-outer.bottom // self.side))
        columns = range(outer.left // self.side, -(-outer.right // self.side))
        found = [(i, j) for i in rows for j in columns if (i, j) in self.places]
        if not found:
            return None
        seen = like.new_ones(1, 1, outer.rows, outer.columns)
        for i, j in found:
            tile = Box(i * self.side, j * self.side, (i + 1) * self.side, (j + 1) * self.side)
            seen[..., *(tile & outer).within(outer)] = 0
        return seen


def box_of(region: Region | None, width: int, height: int) -> Box:
    """The region (x, y, width, height) of a picture; without one, all of it. Raises ValueError if it sticks out."""
    if region is None:
        return Box(0, 0, height, width)
    x, y, w, h = region
    if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
        raise ValueError(f"region {region} is not inside the picture of {width} x {height} pixels")
    return Box(y, x, y + h, x + w)


@contextlib.contextmanager
def forgiving(box: Box, damaged: list[Region] | None) -> Iterator[None]:
    """With a list, a CorruptError ends the body and no more: the region of the box is appended to the list."""
    try:
        yield
    except CorruptError:
        if damaged is None:
            raise
        damaged.append(box.region)


class Band:
    """Some rows of an array [M, rows, columns] of int16 that is never held as a whole: it moves from top to bottom.

    box: what the values are of.
    """

    def __init__(self, channels: int, outer: Box) -> None:
        self.box = replace(outer, bottom=outer.top)
        self.values = np.zeros((channels, 0, outer.columns), np.int16)

    def move(self, top: int, bottom: int) -> None:
        """Hold the rows top..bottom, zero where they are new."""
        box = replace(self.box, top=top, bottom=bottom)
        values = np.zeros((len(self.values), box.rows, box.columns), np.int16)
        if kept := box & self.box:
            values[:, *kept.within(box)] = self.values[:, *kept.within(self.box)]
        self.box, self.values = box, values


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast, and on CUDA plain matrix products instead of cuDNN's algorithms (TF32, Winograd)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_without_cudnn())
        yield


_cudnn = threading.Lock()
_users, _before = 0, True


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Its switch is the process's, so the last thread to leave puts it back."""
    global _users, _before
    with _cudnn:
        if _users == 0:
            _before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
        _users += 1
    try:
        yield
    finally:
        with _cudnn:
            _users -= 1
            if _users == 0:
                torch.backends.cudnn.enabled = _before


class Codec:
    """Compresses and decompresses; loads the weights when they are first needed.

    device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N". weights: an exported file of either kind, in place
    of the one in the package. Weights that are missing, damaged or not exact on the device raise WeightsError.

    One codec may be used from several threads. It is pickled as its two arguments: whoever receives it loads the
    weights anew, on the device that "auto" means there.

    ``progress`` of the methods is called after each tile, and within it where it is refined, with the number of pixels
    done since the last call. What it raises ends the work and reaches the caller: this is how to cancel.
    """

    @public
    def __init__(self, device: str = "auto", weights: str | os.PathLike[str] | None = None) -> None:
        self._arguments = device, None if weights is None else Path(weights).absolute()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.empty(0, device=device).device  # raises if there is none
        self._loading = threading.Lock()
        self._loaded: dict[Kind, Lossy | Lossless] = {}
        if weights is not None:
            self._load(Path(weights))

    def __reduce__(self) -> tuple[type[Codec], tuple[str, Path | None]]:
        return Codec, self._arguments

    def _load(self, path: Path) -> Lossy | Lossless:
        with exact_arithmetic(self.device):
            loaded = load(path, self.device)
        self._loaded[Kind.LOSSY if isinstance(loaded, Lossy) else Kind.LOSSLESS] = loaded
        return loaded

    @property
    @public
    def lossy(self) -> Lossy:
        with self._loading:
            weights = self._loaded.get(Kind.LOSSY) or self._load(packaged("lossy"))
        if not isinstance(weights, Lossy):
            raise WeightsError("the packaged weights are not those of a lossy model")
        return weights

    @property
    @public
    def lossless(self) -> Lossless:
        with self._loading:
            weights = self._loaded.get(Kind.LOSSLESS) or self._load(packaged("lossless"))
        if not isinstance(weights, Lossless):
            raise WeightsError("the packaged weights are not those of a lossless model")
        return weights

    @public
    def compress(
        self,
        picture: Picture,
        quality: float = 75.0,
        progress: Progress | None = None,
        *,
        lossless: bool = False,
        depth: int | None = None,
        effort: int = 0,
        limits: Limits | None = None,
    ) -> bytes:
        """The bytes of a ``.vae`` file.

        picture: a Pillow picture of integers, an array or tensor, or a file, see ``Picture``. quality: 0 (smallest) to
        100, in hundredths, of lossy files, which keep alpha without loss. depth: how many bits of 16-bit samples are in
        use, 9 to 16; by default what the file says or, where it says nothing, what the largest sample takes. effort: 0
        (fast) to 9 (small): the latents of lossy files are refined for this picture. 1 makes files 2 to 3 % smaller at
        equal PSNR for ten times the time, some seconds a megapixel; 2 and more take minutes a megapixel for the next
        per cent, see ``refine``. Lossless tiles are coded in every way, not only in those that are worth a try. limits:
        by default ``Limits()``; what exceeds them, no reader with the same limits would accept. Equal pixels give equal
        bytes, whatever holds them. Metadata comes from the file, or from Pillow's ``info`` and Exif.

        Raises ImageError for pictures that are not supported, ValueError for a quality, depth or effort out of range,
        LimitError.
        """
        quality = float(quality)
        if not 0 <= quality <= 100:
            raise ValueError(f"quality {quality} is not in 0..100")
        if effort not in range(len(ANNEALING)):
            raise ValueError(f"effort {effort} is not in 0..{len(ANNEALING) - 1}")
        if isinstance(picture, Tensor):
            picture = array_of(picture)
        elif not isinstance(picture, Image.Image | DeepPicture | np.ndarray):
            picture = open_picture(io.BytesIO(bytes_of(picture)), limits)
        pixels = pixels_of(picture)
        grey = grey_pixels(pixels)
        pixels = grey or pixels
        sections = metadata_of(picture)  # PNG may have it after the pixels, which are loaded now
        kind, weights = (Kind.LOSSLESS, self.lossless) if lossless else (Kind.LOSSY, self.lossy)
        hundredths = 0 if lossless else round(quality * 100)
        (limits or Limits()).check_size(pixels.width, pixels.height)
        whole = box_of(None, pixels.width, pixels.height)
        boxes = [box.within(whole) for box in tiles(pixels.height, pixels.width, TILE)]
        used = max(depth_used(pixels[box]) for box in boxes) if pixels.bits > 8 else 8
        depth = (depth or pixels.depth or used) if pixels.bits > 8 else 8
        size, colour = (pixels.width, pixels.height), GREY if grey else 0
        header = Header(kind, pixels.mode, *size, depth, hundredths, colour, TILE, weights.identity)
        (limits or Limits()).check(header)
        if used > depth:
            raise ImageError(f"the picture has samples of more than {depth} bits")
        code = self._compress_lossless if lossless else self._compress_lossy
        with exact_arithmetic(self.device):
            coded = code(pixels, header, effort, progress or ignore)
        return pack(header, coded, sections)

    def _compress_lossy(self, pixels: Pixels, header: Header, effort: int, progress: Progress) -> list[Tile]:
        q = torch.tensor([header.quality], device=self.device)
        whole = box_of(None, header.width, header.height)
        coded, missing = dict[Box, Tile](), Missing(TILE // PATCH, set())
        waiting = boxes = tiles(-(-header.height // PATCH), -(-header.width // PATCH), TILE // PATCH)
        while waiting:
            left_out = list[Box]()
            for box in waiting:
                samples = pixels[(box.times(PATCH) & whole).within(whole)]
                parts = shares(box.rows * box.columns * PATCH**2 if box not in coded else 0, steps_of(effort) + 1)
                stepped = partial(advance, progress, parts)
                coded[box] = tile = self._push_best(pixels, samples, header, box, q, effort, missing, stepped)
                stepped()
                if tile.method != NETWORK:
                    left_out.append(box)
            # Their neighbours have counted on their latents.
            for box in left_out:
                missing.add(box)
            around = [box.grown(self.lossy.margin) for box in left_out]
            waiting = [b for b in boxes if coded[b].method == NETWORK and any(b & other for other in around)]
        return [coded[box] for box in boxes]

    def _push_best(
        self,
        pixels: Pixels,
        samples: Samples,
        header: Header,
        box: Box,
        q: Tensor,
        effort: int,
        missing: Missing,
        stepped: Callable[[], None],
    ) -> Tile:
        """A tile of a lossy file with networks or, where they cost more than they save, without."""
        outer = box.grown(self.lossy.margin) & Box(0, 0, -(-header.height // PATCH), -(-header.width // PATCH))
        inside, colours = box.within(outer), colours_of(header)
        seen = missing.seen(outer, self.lossy.model.log_ratio)
        x = self._padded(pixels, header, outer)
        y = of_seen(self.lossy.quantiser_units(self.lossy.model.g_a(x, q, seen), q), seen)
        if effort:
            y[..., *inside] = refined(self.lossy, x, y, inside, q, effort, seen, stepped)
        tile, y[..., *inside] = self._push_tile(y[..., *inside], q, samples[..., colours:], header.depth)
        pixel = 8 / (samples.shape[0] * samples.shape[1])
        weight = float(lagrangian(q, self.lossy.model.config.lambda_max))
        bits = len(tile.words) * pixel
        signs = misfits.signs(samples, header.depth)
        if not signs.doubtful(bits, weight):
            return tile
        x_hat = self.lossy.model.g_s(self.lossy.stream((y / self.lossy.model.config.unit).round().long(), q), q, seen)
        error = (x_hat.clamp(0, 255) - x)[0, :, *box.times(PATCH).within(outer.times(PATCH))]
        error = error[:, : samples.shape[0], : samples.shape[1]]
        error = error.mean(0) if colours == 1 else error
        cost = bits + weight * float(error.square().mean())
        if cost < signs.bits:
            return tile
        exact = TileCoder(None, header.depth).push(samples)
        return exact if len(exact.words) * pixel <= cost else tile

    def _compress_lossless(self, pixels: Pixels, header: Header, effort: int, progress: Progress) -> list[Tile]:
        coder, coded = TileCoder(self.lossless if header.depth == 8 else None, header.depth, effort > 0), []
        whole = box_of(None, header.width, header.height)
        for box in tiles(header.height, header.width, TILE):
            coded.append(coder.push(pixels[box.within(whole)]))
            progress(box.rows * box.columns)
        return coded

    @public
    def compress_batch(
        self,
        pictures: Iterable[Picture],
        quality: float = 75.0,
        *,
        lossless: bool = False,
        depth: int | None = None,
        effort: int = 0,
        limits: Limits | None = None,
    ) -> list[bytes]:
        """A file for each picture, byte for byte that of ``compress``.

        pictures: a tensor [N, C, H, W], an array [N, H, W, C], or pictures of any kinds and sizes. Raises ImageError
        for a single picture.
        """
        if isinstance(pictures, Image.Image) or (isinstance(pictures, np.ndarray | Tensor) and pictures.ndim != 4):
            shape = list(getattr(pictures, "shape", ()))
            raise ImageError(
                f"a batch is an array [N, H, W, C], a tensor [N, C, H, W] or a list of pictures, not {shape}"
            )
        options: dict[str, Any] = {"lossless": lossless, "depth": depth, "effort": effort, "limits": limits}
        return [self.compress(picture, quality, **options) for picture in pictures]

    @public
    def decompress(
        self,
        data: Source,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        region: Region | None = None,
        damaged: list[Region] | None = None,
    ) -> Image.Image:
        """The picture in a ``.vae`` file, in the mode and with the metadata it had.

        data: the file's bytes, its path, or a binary file object. limits: what to accept, of the whole picture; by
        default ``Limits()``. region: (x, y, width, height) in pixels, the part that is wanted: equal to that part of
        the whole, but only the tiles that it needs are decoded. damaged: given a list, tiles that are cut off or fail
        their checksum are no error, but zero, and the regions of such tiles are appended to it; in lossy files pixels
        up to 32 beside them may be wrong. Raises CorruptError, TruncatedError, VersionError or
        LimitError, WeightsError if the file was made with other weights, ImageError for 16-bit colour, which Pillow
        has no mode for, ValueError for a region that is not inside the picture.
        """
        container = unpack(bytes_of(data), limits or Limits(), partial=damaged is not None)
        refuse_deep_colour(container.header.mode)
        wanted = box_of(region, container.header.width, container.header.height)
        parts = self._decode(container, wanted, progress or ignore, damaged)
        picture = Image.new(container.header.mode.name, (wanted.columns, wanted.rows))
        picture.info |= info_of(container.sections)
        for box, samples in parts:
            picture.paste(picture_of(samples), (box.left - wanted.left, box.top - wanted.top))
        return picture

    @public
    def decode_array(
        self,
        data: Source,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        region: Region | None = None,
        damaged: list[Region] | None = None,
    ) -> Samples:
        """The samples of a file [H, W, C], uint8, or uint16 if it holds more than 8 bits a sample.

        Arguments and errors are those of ``decompress``, but 16-bit colour is no error.
        """
        container = unpack(bytes_of(data), limits or Limits(), partial=damaged is not None)
        header = container.header
        wanted = box_of(region, header.width, header.height)
        parts = self._decode(container, wanted, progress or ignore, damaged)
        whole: Samples = np.zeros((wanted.rows, wanted.columns, CHANNELS[header.mode]), sample_type(header.depth))
        for box, samples in parts:
            whole[box.within(wanted)] = samples
        return whole

    @public
    def decode_tiles(
        self,
        data: Source,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        damaged: list[Region] | None = None,
    ) -> Iterator[tuple[Region, Samples]]:
        """The picture in parts, each when it is decoded, for what is too large to be held as a whole.

        Yields for each tile its region (x, y, width, height) and what ``decode_array`` gives for it. Arguments and
        errors are those of ``decode_array``; some parts may have come before a CorruptError. Damaged tiles do not come.
        """
        container = unpack(bytes_of(data), limits or Limits(), partial=damaged is not None)
        whole = box_of(None, container.header.width, container.header.height)
        parts = self._decode(container, whole, progress or ignore, damaged)

        @public
        def following() -> tuple[Region, Samples] | None:
            for box, samples in parts:
                return box.region, samples
            return None

        return iter(following, None)

    @public
    def decode_tensor(
        self,
        data: Source,
        device: torch.device | str | None = None,
        limits: Limits | None = None,
        progress: Progress | None = None,
        *,
        region: Region | None = None,
        damaged: list[Region] | None = None,
    ) -> Tensor:
        """The same as a tensor [C, H, W] on a device, by default the codec's."""
        samples = torch.from_numpy(self.decode_array(data, limits, progress, region=region, damaged=damaged))
        return samples.permute(2, 0, 1).contiguous().to(device or self.device)

    @public
    def account(self, data: Source) -> dict[str, float]:
        """Where the bits of a lossless file went: by part, in bits; what the posterior gives back is negative."""
        view, bits = bytes_of(data), dict[str, float]()
        container = unpack(view)
        if container.header.kind != Kind.LOSSLESS:
            raise VersionError("not a lossless file")

        def record(name: str, count: float) -> None:
            bits[name] = bits.get(name, 0.0) + count

        whole = box_of(None, container.header.width, container.header.height)
        for _ in self._decode(container, whole, ignore, None, record):
            pass
        other = 8 * sum(len(tile.words) for tile in container.tiles if tile.method in (PLAIN, RAW))
        if other:
            bits["tiles without networks"] = other
        bits["metadata"] = 8 * sum(len(section.payload) for section in container.sections)
        bits["overhead"] = 8 * len(view) - sum(bits.values())
        return bits

    def _decode(
        self,
        container: Container,
        wanted: Box,
        progress: Progress,
        damaged: list[Region] | None,
        record: Record | None = None,
    ) -> Iterator[tuple[Box, Samples]]:
        """The boxes of tiles, as far as they are wanted, and their samples [h, w, C], each when it is decoded."""
        header = container.header
        if header.kind not in (Kind.LOSSLESS, Kind.LOSSY):
            raise VersionError(f"kind {header.kind.name} is not supported by this version")
        if header.colour not in (0, GREY):
            raise VersionError(f"colour transform {header.colour} is not supported by this version")
        if header.colour == GREY and CHANNELS[header.mode] < 3:
            raise CorruptError(f"colours of mode {header.mode.name} are not there to be equal")
        if header.tile > TILE_MAX:
            raise CorruptError(f"tile size {header.tile} is larger than {TILE_MAX}")
        if header.kind == Kind.LOSSLESS:
            parts = self._decode_lossless(container, wanted, progress, damaged, record)
        else:
            network = any(tile.method not in (PLAIN, RAW) for tile in container.tiles)
            if network and header.model != self.lossy.identity:
                raise WeightsError(f"made with weights {header.model.hex()}, these are {self.lossy.identity.hex()}")
            parts = self._decode_lossy(container, network, wanted, progress, damaged)
        return parts if header.colour != GREY else ((box, coloured(samples)) for box, samples in parts)

    def _decode_lossless(
        self,
        container: Container,
        wanted: Box,
        progress: Progress,
        damaged: list[Region] | None,
        record: Record | None,
    ) -> Iterator[tuple[Box, Samples]]:
        header = container.header
        grid = zip(tiles(header.height, header.width, header.tile), container.tiles, strict=True)
        needed = [(box, tile) for box, tile in grid if box & wanted]
        network = header.depth == 8 and any(tile.method in (BITS_BACK, ROUNDED) for _, tile in needed)
        if network and header.model != self.lossless.identity:
            raise WeightsError(f"made with weights {header.model.hex()}, these are {self.lossless.identity.hex()}")
        coder, channels = TileCoder(self.lossless if network else None, header.depth), channels_of(header)
        for box, tile in needed:
            part = box & wanted
            samples: Samples | None = None
            with forgiving(box, damaged), exact_arithmetic(self.device):
                samples = coder.pop(tile, (box.rows, box.columns, channels), record)
            if samples is not None:
                yield part, samples[part.within(box)]
            progress(part.rows * part.columns)

    def _decode_lossy(
        self,
        container: Container,
        network: bool,
        wanted: Box,
        progress: Progress,
        damaged: list[Region] | None,
    ) -> Iterator[tuple[Box, Samples]]:
        header = container.header
        margin, latents = (self.lossy.margin, self.lossy.model.config.latent) if network else (0, 0)
        whole = box_of(None, header.width, header.height)
        grid = Box(0, 0, -(-header.height // PATCH), -(-header.width // PATCH))
        inner = Box(wanted.top // PATCH, wanted.left // PATCH, -(-wanted.bottom // PATCH), -(-wanted.right // PATCH))
        outer = inner.grown(margin) & grid
        boxes = list(zip(tiles(grid.rows, grid.columns, header.tile // PATCH), container.tiles, strict=True))
        needed = [(box, tile) for box, tile in boxes if box & outer]
        missing = Missing(header.tile // PATCH, set())
        for box, tile in needed:
            if tile.method in (PLAIN, RAW):
                missing.add(box)
        q = torch.tensor([header.quality], device=self.device)
        # Tiles wait with their alpha, or all their samples, None if they are damaged, for the latents below them.
        band, waiting = Band(latents, outer), deque[tuple[Box, Tile, Samples | None]]()
        for top, row in groupby(needed, lambda pair: pair[0].top):
            kept = (waiting[0][0].top if waiting else top) - margin
            band.move(max(kept, outer.top), min(top + header.tile // PATCH, outer.bottom))
            for box, tile in row:
                covered = box.times(PATCH) & whole
                samples: Samples | None = None
                with forgiving(covered, damaged), exact_arithmetic(self.device):
                    if tile.method in (PLAIN, RAW):
                        if box & inner:
                            shape = (covered.rows, covered.columns, channels_of(header))
                            samples = TileCoder(None, header.depth).pop(tile, shape)
                    else:
                        shape = (covered.rows, covered.columns, channels_of(header) - colours_of(header))
                        stream, samples = self._pop_tile(tile, box, q, shape, header.depth)
                        part = box & outer
                        band.values[:, *part.within(band.box)] = stream[:, *part.within(box)]
                if box & inner:
                    waiting.append((box, tile, samples))
            while waiting and min(waiting[0][0].bottom + margin, outer.bottom) <= band.box.bottom:
                box, tile, samples = waiting.popleft()
                part = box & inner
                if samples is not None:
                    shown = part.times(PATCH) & wanted
                    samples = samples[shown.within(box.times(PATCH))]
                    if tile.method == NETWORK:
                        with exact_arithmetic(self.device):
                            pixels = self._synthesise(band, part, q, header.depth, missing)
                        pixels = pixels[shown.within(part.times(PATCH))]
                        pixels = grey_of(pixels) if colours_of(header) == 1 else pixels
                        samples = np.concatenate(
                            [pixels, samples], 2, dtype=sample_type(header.depth), casting="unsafe"
                        )
                    yield shown, samples
                progress(part.rows * part.columns * PATCH**2)

    def _padded(self, pixels: Pixels, header: Header, outer: Box) -> Tensor:
        """The pixels of a box of latents, float [1, 3, H, W] in 0..255, repeated below and right of the picture."""
        whole = box_of(None, pixels.width, pixels.height)
        part = pixels[(outer.times(PATCH) & whole).within(whole)]
        x = torch.from_numpy(np.array(part[..., :3]) if part.shape[2] > 2 else part[..., :1].repeat(3, 2))
        x = x.to(self.device, torch.float32).permute(2, 0, 1)[None]
        if header.depth > 8:
            x = x * (255 / (2**header.depth - 1))
        missing = (outer.columns * PATCH - x.shape[3], outer.rows * PATCH - x.shape[2])
        x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
        return x.to(self.lossy.model.log_ratio.dtype).contiguous(memory_format=torch.channels_last)

    def _push_tile(self, y: Tensor, q: Tensor, alpha: Samples, depth: int) -> tuple[Tile, Tensor]:
        """Quantise and code one tile; alpha [H, W, 1 or 0]. What the decoder needs first is pushed last. Gives the tile
        and y as the decoder gets it."""
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
            residual, ids = pick(y, quarters) - mean, flat(index)
            chosen = self._quantise(residual.clamp(-SYMBOL_MAX, SYMBOL_MAX), ids)
            y_hat = place(y_hat, quarters, torch.from_numpy(chosen).to(y).view(mean.shape) + mean)
            parts.append((chosen, ids))
        crc, stack = 0, AnsStack()
        for values in (*(values for values, _ in parts), alpha):
            crc = checksum(values, crc)
        if alpha.size:
            push_plain(stack, alpha, depth)
        for values, ids in reversed(parts):
            stack.push(values, self.lossy.tables, ids)
        return Tile(NETWORK, crc, stack.to_bytes()), y_hat

    def _quantise(self, residual: Tensor, ids: Symbols) -> Symbols:
        """Integers [N] for what is left of latents, in steps [1, M / 4, h, w]: rounded, or one nearer to 0 where that
        saves more bits than its squared error is worth."""
        values = residual.flatten().double().cpu().numpy()
        symbols = np.rint(values)
        some = np.flatnonzero(symbols)
        value, near, tables = values[some], symbols[some], self.lossy.tables
        lower = near - np.sign(near)
        worse = (value - lower) ** 2 - (value - near) ** 2
        saved = tables.bits(ids[some], near.astype(int)) - tables.bits(ids[some], lower.astype(int))
        symbols[some] = np.where(worse < RATE_WEIGHT * saved, lower, near)
        integers: Symbols = symbols.astype(np.int32)
        return integers

    def _pop_tile(
        self, tile: Tile, box: Box, q: Tensor, shape: tuple[int, int, int], depth: int
    ) -> tuple[NDArray[np.int16], Samples]:
        """g_s's input for one tile, int16 [M, h, w] in steps of STREAM_UNIT, and the tile's alpha, of the shape given:
        [H, W, 1 or 0]. Raises CorruptError."""
        if tile.method != NETWORK:
            raise VersionError(f"unknown tile method {tile.method}")
        model, stack = self.lossy.model, AnsStack(tile.words)
        c, device, dtype = model.config, self.device, model.log_ratio.dtype
        rows, columns, crc = box.rows, box.columns, 0

        def pop(tables: Symbols) -> Tensor:
            nonlocal crc
            symbols = table_codec(self.lossy.tables, tables).pop(stack)
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
        alpha: Samples = pop_plain(stack, shape, depth) if shape[2] else np.empty(shape, np.uint16)
        if checksum(alpha, crc) != tile.crc or not stack.is_empty():
            raise CorruptError("a tile fails its checksum")
        stream = self.lossy.stream((y_hat / c.unit).long(), q)[0] / STREAM_UNIT
        return stream.to(torch.int16).cpu().numpy(), alpha

    def _z_tables(self, z: Tensor, q: Tensor) -> Symbols:
        return flat(interpolate(self.lossy.z_index, q)[:, :, None, None].expand(z.shape))

    def _features(self, z: Tensor, z_mean: Tensor, q: Tensor, rows: int, columns: int) -> Tensor:
        z_hat = (z * round(1 / UNIT) + z_mean).to(self.lossy.model.log_ratio.dtype) * UNIT
        features: Tensor = self.lossy.model.h_s(z_hat, q)
        return features[:, :, :rows, :columns]

    def _synthesise(self, band: Band, box: Box, q: Tensor, depth: int, missing: Missing) -> Symbols:
        """What g_s makes of a box, int32 [H, W, 3] in 0..2**depth - 1, from a band that holds it and, as far as the
        picture reaches, the margin around it."""
        outer = box.grown(self.lossy.margin) & band.box
        steps = torch.from_numpy(np.array(band.values[:, *outer.within(band.box)])).to(self.device)[None]
        stream = steps.to(self.lossy.model.log_ratio.dtype).contiguous(memory_format=torch.channels_last) * STREAM_UNIT
        x_hat = self.lossy.model.g_s(stream, q, missing.seen(outer, stream))
        x_hat = x_hat[0, :, *box.times(PATCH).within(outer.times(PATCH))]
        # In integers, steps of 1/16, so that 16 bits are as exact as 8.
        steps = (x_hat * 16).clamp_(0, 255 * 16).to(torch.int32)
        steps.mul_(2 * (2**depth - 1)).add_(255 * 16).floor_divide_(2 * 255 * 16)
        pixels: Symbols = steps.permute(1, 2, 0).cpu().numpy()
        return pixels


_shared: dict[torch.device, Codec] = {}


@public
def shared(device: str = "auto") -> Codec:
    """The codec with the packaged weights that all callers share, one for each device."""
    codec = Codec(device)  # costs nothing: the weights are loaded by the one that is kept
    return _shared.setdefault(codec.device, codec)


@public
def compress(
    picture: Picture,
    *,
    quality: float = 75.0,
    lossless: bool = False,
    effort: int = 0,
    limits: Limits | None = None,
    device: str = "auto",
) -> bytes:
    """The bytes of a ``.vae`` file; see ``Codec.compress``."""
    return shared(device).compress(picture, quality, lossless=lossless, effort=effort, limits=limits)


@public
def decompress(
    data: Source, *, region: Region | None = None, limits: Limits | None = None, device: str = "auto"
) -> Image.Image:
    """The picture in a ``.vae`` file; see ``Codec.decompress``."""
    return shared(device).decompress(data, limits, region=region)


def array_of(picture: Tensor) -> NDArray[Any]:
    """An array [H, W, C] from a tensor [C, H, W]. Raises ImageError for other shapes and types."""
    if picture.ndim != 3 or picture.dtype not in (torch.uint8, torch.uint16):
        raise ImageError(
            f"a tensor of {picture.dtype} {list(picture.shape)} is no picture: uint8 or uint16 [C, H, W]; "
            "compress_batch takes [N, C, H, W]"
        )
    array: NDArray[Any] = picture.permute(1, 2, 0).cpu().numpy()
    return array


def flat(x: Tensor) -> Symbols:
    """int32 [N] in the order channel, row, column."""
    symbols: Symbols = x.to(torch.int32).flatten().cpu().numpy()
    return symbols


def shares(count: int, parts: int) -> Iterator[int]:
    """As many whole numbers as there are parts, equal as far as may be, that sum to a count."""
    return (count * (k + 1) // parts - count * k // parts for k in range(parts))


def advance(progress: Progress, parts: Iterator[int]) -> None:
    if count := next(parts):
        progress(count)


def ignore(_count: int) -> None:
    """Progress that nobody follows."""


def coloured(samples: Samples) -> Samples:
    """[h, w, 3 and alpha] from a grey and alpha."""
    return np.concatenate([samples[..., :1].repeat(3, 2), samples[..., 1:]], 2)


def channels_of(header: Header) -> int:
    """How many channels are coded."""
    return CHANNELS[header.mode] - (2 if header.colour == GREY else 0)


def colours_of(header: Header) -> int:
    """How many are coded without alpha."""
    return 3 if channels_of(header) > 2 else 1


def checksum(symbols: NDArray[np.integer[Any]], crc: int) -> int:
    """CRC-32 of little-endian int32, continued."""
    return zlib.crc32(symbols.astype("<i4", copy=False).tobytes(), crc)
