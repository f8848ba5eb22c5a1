"""Do all engines and coders decode every file to the same samples? And by how much do the bytes of the engines' lossy
files differ?"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vaecodec import Codec
from vaecodec.engines import installed
from vaecodec.lossless.tile import TileCoder

from .device_speed import coding

QUALITIES = (0, 25, 50, 75, 90, 100)
LOSSLESS_SIDE = 400
"""Pixels of the part that is coded without loss, at most: those networks take ten times as long."""
SMALL = (7, 5)
"""Pixels of the part that is all that Triton's interpreter codes, in a minute."""


@dataclass
class Way:
    """A codec and the coder that it uses. small: only for small parts."""

    codec: Codec
    coder: str = "constriction"
    small: bool = False

    @contextlib.contextmanager
    def coding(self) -> Iterator[Codec]:
        with mock.patch.dict(os.environ, {} if self.coder == "triton" else {"VAECODEC_CODER": self.coder}):
            yield self.codec


def ways() -> dict[str, Way]:
    """Every engine with one thread and with two, and every coder."""
    found = dict[str, Way]()
    coders = ("constriction", "numpy") if installed("constriction") else ("numpy",)
    for engine in ("onnx", "torch"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[f"{engine}, threads {threads}"] = way = Way(Codec("cpu", engine=engine), coders[0])
            assert way.codec.lossy and way.codec.lossless  # loaded now, for so many threads
    if coders[0] != "numpy":
        found["onnx, numpy coder"] = Way(found["onnx, threads 1"].codec, "numpy")
    if torch.cuda.is_available():
        found["torch, CUDA"] = Way(Codec("cuda", engine="torch"), "triton")
    elif installed("triton"):
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made
        found["torch, Triton's interpreter"] = Way(coding(Codec("cpu", engine="torch")), "triton", small=True)
    return found


def parts_of(picture: Image.Image, number: int) -> Iterator[tuple[str, Image.Image, dict[str, Any]]]:
    """By what they are: pictures, and how to code them. Sizes are made odd, qualities take turns."""
    odd = picture.crop((0, 0, picture.width - number % 3, picture.height - number % 2))
    quality = QUALITIES[number % len(QUALITIES)]
    part = odd.crop((0, 0, min(odd.width, LOSSLESS_SIDE - number), min(odd.height, LOSSLESS_SIDE + 1 - number)))
    small = odd.crop((0, 0, *SMALL))
    yield f"lossy, quality {quality}", odd, {"quality": quality}
    yield "lossless", part, {"lossless": True}
    yield f"small, quality {quality}", small, {"quality": quality}
    yield "small, lossless", small, {"lossless": True}


def compress(way: Way, picture: Image.Image, **options: Any) -> bytes:
    """A file; without loss by the networks, even if another way should be shorter."""
    push = mock.patch.object(TileCoder, "push", lambda coder, samples: coder._push_network(coder.weights, samples))
    with way.coding() as codec, push:
        return codec.compress(picture, **options)


def run(pictures: list[Path]) -> None:
    """Print a table, and raise ClickException if any samples differ."""
    all_ways = ways()
    wrong, sizes, count, differing = list[str](), list[float](), Counter[str](), Counter[str]()
    for number, path in enumerate(tqdm(pictures)):
        picture = Image.open(path).convert("RGB")
        for what, part, options in parts_of(picture, number):
            used = {name: way for name, way in all_ways.items() if not way.small or what.startswith("small")}
            files = {
                name: compress(way, part, **options) for name, way in used.items() if not name.endswith("threads 2")
            }
            onnx, torch_s = files["onnx, threads 1"], files["torch, threads 1"]
            if what.startswith("lossy"):
                sizes.append(100 * (len(torch_s) / len(onnx) - 1))
            for name, data in files.items():
                # CUDA's analysis may differ in its last bits from a CPU's.
                expected = onnx if "onnx" in name or "lossless" in what else torch_s
                if data != expected and not ("CUDA" in name and "lossless" not in what):
                    wrong.append(f"{path.name}, {what}: other bytes by {name}")
            for data in sorted(set(files.values())):
                with all_ways["onnx, threads 1"].coding() as codec:
                    samples = codec.decode_array(data)
                height, width = samples.shape[:2]
                x, y, columns, rows = region = (width // 3, height // 5, width // 2, height // 3)
                for name, way in used.items():
                    with way.coding() as codec:
                        pixels, inside = codec.decode_array(data), codec.decode_array(data, region=region)
                    count[name] += 2
                    if not np.array_equal(samples, pixels) or not np.array_equal(
                        samples[y : y + rows, x : x + columns], inside
                    ):
                        differing[name] += 1
                        wrong.append(f"{path.name}, {what}: {name}")
    print(f"{len(pictures)} pictures, whole and regions of them, and small parts of {SMALL[0]} x {SMALL[1]} pixels:")
    print("| decoded by | decodes | with other samples |\n|---|--:|--:|")
    for name, decodes in count.items():
        print(f"| {name} | {decodes} | {differing[name]} |")
    for engine in ("onnx", "torch"):
        print(f"{engine}: {all_ways[f'{engine}, threads 1'].codec.arithmetic(data)} in the last file")
    print(f"{count.total()} decodes, whole and of regions, {differing.total()} with other samples")
    changed = [size for size in sizes if size]
    print(
        f"lossy files by torch against those by ONNX Runtime: {len(changed)} of {len(sizes)} of another size, "
        f"mean {np.mean(sizes):+.3f} %, at most {max(map(abs, sizes)):.3f} %"
    )
    if wrong:
        raise click.ClickException("\n".join(wrong))
