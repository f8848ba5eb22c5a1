"""SSIMULACRA2 of vaecodec, and of AVIF in no more bytes: a measure that follows the eye better than PSNR."""

import io
import json
from pathlib import Path
from statistics import fmean

from PIL import Image
from tqdm import tqdm

from . import codecs
from .pictures import open_picture

QUALITIES = (0, 25, 50, 75, 100)


def ssimulacra2(original: Image.Image, decoded: Image.Image) -> float:
    """Of two RGB pictures: 100 for equal ones, 90 for what cannot be told apart side by side, 70 for high quality, 50
    for medium (package ssimulacra2, of the "bench" extra)."""
    from ssimulacra2 import compute_ssimulacra2

    files = [io.BytesIO(), io.BytesIO()]
    for file, picture in zip(files, (original, decoded), strict=True):
        picture.save(file, "PNG", compress_level=1)
        file.seek(0)
    return float(compute_ssimulacra2(*files))


def largest_within(codec: codecs.Codec, picture: Image.Image, size: int) -> bytes | None:
    """The largest file of at most ``size`` bytes among the codec's scale; None if none is so small."""
    low, high, best = 0, len(codec.scale) - 1, None
    while low <= high:
        middle = (low + high) // 2
        data = codec.encode(picture, codec.scale[middle])
        if len(data) <= size:
            low, best = middle + 1, data
        else:
            high = middle - 1
    return best


def run(files: list[Path], out: Path) -> None:
    """Print a table of means over pictures and write visual.json into ``out``."""
    ours, other = codecs.vaecodec(), codecs.avif()
    pictures = [open_picture(file) for file in files]
    rows = []
    with tqdm(total=len(QUALITIES) * len(pictures)) as bar:
        for quality in QUALITIES:
            bpp, scores, others = list[float](), list[float](), list[float]()
            for picture in pictures:
                data = ours.encode(picture.image, quality)
                bpp.append(8 * len(data) / picture.pixels)
                scores.append(ssimulacra2(picture.image, ours.decode(data)))
                if rival := largest_within(other, picture.image, len(data)):
                    others.append(ssimulacra2(picture.image, other.decode(rival)))
                bar.update()
            rows.append(
                {
                    "quality": quality,
                    "bpp": round(fmean(bpp), 4),
                    "vaecodec": round(fmean(scores), 2),
                    "AVIF": round(fmean(others), 2) if len(others) == len(pictures) else None,
                }
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / "visual.json").write_text(json.dumps({"AVIF": other.note, "rows": rows}, indent=1) + "\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "--:|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join("-" if value is None else str(value) for value in row.values()) + " |")
