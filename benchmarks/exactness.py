"""Do all engines decode every file to the same samples? And by how much do the bytes of their lossy files differ?"""

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vaecodec import Codec

QUALITIES = (0, 25, 50, 75, 90, 100)
LOSSLESS_SIDE = 400
"""Pixels of the part that is coded without loss, at most: those networks take ten times as long."""


def decoders() -> dict[str, Codec]:
    """Every engine with one thread and with two."""
    codecs = dict[str, Codec]()
    for engine in ("onnx", "torch"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codec = codecs[f"{engine}, threads {threads}"] = Codec("cpu", engine=engine)
            assert codec.lossy and codec.lossless  # loaded now, for so many threads
    return codecs


def files_of(picture: Image.Image, number: int, encoders: list[Codec]) -> Iterator[tuple[str, list[bytes]]]:
    """By what they are: files of every encoder. Sizes are made odd, qualities take turns."""
    odd = picture.crop((0, 0, picture.width - number % 3, picture.height - number % 2))
    quality = QUALITIES[number % len(QUALITIES)]
    yield f"lossy, quality {quality}", [codec.compress(odd, quality) for codec in encoders]
    part = odd.crop((0, 0, min(odd.width, LOSSLESS_SIDE - number), min(odd.height, LOSSLESS_SIDE + 1 - number)))
    yield "lossless", [codec.compress(part, lossless=True) for codec in encoders]


def run(pictures: list[Path]) -> None:
    """Print a table, and raise ClickException if any samples differ."""
    codecs = decoders()
    first, *others = codecs.values()
    encoders = [codecs[name] for name in codecs if name.endswith("threads 1")]
    wrong, sizes = list[str](), list[float]()
    count = 0
    for number, path in enumerate(tqdm(pictures)):
        picture = Image.open(path).convert("RGB")
        for what, files in files_of(picture, number, encoders):
            sizes += [100 * (len(files[1]) / len(files[0]) - 1)] if "lossy" in what else []
            if what == "lossless" and files[0] != files[1]:
                wrong.append(f"{path.name}, {what}: other bytes")
            for data in sorted(set(files)):
                samples = first.decode_array(data)
                height, width = samples.shape[:2]
                x, y = width // 3, height // 5
                region = (x, y, width // 2, height // 3)
                for name, codec in zip(list(codecs)[1:], others, strict=True):
                    count += 2
                    part = codec.decode_array(data, region=region)
                    same = np.array_equal(samples[y : y + region[3], x : x + region[2]], part)
                    if not same or not np.array_equal(samples, codec.decode_array(data)):
                        wrong.append(f"{path.name}, {what}: {name}")
    print(f"{len(pictures)} pictures, decoded by {'; '.join(codecs)}:")
    for engine, codec in zip(("onnx", "torch"), encoders, strict=True):
        print(f"{engine}: {codec.arithmetic(data)} in the last file")
    print(f"{count} decodes, whole and of regions, {len(wrong)} with other samples")
    changed = [size for size in sizes if size]
    print(
        f"lossy files by torch against those by ONNX Runtime: {len(changed)} of {len(sizes)} of another size, "
        f"mean {np.mean(sizes):+.3f} %, at most {max(map(abs, sizes)):.3f} %"
    )
    if wrong:
        raise click.ClickException("\n".join(wrong))
