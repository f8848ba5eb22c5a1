"""The kinds of model that can be trained."""

from __future__ import annotations

from .lossless import LosslessObjective
from .lossy import LossyObjective

OBJECTIVES: dict[str, type[LossyObjective] | type[LosslessObjective]] = {
    "lossy": LossyObjective,
    "lossless": LosslessObjective,
}
"""By the name that configurations, checkpoints and weights have for them."""
