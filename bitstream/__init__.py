"""Integers to bytes: probability tables, the ANS stack and the `.vae` container. See FORMAT.md.

This package knows no pixels and no networks; it accepts integer arrays only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .container import (
    BITS_BACK,
    EXIF,
    GAIN,
    HEADER_SIZE,
    ICC,
    IPTC,
    MAGIC,
    NETWORK,
    PLAIN,
    PNG,
    RAW,
    ROUNDED,
    SPARSE,
    TILE_MAX,
    VERSION,
    XMP,
    Container,
    Header,
    Kind,
    Limits,
    Mode,
    Section,
    Tile,
    pack,
    read_header,
    unpack,
)
from .errors import CorruptError, LimitError, TruncatedError, VaeError, VersionError

if TYPE_CHECKING:
    from .bits_back import Depths, Parts, Record, bits_back, chain
    from .coder import AnsStack, Codec, table_codec
    from .plain import pop_plain, push_plain
    from .tables import NEAR, Tables, gaussian_tables, normalise

__all__ = [
    "BITS_BACK",
    "EXIF",
    "GAIN",
    "HEADER_SIZE",
    "ICC",
    "IPTC",
    "MAGIC",
    "NEAR",
    "NETWORK",
    "PLAIN",
    "PNG",
    "RAW",
    "ROUNDED",
    "SPARSE",
    "TILE_MAX",
    "VERSION",
    "XMP",
    "AnsStack",
    "Codec",
    "Container",
    "CorruptError",
    "Depths",
    "Header",
    "Kind",
    "LimitError",
    "Limits",
    "Mode",
    "Parts",
    "Record",
    "Section",
    "Tables",
    "Tile",
    "TruncatedError",
    "VaeError",
    "VersionError",
    "bits_back",
    "chain",
    "gaussian_tables",
    "normalise",
    "pack",
    "pop_plain",
    "push_plain",
    "read_header",
    "table_codec",
    "unpack",
]

_HOMES = {
    "bitstream.bits_back": ("Depths", "Parts", "Record", "bits_back", "chain"),
    "bitstream.coder": ("AnsStack", "Codec", "table_codec"),
    "bitstream.plain": ("pop_plain", "push_plain"),
    "bitstream.tables": ("NEAR", "Tables", "gaussian_tables", "normalise"),
}


def __getattr__(name: str) -> Any:
    # These need numpy, which `vaecodec info` and `--help` do without.
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(home)
            globals().update({other: getattr(module, other) for other in names})  # bits_back is a module's name as well
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
