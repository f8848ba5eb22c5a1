"""The wing of lossless files: everything that knows the lossless model, but for its training."""

from . import coder, weights

__all__ = ["coder", "weights"]
