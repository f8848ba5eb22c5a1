"""vaecodec: a learned image codec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Codec"]

if TYPE_CHECKING:
    from .codec import Codec


def __getattr__(name: str) -> Any:
    # torch takes a second to import: `vaecodec info` and `--help` do without.
    if name == "Codec":
        from .codec import Codec

        return Codec
    raise AttributeError(name)
