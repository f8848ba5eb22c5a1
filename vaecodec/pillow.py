"""Pillow opens and saves ``.vae`` files once this module is imported.

    import vaecodec.pillow                     # or: vaecodec.register_vae_opener()

    picture = Image.open("photo.vae")          # reads the header; pixels are decoded when they are first needed
    picture.save("copy.vae", quality=85)       # or lossless=True; exif=, icc_profile= and xmp= replace what was there

Nothing here imports torch before a picture is decoded or saved.
"""

from __future__ import annotations

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
            container = unpack(data, UNLIMITED)
            refuse_deep_colour(container.header.mode)
        except VaeError as error:
            raise OSError(str(error)) from error
        header = container.header
        self._size = header.width, header.height
        self._mode = header.mode.name
        self.info |= info_of(container.sections)
        self.tile = [ImageFile._Tile(FORMAT, (0, 0, *self._size), 0, self._mode)]


class VaeDecoder(ImageFile.PyDecoder):
    """Decodes the whole file when Pillow asks for pixels."""

    _pulls_fd = True

    def decode(self, buffer: Any) -> tuple[int, int]:
        assert self.fd is not None and self.im is not None
        try:
            for (x, y, width, height), samples in _chosen_codec().decode_tiles(self.fd, UNLIMITED):
                self.im.paste(picture_of(samples).im, (x, y, x + width, y + height))
        except VaeError as error:
            raise OSError(str(error)) from error
        return -1, 0


OPTIONS = {"lossless": False, "quality": None, "effort": 0}


def _save(picture: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    """Options: quality, lossless and effort as in ``Codec.compress``; exif (bytes or Image.Exif), icc_profile (bytes)
    and xmp (bytes or str) stand in for those of the picture's ``info``, None drops them.

    Raises ValueError for options that are unknown or out of range, OSError for pictures that are not supported.
    """
    options = dict(picture.encoderinfo)
    lossless, quality, effort = (options.pop(*option) for option in OPTIONS.items())
    if lossless and quality is not None:
        raise ValueError("lossless keeps every pixel: it has no quality")
    if not isinstance(quality, int | float | None):
        raise ValueError(f"quality {quality!r} is no number from 0 to 100")
    single = picture.copy()  # of several frames the current one, as Pillow has it
    single.info |= carried(picture)  # what Pillow keeps elsewhere
    for key in INFO_KEYS.values():
        if key in options:
            payload = options.pop(key)
            payload = payload.tobytes() if isinstance(payload, Image.Exif) else payload
            if not isinstance(payload, bytes | str | None):
                raise ValueError(f"{key} is of type {type(payload).__name__}, not bytes")
            single.info[key] = payload
    if options:
        raise ValueError(f"unknown option {min(options)}: there are {', '.join([*OPTIONS, *INFO_KEYS.values()])}")
    try:
        data = _chosen_codec().compress(single, 75 if quality is None else quality, lossless=lossless, effort=effort)
    except VaeError as error:
        raise OSError(str(error)) from error
    file.write(data)


def _save_all(picture: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    others = picture.encoderinfo.pop("append_images", ())
    if getattr(picture, "n_frames", 1) > 1 or list(others):
        raise ValueError("several frames: a .vae file holds one picture")
    _save(picture, file, name)


register_vae_opener()
