"""`vaecodec train`: training under a time budget, on a CPU, a GPU, or several under torchrun.

The learning rate warms up, stays, and decays over the last part of the time; the checkpoint from before the decay is
kept, because that is the one to go on from. What is minimised is in ``lossy.py`` and ``lossless.py``, what a
step is in ``steps.py``.
"""

from __future__ import annotations

import importlib
import math
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
import torch.distributed as dist

from . import checkpoints, ranks
from .crops import Crops, keep_large, load_images
from .objective import Objective, Phase
from .objectives import OBJECTIVES
from .steps import JUDGE_EVERY, Trainer, UnsoundError

SAVE_EVERY, SAY_EVERY = 180.0, 10.0  # seconds
LOOK_EVERY = {"cpu": 1, "cuda": 50}
"""Steps; to look at the loss is to wait for it."""

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class TrainConfig:
    """The [train] table of a configuration.

    ``phases`` follow one another; what one does not say of its batch and crop, ``batch`` and ``crop`` say. ``batch`` is
    that of all processes together. ``lr`` is Adam's; ``soap``, if not 0, that of SOAP for the layers' matrices.
    ``decay`` is a part of the time, at its end. ``ema``: of the weights, at each step.
    """

    batch: int = 8
    crop: int = 128
    phases: tuple[Phase, ...] = ()
    lr: float = 7e-4
    soap: float = 0.0
    warmup: int = 300
    decay: float = 0.35
    ema: float = 0.999

    def phase(self, progress: float) -> Phase:
        """That of a part of the time."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])

    def rate(self, step: int, progress: float) -> float:
        """What part of the learning rates a step gets."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * min(1.0, (1 - progress) / max(self.decay, 1e-9))


def found_config(name: str) -> Path:
    """A .toml file, or the packaged one of a name without a suffix."""
    path = Path(name)
    return path if path.suffix else Path(__file__).parent.parent / "configs" / f"{name}.toml"


def read_config(path: Path) -> tuple[Objective, TrainConfig]:
    """The two tables of a configuration. ``kind`` is "lossy" or "lossless". Raises ValueError for anything unknown."""
    try:
        table = tomllib.loads(path.read_text())
        settings, options = dict(table.get("model", {})), dict(table.get("train", {}))
        kind = settings.pop("kind", "lossy")
        objective_of: Any = OBJECTIVES.get(kind)
        if objective_of is None:
            raise ValueError(f"unknown kind of model {kind!r}")
        of_model: Any = filled(objective_of.configuration, settings)
        own = {f.name: options.pop(f.name) for f in fields(objective_of) if f.name in options}
        objective: Objective = filled(objective_of, {"config": of_model, **own})
        common = filled(TrainConfig, {**options, "phases": ()})
        phases = options.get("phases", [{}])
        if not (isinstance(phases, list) and phases and all(isinstance(phase, dict) for phase in phases)):
            raise TypeError("phases are tables, [[train.phases]]")
        whole = {"batch": common.batch, "crop": common.crop}
        config = replace(common, phases=tuple(filled(Phase, {**whole, **phase}) for phase in phases))
        ends = [0.0, *(phase.until for phase in config.phases)]
        if ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError("phases end one after the other (until), the last at 1")
        return objective, config
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def filled(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """A dataclass of settings, of which each has the type of its default. Raises TypeError, ValueError."""
    settings = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    for name in values:
        value, default = getattr(settings, name), getattr(cls, name, None)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if default is not None and not (isinstance(value, type(default)) or (isinstance(default, float) and number)):
            raise TypeError(f"{name} = {value!r} is no {type(default).__name__}")
        if number and (value < 0 or not math.isfinite(value) or (value == 0 and name in ("batch", "crop"))):
            raise ValueError(f"{name} = {value} is out of range")
    return settings


def device_of(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises ValueError for others, and where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in LOOK_EVERY:
            raise ValueError("training runs on cpu and cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's own words
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False  # what it measures is not what is fast inside a graph
    return device


def train(
    config_path: Path,
    data: Path,
    minutes: float,
    out: Path,
    *,
    val: Path | None = None,
    resume: Path | None = None,
    overwrite: bool = False,
    device_name: str = "auto",
    seed: int = 0,
) -> None:
    """Train for ``minutes`` and write to ``out``: last.pt, stable.pt, curve.csv.

    last.pt holds the whole state: ``resume`` with the one in ``out`` goes on exactly, clock included. stable.pt holds
    the weights before the decay in half precision: resumed, it starts a new run, as any other checkpoint and exported
    weights do. Under torchrun the processes share each batch and do what one would do: how many there are, which may
    change when a run is resumed, changes how sums are rounded and nothing else.

    Raises ValueError, OSError or VaeError before the first step for what cannot be trained, and UnsoundError, with
    sound weights in last.pt, where the loss is not finite any more.
    """
    objective, config = read_config(config_path)
    device = device_of(device_name)
    state = None if resume is None else checkpoints.read(resume, objective, device)
    folder = checkpoints.Folder(out, objective)
    folder.refuse_to_replace(resume, overwrite)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # Imported later, as optimisers do, it would keep the group for ever: as a default argument (torch 2.14).
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)  # the same on all ranks, as is all that they draw; see ranks.py
    crops = Crops(load_images(data, quiet=rank > 0), device)
    for phase in config.phases:
        objective.check(phase, crops)
    val_images = []
    if val is not None and rank == 0:
        val_images = keep_large(load_images(val), objective.stride, "validation")

    trainer = begun(objective, config, crops, state)
    spent = 0.0
    if state is not None and folder.goes_on(resume, state):
        trainer.load_state_dict(state)
        spent = state["spent"]
        set_random_state(state["random"], device)
    elif rank == 0:
        folder.begin(keep=resume)

    def say(line: str) -> None:
        if rank == 0:
            click.echo(line)

    weights = sum(p.numel() for p in trainer.parameters)
    say(f"{objective.name}: {weights / 1e6:.2f} M weights, {crops.described()}, on {device}")
    for side in sorted({phase.crop for phase in config.phases if crops.smaller(phase.crop)}):
        say(f"{crops.smaller(side)} pictures are smaller than {side} pixels: left out of crops of that size")
    if device.type == "cuda" and world == 1:
        trainer.capture(config.phases)

    budget = minutes * 60
    last_save = last_log = spent
    last_said = -math.inf
    kept_stable = spent > (1 - config.decay) * budget
    losses = list[float]()

    def checkpoint() -> None:
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        folder.save({**trainer.state_dict(), "random": random, "spent": spent})

    def validate() -> None:
        loss = float(np.mean(losses[-20:])) if losses else math.nan
        row = {"step": float(trainer.steps), "minutes": spent / 60, "loss": loss}
        # What is drawn to validate must not change what is drawn to train; on other ranks nothing is.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            row |= objective.validate(trainer.average, val_images, device)
        folder.log(row)

    try:
        for progress, clock in clocked(budget, spent, device, world):
            spent = clock
            if (phase := config.phase(progress)) != trainer.phase:
                trainer.enter(phase)
            if progress >= 1 - config.decay and not kept_stable:
                kept_stable = True
                if rank == 0:
                    folder.save_stable(trainer.average)
            trainer.launch(phase, config.rate(trainer.steps, progress))
            if trainer.steps % LOOK_EVERY[device.type]:
                continue
            losses.append(trainer.check())
            if trainer.steps % JUDGE_EVERY == 0 and (word := trainer.judge()):
                say(word)
            if spent - last_said > SAY_EVERY:
                say(f"{spent / 60:7.2f} of {minutes:g} min  step {trainer.steps}  loss {np.mean(losses[-20:]):.4f}")
                last_said = spent
            if rank == 0 and spent - last_save > SAVE_EVERY:
                checkpoint()
                last_save = spent
            if val_images and spent - last_log > max(120.0, budget / 12):
                validate()
                last_log = spent
        trainer.check()
        spent = budget
        if not any(phase.exact for phase in config.phases):
            trainer.calibrate(config.phases[-1].crop)  # for the export
    except UnsoundError:
        if not any(phase.exact for phase in config.phases):
            trainer.calibrate(config.phases[-1].crop)
        if rank == 0:
            checkpoint()
            if not kept_stable:
                folder.save_stable(trainer.average)
        raise
    if rank == 0:
        checkpoint()
        if val_images:
            validate()
            folder.plot()
    say(f"{minutes:7.2f} of {minutes:g} min  step {trainer.steps}  done")
    if world > 1:
        # The group's threads end with it; one that outlives Python's own end now and then aborts the process.
        dist.destroy_process_group()


def begun(objective: Objective, config: TrainConfig, crops: Crops, state: dict[str, Any] | None = None) -> Trainer:
    """The trainer of a new model, or of the weights of a checkpoint."""
    network: Any = objective.build()
    if state is None:
        objective.start(network, crops, config.phases[0].crop)
    else:
        network.load_state_dict(state["model"], strict=False)  # units may be missing: see ``checkpoints.read``
    network.to(crops.device, memory_format=torch.channels_last)
    ranks.alike([p.detach() for p in network.parameters()])
    trainer = Trainer(objective, network, crops, lr=config.lr, soap=config.soap, ema=config.ema)
    if state is not None:
        trainer.average.load_state_dict(state.get("average", state["model"]), strict=False)
        if checkpoints.lacks_units(state):
            trainer.calibrate(config.phases[0].crop)
    return trainer


def set_random_state(random: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(random["cpu"].cpu())
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"].cpu(), device)


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
