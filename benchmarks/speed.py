"""Speed of vaecodec against CompressAI's mbt2018-mean, its start-up time and its peak memory, on a CPU."""

import io
import itertools
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from vaecodec import Codec

THREADS = 2
LARGE = (6000, 4000)
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of ru_maxrss (getrusage(2))."""

# Popen's child starts with its parent's peak (exec keeps ru_maxrss), so a small process stands in between.
COLD = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


class Mbt2018Mean:
    """CompressAI's mbt2018-mean (Minnen et al. 2018, arXiv:1809.02736), quality 6: N 192, M 320.

    Weights are random, which networks and coder do not notice as long as the symbols look like a trained model's.
    """

    def __init__(self, sample: Image.Image) -> None:
        try:
            from compressai.zoo import mbt2018_mean
        except ImportError:
            raise click.ClickException("speed compares with CompressAI: pip install 'vaecodec[bench]'") from None
        torch.manual_seed(0)
        self.model: Any = mbt2018_mean(quality=6, metric="mse", pretrained=False).eval()
        # Random weights give latents near zero with scales near zero. Latents are scaled to a standard deviation of
        # 0.35, and h_s's scales (the first M channels, by their bias) to the same: files then take about 1 bpp, close
        # to the trained model's 0.9, and next to no symbol leaves its table for the coder's slow escape.
        deviation = 0.35
        with torch.no_grad():
            last = self.model.g_a[-1]
            last.bias.zero_()
            last.weight *= deviation / self.model.g_a(to_tensor(sample)).std()
            self.model.h_s[-1].bias[: self.model.M] = deviation
        self.model.update()

    @torch.no_grad()
    def compress(self, picture: Image.Image) -> Any:
        """Strings and shape of the hyper-latents."""
        return self.model.compress(to_tensor(picture))

    @torch.no_grad()
    def decompress(self, packed: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The picture of width and height ``size`` as [H, W, 3]."""
        width, height = size
        x: Tensor = self.model.decompress(packed["strings"], packed["shape"])["x_hat"]
        pixels: NDArray[np.uint8] = (
            (x[0, :, :height, :width] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        )
        return pixels

    def size(self, packed: Any) -> int:
        """Bytes of the strings."""
        return sum(len(string) for strings in packed["strings"] for string in strings)


def to_tensor(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in 0 to 1, padded on the right and below to the multiples of 64 that mbt2018-mean needs."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    return torch.nn.functional.pad(x, (0, -x.shape[3] % 64, 0, -x.shape[2] % 64))


def read(original: bytes) -> Image.Image:
    """The RGB picture in a PNG or other file."""
    return Image.open(io.BytesIO(original)).convert("RGB")


class Ours:
    """vaecodec, warm."""

    def __init__(self, codec: Codec, **options: Any) -> None:
        self.codec, self.options = codec, options

    def compress(self, picture: Image.Image) -> bytes:
        return self.codec.compress(picture, **self.options)

    def decompress(self, packed: bytes, _size: tuple[int, int]) -> NDArray[Any]:
        return np.asarray(self.codec.decompress(packed))

    def size(self, packed: bytes) -> int:
        return len(packed)


def warm(files: list[Path], quality: float) -> list[str]:
    """Markdown table of megapixels per second, picture file to coded bytes and coded bytes to an array of pixels."""
    torch.set_num_threads(THREADS)
    codec = Codec(device="cpu")
    reference = "mbt2018-mean, random weights"
    codecs: dict[str, Any] = {
        f"vaecodec, quality {quality:g}": Ours(codec, quality=quality),
        "vaecodec, lossless": Ours(codec, lossless=True),
        reference: Mbt2018Mean(Image.open(files[0]).convert("RGB")),
    }
    seconds, sizes, pixels = {name: [0.0, 0.0] for name in codecs}, dict.fromkeys(codecs, 0), 0
    # The first picture runs once more than the others, untimed. The codecs take turns, so that other load on the
    # machine meets all of them.
    for number, file in enumerate(tqdm([files[0], *files], desc="warm")):
        original = file.read_bytes()
        for name, each in codecs.items():
            start = time.perf_counter()
            picture = read(original)
            packed = each.compress(picture)
            middle = time.perf_counter()
            each.decompress(packed, picture.size)
            end = time.perf_counter()
            if number:
                seconds[name][0] += middle - start
                seconds[name][1] += end - middle
                sizes[name] += each.size(packed)
        pixels += picture.width * picture.height if number else 0

    speeds = {name: (pixels / 1e6 / e, pixels / 1e6 / (e + d), pixels / 1e6 / d) for name, (e, d) in seconds.items()}
    lines = [
        "| codec | bpp | encode MP/s | encode and verify MP/s | decode MP/s | of mbt2018-mean, encode | decode |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, (encode, verified, decode) in speeds.items():
        ratios = f"{encode / speeds[reference][0]:.2f} | {decode / speeds[reference][2]:.2f}"
        bpp = 8 * sizes[name] / pixels
        lines.append(f"| {name} | {bpp:.3f} | {encode:.3f} | {verified:.3f} | {decode:.3f} | {ratios} |")
    return lines


def large_picture(files: list[Path]) -> Image.Image:
    """24 megapixels: a 4 by 4 mosaic of the pictures, enlarged to fill their cells."""
    canvas = Image.new("RGB", LARGE)
    cell = (LARGE[0] // 4, LARGE[1] // 4)
    for place, file in zip(range(16), itertools.cycle(files)):
        picture = ImageOps.fit(Image.open(file).convert("RGB"), cell, Image.Resampling.LANCZOS)
        canvas.paste(picture, (place % 4 * cell[0], place // 4 * cell[1]))
    return canvas


def fresh_process(code: str, *arguments: str) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of Python code in a process of its own, started in the repository's root."""
    command = [sys.executable, "-c", COLD, sys.executable, "-c", code, *arguments]
    root = Path(__file__).parent.parent
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout
    seconds, peak = printed.split()
    return float(seconds), float(peak) * RSS_UNIT / 2**20


def cold(*arguments: str) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of the vaecodec command in a process of its own."""
    return fresh_process("from vaecodec.cli import main; main()", *arguments)  # what the console script does


def cold_rows(name: str, picture: Image.Image, quality: float, runs: int) -> list[str]:
    """Two rows of Markdown, compress (verification included) and decompress; of several runs the one of median time."""
    with TemporaryDirectory() as folder:
        source, packed, decoded = (str(Path(folder, name)) for name in ("in.png", "packed.vae", "out.png"))
        picture.save(source)
        common = ("--device", "cpu", "--threads", str(THREADS), "--quiet", "--overwrite")
        rows = []
        for arguments in (
            ("compress", source, "-o", packed, "--quality", str(quality), *common),
            ("decompress", packed, "-o", decoded, *common),
        ):
            seconds, peak = sorted(cold(*arguments) for _ in range(runs))[runs // 2]
            rows.append(f"| {name} | {arguments[0]} | {seconds:.2f} | {peak:.0f} |")
    return rows


def run(files: list[Path], quality: float) -> None:
    """Print both tables."""
    print("\n".join(warm(files, quality)), end="\n\n")
    first = Image.open(files[0]).convert("RGB")
    print("| picture, fresh process | | seconds | peak MiB |\n|---|---|--:|--:|")
    for name, picture, runs in (
        (f"{first.width} x {first.height}", first, 3),
        (f"{LARGE[0]} x {LARGE[1]}", large_picture(files), 1),
    ):
        print("\n".join(cold_rows(name, picture, quality, runs)), flush=True)
