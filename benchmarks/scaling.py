"""Time and peak memory of the command line, on one thread, over the number of pixels."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image, ImageOps

from .plots import save
from .speed import fresh_process

MEGAPIXELS = (1, 4, 9, 25, 100)
CELL = 1000
"""Pixels a side of one picture of the mosaic."""

# CPU seconds are those of this process alone; getrusage's peak is taken outside, see ``fresh_process``.
COMMAND = """
import resource, sys
from vaecodec.cli import main
main(sys.argv[2:], standalone_mode=False)
used = resource.getrusage(resource.RUSAGE_SELF)
open(sys.argv[1], "w").write(str(used.ru_utime + used.ru_stime))
"""


def mosaic(files: list[Path], megapixels: int) -> Image.Image:
    """A square of ``megapixels`` cells, each one picture cut and scaled to fill it."""
    side = round(megapixels**0.5)
    canvas = Image.new("RGB", (side * CELL, side * CELL))
    for place in range(side * side):
        with Image.open(files[place % len(files)]) as picture:
            cell = ImageOps.fit(picture.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)
        canvas.paste(cell, (place % side * CELL, place // side * CELL))
    return canvas


def measured(files: list[Path], megapixels: int, kind: list[str]) -> dict[str, Any]:
    """CPU seconds and peak MiB to compress and to decompress, each in a fresh process, start-up included."""
    with TemporaryDirectory() as folder:
        source, packed, decoded, seconds = (str(Path(folder, name)) for name in ("in.png", "x.vae", "x.ppm", "seconds"))
        mosaic(files, megapixels).save(source, compress_level=1)
        common = ("--device", "cpu", "--threads", "1", "--quiet")
        row: dict[str, Any] = {"megapixels": megapixels}
        for name, arguments in (
            ("compress", ("compress", source, "-o", packed, "--no-verify", *kind)),
            ("decompress", ("decompress", packed, "-o", decoded)),
        ):
            _, peak = fresh_process(COMMAND, seconds, *arguments, *common)
            row |= {f"{name} CPU seconds": round(float(Path(seconds).read_text()), 2), f"{name} MiB": round(peak)}
        row["bits per pixel"] = round(8 * Path(packed).stat().st_size / (megapixels * CELL**2), 4)
    return row


def run(files: list[Path], out: Path, megapixels: tuple[int, ...] = MEGAPIXELS) -> None:
    """Print a table, and write scaling.json and a figure into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, kind in (("lossy", []), ("lossless", ["--lossless"])):
        rows = results[name] = []
        for size in megapixels:
            rows.append(measured(files, size, kind))
            if size == megapixels[0]:
                print("| " + " | ".join(["", *rows[0]]) + " |\n|---" + "|--:" * len(rows[0]) + "|")
            print("| " + " | ".join([name, *map(str, rows[-1].values())]) + " |", flush=True)
    (out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, unit in zip(panels, ("CPU seconds", "MiB"), strict=True):
        for name, rows in results.items():
            for way, line in (("compress", "-o"), ("decompress", "--s")):
                x, y = ([row[key] for row in rows] for key in ("megapixels", f"{way} {unit}"))
                colour = "tab:blue" if name == "lossy" else "tab:orange"
                axes.plot(x, y, line, color=colour, markersize=4, label=f"{name}, {way}")
        axes.set(xlabel="megapixels", ylabel=f"{unit}, fresh process", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    save(figure, out / "scaling")
