"""The folder of a training run, and what `--resume` and `vaecodec export` take."""

from __future__ import annotations

import csv
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..exact import ExactConv
from ..kinds import load
from ..lossy.layers import CentredBlock
from ..weights import WeightsError, about
from .objective import Objective
from .objectives import OBJECTIVES

LAST, STABLE, CURVE = "last.pt", "stable.pt", "curve.csv"


class Folder:
    """Where a run is written: last.pt, stable.pt, curve.csv and, if matplotlib is there, curve.png."""

    def __init__(self, path: Path, objective: Objective) -> None:
        self.path, self.objective = path, objective

    def refuse_to_replace(self, resume: Path | None, overwrite: bool) -> None:
        """Raises ValueError if the folder holds a run and the new one neither goes on with it nor may replace it."""
        held = [name for name in (LAST, STABLE, CURVE) if (self.path / name).exists()]
        if held and not overwrite and not (resume is not None and same(resume, self.path / LAST)):
            raise ValueError(
                f"{self.path} holds a run ({', '.join(held)}): --resume {self.path / LAST} goes on with it, "
                "--overwrite begins anew, --out names another folder"
            )

    def goes_on(self, resume: Path | None, state: dict[str, Any]) -> bool:
        """Whether a checkpoint is this run's own, whose clock goes on. Raises ValueError if it cannot."""
        own = resume is not None and same(resume, self.path / LAST)
        if own and "guard" not in state:
            raise ValueError(f"{resume} is no whole state of a run: --out another folder begins one from its weights")
        return own

    def begin(self, keep: Path | None) -> None:
        """Make the folder, and empty it of an earlier run."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (LAST, STABLE, CURVE, "curve.png"):
            if keep is None or not same(keep, self.path / name):
                (self.path / name).unlink(missing_ok=True)

    def save(self, state: dict[str, Any]) -> None:
        """last.pt, which is whole at any time."""
        temporary = self.path / f"{LAST}.tmp"
        torch.save(self.described(state), temporary)
        temporary.replace(self.path / LAST)

    def save_stable(self, average: nn.Module) -> None:
        half = {name: tensor.half().cpu() for name, tensor in average.state_dict().items()}
        torch.save(self.described({"model": half}), self.path / STABLE)

    def described(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "kind": self.objective.name, "config": asdict(self.objective.config)}

    def log(self, row: dict[str, float]) -> None:
        """A row of curve.csv."""
        path = self.path / CURVE
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" for k, v in row.items()})

    def plot(self) -> None:
        """curve.csv as curve.png. Needs matplotlib."""
        try:
            from matplotlib import pyplot as plt
        except ImportError:
            return
        with (self.path / CURVE).open(newline="") as file:
            rows = list(csv.DictReader(file))
        figure, axes = plt.subplots(figsize=(6, 4))
        self.objective.plot(axes, rows)
        figure.savefig(self.path / "curve.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def read(path: Path, objective: Objective, device: torch.device) -> dict[str, Any]:
    """The state of a checkpoint or of exported weights, to train on with the objective's model.

    Raises WeightsError for what is neither, ValueError for a model that is not the objective's.
    """
    exported = path.suffix == ".safetensors"
    state = thawed(load(path, device).model, about(path).kind) if exported else opened(path, device)
    name, config = state["kind"], asdict(model_of(state, path)[1].config)
    wanted = asdict(objective.config)
    if name != objective.name:
        raise ValueError(f"{path} holds a {name} model, and the configuration is of a {objective.name} one")
    others = [f"{key} {config.get(key)} for {value}" for key, value in wanted.items() if config.get(key) != value]
    if others:
        raise ValueError(f"{path} holds a model of another configuration: {', '.join(others)}")
    return state


def opened(path: Path, device: torch.device) -> dict[str, Any]:
    """What a training run has saved. Raises WeightsError for other files."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return {"kind": "lossy", **state, "model": dict(state["model"]), "config": dict(state["config"])}
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever junk makes torch raise
        raise WeightsError(f"{path} is no checkpoint of a training run, with its model and configuration") from None


def lacks_units(state: dict[str, Any]) -> bool:
    """Whether a lossy model's 8-bit layers have not been calibrated: it was trained before there were any."""
    return state["kind"] == "lossy" and not any(name.endswith("_units") for name in state["model"])


def thawed(frozen: Any, kind: str) -> dict[str, Any]:
    """The state of exported weights, as floating-point numbers."""
    tensors = {name: tensor.float() for name, tensor in frozen.state_dict().items()}
    for name, layer in frozen.named_modules():
        if isinstance(layer, ExactConv):
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = layer.thawed()
    for name, block in frozen.named_modules():  # g_a and h_a are trained in floating point
        if isinstance(block, CentredBlock):
            tensors[f"{name}.conv_3.weight"], tensors[f"{name}.conv_3.bias"] = block.whole()
    if kind == "lossy":
        rounded = re.compile(r"[gh]_a\..*(_units|\.(around|centre)\.\w+)")
        tensors = {name: tensor for name, tensor in tensors.items() if not rounded.fullmatch(name)}
    return {"model": tensors, "kind": kind, "config": asdict(frozen.config)}


def model_of(state: dict[str, Any], path: Path) -> tuple[Objective, Any]:
    """What a checkpoint was trained for, and its averaged model. Raises WeightsError if its tensors do not fit its
    configuration."""
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()}
    try:
        of_kind: Any = OBJECTIVES[state["kind"]]
        objective: Objective = of_kind(of_kind.configuration(**settings))
        built: Any = objective.build()
        found = built.load_state_dict(state.get("average", state["model"]), strict=False)
        # Units are set where there are none: see calibrate.py.
        missing = [name for name in found.missing_keys if not name.endswith("_units")]
        if missing or found.unexpected_keys:
            raise ValueError(f"{len(missing)} tensors are missing, {len(found.unexpected_keys)} are unknown")
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} does not fit its own configuration: {reason}") from None
    return objective, built
