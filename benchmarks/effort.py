"""BD-rate and seconds of the lossy encoder by effort."""

import json
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image
from tqdm import tqdm

from vaecodec import Codec
from vaecodec.metrics import psnr

from .bd_rate import bd_rate
from .plots import save

QUALITIES = (20, 40, 60, 80)


def run(files: list[Path], out: Path, efforts: list[int]) -> None:
    """Print a table, and write effort.json and a figure into ``out``; the first effort is what the others are
    compared with."""
    out.mkdir(parents=True, exist_ok=True)
    codec, rows, curves = Codec("cpu"), list[dict[str, Any]](), list[list[tuple[float, float]]]()
    pictures = [Image.open(file).convert("RGB") for file in files]
    pixels = sum(picture.width * picture.height for picture in pictures)
    with tqdm(total=len(efforts) * len(QUALITIES) * len(pictures)) as bar:
        for effort in efforts:
            curve, seconds = list[tuple[float, float]](), 0.0
            for quality in QUALITIES:
                rates, qualities = list[float](), list[float]()
                for picture in pictures:
                    started = time.process_time()
                    data = codec.compress(picture, quality, effort=effort)
                    seconds += time.process_time() - started
                    rates.append(8 * len(data) / (picture.width * picture.height))
                    qualities.append(psnr(picture, codec.decompress(data)))
                    bar.update()
                curve.append((sum(rates) / len(rates), sum(qualities) / len(qualities)))
            curves.append(curve)
            change = bd_rate(curves[0], curve)
            assert change is not None
            rows.append(
                {
                    "effort": effort,
                    "BD-rate, %": round(change.percent, 2),
                    "CPU seconds a megapixel": round(seconds * 1e6 / (pixels * len(QUALITIES)), 2),
                }
            )
    print("| " + " | ".join(rows[0]) + " |\n|" + "--:|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    facts = {"pictures": [file.name for file in files], "threads": torch.get_num_threads(), "efforts": rows}
    (out / "effort.json").write_text(json.dumps(facts, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.plot(
        [row["CPU seconds a megapixel"] for row in rows], [row["BD-rate, %"] for row in rows], "-o", color="black"
    )
    for row in rows:
        place = row["CPU seconds a megapixel"], row["BD-rate, %"]
        axes.annotate(f"effort {row['effort']}", place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="CPU seconds a megapixel", ylabel=f"BD-rate against effort {efforts[0]}, %", xscale="log")
    axes.grid(alpha=0.3)
    save(figure, out / "effort")
