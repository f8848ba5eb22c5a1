"""vaecodec: a learned image codec.

``compress`` and ``decompress`` are all that most programs need; ``Codec`` does the same with other weights, for arrays
and for tensors.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it: typing takes longer to import than all else that is needed here

# Threads of torch that wait for work spin, by default, and on a busy machine take the time of those that have some. The
# library that starts them reads this once, when torch is imported.
if "torch" not in sys.modules and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

__version__ = "0.4.0"
__all__ = [
    "Codec",
    "CorruptError",
    "ImageError",
    "Info",
    "LimitError",
    "Limits",
    "TruncatedError",
    "VaeError",
    "VersionError",
    "WeightsError",
    "compress",
    "compress_to",
    "decompress",
    "read_info",
    "register_vae_opener",
]

if TYPE_CHECKING:
    from bitstream import CorruptError, LimitError, Limits, TruncatedError, VaeError, VersionError

    from .codec import Codec, compress, decompress
    from .image import ImageError
    from .info import Info, read_info
    from .pillow import register_vae_opener
    from .targets import compress_to
    from .weights import WeightsError

_HOMES = {
    "bitstream": ("CorruptError", "LimitError", "Limits", "TruncatedError", "VaeError", "VersionError"),
    "vaecodec.codec": ("Codec", "compress", "decompress"),
    "vaecodec.image": ("ImageError",),
    "vaecodec.info": ("Info", "read_info"),
    "vaecodec.pillow": ("register_vae_opener",),
    "vaecodec.targets": ("compress_to",),
    "vaecodec.weights": ("WeightsError",),
}


def __getattr__(name: str) -> object:
    # torch takes a second to import: `vaecodec info` and `--help` do without.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
