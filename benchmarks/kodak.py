"""Rate and distortion of vaecodec, JPEG and WebP on a folder of pictures."""

import io
import itertools
import json
import math
import platform
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import click
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image, features
from tqdm import tqdm

from vaecodec import __version__
from vaecodec.cli import main as vaecodec_main

from .bd_rate import Curve, bd_rate

JPEG_QUALITIES = [5, 10, 15, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 93, 95, 97]
WEBP_QUALITIES = [1, 5, 10, 20, 35, 50, 65, 75, 85, 90, 95, 98, 100]
KODAK = [f"kodim{number:02}" for number in range(1, 25)]
PUBLISHED = Path(__file__).with_name("published.json")
RANGE = (30.5, 36.0)
"""PSNR in dB over which BD-rates are quoted: the span that nearly every published Kodak curve covers."""

Codec = Callable[[Image.Image, float], tuple[int, Image.Image]]
"""Picture and quality to the whole file's size in bytes and the decoded picture."""


@dataclass(frozen=True)
class Row:
    """One picture at one quality: size of the whole file in bytes, PSNR in dB over 8-bit RGB."""

    picture: str
    bytes: int
    pixels: int
    psnr: float

    @property
    def bpp(self) -> float:
        """Bits per pixel."""
        return 8 * self.bytes / self.pixels


@dataclass(frozen=True)
class Point:
    """One quality over all pictures; bits per pixel and PSNR are means over pictures."""

    quality: float
    rows: list[Row]

    @property
    def bpp(self) -> float:
        """Mean bits per pixel."""
        return fmean(row.bpp for row in self.rows)

    @property
    def psnr(self) -> float:
        """Mean PSNR in dB."""
        return fmean(row.psnr for row in self.rows)


def psnr(original: Image.Image, decoded: Image.Image) -> float:
    """PSNR in dB, peak 255, the squared error averaged over pixels and channels together."""
    error = np.asarray(original, np.float64) - np.asarray(decoded, np.float64)
    mse = float(np.mean(error**2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def command(*arguments: str) -> None:
    """One vaecodec command in this process; it has already said on standard error why it fails."""
    if vaecodec_main(list(arguments), standalone_mode=False):
        raise click.ClickException(f"vaecodec {arguments[0]} failed")


def vaecodec(picture: Image.Image, quality: float) -> tuple[int, Image.Image]:
    """The command line with real files. The decompression that follows is the verification."""
    with TemporaryDirectory() as folder:
        source, packed, decoded = (str(Path(folder, name)) for name in ("in.png", "packed.vae", "out.png"))
        picture.save(source)
        command("compress", source, "-o", packed, "--quality", str(quality), "--no-verify", "--quiet")
        command("decompress", packed, "-o", decoded, "--quiet")
        return Path(packed).stat().st_size, Image.open(decoded).convert("RGB")


def weights_hash(picture: Path) -> str:
    """Hash of the weights that ``vaecodec compress`` uses, as its files name them."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as printed:
        packed = str(Path(folder, "packed.vae"))
        command("compress", str(picture), "-o", packed, "--no-verify", "--quiet")
        command("info", packed, "--json")
    return str(json.loads(printed.getvalue())["model"])


def pillow(picture: Image.Image, **options: Any) -> tuple[int, Image.Image]:
    """One of Pillow's codecs, in memory."""
    file = io.BytesIO()
    picture.save(file, **options)
    return file.tell(), Image.open(file).convert("RGB")


def jpeg(picture: Image.Image, quality: float) -> tuple[int, Image.Image]:
    """JPEG at its best in Pillow: optimised Huffman tables, progressive."""
    return pillow(picture, format="JPEG", quality=int(quality), subsampling="4:2:0", optimize=True, progressive=True)


def webp(picture: Image.Image, quality: float) -> tuple[int, Image.Image]:
    """Lossy WebP at its slowest method."""
    return pillow(picture, format="WEBP", quality=int(quality), method=6)


def measure(name: str, codec: Codec, files: list[Path], qualities: Sequence[float]) -> list[Point]:
    """Every picture at every quality, from its 8-bit RGB pixels alone (no metadata), so all codecs see the same."""
    points = [Point(quality, []) for quality in qualities]
    for file, point in tqdm(list(itertools.product(files, points)), desc=name):
        picture = Image.open(file).convert("RGB")
        picture.info.clear()
        size, decoded = codec(picture, point.quality)
        point.rows.append(Row(file.stem, size, picture.width * picture.height, psnr(picture, decoded)))
    return points


def curve(points: list[Point]) -> Curve:
    """Mean rate over mean distortion."""
    return [(point.bpp, point.psnr) for point in points]


def published_curves() -> dict[str, Curve]:
    """Other people's results on Kodak; the file names the source of each."""
    return {
        name: list(zip(entry["bpp"], entry["psnr"], strict=True))
        for name, entry in json.loads(PUBLISHED.read_text("utf-8")).items()
    }


def violations(points: list[Point]) -> list[str]:
    """Where a higher quality gives a smaller mean or, by over 1 % or 0.05 dB, a smaller file or PSNR of a picture."""
    found = []
    for low, high in itertools.pairwise(points):
        step = f"quality {low.quality:g} to {high.quality:g}"
        if high.bpp < low.bpp:
            found.append(f"{step}: mean rate falls from {low.bpp:.4f} to {high.bpp:.4f} bpp")
        if high.psnr < low.psnr:
            found.append(f"{step}: mean PSNR falls from {low.psnr:.3f} to {high.psnr:.3f} dB")
        for before, after in zip(low.rows, high.rows, strict=True):
            if after.bytes < 0.99 * before.bytes:
                found.append(f"{step}: {before.picture} falls from {before.bytes} to {after.bytes} bytes")
            if after.psnr < before.psnr - 0.05:
                found.append(f"{step}: {before.picture} falls from {before.psnr:.3f} to {after.psnr:.3f} dB")
    return found


def comparison(name: str, anchor: Curve, test: Curve) -> str:
    """Line of Markdown: BD-rate over RANGE and over the full overlap; a BD-rate over less than RANGE says so."""
    cells = [name]
    for low, high in (RANGE, (-math.inf, math.inf)):
        result = bd_rate(anchor, test, low, high)
        if result is None:
            cells.append("no overlap")
            continue
        span = f"{result.low:.1f}-{result.high:.1f} dB"
        covered = (result.low, result.high) == (low, high)
        partial = "" if covered or math.isinf(low) else ", does not cover the range"
        cells.append(f"{result.percent:+.1f} % ({span}{partial})")
    return "| " + " | ".join(cells) + " |"


def table(points: list[Point]) -> list[str]:
    """Markdown: bits per pixel and dB of each picture at each quality."""
    header = " | ".join(f"{point.quality:g}" for point in points)
    lines = [f"| picture | {header} |", "|---|" + "--:|" * len(points)]
    for rows in zip(*(point.rows for point in points), strict=True):
        lines.append(f"| {rows[0].picture} | " + " | ".join(f"{r.bpp:.3f} / {r.psnr:.2f}" for r in rows) + " |")
    means = " | ".join(f"{point.bpp:.3f} / {point.psnr:.2f}" for point in points)
    return [*lines, f"| **mean** | {means} |"]


def plot(curves: dict[str, Curve], published: dict[str, Curve], title: str, path: Path) -> None:
    """Rate-distortion plot; published curves are dashed, and rate is logarithmic as in the BD-rate."""
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    for name, points in published.items():
        axes.plot(*zip(*points, strict=True), linestyle="--", label=f"{name} (published)")
    axes.set(title=title, xlabel="bits per pixel", ylabel="PSNR, dB (RGB)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(path: Path, codec: dict[str, Any], points: list[Point]) -> None:
    """One codec's points with their rows, as JSON, after what ``codec`` says about it."""
    document = {
        **codec,
        "python": platform.python_version(),
        "pillow": version("pillow"),
        "points": [
            {
                "quality": point.quality,
                "bpp": point.bpp,
                "psnr": point.psnr,
                "pictures": [{**vars(row), "bpp": row.bpp} for row in point.rows],
            }
            for point in points
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def run(files: list[Path], out: Path, qualities: list[float]) -> None:
    """Measure the three codecs, write results to ``out`` and print the comparison."""
    about_vaecodec = {
        "note": "vaecodec command line, defaults but for quality",
        "model": weights_hash(files[0]),
        "vaecodec": __version__,
        "torch": version("torch"),
        "constriction": version("constriction"),
    }
    about_jpeg = {
        "note": "Pillow, 4:2:0, optimize, progressive",
        "libjpeg-turbo": features.version("libjpeg_turbo"),
    }
    about_webp = {"note": "Pillow, lossy, method 6", "libwebp": features.version("webp")}
    jpegs = measure("JPEG 4:2:0", jpeg, files, JPEG_QUALITIES)
    webps = measure("WebP", webp, files, WEBP_QUALITIES)
    ours = measure("vaecodec", vaecodec, files, qualities)
    anchor = curve(jpegs)
    curves = {"JPEG 4:2:0": anchor, "WebP": curve(webps), "vaecodec": curve(ours)}
    published = published_curves() if [file.stem for file in files] == KODAK else {}
    title = f"{out.name}, {len(files)} pictures"
    report = [
        f"# {title}",
        "",
        "BD-rate against JPEG 4:2:0, PSNR over RGB; negative is smaller:",
        "",
        f"| codec | {RANGE[0]:g}-{RANGE[1]:g} dB | full overlap |",
        "|---|--:|--:|",
        comparison("vaecodec", anchor, curves["vaecodec"]),
        comparison("WebP", anchor, curves["WebP"]),
        *(comparison(f"{name} (published)", anchor, test) for name, test in published.items()),
        "",
        "vaecodec, bits per pixel / dB at each quality:",
        "",
        *table(ours),
        "",
        "Monotonicity over qualities (mean rate and PSNR; 1 % and 0.05 dB for each picture):",
        "",
        *([f"- {violation}" for violation in violations(ours)] or ["no violations"]),
    ]
    text = "\n".join(report) + "\n"

    out.mkdir(parents=True, exist_ok=True)
    save(out / "vaecodec.json", about_vaecodec, ours)
    save(out / "jpeg420.json", about_jpeg, jpegs)
    save(out / "webp.json", about_webp, webps)
    plot(curves, published, title, out / "rd.png")
    (out / "table.md").write_text(text, "utf-8")
    print(text)
