"""Pictures to the bytes of ``.vae`` files, and back: what programs call.

Pixels come from ``image``, bytes go to ``bitstream``; what lies between them, the tiles, is the affair of the wing that
the file's kind has in ``kinds``. No layer and no network is named here.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeGuard, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitstream import (
    TILE_MAX,
    Header,
    Kind,
    Limits,
    pack,
)

from .colour import GREY, grey_pixels
from .decoder import Decoder, room_of
from .engines import torch_for, torch_if_loaded
from .guest import public
from .image import (
    DeepPicture,
    ImageError,
    Pixels,
    depth_used,
    metadata_of,
    open_picture,
    pixels_of,
)
from .info import Source, bytes_of
from .kinds import WINGS, Shelf
from .tiles import TILE, Progress, Region, box_of, ignore, tiles
from .together import ROOM

EFFORTS = range(10)

if TYPE_CHECKING:
    from torch import Tensor

Picture = Union[Image.Image, DeepPicture, NDArray[Any], "Tensor", bytes, str, os.PathLike[str], IO[bytes]]
"""Pillow's; or an array [H, W] or [H, W, C], uint8 with 1 to 4 channels or uint16 with 1, 3 or 4; or such a tensor
[C, H, W], on any device; or a picture's file: its path, its bytes or a binary file object. Only from a file can colour
of more than 8 bits be had with its metadata, and a gain map."""


class Codec(Decoder):
    """Compresses and decompresses; loads the weights when they are first needed.

    device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N". weights: exported files of any kinds, or one. New
    files are made with the first of their kind; others decode with those that they name. Both are looked for among the
    files given, then those that the environment variable VAECODEC_WEIGHTS names, then the packaged ones. Weights that
    are missing, damaged or not exact on the device raise WeightsError. tile: side of the tiles of new files, a multiple
    of 64 up to 2048. engine: what runs the networks, "onnx" or "torch"; "auto" is ONNX Runtime on a CPU, where it is
    installed and exact, else torch. Pixels are the same; lossy files may differ by some bytes.

    One codec may be used from several threads. It is pickled as its arguments: whoever receives it loads the weights
    anew, on the device that "auto" means there.

    ``progress`` of the methods is called after each tile, and within it where it is refined, with the number of pixels
    done since the last call. What it raises ends the work and reaches the caller: this is how to cancel.
    """

    @public
    def __init__(
        self,
        device: str = "auto",
        weights: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        *,
        tile: int = TILE,
        engine: str = "auto",
    ) -> None:
        given = [weights] if isinstance(weights, str | os.PathLike) else weights or ()
        paths = tuple(Path(path).absolute() for path in given)
        if tile not in range(64, TILE_MAX + 1, 64):
            raise ValueError(f"tile {tile} is no multiple of 64 up to {TILE_MAX}")
        self._arguments, self.tile = (device, paths), tile
        super().__init__(device, paths, engine)
        self._refining: Shelf | None = None

    def __reduce__(self) -> tuple[Callable[..., Codec], tuple[str, tuple[Path, ...]]]:
        return partial(Codec, tile=self.tile, engine=self.engine), self._arguments

    @property
    @public
    def lossy(self) -> Any:
        """The weights that lossy files are made with."""
        return self._shelf.first(Kind.LOSSY)

    @property
    @public
    def lossless(self) -> Any:
        """The weights that lossless files are made with."""
        return self._shelf.first(Kind.LOSSLESS)

    @public
    def compress(
        self,
        picture: Picture,
        quality: float = 75.0,
        progress: Progress | None = None,
        *,
        lossless: bool = False,
        fast: bool = False,
        depth: int | None = None,
        effort: int = 0,
        progressive: bool = False,
        limits: Limits | None = None,
    ) -> bytes:
        """The bytes of a ``.vae`` file.

        picture: a Pillow picture of integers, an array or tensor, or a file, see ``Picture``. quality: 0 (smallest) to
        100, in hundredths, of lossy files, which keep alpha without loss. fast: lossless without networks, several
        times as fast, in a few percent more bytes; 16-bit pictures are coded so in any case. depth: how many bits of
        16-bit samples are in use, 9 to 16; by default what the file says or, where it says nothing, what the largest
        sample takes. effort: 0 (fast) to 9 (small): the latents of lossy files are refined for this picture. 1 makes
        files about 1 % smaller at equal PSNR for ten times the time, some seconds a megapixel; 2 and more take minutes
        a megapixel, see ``refine``. Lossless tiles are coded in every way, not only in those that are worth a try.
        progressive: what is coarse comes first for all tiles, so that any part of the file can be drawn, see
        ``preview`` of ``decompress``; the whole file gives the same pixels, for some fifty bytes a tile. Tiles without
        networks come as they are. limits: by default ``Limits()``; what exceeds them, no reader with the same limits
        would accept. Equal pixels give equal bytes, whatever holds them. Metadata comes from the file, or from Pillow's
        ``info`` and Exif.

        Raises ImageError for pictures that are not supported, ValueError for a quality, depth or effort out of range,
        LimitError.
        """
        options = (quality, lossless, fast, depth, effort, progressive, limits)
        return self._begun(picture, *options, progress or ignore)[1]()

    def _begun(
        self,
        picture: Picture,
        quality: float,
        lossless: bool,
        fast: bool,
        depth: int | None,
        effort: int,
        progressive: bool,
        limits: Limits | None,
        progress: Progress,
    ) -> tuple[Header, Callable[[], bytes]]:
        """What a file will be, and the rest of the work: see ``compress``."""
        quality = float(quality)
        if not 0 <= quality <= 100:
            raise ValueError(f"quality {quality} is not in 0..100")
        if fast and not lossless:
            raise ValueError("fast is for lossless files")
        if effort not in EFFORTS:
            raise ValueError(f"effort {effort} is not in 0..{EFFORTS[-1]}")
        picture = opened(picture, limits)
        pixels = pixels_of(picture)
        grey = grey_pixels(pixels)
        pixels = grey or pixels
        sections = metadata_of(picture)  # PNG may have it after the pixels, which are loaded now
        kind = Kind.LOSSLESS if lossless else Kind.LOSSY
        shelf = self._refining_shelf() if effort and not lossless else self._shelf
        weights = None if fast else shelf.first(kind)
        hundredths = 0 if lossless else round(quality * 100)
        (limits or Limits()).check_size(pixels.width, pixels.height)
        used = bits_used(pixels, self.tile)
        depth = (depth or pixels.depth or used) if pixels.bits > 8 else 8
        size, colour = (pixels.width, pixels.height), GREY if grey else 0
        identity = bytes(16) if weights is None else weights.identity
        header = Header(kind, pixels.mode, *size, depth, hundredths, colour, self.tile, identity)
        (limits or Limits()).check(header)
        if used > depth:
            raise ImageError(f"the picture has samples of more than {depth} bits")

        def file() -> bytes:
            return pack(
                header, WINGS[kind].coder(weights).encode(pixels, header, effort, progress, progressive), sections
            )

        return header, file

    def _refining_shelf(self) -> Shelf:
        """Weights that latents are refined with, by gradients: torch's."""
        torch_for("effort above 0")
        if self._refining is None:
            self._refining = Shelf(self._shelf.given, self.device, "torch")
        return self._refining

    @public
    def compress_batch(
        self,
        pictures: Iterable[Picture],
        quality: float = 75.0,
        *,
        lossless: bool = False,
        fast: bool = False,
        depth: int | None = None,
        effort: int = 0,
        progressive: bool = False,
        limits: Limits | None = None,
    ) -> list[bytes]:
        """A file for each picture, byte for byte that of ``compress``.

        On a GPU pictures are coded at once, up to 16 megapixels of them and one more that is open, and so are the
        tiles of each: the exact networks of tiles of equal size run as one batch. The encoder's own, whose numbers
        might depend on the batch, run tile by tile, and ``effort`` picture by picture.

        pictures: a tensor [N, C, H, W], an array [N, H, W, C], or pictures of any kinds and sizes. Raises ImageError
        for a single picture.
        """
        if isinstance(pictures, Image.Image) or (
            (isinstance(pictures, np.ndarray) or is_tensor(pictures)) and pictures.ndim != 4
        ):
            shape = list(getattr(pictures, "shape", ()))
            raise ImageError(
                f"a batch is an array [N, H, W, C], a tensor [N, C, H, W] or a list of pictures, not {shape}"
            )
        options = (quality, lossless, fast, depth, effort, progressive, limits, ignore)
        begun = (self._begun(picture, *options) for picture in pictures)
        coded = self._each(lambda pair: pair[1](), begun, lambda pair: ROOM if effort else room_of(pair[0]))
        return [file() for file in coded]


_shared: dict[str, Codec] = {}


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
    fast: bool = False,
    effort: int = 0,
    progressive: bool = False,
    limits: Limits | None = None,
    device: str = "auto",
) -> bytes:
    """The bytes of a ``.vae`` file; see ``Codec.compress``."""
    return shared(device).compress(
        picture, quality, lossless=lossless, fast=fast, effort=effort, progressive=progressive, limits=limits
    )


@public
def decompress(
    data: Source,
    *,
    region: Region | None = None,
    preview: bool = False,
    limits: Limits | None = None,
    device: str = "auto",
) -> Image.Image:
    """The picture in a ``.vae`` file; see ``Codec.decompress``."""
    return shared(device).decompress(data, limits, region=region, preview=preview)


def opened(picture: Picture, limits: Limits | None) -> Image.Image | DeepPicture | NDArray[Any]:
    """What is no file, and no tensor, from what may be either."""
    if is_tensor(picture):
        return array_of(picture)
    if isinstance(picture, Image.Image | DeepPicture | np.ndarray):
        return picture
    return open_picture(io.BytesIO(bytes_of(picture)), limits)


def bits_used(pixels: Pixels, side: int) -> int:
    """How many bits of its samples a picture uses, looked at in tiles: 8, or 9 to 16."""
    if pixels.bits == 8:
        return 8
    whole = box_of(None, pixels.width, pixels.height)
    return max(depth_used(pixels[box.within(whole)]) for box in tiles(pixels.height, pixels.width, side))


def is_tensor(picture: object) -> TypeGuard[Tensor]:
    torch = torch_if_loaded()
    return torch is not None and isinstance(picture, torch.Tensor)


def array_of(picture: Tensor) -> NDArray[Any]:
    """An array [H, W, C] from a tensor [C, H, W]. Raises ImageError for other shapes and types."""
    import torch

    if picture.ndim != 3 or picture.dtype not in (torch.uint8, torch.uint16):
        raise ImageError(
            f"a tensor of {picture.dtype} {list(picture.shape)} is no picture: uint8 or uint16 [C, H, W]; "
            "compress_batch takes [N, C, H, W]"
        )
    array: NDArray[Any] = picture.permute(1, 2, 0).cpu().numpy()
    return array
