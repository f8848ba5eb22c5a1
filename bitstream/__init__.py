"""Integers to bytes: probability tables, the ANS stack and the `.vae` container. See FORMAT.md.

This package knows no pixels and no networks; it accepts integer arrays only.
"""

from .coder import AnsStack, Codec, table_codec
from .container import (
    EXIF,
    HEADER_SIZE,
    ICC,
    MAGIC,
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
from .tables import Tables, gaussian_tables, normalise

__all__ = [
    "EXIF",
    "HEADER_SIZE",
    "ICC",
    "MAGIC",
    "VERSION",
    "XMP",
    "AnsStack",
    "Codec",
    "Container",
    "CorruptError",
    "Header",
    "Kind",
    "LimitError",
    "Limits",
    "Mode",
    "Section",
    "Tables",
    "Tile",
    "TruncatedError",
    "VaeError",
    "VersionError",
    "gaussian_tables",
    "normalise",
    "pack",
    "read_header",
    "table_codec",
    "unpack",
]
