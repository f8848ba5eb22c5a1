"""The wing of lossy files: everything that knows the lossy model, but for its training."""

from . import coder

__all__ = ["coder"]
