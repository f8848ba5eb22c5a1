"""The same pictures with 8, 10, 12 and 16 bits a sample: what finer levels cost, and what they give."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vaecodec import Codec

from .pictures import open_picture

DEPTHS = (8, 10, 12, 16)
QUALITIES = (25.0, 50.0, 75.0, 100.0)
FILTER = np.array([1, 3, 3, 1]) / 8
Floats = NDArray[np.float64]


def halved(samples: NDArray[np.uint8]) -> Floats:
    """A picture [H, W, 3] of 8 bits at half its resolution, 0 to 1: sums of 16 samples have levels of 14 bits."""
    found: Floats = samples / 255
    for axis in (0, 1):
        found = np.moveaxis(found, axis, 0)
        count = len(found) // 2 - 1
        found = np.moveaxis(sum(weight * found[k : k + 2 * count : 2] for k, weight in enumerate(FILTER)), 0, axis)
    return found


def psnr(x: Floats, y: Floats) -> float:
    """dB of samples from 0 to 1."""
    return -10 * math.log10(float(((x - y) ** 2).mean()))


def run(files: list[Path], out: Path) -> None:
    """Print a table of means over pictures and write depth.json into ``out``."""
    codec, rows = Codec("cpu"), list[dict[str, Any]]()
    pictures = [halved(np.asarray(open_picture(file).image)) for file in files]
    with tqdm(total=len(QUALITIES) * len(DEPTHS) * len(pictures)) as bar:
        for quality in QUALITIES:
            for depth in DEPTHS:
                bpp, own, true = list[float](), list[float](), list[float]()
                for picture in pictures:
                    peak = 2**depth - 1
                    samples = np.rint(picture * peak).astype(np.uint8 if depth == 8 else np.uint16)
                    data = codec.compress(samples, quality, depth=depth)
                    decoded = codec.decode_array(data) / peak
                    bpp.append(8 * len(data) / samples[..., 0].size)
                    own.append(psnr(samples / peak, decoded))
                    true.append(psnr(picture, decoded))
                    bar.update()
                means = {"bpp": fmean(bpp), "psnr": fmean(own), "psnr_14_bits": fmean(true)}
                rows.append({"quality": quality, "depth": depth, **{key: round(x, 4) for key, x in means.items()}})
    out.mkdir(parents=True, exist_ok=True)
    (out / "depth.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print("| quality | bits a sample | bpp | PSNR, dB | against 14 bits, dB |\n|--:|--:|--:|--:|--:|")
    for row in rows:
        cells = (f"{row['quality']:g}", row["depth"], f"{row['bpp']:.4f}", f"{row['psnr']:.2f}")
        print("| " + " | ".join(map(str, (*cells, f"{row['psnr_14_bits']:.2f}"))) + " |")
