"""From a trained model to the file that ships: entropy tables fitted to its latents, then integers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..kinds import load
from ..lossy.layers import PATCH
from ..weights import about, digest_of, read
from . import checkpoints
from .calibrate import round_encoder
from .crops import Crops, load_images
from .objective import FIT_SIDE

ENCODER_SIDE, ENCODER_BATCHES = 384, 16
"""Pixels of the crops, and batches of four, that g_a is rounded by."""


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
    add_graphs(out)


def add_rounded_encoder(path: Path, data: Path) -> None:
    """Put blocks of g_a in exported lossy weights in 8 bits, see ``calibrate``. Their identity stays, as it is the
    decoder's.

    data: training pictures.
    """
    from ..lossy.weights import encoder_of

    model = load(path, torch.device("cpu")).model
    crops = Crops(load_images(data), torch.device("cpu"))
    torch.manual_seed(3)
    side = min(ENCODER_SIDE, crops.largest())
    side -= side % PATCH
    round_encoder(model, ((crops.batch(4, side), crops.qualities(4)) for _ in range(ENCODER_BATCHES)))
    rewrite(path, {f"encoder.{name}": tensor for name, tensor in encoder_of(model).items()}, "encoder.")
    add_graphs(path)


def add_graphs(path: Path) -> None:
    """Write the graphs of its networks into an exported weights file, in place of those it has. Its identity stays."""
    from .. import graphs  # onnx is not needed for the rest
    from ..lossless import graphs as lossless
    from ..lossy import graphs as lossy

    wing = {"lossy": lossy, "lossless": lossless}[about(path).kind]
    model = load(path, torch.device("cpu")).model
    tensors = {name: torch.from_numpy(array) for name, array in read(path).tensors.items()}
    rewrite(path, graphs.stored_graphs(wing.graphs_of(model, tensors)), "graph")


def rewrite(path: Path, new: dict[str, Tensor], old: str) -> None:
    """Write tensors into a weights file in place of those whose names begin with ``old``."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        names = [name for name in file.keys() if not name.startswith(old)]  # noqa: SIM118
        tensors = {name: file.get_tensor(name).clone() for name in names}
    tensors |= {name: tensor.contiguous() for name, tensor in new.items()}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    metadata["digest"] = digest_of(arrays, metadata["config"]).hex()
    path.write_bytes(save(tensors, metadata))
