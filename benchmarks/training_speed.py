"""Megapixels a second that `vaecodec train` trains on, for each phase of a configuration."""

import time
from pathlib import Path

import numpy as np
import torch

from vaecodec.training.crops import Crops, load_images
from vaecodec.training.loop import begun, device_of, found_config, read_config
from vaecodec.training.objective import Phase
from vaecodec.training.steps import Trainer

WARM_UP = 2  # steps


def run(config: str, device_name: str, seconds: float, data: Path | None) -> None:
    """Train a new model for some seconds in each phase, on pictures or, without them, on noise."""
    objective, settings = read_config(found_config(config))
    device = device_of(device_name)
    torch.manual_seed(0)
    crops = Crops(load_images(data) if data else [noise(1024) for _ in range(4)], device)
    for phase in settings.phases:
        objective.check(phase, crops)
    trainer = begun(objective, settings, crops)
    if device.type == "cuda":
        trainer.capture(settings.phases)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{objective.name}, {sum(p.numel() for p in trainer.parameters) / 1e6:.2f} M weights, {where}")
    for phase in settings.phases:
        trainer.enter(phase)
        step = time_of_step(trainer, phase, seconds)
        kinds = "".join(f", {name}" for name in ("exact", "hard") if getattr(phase, name))
        pixels = phase.batch * phase.crop**2
        print(
            f"{phase.batch} crops of {phase.crop} pixels{kinds}: {step * 1e3:.1f} ms a step, "
            f"{pixels / step / 1e6:.3g} megapixels a second"
        )


def time_of_step(trainer: Trainer, phase: Phase, seconds: float) -> float:
    """Mean over so many seconds, at a rate of which nothing comes."""
    count, began = -WARM_UP, time.perf_counter()
    while count < 1 or time.perf_counter() - began < seconds:
        trainer.launch(phase, 1e-6)
        count += 1
        if count == 0:
            float(trainer.loss)  # waits for the device
            began = time.perf_counter()
    float(trainer.loss)
    return (time.perf_counter() - began) / count


def noise(side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side), np.uint8))
