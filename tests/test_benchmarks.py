import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("scipy")  # of the "bench" extra
pytest.importorskip("matplotlib")

from benchmarks import bitsback, kodak
from benchmarks.bd_rate import Curve, bd_rate

# Pillow's JPEG (4:2:0) and WebP (method 6) on Kodak-24: bits per pixel, PSNR in dB.
JPEG: Curve = [
    (0.15427, 23.8522), (0.26837, 26.6718), (0.36949, 28.1448), (0.45818, 29.1445),
    (0.61500, 30.4915), (0.74344, 31.4220), (0.86484, 32.1738), (0.99593, 32.9076),
    (1.19258, 33.9167), (1.31531, 34.5221), (1.50437, 35.3700), (1.76776, 36.4615),
    (2.20697, 38.0340), (2.62333, 39.3627), (3.11699, 40.5604), (3.90757, 42.1838),
]  # fmt: skip
WEBP: Curve = [
    (0.15452, 26.9808), (0.21742, 28.1086), (0.27442, 28.9319), (0.37749, 30.1936),
    (0.52602, 31.7099), (0.67273, 33.0089), (0.82058, 34.1040), (0.93904, 34.8720),
    (1.44755, 37.6061), (1.92966, 39.4463), (2.79823, 41.6598), (3.45770, 42.6986), (3.79433, 43.0011),
]  # fmt: skip


def percent(anchor: Curve, test: Curve, *span: float) -> float:
    result = bd_rate(anchor, test, *span)
    assert result is not None
    return result.percent


def test_equal_curves_differ_by_nothing() -> None:
    assert percent(JPEG, JPEG) == pytest.approx(0, abs=1e-9)


def test_half_the_rate_is_minus_fifty_per_cent() -> None:
    assert percent(JPEG, [(bpp / 2, psnr) for bpp, psnr in JPEG]) == pytest.approx(-50)


def test_webp_against_jpeg_as_the_bjontegaard_package_has_it() -> None:
    assert percent(JPEG, WEBP, 30.5, 36.0) == pytest.approx(-33.2, abs=0.05)
    assert percent(JPEG, WEBP) == pytest.approx(-32.5, abs=0.05)


def test_nothing_is_extrapolated() -> None:
    result = bd_rate(JPEG, WEBP[:7], 30.5, 36.0)
    assert result is not None and (result.low, result.high) == (30.5, 34.104)
    assert bd_rate(JPEG, WEBP, 43.0, 45.0) is None
    assert "does not cover the range" in kodak.comparison("webp", JPEG, WEBP[:7])
    assert "does not cover the range" not in kodak.comparison("webp", JPEG, WEBP)


def test_published_curves_have_sources() -> None:
    assert set(kodak.published_curves()) == {"AV1", "VTM", "mbt2018-mean"}
    assert all(entry["source"] for entry in json.loads(kodak.PUBLISHED.read_text("utf-8")).values())


def test_psnr() -> None:
    black, grey = Image.new("RGB", (2, 1)), Image.new("RGB", (2, 1), (1, 1, 1))
    assert kodak.psnr(black, grey) == pytest.approx(48.1308, abs=1e-4)
    assert kodak.psnr(black, black) == float("inf")


def test_averages_are_over_pictures() -> None:
    point = kodak.Point(50, [kodak.Row("a", 1, 8, 30.0), kodak.Row("b", 9, 24, 40.0)])
    assert (point.bpp, point.psnr) == (2.0, 35.0)


def test_violations() -> None:
    low = kodak.Point(0, [kodak.Row("a", 1000, 8, 30.0), kodak.Row("b", 1000, 8, 30.0)])
    high = kodak.Point(50, [kodak.Row("a", 989, 8, 29.94), kodak.Row("b", 2000, 8, 29.96)])
    assert [line.split(": ")[1] for line in kodak.violations([low, high])] == [
        "mean PSNR falls from 30.000 to 29.950 dB",
        "a falls from 1000 to 989 bytes",
        "a falls from 30.000 to 29.940 dB",
    ]


@pytest.mark.parametrize("codec", [kodak.jpeg, kodak.webp])
def test_measure(codec: kodak.Codec, tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "gradient.png")
    small, large = kodak.measure("", codec, [tmp_path / "gradient.png"], [5, 95])
    assert small.rows[0].picture == "gradient" and small.rows[0].pixels == 256 * 256
    assert small.bpp < large.bpp and 20 < small.psnr < large.psnr


def test_lossless_files_are_accounted_for(photo: Image.Image, tmp_path: Path) -> None:
    photo.crop((0, 0, 128, 96)).save(tmp_path / "photo.png")
    bitsback.run([tmp_path / "photo.png"], tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "lossless.json").read_text("utf-8"))
    assert sum(row["parts"].values()) == pytest.approx(8 * row["bytes"])
    assert row["bytes"] < row["png"] and 8 * row["bytes"] < 1.03 * sum(row["bound"].values())
    assert (tmp_path / "out" / "lossless.md").exists()
