import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from click import ClickException
from click.testing import CliRunner
from conftest import gathering_codec, picture, python
from PIL import Image

pytest.importorskip("scipy")  # of the "bench" extra
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_msssim")
pytest.importorskip("ssimulacra2")

from scipy.interpolate import Akima1DInterpolator

from benchmarks import bitsback, codecs, depth, device_speed, kodak, progressive, report, same_bytes, speed, theory
from benchmarks.__main__ import main
from benchmarks.bd_rate import Curve, bd_rate
from benchmarks.kodak import decibels
from benchmarks.pictures import Cache
from vaecodec import Codec
from vaecodec.metrics import psnr, ssimulacra2

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


def test_by_hand() -> None:
    anchor = [(2 ** (psnr / 6), psnr) for psnr in (30, 32, 34, 36)]
    test = [(rate / 2 ** ((psnr - 28) / 4), psnr) for rate, psnr in anchor]  # from 0.5 to 1.5 halvings
    assert percent(anchor, test) == pytest.approx(100 * (2 ** -((0.5 + 2) / 2) - 1))


def test_nothing_is_extrapolated() -> None:
    result = bd_rate(JPEG, WEBP[:7], 30.5, 36.0)
    assert result is not None and (result.low, result.high) == (30.5, 34.104)
    with pytest.warns(UserWarning, match="share no range"):
        assert bd_rate(JPEG, WEBP, 43.0, 45.0) is None


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ([], "0 points"),
        ([(1, 30)], "1 points"),
        ([(1, 30), (2, 30)], "two points of one PSNR"),
        ([(1, 30), (2, 33), (3, 33), (4, 40)], "two points of one PSNR"),
        ([(1, 30), (2, math.inf)], "not finite"),
        ([(1, 30), (2, math.nan)], "not finite"),
        ([(1, 30), (math.nan, 35)], "not finite"),
        ([(0, 30), (1, 35)], "not positive"),
    ],
)
def test_no_bd_rate_of_what_is_no_curve(odd: Curve, reason: str) -> None:
    for pair, name in (((JPEG, odd), "test"), ((odd, JPEG), "anchor")):
        with pytest.warns(UserWarning, match=f"the {name} curve has .*{reason}"):
            assert bd_rate(*pair) is None


def test_what_is_missing_is_said_in_one_line() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
import runpy
runpy.run_module("benchmarks", run_name="__main__")
"""
    result = python(code)
    assert result.returncode == 1
    assert result.stderr == b"benchmarks: there is no matplotlib; pip install '.[bench]' brings it\n"
    assert kodak.comparison(JPEG, WEBP[:7])[0].endswith("(only 30.5-34.1 dB)")
    assert kodak.comparison(JPEG, WEBP)[0] == "-33.2 %"
    assert kodak.comparison(None, WEBP) == ["-", "-"]


def test_published_curves_have_sources() -> None:
    curves, similarities = kodak.published_curves()
    assert set(similarities) < set(curves) and {"AV1", "VTM", "mbt2018-mean"} <= set(similarities)
    assert all(entry["source"] for entry in json.loads(kodak.PUBLISHED.read_text("utf-8")).values())


def test_metrics() -> None:
    black, grey = Image.new("RGB", (200, 180)), Image.new("RGB", (200, 180), (1, 1, 1))
    assert psnr(black, grey) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(black, black) == math.inf
    assert decibels(0.99) == pytest.approx(20)


def row(name: str, pixels: int, size: int, decibel: float) -> kodak.Row:
    return kodak.Row(name, pixels, size, decibel, 0.9, 0.5, 0.25)


def test_averages_are_over_pictures() -> None:
    point = kodak.Point(50, [row("a", 8, 1, 30.0), row("b", 24, 9, 40.0)])
    assert (point.bpp, point.psnr, point.ms_ssim) == (2.0, 35.0, 0.9)
    assert (point.encode_speed, point.decode_speed) == (32 / 1e6, 64 / 1e6)


def test_rates_at_equal_scores() -> None:
    def result(name: str, factor: int, scores: list[float]) -> kodak.Result:
        rows = [replace(row("a", 800, factor * 2**k, 30.0 + k), ssimulacra2=s) for k, s in enumerate(scores)]
        return kodak.Result(codecs.CODECS[name](), [kodak.Point(k, [one]) for k, one in enumerate(rows)], 1.0)

    jpeg = result("jpeg420", 20, [0, 30, 55, 75, 90])
    half, short = result("webp", 10, [0, 30, 55, 75, 90]), result("jpeg444", 20, [0, 30, 55, math.nan])
    none = result("jpeg2000", 20, [math.nan] * 3)
    head, *lines = kodak.seen_table([jpeg, half, short, none])
    assert head[1:] == ["against JPEG 4:2:0, 10 to 50", "against JPEG 4:2:0, 50 to 80"]
    assert [line[1] for line in lines[:2]] == ["+0.0 %", "-50.0 %"]
    assert lines[2][2].endswith("(only 50 to 55)") and len(lines) == 3


def test_violations() -> None:
    low = kodak.Point(0, [row("a", 8, 1000, 30.0), row("b", 8, 1000, 30.0)])
    high = kodak.Point(50, [row("a", 8, 989, 29.94), row("b", 8, 2000, 29.96)])
    assert [line.split(": ")[1] for line in kodak.violations([low, high])] == [
        "mean PSNR falls from 30.000 to 29.950 dB",
        "a falls from 1000 to 989 bytes",
        "a falls from 30.000 to 29.940 dB",
    ]


@pytest.mark.parametrize("name", [name for name in codecs.CODECS if not name.startswith(("vaecodec", "pca"))])
def test_codecs(name: str) -> None:
    try:
        codec = codecs.CODECS[name]()
    except ImportError as error:
        pytest.skip(str(error))
    assert codec.name == name and codec.lossless == (not codec.scale)
    image = picture(64, 48)
    qualities = (codec.qualities[0], codec.qualities[-1])
    small, large = (len(codec.encode(image, quality)) for quality in qualities)
    assert small < large or codec.lossless
    decoded = codec.decode(codec.encode(image, qualities[-1]))
    assert decoded.mode == "RGB" and psnr(image, decoded) > 25
    assert (decoded.tobytes() == image.tobytes()) == codec.lossless


def test_jpeg_xl_qualities_stand_for_distances() -> None:
    # JxlEncoderDistanceFromQuality
    assert codecs.quality_of(1.0) == pytest.approx(90) and codecs.quality_of(6.4) == pytest.approx(30)
    quality = codecs.quality_of(9.9)
    assert 53 / 3000 * quality**2 - 23 / 20 * quality + 25 == pytest.approx(9.9)


def test_vaecodec_is_measured(tiny: Codec, tmp_path: Path) -> None:
    picture(176, 176).save(tmp_path / "a.png")
    pictures = kodak.open_pictures([tmp_path / "a.png"])
    codec = replace(codecs.vaecodec(tiny), qualities=(0, 100))
    first, last = kodak.measure(codec, pictures, Cache(tmp_path / "cache"), lambda: None)
    assert first.bpp < last.bpp
    assert last.rows[0].bytes == len(tiny.compress(pictures[0].image, 100))


def test_command_line_is_compared(shipped: Path, tmp_path: Path) -> None:
    picture(176, 176).save(tmp_path / "a.png")
    pictures = kodak.open_pictures([tmp_path / "a.png"])
    codec = replace(codecs.vaecodec(Codec("cpu", shipped)), qualities=(40,))
    assert kodak.check_command_line(codec, pictures)
    other = replace(codec, encode=lambda picture, quality: codec.encode(picture, quality + 1))
    with pytest.raises(ClickException, match="differ"):
        kodak.check_command_line(other, pictures)


def test_lossless_codecs_must_be_lossless() -> None:
    pictures = [kodak.Picture("a", picture(176, 176), "")]
    codec = replace(codecs.jpeg("4:2:0"), lossless=True)
    with pytest.raises(ClickException, match="differ"):
        kodak.measure_one(codec, pictures[0], 90)


@pytest.fixture(scope="module")
def benchmark_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of two pictures and two codecs: the folder of the pictures, with the results in ``out``."""
    folder = tmp_path_factory.mktemp("two")
    for seed, name in enumerate("ab"):
        picture(208, 176, seed=seed).save(folder / f"{name}.png")
    kodak.run([folder / "a.png", folder / "b.png"], folder / "out" / "two", ["webp", "jpeg420", "png"])
    return folder


def test_results(benchmark_of_two: Path) -> None:
    out = benchmark_of_two / "out" / "two"
    stems = {"jpeg420.json", "webp.json", "png.json", "table.md", "report.html"}
    drawn = {
        f"{stem}.{suffix}"
        for stem in ("rd", "rd_msssim", "rd_ssimulacra2", "lossless_sizes")
        for suffix in ("png", "svg")
    }
    assert {path.name for path in out.iterdir()} == stems | drawn

    webp = json.loads((out / "webp.json").read_text("utf-8"))
    image = Image.open(benchmark_of_two / "b.png").convert("RGB")
    data = codecs.webp().encode(image, 50)
    (found,) = (row for row in webp["rows"] if row[:2] == [50, "b"])
    assert webp["columns"] == ["quality", "picture", "pixels", "bytes", "psnr", "ms_ssim", "ssimulacra2"]
    assert found[2:4] == [208 * 176, len(data)]
    assert found[4] == pytest.approx(psnr(image, codecs.webp().decode(data)), abs=1e-4)
    assert found[6] == pytest.approx(ssimulacra2(image, codecs.webp().decode(data)), abs=1e-3)

    curves = []
    for name in ("jpeg420", "webp"):
        means = json.loads((out / f"{name}.json").read_text("utf-8"))["means"]
        curves.append(np.array(sorted((mean["psnr"], math.log(mean["bpp"])) for mean in means)))
    low, high = (pick(pick_2(curve[:, 0]) for curve in curves) for pick, pick_2 in ((max, np.min), (min, np.max)))
    at = np.linspace(low, high, 10001)
    jpeg, other = (Akima1DInterpolator(*curve.T)(at) for curve in curves)
    by_hand = 100 * math.expm1(np.mean(other - jpeg))
    line = next(
        line for line in (out / "table.md").read_text("utf-8").splitlines() if re.match(r"\| WebP \| \S+ %", line)
    )
    assert float(line.split(" | ")[2].split(" %")[0]) == pytest.approx(by_hand, abs=0.06)


def test_second_run_measures_nothing(benchmark_of_two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise AssertionError("measured again")

    for module, name in ((kodak, "measure_one"), (kodak, "peak_memory"), (report, "nearest_below")):
        monkeypatch.setattr(module, name, fail)
    files, out = [benchmark_of_two / "a.png", benchmark_of_two / "b.png"], benchmark_of_two / "out" / "two"
    before = (out / "table.md").read_text("utf-8")
    kodak.run(files, out, ["jpeg420", "webp", "png"])
    assert (out / "table.md").read_text("utf-8") == before

    changed = Image.open(files[0])
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(benchmark_of_two / "c.png")
    with pytest.raises(AssertionError, match="measured again"):
        kodak.run([benchmark_of_two / "c.png"], out, ["jpeg420"])


def test_earlier_results_stay_in_the_tables(benchmark_of_two: Path, tmp_path: Path) -> None:
    files, out = [benchmark_of_two / "a.png", benchmark_of_two / "b.png"], tmp_path / "two"
    shutil.copytree(benchmark_of_two / "out", tmp_path, dirs_exist_ok=True)
    before, stored = (out / "table.md").read_text("utf-8"), (out / "webp.json").read_text("utf-8")
    kodak.run(files, out, ["jpeg420"])
    columns = [
        [line.split(" | ")[:6] for line in text.splitlines()] for text in (before, (out / "table.md").read_text())
    ]
    assert columns[0] == columns[1]  # speeds of the others are rounded
    assert (out / "webp.json").read_text("utf-8") == stored


def test_earlier_results_get_the_scores_they_lack(
    benchmark_of_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = [benchmark_of_two / "a.png", benchmark_of_two / "b.png"], tmp_path / "two"
    shutil.copytree(benchmark_of_two / "out", tmp_path, dirs_exist_ok=True)
    path = out / "webp.json"
    complete = json.loads(path.read_text("utf-8"))
    older = complete | {
        "columns": complete["columns"][:6],
        "rows": [row[:6] for row in complete["rows"]],
        "means": [{key: value for key, value in mean.items() if key != "ssimulacra2"} for mean in complete["means"]],
    }
    path.write_text(json.dumps(older), "utf-8")
    kodak.run(files, out, ["jpeg420"])
    scores = [row[6] for row in json.loads(path.read_text("utf-8"))["rows"]]
    every_second = zip(complete["rows"], scores, strict=True)
    assert all(
        score == (row[6] if codecs.webp().qualities.index(row[0]) % 2 == 0 else None) for row, score in every_second
    )
    older["rows"][0][3] += 1  # as if another WebP had made them
    path.write_text(json.dumps(older), "utf-8")
    kodak.run(files, out, ["jpeg420"])
    assert json.loads(path.read_text("utf-8")) == older
    assert "WebP: not the files of the earlier results" in capsys.readouterr().err


def test_report_loads_nothing(benchmark_of_two: Path) -> None:
    text = (benchmark_of_two / "out" / "two" / "report.html").read_text("utf-8")
    assert not re.search(r"https?://|<link|@import|url\(|<!--[A-Z]", text)
    assert all(source.startswith('"data:') for source in re.findall(r"<\w+[^>]*?\bsrc=(.{6})", text))
    assert "default-src 'none'" in text

    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    views = json.loads(data)
    assert [view["name"] for view in views] == ["a", "b"]
    for view in views:
        assert (view["width"], view["height"]) == (208, 176)
        original, *versions = view["versions"]
        assert original["bytes"] == 3 * 208 * 176
        assert [version["title"] for version in versions] == ["JPEG 4:2:0", "WebP"]
        assert versions[1]["bytes"] <= max(versions[0]["bytes"], len(codecs.webp().encode(picture(208, 176), 0)))
        assert all(version["copy_psnr"] > 30 for version in view["versions"])


def test_equal_bytes_are_nearest_from_below() -> None:
    image = kodak.Picture("a", picture(208, 176), "")
    codec = codecs.jpeg("4:2:0")
    found = report.nearest_below(codec, image, 4000)
    assert found["bytes"] == len(codec.encode(image.image, found["quality"])) <= 4000
    assert len(codec.encode(image.image, found["quality"] + 1)) > 4000
    assert report.nearest_below(codec, image, 1)["quality"] == 1


def test_kodak_is_found_or_its_source_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KODAK", raising=False)
    result = CliRunner().invoke(main, ["kodak"])
    assert result.exit_code == 1 and "r0k.us" in result.output and len(result.output.splitlines()) == 1
    (tmp_path / "data" / "kodak").mkdir(parents=True)
    assert kodak.find_kodak().resolve() == (tmp_path / "data" / "kodak").resolve()
    monkeypatch.setenv("KODAK", str(tmp_path))
    assert kodak.find_kodak() == tmp_path


def test_choice_of_codecs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> NoReturn:
        raise ImportError("no such plugin")

    monkeypatch.setitem(codecs.CODECS, "heic", missing)
    assert [codec.name for codec in kodak.choose(["webp", "heic", "jpeg444"])] == ["jpeg444", "webp"]
    assert capsys.readouterr().err == "heic is skipped: no such plugin\n"
    result = CliRunner().invoke(main, ["kodak", "--codecs", "webp,gif"])
    assert result.exit_code == 2 and "unknown: gif" in result.output


def test_small_pictures_are_refused(tmp_path: Path) -> None:
    picture(300, 160).save(tmp_path / "a.png")
    with pytest.raises(ClickException, match="161 pixels"):
        kodak.open_pictures([tmp_path / "a.png"])


def test_same_bytes(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    same_bytes.run(tmp_path / "photo.png", 1.0, (0, 0, 64, 64), tmp_path / "same.png")
    assert Image.open(tmp_path / "same.png").size == (3 * 72 - 8, 64 + 24)


def test_lossless_files_are_accounted_for(photo: Image.Image, tmp_path: Path) -> None:
    photo.crop((0, 0, 128, 96)).save(tmp_path / "photo.png")
    bitsback.run([tmp_path / "photo.png"], tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "lossless.json").read_text("utf-8"))
    assert sum(row["parts"].values()) == pytest.approx(8 * row["bytes"])
    assert row["bytes"] < row["png"] and 8 * row["bytes"] < 1.03 * sum(row["bound"].values())
    assert (tmp_path / "out" / "lossless.md").exists()


def test_finer_levels_are_nearer_to_what_they_were_made_of(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.crop((0, 0, 130, 98)).save(tmp_path / "photo.png")
    monkeypatch.setattr(depth, "QUALITIES", (90.0,))
    depth.run([tmp_path / "photo.png"], tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "depth.json").read_text("utf-8"))
    assert [row["depth"] for row in rows] == [8, 10, 12, 16]
    assert rows[0]["psnr_14_bits"] < rows[1]["psnr_14_bits"]
    assert all(abs(row["bpp"] / rows[0]["bpp"] - 1) < 0.05 for row in rows)


def test_one_command_makes_all_that_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    calls: list[str] = []
    for module in (kodak, bitsback, speed, same_bytes, theory):
        monkeypatch.setattr(module, "run", lambda *given, name=module.__name__: calls.append(f"{name} {len(given)}"))
    result = CliRunner().invoke(main, ["readme", "--data", str(tmp_path), "--photographs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    names = ["kodak 3", "bitsback 2", "speed 2", "same_bytes 4", "theory 3"]
    assert calls == [f"benchmarks.{name}" for name in names]


@pytest.mark.usefixtures("small_weights", "threads")
@pytest.mark.parametrize("threads_of_tiles", [False, True])
def test_shares_of_the_time_on_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, threads_of_tiles: bool
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which takes minutes
    if threads_of_tiles:  # as on a GPU
        codec = gathering_codec()
        monkeypatch.setattr(device_speed, "Codec", lambda _device, **_: codec)
    for name in "ab":
        picture(40, 30).save(tmp_path / f"{name}.png")
    device_speed.run([tmp_path / "a.png", tmp_path / "b.png"], 50, "cpu")
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 8
    for row in rows:
        _, _, _, speed, *parts = [cell.strip() for cell in row.strip("| ").split("|")]
        shares = [int(share) for share in parts]
        assert len(shares) == len(device_speed.PARTS)
        assert float(speed) >= 0 and 97 <= sum(shares) <= 103 and min(shares) >= 0


def test_progressive_files(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progressive, "Codec", lambda _device: codec)
    monkeypatch.setenv("PATH", "")  # JPEG XL's commands take long
    picture(70, 50).save(tmp_path / "x.png")
    progressive.run([tmp_path / "x.png"], tmp_path, 80, 1)
    result = json.loads((tmp_path / "progressive.json").read_text())
    assert result["lossy"]["pictures"] == result["lossless"]["pictures"] == 1
    assert {len(curve) for curve in result["curves"].values()} == {progressive.PREFIXES + 1}
    assert {"progressive.png", "progressive_strip.jpg"} <= {file.name for file in tmp_path.iterdir()}
