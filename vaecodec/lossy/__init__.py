"""The wing of lossy files: everything that knows the lossy model, but for its training."""

from . import coder, weights

__all__ = ["coder", "weights"]
