"""Training and export."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .group import main


@main.command()
@click.argument("config")
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), required=True, help="Time to train.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for what is written. Default: runs/CONFIG.")
@click.option("--val", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Pictures to validate on.")
@click.option("--resume", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Checkpoint or weights.")
@click.option("--overwrite", is_flag=True, help="Begin anew in a folder that holds a run.")
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
def train(
    config: str,
    data: Path,
    minutes: float,
    out: Path | None,
    val: Path | None,
    resume: Path | None,
    overwrite: bool,
    device: str,
    threads: int | None,
    seed: int,
) -> None:
    """Train CONFIG, a .toml file, or `lossy` or `lossless` for the packaged ones.

    Writes checkpoints, curve.csv and, at the end, the exported weights, CONFIG.safetensors, to --out. The same command
    works under torchrun. What is no picture in --data and --val is named and left out, hidden files are passed over.
    Where the loss is not finite any more, training stops, the last sound weights are exported, and the exit code is 1.
    """
    need_to_train()
    import torch

    from ..training import loop
    from ..training.steps import UnsoundError

    if threads:
        torch.set_num_threads(threads)
    path = loop.found_config(config)
    out = out or Path("runs") / path.stem
    unsound = None
    try:
        loop.train(path, data, minutes, out, val=val, resume=resume, overwrite=overwrite, device_name=device, seed=seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except UnsoundError as error:
        unsound = error
    if int(os.environ.get("RANK", "0")) == 0:
        exported(out / "last.pt", data, out / f"{path.stem}.safetensors")
    if unsound is not None:
        raise unsound


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def export(checkpoint: Path, data: Path, output: Path) -> None:
    """Turn a training CHECKPOINT into a weights file, its entropy tables fitted to the pictures in --data."""
    if not output.parent.is_dir():
        raise click.UsageError(f"{output.parent}: no such folder")
    exported(checkpoint, data, output)


@main.command()
@click.argument("weights", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def quantise(weights: Path, data: Path, output: Path) -> None:
    """Write lossless WEIGHTS with levels of 8 bits in place of 16, rounded by the pictures in --data.

    They code nearly as well and run twice as fast.
    """
    need_to_train()
    from ..training.export import add_graphs
    from ..training.quantise import quantise

    if not output.parent.is_dir():
        raise click.UsageError(f"{output.parent}: no such folder")
    try:
        quantise(weights, data, output)
    except ValueError as error:
        raise click.ClickException(f"{weights}: {error}") from None
    add_graphs(output)


def need_to_train() -> None:
    """At once, not when there is something to export."""
    from ..engines import need

    for name in ("torch", "onnx"):
        need(name, "training", "train")


def exported(checkpoint: Path, data: Path, output: Path) -> None:
    """Write the weights file of a checkpoint; one line where its numbers do not fit into one."""
    need_to_train()
    from ..training.export import export

    try:
        export(checkpoint, data, output)
    except ValueError as error:
        raise click.ClickException(f"{checkpoint}: {error}") from None
