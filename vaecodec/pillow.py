"""Pillow opens and saves ``.vae`` files once this module is imported.

    import vaecodec.pillow                     # or: vaecodec.register_vae_opener()

    picture = Image.open("photo.vae")          # reads the header; pixels are decoded when they are first needed
    picture.save("copy.vae", quality=85)       # or lossless=True; exif=, icc_profile= and xmp= replace what was there

Nothing here imports torch before a picture is decoded or saved.
"""

from __future__ import annotations

import functools
import os
from numbers import Real
from typing import IO, TYPE_CHECKING, Any

from PIL import Image, ImageFile

from bitstream import MAGIC, VaeError, unpack

from .image import INFO_KEYS, carried, info_of, picture_of, refuse_deep_colour
from .info import UNLIMITED

if TYPE_CHECKING:
    from .codec import Codec

FORMAT = "VAE"

_codec: Codec | None = None


def register_vae_opener(codec: Codec | None = None) -> None:
    """Let Pillow open and save ``.vae`` files with a codec, by default the one that ``vaecodec.compress`` uses."""
    global _codec
    _codec = codec
    Image.register_open(FORMAT, VaeImageFile, _accept)
    Image.register_decoder(FORMAT, VaeDecoder)
    Image.register_save(FORMAT, _save)
    Image.register_save_all(FORMAT, _save_all)
    Image.register_extension(FORMAT, ".vae")
    Image.register_mime(FORMAT, "image/x-vae")
    if not hasattr(Image.Image.save, "__wrapped__"):
        Image.Image.save = _looking_first(Image.Image.save)  # type: ignore[method-assign]


def _chosen_codec() -> Codec:
    from .codec import shared

    return _codec or shared()


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


class VaeImageFile(ImageFile.ImageFile):
    """A ``.vae`` file of which only the header and the metadata have been read.

    Raises SyntaxError if it is none, so that Pillow tries other formats, and OSError if it is damaged, too new, or
    holds 16-bit colour. How many pixels are accepted is for ``Image.MAX_IMAGE_PIXELS`` to say.
    """

    format = FORMAT
    format_description = "vaecodec"

    def _open(self) -> None:
        assert self.fp is not None
        data = self.fp.read()
        if not _accept(data):
            raise SyntaxError("not a .vae file")
        try:
            container = unpack(data, UNLIMITED, partial=ImageFile.LOAD_TRUNCATED_IMAGES)
            refuse_deep_colour(container.header.mode)
        except VaeError as error:
            raise OSError(str(error)) from error
        header = container.header
        self._size = header.width, header.height
        self._mode = header.mode.name
        self.info |= info_of(container.sections)
        self.tile = [ImageFile._Tile(FORMAT, (0, 0, *self._size), 0, self._mode)]

    def load_seek(self, pos: int) -> None:
        """That it is there tells ``ImageFile.Parser`` to wait for the end of the file."""
        assert self.fp is not None
        self.fp.seek(pos)

    def verify(self) -> None:
        """Decodes the tiles, whose checksums are those of what they hold. Raises OSError if one fails."""
        assert self.fp is not None
        self.fp.seek(0)
        try:
            for _ in _chosen_codec().decode_tiles(self.fp, UNLIMITED):
                pass
        except VaeError as error:
            raise OSError(str(error)) from error
        super().verify()


class VaeDecoder(ImageFile.PyDecoder):
    """Decodes the whole file when Pillow asks for pixels. With ``ImageFile.LOAD_TRUNCATED_IMAGES`` damaged tiles stay
    black, and what there is of those that are cut off is drawn, as for ``preview`` of ``Codec.decompress``."""

    _pulls_fd = True

    def decode(self, buffer: Any) -> tuple[int, int]:
        assert self.fd is not None and self.im is not None
        cut = ImageFile.LOAD_TRUNCATED_IMAGES
        damaged = list[tuple[int, int, int, int]]() if cut else None
        tiles = _chosen_codec().decode_tiles(self.fd, UNLIMITED, damaged=damaged, preview=cut)
        try:
            for (x, y, width, height), samples in tiles:
                self.im.paste(picture_of(samples).im, (x, y, x + width, y + height))
        except VaeError as error:
            raise OSError(str(error)) from error
        return -1, 0


CODED = "vaecodec: bytes of the file"


def _looking_first(save: Any) -> Any:
    """Pillow empties the file that it writes to before it asks a plugin, and most of what can fail fails after that. So
    files of this format are made before Pillow opens anything."""

    @functools.wraps(save)
    def look_first(self: Image.Image, fp: Any, format: str | None = None, **params: Any) -> None:
        if isinstance(fp, str | bytes | os.PathLike) and _is_ours(fp, format):
            several = params.get("append_images") if params.get("save_all") is None else params["save_all"]
            if several:
                _refuse_frames(self, params)
            params |= {CODED: _coded(self, getattr(self, "encoderinfo", {}) | params)}
        try:
            save(self, fp, format, **params)
        finally:
            getattr(self, "_default_encoderinfo", {}).pop(CODED, None)

    return look_first


def _is_ours(path: str | bytes | os.PathLike[str], format: str | None) -> bool:
    if format:
        return format.upper() == FORMAT
    return os.path.splitext(os.fsdecode(path))[1].lower() == ".vae"


def _save(picture: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    options = picture.encoderinfo
    file.write(options[CODED] if CODED in options else _coded(picture, options))


def _coded(picture: Image.Image, options: dict[str, Any]) -> bytes:
    """Options: quality, lossless, effort and progressive as in ``Codec.compress``; exif (bytes or Image.Exif),
    icc_profile (bytes) and xmp (bytes or str) stand in for those of the picture's ``info``, None drops them. Others,
    which other formats know, are passed over, as Pillow's own formats do.

    Raises ValueError for options out of range, OSError for pictures that are not supported.
    """
    lossless, quality, effort = options.get("lossless", False), options.get("quality"), options.get("effort", 0)
    if lossless and quality is not None:
        raise ValueError("lossless keeps every pixel: it has no quality")
    if not isinstance(quality, Real | None):
        raise ValueError(f"quality {quality!r} is no number from 0 to 100")
    single = picture.copy()  # of several frames the current one, as Pillow has it
    single.info |= carried(picture)  # what Pillow keeps elsewhere
    for key in INFO_KEYS.values():
        if key in options:
            payload = options[key]
            payload = payload.tobytes() if isinstance(payload, Image.Exif) else payload
            if not isinstance(payload, bytes | str | None):
                raise ValueError(f"{key} is of type {type(payload).__name__}, not bytes")
            single.info[key] = payload
    try:
        return _chosen_codec().compress(
            single,
            75.0 if quality is None else float(quality),
            lossless=bool(lossless),
            effort=effort,
            progressive=bool(options.get("progressive", False)),
        )
    except VaeError as error:
        raise OSError(str(error)) from error


def _refuse_frames(picture: Image.Image, options: dict[str, Any]) -> None:
    if getattr(picture, "n_frames", 1) > 1 or list(options.get("append_images", ())):
        raise ValueError("several frames: a .vae file holds one picture")


def _save_all(picture: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    _refuse_frames(picture, picture.encoderinfo)
    _save(picture, file, name)


register_vae_opener()
