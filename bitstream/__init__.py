"""Integers to bytes: probability tables, the ANS stack and the `.vae` container. See FORMAT.md.

This package knows no pixels and no networks; it accepts integer arrays only.
"""

from .bits_back import Parts, Record, bits_back, chain
from .coder import AnsStack, Codec, table_codec
from .container import (
    EXIF,
    HEADER_SIZE,
    ICC,
    IPTC,
    MAGIC,
    PNG,
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
from .plain import pop_plain, push_plain
from .tables import Tables, gaussian_tables, normalise

__all__ = [
    "EXIF",
    "HEADER_SIZE",
    "ICC",
    "IPTC",
    "MAGIC",
    "PNG",
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
