"""What was measured of a codec, and the file that keeps it."""

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from .bd_rate import Curve
from .codecs import Codec

NEAR = 34.0
"""dB: speeds of a lossy codec are those at the quality that comes nearest."""


@dataclass(frozen=True)
class Row:
    """One picture at one quality: size of the whole file in bytes, PSNR in dB, MS-SSIM, CPU seconds each way and
    SSIMULACRA2, which is NaN where it was not measured."""

    picture: str
    pixels: int
    bytes: int
    psnr: float
    ms_ssim: float
    encode_s: float
    decode_s: float
    ssimulacra2: float = math.nan

    @property
    def bpp(self) -> float:
        """Bits per pixel."""
        return 8 * self.bytes / self.pixels


@dataclass(frozen=True)
class Point:
    """One quality over all pictures. Rate, PSNR, MS-SSIM, SSIMULACRA2: means over pictures. Speeds: all pixels over all
    time."""

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

    @property
    def ms_ssim(self) -> float:
        """Mean MS-SSIM."""
        return fmean(row.ms_ssim for row in self.rows)

    @property
    def ssimulacra2(self) -> float:
        """Mean SSIMULACRA2, or NaN."""
        return fmean(row.ssimulacra2 for row in self.rows)

    @property
    def encode_speed(self) -> float:
        """Megapixels in a CPU second."""
        return self.speed(row.encode_s for row in self.rows)

    @property
    def decode_speed(self) -> float:
        """Megapixels in a CPU second."""
        return self.speed(row.decode_s for row in self.rows)

    def speed(self, seconds: Iterator[float]) -> float:
        return sum(row.pixels for row in self.rows) / 1e6 / max(sum(seconds), 1e-9)


def in_psnr(point: Point) -> float:
    """Mean PSNR in dB."""
    return point.psnr


def decibels(ms_ssim: float) -> float:
    """MS-SSIM as -10 log10(1 - x), the scale on which its curves are drawn and compared."""
    return -10 * math.log10(1 - ms_ssim)


def in_decibels(point: Point) -> float:
    """Mean MS-SSIM as -10 log10(1 - x)."""
    return decibels(point.ms_ssim)


def in_scores(point: Point) -> float:
    """Mean SSIMULACRA2."""
    return point.ssimulacra2


@dataclass(frozen=True)
class Result:
    """A codec at all its qualities. peak: MiB of a fresh process that encodes and decodes one picture, once."""

    codec: Codec
    points: list[Point]
    peak: float

    def curve(self, distortion: Callable[[Point], float] = in_psnr) -> Curve:
        """Mean rate over mean distortion, where that was measured."""
        pairs = [(point.bpp, distortion(point)) for point in self.points]
        return [pair for pair in pairs if not math.isnan(pair[1])]

    @property
    def scored(self) -> bool:
        """Whether there are points with an SSIMULACRA2."""
        return not all(math.isnan(point.ssimulacra2) for point in self.points)

    @property
    def typical(self) -> Point:
        """The point nearest to NEAR, at which speeds are quoted."""
        return min(self.points, key=lambda point: abs(point.psnr - NEAR))


def as_json(result: Result) -> str:
    """A codec with its versions, its means and every picture, one line each."""
    codec = result.codec
    likenesses = {} if codec.lossless else {"psnr": 4, "ms_ssim": 6} | ({"ssimulacra2": 3} if result.scored else {})
    means = [
        {
            "quality": round(point.quality, 3),
            "bpp": round(point.bpp, 5),
            **{name: rounded(getattr(point, name), digits) for name, digits in likenesses.items()},
            "encode_mpps": float(f"{point.encode_speed:.3g}"),
            "decode_mpps": float(f"{point.decode_speed:.3g}"),
        }
        for point in result.points
    ]
    columns = ["quality", "picture", "pixels", "bytes", *likenesses]
    rows = [
        [round(point.quality, 3), r.picture, r.pixels, r.bytes]
        + [rounded(getattr(r, name), digits) for name, digits in likenesses.items()]
        for point in result.points
        for r in point.rows
    ]
    head = {
        "codec": codec.title,
        "note": codec.note,
        "versions": {"python": platform.python_version(), **codec.versions},
        "peak_mib": round(result.peak),
        "columns": columns,
    }
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, lines in (("means", means), ("rows", rows)):
        parts.append(f' "{key}": [\n  ' + ",\n  ".join(json.dumps(line) for line in lines) + "\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def rounded(value: float, digits: int) -> float | None:
    """None for NaN."""
    return None if math.isnan(value) else round(value, digits)


def from_json(codec: Codec, text: str) -> Result:
    """What ``as_json`` has written of an earlier run; seconds are shared out evenly."""
    facts = json.loads(text)
    points = []
    for mean in facts["means"]:
        rows = [dict(zip(facts["columns"], row, strict=True)) for row in facts["rows"]]
        points.append(
            Point(
                mean["quality"],
                [
                    Row(
                        row["picture"],
                        row["pixels"],
                        row["bytes"],
                        row.get("psnr", math.inf),
                        row.get("ms_ssim", 1.0),
                        row["pixels"] / 1e6 / mean["encode_mpps"],
                        row["pixels"] / 1e6 / mean["decode_mpps"],
                        math.nan if row.get("ssimulacra2") is None else row["ssimulacra2"],
                    )
                    for row in rows
                    if row["quality"] == mean["quality"]
                ],
            )
        )
    versions = {name: version for name, version in facts["versions"].items() if name != "python"}
    return Result(replace(codec, note=facts["note"], versions=versions), points, facts["peak_mib"])
