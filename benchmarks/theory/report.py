"""What an experiment hands back, how spreads and verdicts are worded, and the files that show it."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import torch

A = TypeVar("A")
B = TypeVar("B")
Numbers = dict[str, Any]
EVALUATIONS = 8
"""Samples of a posterior in what is reported."""


@dataclass(frozen=True)
class Finding:
    """One experiment. name: of its figure's file; hypothesis: what was expected before it ran; caption: what was
    found, worded from ``numbers``, which hold everything that the figure draws."""

    name: str
    title: str
    hypothesis: str
    caption: str
    numbers: Numbers


@dataclass(frozen=True)
class Settings:
    """How much of everything; the defaults are the full run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    per_training_picture: int = 200  # patches
    per_picture: int = 240  # held-out patches
    linear_steps: int = 20000
    steps: int = 4000  # of each training
    batch: int = 64
    code_sizes: tuple[int, ...] = (2, 4, 8, 16, 32)
    lambdas: tuple[float, ...] = (0.0005, 0.0015, 0.0045, 0.0135)
    crops: int = 4  # of pictures, for what is measured on the shipped models
    lossless_side: int = 256  # pixels
    lossy_side: int = 128
    latents_side: int = 256  # of pictures that are mixed or drawn; a multiple of 64, as the one above
    qualities: tuple[int, ...] = (25, 50, 75, 100)
    lossy_steps: int = 60
    inference_patches: int = 128
    inference_steps: int = 400
    samples: int = 256  # of the importance-weighted bound
    processes: int = 2


def parallel(function: Callable[[A], B], arguments: Sequence[A], processes: int) -> list[B]:
    """The function of each argument, in order; with more than one process, each on one thread."""
    if processes == 1:
        return [function(argument) for argument in arguments]
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, arguments))


def spread(values: Sequence[float], form: str = ".2f", unit: str = "") -> str:
    """Mean and range: "1.5 dB (1.2 to 1.8)"."""
    low, mean, high = (format(value, form) for value in (min(values), fmean(values), max(values)))
    unit = f" {unit}" if unit else ""
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"


def verdict(*checks: bool) -> str:
    """How a caption begins: whether all, some or none of what was expected was found."""
    if all(checks):
        return "As expected."
    return "In part as expected." if any(checks) else "Contrary to what was expected."


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def band(axes: Any, x: Sequence[float], rows: Sequence[Sequence[float]], **style: Any) -> None:
    """Mean over seeds as a line and their range as a band. rows: for each seed its values over ``x``."""
    columns = list(zip(*rows, strict=True))
    (line,) = axes.plot(x, [fmean(column) for column in columns], **style)
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)


def write(findings: Sequence[Finding], settings: Settings, facts: Numbers, out: Path) -> None:
    """``theory.json`` and ``theory.md``. facts: what the run was made with, and how long it took."""
    record = {"settings": asdict(settings), **facts, "experiments": [asdict(finding) for finding in findings]}
    (out / "theory.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")
    lines = [
        "# The theory, as experiments",
        "",
        "Made by `python -m benchmarks theory`, captions included: they are worded from the numbers in "
        "`theory.json`. A mean is followed by its range, over seeds where something is trained, otherwise over "
        "pictures. " + "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".",
    ]
    for number, finding in enumerate(findings, 1):
        lines += ["", f"## {number}. {finding.title}", "", f"Expected: {finding.hypothesis}", ""]
        figure = next(out.glob(f"{finding.name}.[jp][pn]g"))  # photographs are JPEG files
        lines += [f"![{finding.title}]({figure.name})", "", finding.caption]
    (out / "theory.md").write_text("\n".join(lines) + "\n", "utf-8")
