"""From a trained model to the file that ships: entropy tables fitted to its latents, then integers."""

from __future__ import annotations

from pathlib import Path

import torch

from ..lossy.layers import PATCH
from . import checkpoints
from .crops import Crops, load_images
from .objective import FIT_SIDE


def export(checkpoint: Path, data: Path, out: Path) -> None:
    """Write the weights file for a checkpoint, of its averaged weights.

    data: training pictures to fit the tables on. Raises WeightsError if the file is no checkpoint, ValueError if there
    are no pictures or the weights do not fit into integers.
    """
    state = checkpoints.opened(checkpoint, torch.device("cpu"))
    objective, model = checkpoints.model_of(state, checkpoint)
    crops = Crops(load_images(data), torch.device("cpu"))
    side = min(FIT_SIDE, crops.largest())
    torch.manual_seed(2)  # for crops and latents
    if checkpoints.lacks_units(state):
        objective.calibrate(model, crops, side - side % PATCH)
    objective.export(out, model, crops, side)
