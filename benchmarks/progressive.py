"""What a part of a file shows: PSNR over the share of the file that has been read, for vaecodec, JPEG and JPEG XL.

All three are progressive files of one picture, JPEG and JPEG XL the largest ones that need no more bytes than
vaecodec's. Pillow's plugins for JPEG XL decode no part of a file: it comes from the commands cjxl and djxl, if they are
there.
"""

import contextlib
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFile, ImageFont
from tqdm import tqdm

from vaecodec import Codec, read_info
from vaecodec.metrics import psnr

from . import codecs
from .pictures import Picture, open_picture
from .plots import save

PREFIXES = 20
"""Of each file, at random, more of them short than long."""
SHOWN = (0.03, 0.1, 0.3, 0.6, 1.0)
"""Shares of a file in the strip of pictures."""
LONGEST_TABLE = 300
GREY = (128, 128, 128)
BEST = 99.0  # dB, for equal pictures

Draw = Callable[[bytes], Image.Image]
Curve = list[tuple[float, float]]
"""Shares of a file, and PSNR in dB."""


@dataclass(frozen=True)
class Progressive:
    """A file and what its prefixes show. worst_fall: by how much PSNR falls, at most, from one to a longer one."""

    data: bytes
    extra: float  # share of bytes that a file that is not progressive saves
    first: float  # share of the file at which the whole picture is first seen
    curve: Curve

    @property
    def worst_fall(self) -> float:
        best, fall = 0.0, 0.0
        for _, value in self.curve:
            best, fall = max(best, value), max(fall, best - value)
        return fall


def progressive(codec: Codec, picture: Picture, quality: float, lossless: bool, number: int) -> Progressive:
    """Measured at random prefixes that are long enough to show something. Stops if the whole file has other pixels than
    one that is not progressive."""
    plain, data = (codec.compress(picture.image, quality, lossless=lossless, progressive=p) for p in (False, True))
    whole = codec.decompress(data)
    if whole.tobytes() != codec.decompress(plain).tobytes():
        raise SystemExit(f"{picture.name}: the progressive file decodes to other pixels")
    rng, size, info = Random(number), len(data), read_info(data)
    first, curve, known = (info.previews or [size])[0], list[tuple[float, float]](), dict[int, float]()
    for place in range(PREFIXES):
        end = first + int((size - first) * ((place + rng.random()) / PREFIXES) ** 2)
        # Of one tile, the bytes of a part that is not whole show nothing.
        key = sum(preview <= end for preview in info.previews) if info.tiles == 1 else end
        if key not in known:
            known[key] = min(psnr(picture.image, codec.decompress(data[:end], preview=True)), BEST)
        curve.append((end / size, known[key]))
    curve.append((1.0, min(psnr(picture.image, whole), BEST)))
    return Progressive(data, len(data) / len(plain) - 1, first / size, curve)


def truncated_jpeg(data: bytes, size: tuple[int, int]) -> Image.Image:
    """What Pillow shows of a part of a JPEG file; grey, where that is nothing. Pillow shows nothing of a file that ends
    within the tables between two scans; a viewer would go on showing what it had."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        for end in range(len(data), max(len(data) - LONGEST_TABLE, 0), -1):
            with contextlib.suppress(OSError):
                return Image.open(io.BytesIO(data[:end])).convert("RGB")
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    return Image.new("RGB", size, GREY)


def encode_jxl(picture: Image.Image, size: int) -> bytes | None:
    """The largest of at most so many bytes that cjxl makes at a quality that five divides."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "x.png"), Path(folder, "x.jxl")
        picture.save(source, compress_level=1)
        low, high, best = 2, 19, None
        while low <= high:
            middle = (low + high) // 2
            command = ["cjxl", str(source), str(target), "-q", str(5 * middle), "--progressive", "--num_threads=0"]
            subprocess.run(command, check=True, capture_output=True)
            if len(data := target.read_bytes()) <= size:
                low, best = middle + 1, data
            else:
                high = middle - 1
    return best


def truncated_jxl(data: bytes, size: tuple[int, int]) -> Image.Image:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "x.jxl"), Path(folder, "x.png")
        source.write_bytes(data)
        command = ["djxl", str(source), str(target), "--allow_partial_files", "--num_threads=0"]
        subprocess.run(command, check=False, capture_output=True)
        if not target.exists():
            return Image.new("RGB", size, GREY)
        with Image.open(target) as shown:
            return shown.convert("RGB")


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


def others() -> dict[str, tuple[Callable[[Image.Image, int], bytes | None], Callable[..., Image.Image]]]:
    """Encoders to a size, and decoders of a part."""
    baseline = codecs.jpeg("4:2:0")
    found = {"JPEG": (lambda image, size: largest_within(baseline, image, size), truncated_jpeg)}
    if shutil.which("cjxl") and shutil.which("djxl"):
        found["JPEG XL"] = encode_jxl, truncated_jxl
    else:
        print("JPEG XL is left out: there is no cjxl or no djxl")
    return found


def run(files: Sequence[Path], out: Path, quality: float, count: int) -> None:
    """Write progressive.json, a plot and a strip of pictures into ``out``. count: of the pictures, evenly spaced, so
    many without loss."""
    codec, rivals = Codec("cpu"), others()
    some = set(files[:: max(1, len(files) // count)][:count]) if count else set[Path]()
    curves: dict[str, list[Curve]] = {name: [] for name in ("vaecodec", *rivals, "vaecodec lossless")}
    lossy, lossless = list[Progressive](), list[Progressive]()
    strips = list[list[tuple[Image.Image, str]]]()
    for number, file in enumerate(tqdm(files)):
        picture = open_picture(file)
        image = picture.image
        ours = progressive(codec, picture, quality, False, number)
        lossy.append(ours)
        curves["vaecodec"].append(ours.curve)
        parts: dict[str, tuple[bytes, Draw]] = {"vaecodec": (ours.data, partial(codec.decompress, preview=True))}
        for name, (encode, decode) in rivals.items():
            if data := encode(image, len(ours.data)):
                parts[name] = data, partial(decode, size=image.size)
                drawn = ((share, parts[name][1](data[: round(share * len(data))])) for share, _ in ours.curve)
                curves[name].append([(share, psnr(image, shown)) for share, shown in drawn])
        if not strips:
            for name, (data, draw) in parts.items():
                least = round(ours.first * len(data)) if data is ours.data else 0
                shown = [(draw(data[:end]), end) for end in (max(least, round(s * len(data))) for s in SHOWN)]
                strips.append([(p, f"{name}, {end:,} bytes, {psnr(image, p):.1f} dB") for p, end in shown])
        if file in some:
            lossless.append(progressive(codec, picture, quality, True, number))
            curves["vaecodec lossless"].append(lossless[-1].curve)
    out.mkdir(parents=True, exist_ok=True)
    means = {name: mean_of(measured) for name, measured in curves.items() if measured}
    result = {"quality": quality, "prefixes": PREFIXES, "lossy": summary(lossy)}
    if lossless:
        result["lossless"] = summary(lossless)
    result["curves"] = {name: [(round(s, 4), round(v, 2)) for s, v in curve] for name, curve in means.items()}
    (out / "progressive.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(means, f"{len(files)} pictures, quality {quality:g}; {len(lossless)} without loss", out / "progressive")
    strip(strips, out / "progressive_strip.jpg")
    print(json.dumps({name: part for name, part in result.items() if name != "curves"}, indent=1))


def mean_of(curves: list[Curve]) -> Curve:
    """Prefix by prefix."""
    return [(fmean(s for s, _ in points), fmean(v for _, v in points)) for points in zip(*curves, strict=True)]


def summary(files: list[Progressive]) -> dict[str, float]:
    return {
        "pictures": len(files),
        "bytes": round(fmean(len(file.data) for file in files)),
        "mean extra": round(fmean(file.extra for file in files), 5),
        "largest extra": round(max(file.extra for file in files), 5),
        "first preview": round(fmean(file.first for file in files), 4),
        "worst fall": round(max(file.worst_fall for file in files), 3),
    }


def plot(curves: dict[str, Curve], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        style = {"color": f"C{number}"} if "vaecodec" not in name else {"color": "black", "linewidth": 2}
        seen = [(100 * share, value) for share, value in curve if share < 1 or value < BEST]
        line = "--" if name.endswith("lossless") else "-"
        axes.plot(*zip(*seen, strict=True), line, marker="o", markersize=3, label=name, **style)
    axes.set(title=title, xlabel="% of the file", ylabel="PSNR of what is shown, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def strip(rows: list[list[tuple[Image.Image, str]]], path: Path) -> None:
    """A row for each codec, with a caption above each picture."""
    width, head = 250, 16
    height = round(width * rows[0][0][0].height / rows[0][0][0].width)
    sheet = Image.new("RGB", (len(SHOWN) * (width + 4) - 4, len(rows) * (height + head)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, row in enumerate(rows):
        for j, (panel, caption) in enumerate(row):
            place = j * (width + 4), i * (height + head)
            draw.text((place[0] + 2, place[1] + 2), caption, "black", font)
            sheet.paste(panel.resize((width, height), Image.Resampling.LANCZOS), (place[0], place[1] + head))
    sheet.save(path, quality=80)
