"""What the linear codec has learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstream import Tables

from ..weights import Stored

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

KNOTS = 5  # qualities at which the weights are stored
TABLES, FIRST_OCTAVE = 60, 6  # four tables for each octave of the scale; below 2**6 / 2**14 steps all share table 0
LEVELS = 512  # magnitudes of which lengths and frequencies are kept


@dataclass(frozen=True)
class LinearWeights:
    """What the codec has learned.

    mean: float32 [3]. basis: float32 [192, 192], orthonormal columns, those of flat blocks first. weights: by name
    int16 [KNOTS, inputs, outputs]. components: int64 [KNOTS], how many are coded. shrink: int64 [TABLES, 4], by how
    much magnitudes of 0, 1, 2, more are reconstructed below their value, in 1/16 step. identity: 16 bytes.
    """

    mean: Floats
    basis: Floats
    weights: dict[str, Ints]
    components: Ints
    shrink: Ints
    tables: Tables
    identity: bytes

    def at(self, hundredths: int) -> dict[str, Floats]:
        """The weights for a quality, as whole numbers in float64."""
        position = hundredths * (KNOTS - 1)
        knot = min(position // 10_000, KNOTS - 2)
        above = position - 10_000 * knot
        weights = {}
        for name, knots in self.weights.items():
            low, high = knots[knot : knot + 2].astype(np.int64)
            weights[name] = ((low * (10_000 - above) + high * above + 5000) // 10_000).astype(np.float64)
        return weights

    def count(self, hundredths: int) -> int:
        """How many components a quality codes."""
        return int(self.components[-(-hundredths * (KNOTS - 1) // 10_000)])


def lengths_of(tables: Tables) -> Floats:
    """float32 [TABLES, LEVELS]: bits of each magnitude, sign included."""
    ids, magnitudes = np.indices((TABLES, LEVELS))
    return tables.bits(ids.ravel(), magnitudes.ravel()).astype(np.float32).reshape(ids.shape)


def load(stored: Stored, device: object) -> LinearWeights:
    """Raises KeyError, ValueError or TypeError for tensors that are not what they should be."""
    tensors: dict[str, NDArray[Any]] = {name: tensor.numpy() for name, tensor in stored.tensors.items()}
    tables = {name: tensors.pop(f"tables.{name}") for name in ("lows", "sizes", "counts", "escape")}
    return LinearWeights(
        mean=tensors.pop("mean"),
        basis=tensors.pop("basis"),
        components=tensors.pop("components").astype(np.int64),
        shrink=tensors.pop("shrink").astype(np.int64),
        tables=Tables.from_arrays(tables),
        weights=tensors,
        identity=stored.identity,
    )
