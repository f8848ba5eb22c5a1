"""`vaecodec train`: training under a time budget, on a CPU, a GPU, or several under torchrun.

The learning rate warms up, stays, and decays over the last part of the time; the checkpoint from before the decay is
kept, because that is the one to go on from. What is minimised is in ``objectives.py``.
"""

from __future__ import annotations

import copy
import csv
import gc
import importlib
import math
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from . import lossless, model
from .crops import Crops, load_images
from .exact import Conv
from .objectives import Lossless, Lossy, Objective
from .ranks import mean
from .weights import load

AVERAGE_EVERY = 5  # steps; each update reads all weights


@dataclass(frozen=True)
class TrainConfig:
    """The [train] table of a configuration; ``decay`` and ``exact`` are parts of the time, at its end.

    ``batch`` is that of all processes together. ``lr`` is Adam's; ``muon``, if not 0, is Muon's for the hidden layers'
    matrices (Jordan et al. 2024). ``worn`` is that of ``Crops``.
    """

    batch: int = 8
    crop: int = 128
    worn: float = 0.0
    lr: float = 7e-4
    muon: float = 0.0
    warmup: int = 300
    decay: float = 0.35
    exact: float = 0.2
    ema: float = 0.999


def read_config(path: Path) -> tuple[Objective, TrainConfig]:
    """The two tables of a configuration. ``kind`` is "lossy" or "lossless". Raises ValueError for anything unknown."""
    table = tomllib.loads(path.read_text())
    settings: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in table.get("model", {}).items()
    }
    options = dict(table.get("train", {}))
    try:
        objective: Objective
        match settings.pop("kind", "lossy"):
            case "lossy":
                power = {key: options.pop(key) for key in ("loss_power",) if key in options}
                objective = Lossy(model.Config(**settings), **power)
            case "lossless":
                sizes = {key: options.pop(key) for key in ("coarse_batch", "coarse_crop") if key in options}
                objective = Lossless(lossless.Config(**settings), **sizes)
            case other:
                raise ValueError(f"{path}: unknown kind of model {other!r}")
        return objective, TrainConfig(**options)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None


def train(
    config_path: Path,
    data: Path,
    minutes: float,
    out: Path,
    *,
    val: Path | None = None,
    resume: Path | None = None,
    device_name: str = "auto",
    seed: int = 0,
) -> None:
    """Train for ``minutes`` and write to ``out``: last.pt, stable.pt, curve.csv.

    last.pt holds the whole state: ``resume`` with the one in ``out`` goes on exactly, clock included. stable.pt holds
    the weights before the decay in half precision: resumed, it starts a new run, as any other checkpoint and exported
    weights do. Under torchrun the processes share each batch and do what one would do: how many there are, which may
    change when a run is resumed, changes how sums are rounded and nothing else.
    """
    objective, config = read_config(config_path)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name == "cuda" and world > 1:
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(device_name)
    if world > 1:
        # Imported later, as optimisers do, it would keep the group for ever: as a default argument (torch 2.14).
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)  # the same on all ranks, as is all that they draw; see ranks.py
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    images = load_images(data)
    crops = Crops(images, config.crop, device, seed, config.worn)
    model: Any = objective.build()
    if resume is None:
        objective.start(model, crops)
    to_device: Any = model.to  # not all versions of torch declare memory_format
    to_device(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    run: nn.Module = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimisers = optimisers_of(model, config)
    step, spent = 0, 0.0
    if resume is not None:
        if resume.suffix == ".safetensors":
            state: dict[str, Any] = {"model": load(resume, device).model.state_dict()}
        else:
            state = torch.load(resume, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state.get("average", state["model"]))
        if "optim" in state and resume.parent.resolve() == out.resolve():
            step, spent = state["step"], state["spent"]
            for optimiser, kept in zip(optimisers, state["optim"], strict=True):
                optimiser.load_state_dict(kept)
            crops.generator.set_state(state["generator"].cpu())
            torch.set_rng_state(state["torch"].cpu())

    out.mkdir(parents=True, exist_ok=True)
    val_images = load_images(val) if val is not None and rank == 0 else []

    def keep_stable() -> None:
        half = {name: tensor.half().cpu() for name, tensor in average.state_dict().items()}
        torch.save({"model": half, "kind": objective.name, "config": asdict(objective.config)}, out / "stable.pt")

    def checkpoint() -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optim": [optimiser.state_dict() for optimiser in optimisers],
            "generator": crops.generator.get_state(),
            "torch": torch.get_rng_state(),
            "kind": objective.name,
            "config": asdict(objective.config),
            "step": step,
            "spent": spent,
        }
        torch.save(state, out / "last.pt.tmp")
        (out / "last.pt.tmp").replace(out / "last.pt")

    def validate() -> None:
        loss = float(np.mean(losses[-20:])) if losses else math.nan
        row = {"step": float(step), "minutes": spent / 60, "loss": loss}
        # One rank validates, and what it draws for that must not part its random numbers from the others'.
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=world > 1):
            row |= objective.validate(average, val_images, device)
        path = out / "curve.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" for k, v in row.items()})

    budget = minutes * 60
    last_save = last_log = spent
    kept_stable = spent > (1 - config.decay) * budget
    was_exact, losses = False, list[float]()
    for progress, clock in clocked(budget, spent, device, world):
        spent = clock
        exact = progress >= 1 - config.exact
        if exact != was_exact:
            was_exact = exact
            model.exact(exact)
            average.exact(exact)
        if progress >= 1 - config.decay and not kept_stable:
            kept_stable = True
            if rank == 0:
                keep_stable()
        rate = min(1.0, (step + 1) / config.warmup) * min(1.0, (1 - progress) / config.decay)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * rate

        with torch.autocast(device.type, torch.bfloat16):
            loss = objective.loss(run, crops, config.batch, device)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        if step % AVERAGE_EVERY == 0:
            keep = min(config.ema**AVERAGE_EVERY, step / (step + 10 * AVERAGE_EVERY))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

        if step % 50 == 0:
            losses.append(mean(loss.detach()))
        if rank == 0 and step % 200 == 0:
            print(f"{spent / 60:7.2f} min  step {step}  loss {np.mean(losses[-4:]):.4f}", flush=True)
        if rank == 0 and spent - last_save > 180:
            checkpoint()
            last_save = spent
        if rank == 0 and val_images and spent - last_log > max(120.0, budget / 12):
            validate()
            last_log = spent
    if rank == 0:
        spent = budget
        checkpoint()
        if val_images:
            validate()
            plot_curve(objective, out)
    if world > 1:
        # The group's threads end with it; one that outlives Python's own end now and then aborts the process.
        del run
        gc.collect()
        dist.destroy_process_group()


def optimisers_of(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Adam; and Muon, if wanted, for the matrices between activations."""
    matrices: list[nn.Parameter] = []
    if config.muon:
        matrices = [
            m.weight for m in model.modules() if isinstance(m, Conv) and not m.wide and min(m.weight.shape) >= 8
        ]
    kept = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.Adam(others, lr=config.lr, fused=True)]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=config.muon, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")
        optimisers.append(muon)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return optimisers


def plot_curve(objective: Objective, folder: Path) -> None:
    """curve.csv as curve.png. Needs matplotlib."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    with (folder / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(6, 4))
    objective.plot(axes, rows)
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def clocked(budget: float, spent: float, device: torch.device, world: int) -> Iterator[tuple[float, float]]:
    """(part of the budget used, seconds used) until it is used up; the same on all ranks."""
    last = time.monotonic()
    while True:
        now = time.monotonic()
        # A machine that slept, or a validation pass, must not eat the schedule in one bite.
        spent += min(now - last, 60.0)
        last = now
        if world > 1:
            shared = torch.tensor([spent], dtype=torch.float64, device=device)
            dist.broadcast(shared, 0)
            spent = float(shared)
        if spent >= budget:
            return
        yield spent / budget, spent
