"""The wing of the linear codec, kind PCA: the third one, without networks. Its training is a benchmark's."""

from . import coder, weights

__all__ = ["coder", "weights"]
