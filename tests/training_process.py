"""Training whose clock counts steps, in a test or as a process of its own: CONFIG DATA OUT STEPS [CHECKPOINT]."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vaecodec.training import loop as train
from vaecodec.training import lossless
from vaecodec.training.steps import Trainer

TINY_CONFIG = Path(__file__).parent / "golden" / "tiny.toml"
SECONDS = 200.0  # a step, by this clock: more than lies between two checkpoints


def minutes(steps: int) -> float:
    return (steps + 1) * SECONDS / 60


def counted(budget: float, spent: float, *_: object) -> Iterator[tuple[float, float]]:
    """In place of ``train.clocked``."""
    while (spent := spent + SECONDS) < budget:
        yield spent / budget, spent


def losses_of(config: Path, data: Path, out: Path, steps: int, resume: Path | None = None) -> list[float]:
    """Train; the loss of each step, of all processes together."""
    losses = []

    def recorded(trainer: Trainer) -> float:
        losses.append(float(trainer.loss))
        return check(trainer)

    check = Trainer.check
    with (
        patch.object(train, "clocked", counted),
        patch.object(lossless, "LINEAR_CROPS", 8),
        patch.object(Trainer, "check", recorded),
    ):
        train.train(config, data, minutes(steps), out, device_name="cpu", resume=resume)
    return losses[:-1]  # the last is looked at once more


def run(data: Path, out: Path, steps: int, config: Path = TINY_CONFIG, **options: Any) -> dict[str, Any]:
    train.train(config, data, minutes(steps), out, device_name="cpu", **options)
    return state_of(out / "last.pt")


def state_of(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def equal(a: dict[str, Any], b: dict[str, Any], *parts: str) -> bool:
    return all(torch.equal(a[part][name], b[part][name]) for part in parts for name in a[part])


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, data, out, steps, *resume = sys.argv[1:]
    losses = losses_of(Path(config), Path(data), Path(out), int(steps), *map(Path, resume))
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(losses))
