"""Rate, distortion and speed of vaecodec and others on a folder of pictures: real files, decoded and compared."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from PIL import Image
from tqdm import tqdm

from vaecodec.cli import main as vaecodec_main
from vaecodec.metrics import SIDE_MIN, compare, psnr, ssimulacra2

from . import plots, report
from .bd_rate import Curve, bd_rate
from .codecs import CODECS, Codec
from .measured import Point, Result, Row, as_json, decibels, from_json, in_decibels, in_psnr, in_scores
from .pictures import Cache, Picture, open_picture
from .speed import fresh_process

KODAK = [f"kodim{number:02}" for number in range(1, 25)]
USUAL = ("kodak", "~/kodak", "~/data/kodak")
PUBLISHED = Path(__file__).with_name("published.json")
RANGE = (30.5, 36.0)
"""PSNR in dB over which BD-rates are quoted: the span that nearly every published Kodak curve covers."""
ANCHORS = ("jpeg420", "avif_psnr")
"""Codecs against which BD-rates are given."""
SEEN_RANGES = ((10.0, 50.0), (50.0, 80.0))
"""SSIMULACRA2 over which BD-rates are quoted: up to medium quality, and from there to more than high."""
MANY = 9
"""Qualities, of which earlier results get an SSIMULACRA2 at every one."""
SEEN_ANCHORS = ("jpeg420", "avif")

Curves = dict[str, Curve]
Table = list[list[str]]
"""Rows of cells, the head first."""


def find_kodak() -> Path:
    """The folder of the Kodak pictures: $KODAK, or where they usually are."""
    for place in (os.environ.get("KODAK"), *USUAL):
        if place and (folder := Path(place).expanduser()).is_dir():
            return folder
    raise click.ClickException(
        "no --data, and no Kodak pictures in $KODAK, " + ", ".join(USUAL) + ": see https://r0k.us/graphics/kodak/"
    )


def open_pictures(files: list[Path]) -> list[Picture]:
    """The pictures of the files. Raises ClickException for one that is too small for MS-SSIM."""
    pictures = [open_picture(file) for file in files]
    for picture in pictures:
        if min(picture.image.size) < SIDE_MIN:
            raise click.ClickException(f"{picture.name}: MS-SSIM needs {SIDE_MIN} pixels along each side")
    return pictures


def choose(names: Sequence[str]) -> list[Codec]:
    """The codecs of these names, in the order of CODECS; says in a line which ones are not installed."""
    found = []
    for name, build in CODECS.items():
        if name in names:
            try:
                found.append(build())
            except ImportError as error:
                click.echo(f"{name} is skipped: {error}", err=True)
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on a single thread, as the other codecs are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_one(codec: Codec, picture: Picture, quality: float) -> dict[str, float]:
    """Encode, decode, compare. Raises ClickException if a lossless codec changes a pixel."""
    marks = [time.process_time()]
    data = codec.encode(picture.image, quality)
    marks.append(time.process_time())
    decoded = codec.decode(data)
    decoded.load()
    marks.append(time.process_time())
    if codec.lossless:
        if decoded.tobytes() != picture.image.tobytes():
            raise click.ClickException(f"{codec.title}: the decoded pixels of {picture.name} differ")
        quality_of = {"psnr": math.inf, "ms_ssim": 1.0}
    else:
        likeness = compare(picture.image, decoded)
        assert likeness.ms_ssim is not None  # smaller pictures have been refused
        score = math.nan if likeness.ssimulacra2 is None else likeness.ssimulacra2
        quality_of = {"psnr": psnr(picture.image, decoded), "ms_ssim": likeness.ms_ssim, "ssimulacra2": score}
    return {"bytes": len(data), **quality_of, "encode_s": marks[1] - marks[0], "decode_s": marks[2] - marks[1]}


def measure(codec: Codec, pictures: list[Picture], cache: Cache, progress: Callable[[], object]) -> list[Point]:
    """Every picture at every quality. The first picture that is not in the cache is run once untimed before."""
    points = [Point(quality, []) for quality in codec.qualities]
    warm = False

    def run(picture: Picture, quality: float) -> dict[str, float]:
        nonlocal warm
        if not warm:
            codec.decode(codec.encode(picture.image, quality))
            warm = True
        return measure_one(codec, picture, quality)

    for picture, point in itertools.product(pictures, points):
        key = [*codec.identity, picture.digest, point.quality]
        cell = cache(key, lambda picture=picture, quality=point.quality: run(picture, quality))  # type: ignore[misc]
        point.rows.append(Row(picture.name, picture.pixels, **cell))
        progress()
    return points


def with_scores(result: Result, pictures: list[Picture], cache: Cache) -> Result:
    """An earlier result with the SSIMULACRA2 that it lacks, of files that are made anew; of many qualities every second
    is enough for a curve. As it is, with a line that says so, where the files are not those of that time."""
    codec, points = result.codec, list(result.points)
    chosen = range(0, len(points), 2 if len(points) > MANY else 1)
    for at in tqdm(chosen, desc=f"{codec.title}, SSIMULACRA2"):
        quality, rows = codec.qualities[at], list[Row]()
        for picture, row in zip(pictures, points[at].rows, strict=True):

            def scored(picture: Picture = picture, quality: float = quality) -> dict[str, float]:
                data = codec.encode(picture.image, quality)
                return {"bytes": len(data), "ssimulacra2": ssimulacra2(picture.image, codec.decode(data))}

            found = cache(["ssimulacra2", version("ssimulacra2"), *codec.identity, picture.digest, quality], scored)
            if (picture.name, found["bytes"]) != (row.picture, row.bytes):
                click.echo(f"{codec.title}: not the files of the earlier results, so no SSIMULACRA2", err=True)
                return result
            rows.append(replace(row, ssimulacra2=found["ssimulacra2"]))
        points[at] = replace(points[at], rows=rows)
    return replace(result, points=points)


def peak_memory(codec: Codec, file: Path) -> float:
    """MiB that a fresh process needs to encode and decode a picture: interpreter, libraries, networks and all."""
    code = "import sys; from benchmarks.codecs import once; once(sys.argv[1], sys.argv[2], float(sys.argv[3]))"
    quality = codec.qualities[len(codec.qualities) // 2]
    _, peak = fresh_process(code, codec.name, str(file.resolve()), str(quality))
    return peak


def command(*arguments: str) -> None:
    """One vaecodec command in this process; it has already said on standard error why it fails."""
    if vaecodec_main(list(arguments), standalone_mode=False):
        raise click.ClickException(f"vaecodec {arguments[0]} failed")


def check_command_line(codec: Codec, pictures: list[Picture]) -> bool:
    """See that the command line writes and reads the very files that are measured. Raises ClickException if not.

    Each quality is tried on another picture.
    """
    for quality, picture in zip(codec.qualities, itertools.cycle(pictures), strict=False):
        data = codec.encode(picture.image, quality)
        with TemporaryDirectory() as folder:
            source, packed, copy = (str(Path(folder, name)) for name in ("in.png", "packed.vae", "out.png"))
            picture.image.save(source, compress_level=1)
            setting = codec.options or ("--quality", str(quality))
            command("compress", source, "-o", packed, *setting, "--device", "cpu", "--no-verify", "--quiet")
            command("decompress", packed, "-o", copy, "--device", "cpu", "--quiet")
            pixels = Image.open(copy).convert("RGB").tobytes()
            if Path(packed).read_bytes() != data or pixels != codec.decode(data).tobytes():
                raise click.ClickException(f"{picture.name}, {quality:g}: the command line and Codec differ")
    return True


def published_curves() -> tuple[Curves, Curves]:
    """Other people's results on Kodak, PSNR and, where there is one, MS-SSIM; the file names the source of each."""
    entries = json.loads(PUBLISHED.read_text("utf-8"))
    curves: Curves = {name: list(zip(entry["bpp"], entry["psnr"], strict=True)) for name, entry in entries.items()}
    similarities: Curves = {
        name: list(zip(entry["bpp"], map(decibels, entry["ms_ssim"]), strict=True))
        for name, entry in entries.items()
        if "ms_ssim" in entry
    }
    return curves, similarities


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


def comparison(anchor: Curve | None, test: Curve) -> list[str]:
    """Two cells: BD-rate over RANGE and over the full overlap, with the dB that it is for unless those are RANGE."""
    cells = []
    for low, high in (RANGE, (-math.inf, math.inf)):
        result = bd_rate(anchor, test, low, high) if anchor else None
        if result is None:
            cells.append("-")
        elif (result.low, result.high) == RANGE:
            cells.append(f"{result.percent:+.1f} %")
        else:
            partial = "" if math.isinf(low) else "only "
            cells.append(f"{result.percent:+.1f} % ({partial}{result.low:.1f}-{result.high:.1f} dB)")
    return cells


def comparison_table(results: list[Result], published: tuple[Curves, Curves]) -> Table:
    """Each lossy codec against the anchors, and what it costs."""
    by_name = {result.codec.name: result for result in results}
    jpeg, tuned = (by_name[name].curve() if name in by_name else None for name in ANCHORS)
    structural = by_name[ANCHORS[0]].curve(in_decibels) if ANCHORS[0] in by_name else None
    span = f"{RANGE[0]:g}-{RANGE[1]:g} dB"
    head = ["codec", f"against JPEG 4:2:0, {span}", "full overlap", f"against AVIF tuned for PSNR, {span}"]
    head += ["full overlap", "MS-SSIM, against JPEG 4:2:0", "encode MP/s", "decode MP/s", "peak MiB"]

    def cells(name: str, curve: Curve, similarity: Curve | None) -> list[str]:
        ratio = bd_rate(structural, similarity) if structural and similarity else None
        in_words = f"{ratio.percent:+.1f} %" if ratio else "-"
        return [name, *comparison(jpeg, curve), *comparison(tuned, curve), in_words]

    lines = [
        [*cells(r.codec.title, r.curve(), r.curve(in_decibels)), *speeds(r.typical), f"{r.peak:.0f}"] for r in results
    ]
    curves, similarities = published
    lines += [
        [*cells(f"{name} (published)", curve, similarities.get(name)), "", "", ""] for name, curve in curves.items()
    ]
    return [head, *lines]


def seen_table(results: list[Result]) -> Table:
    """BD-rates at equal SSIMULACRA2 of each lossy codec that has it; the range where a curve does not span it all."""
    scored = {result.codec.name: result for result in results if result.scored}
    anchors = [scored[name] for name in SEEN_ANCHORS if name in scored]
    head = [f"against {r.codec.title}, {low:g} to {high:g}" for r in anchors for low, high in SEEN_RANGES]

    def cell(anchor: Result, test: Result, low: float, high: float) -> str:
        found = bd_rate(anchor.curve(in_scores), test.curve(in_scores), low, high)
        if found is None:
            return "-"
        span = "" if (found.low, found.high) == (low, high) else f" (only {found.low:.0f} to {found.high:.0f})"
        return f"{found.percent:+.1f} %{span}"

    lines = [
        [r.codec.title, *(cell(anchor, r, *span) for anchor in anchors for span in SEEN_RANGES)]
        for r in scored.values()
    ]
    return [["codec", *head], *lines]


def lossless_table(results: list[Result]) -> Table:
    """Bits per sub-pixel and costs of each lossless codec."""
    lines = [
        [r.codec.title, f"{point.bpp / 3:.4f}", *speeds(point), f"{r.peak:.0f}"] for r in results for point in r.points
    ]
    return [["codec", "bits per sub-pixel", "encode MP/s", "decode MP/s", "peak MiB"], *lines]


def points_table(results: list[Result]) -> Table:
    """Every codec at every quality."""
    lines = [
        [r.codec.title, f"{p.quality:.4g}", f"{p.bpp:.4f}", f"{p.psnr:.2f}", f"{p.ms_ssim:.4f}", score(p), *speeds(p)]
        for r in results
        for p in r.points
    ]
    return [["codec", "quality", "bpp", "PSNR, dB", "MS-SSIM", "SSIMULACRA2", "encode MP/s", "decode MP/s"], *lines]


def score(point: Point) -> str:
    """A cell."""
    return "-" if math.isnan(point.ssimulacra2) else f"{point.ssimulacra2:.1f}"


def pictures_table(points: list[Point]) -> Table:
    """Bits per pixel and dB of each picture at each quality."""
    lines = [
        [rows[0].picture, *(f"{row.bpp:.3f} / {row.psnr:.2f}" for row in rows)]
        for rows in zip(*(point.rows for point in points), strict=True)
    ]
    means = ["**mean**", *(f"{point.bpp:.3f} / {point.psnr:.2f}" for point in points)]
    return [["picture", *(f"{point.quality:g}" for point in points)], *lines, means]


def speeds(point: Point) -> list[str]:
    """Two cells: encoding and decoding, MP/s."""
    return [f"{point.encode_speed:.3g}", f"{point.decode_speed:.3g}"]


def markdown(table: Table) -> list[str]:
    """The lines of a table, with an empty one before and after."""
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return ["", head, "|---|" + "--:|" * (len(table[0]) - 1), *lines, ""]


def document(title: str, results: list[Result], published: tuple[Curves, Curves]) -> str:
    """table.md"""
    lossy = [result for result in results if not result.codec.lossless]
    lossless = [result for result in results if result.codec.lossless]
    lines = [f"# {title}", ""]
    if lossy:
        lines += ["BD-rate, negative is smaller. Speeds are for each CPU second, at the quality nearest 34 dB."]
        lines += markdown(comparison_table(lossy, published))
        lines += ["BD-rate at equal SSIMULACRA2, which follows the eye better: 50 is medium quality, 70 high."]
        lines += markdown(seen_table(lossy))
    if lossless:
        lines += ["Lossless:", *markdown(lossless_table(lossless))]
    for ours in (result.points for result in lossy if result.codec.name == "vaecodec"):
        lines += ["vaecodec, bits per pixel / dB at each quality:", *markdown(pictures_table(ours))]
        lines += ["Monotonicity over qualities (mean rate and PSNR; 1 % and 0.05 dB for each picture):", ""]
        lines += [*([f"- {violation}" for violation in violations(ours)] or ["no violations"]), ""]
    if lossy:
        lines += ["Means over pictures at every quality:", *markdown(points_table(lossy))]
    return "\n".join(lines)


def run(files: list[Path], out: Path, names: Sequence[str]) -> None:
    """Measure the codecs of these names and write tables, plots and the report to ``out``; print the first table.

    Other codecs are in tables and plots as well if ``out`` has results of theirs.
    """
    pictures = open_pictures(files)
    codecs = choose(names)
    cache = Cache(out.parent / ".cache")
    results = []
    with one_thread():
        with tqdm(total=len(pictures) * sum(len(codec.qualities) for codec in codecs)) as bar:
            for codec in codecs:
                bar.set_description(codec.title)
                points = measure(codec, pictures, cache, bar.update)
                key = ["peak memory", *codec.identity, pictures[0].digest]
                peak = cache(key, lambda codec=codec: peak_memory(codec, files[0]))  # type: ignore[misc]
                if codec.name.startswith("vaecodec"):
                    key = ["command line", *codec.identity, *(picture.digest for picture in pictures)]
                    cache(key, lambda codec=codec: check_command_line(codec, pictures))  # type: ignore[misc]
                results.append(Result(codec, points, peak))
        sought = [codec for codec in codecs if not codec.lossless]
        views = report.views(sought, pictures, cache) if sought else []

    earlier = {name: out / f"{name}.json" for name in CODECS if name not in names}
    fresh = set(names)
    for codec in choose([name for name, path in earlier.items() if path.exists()]):
        result = from_json(codec, earlier[codec.name].read_text("utf-8"))
        if not (codec.lossless or result.scored):
            result = with_scores(result, pictures, cache)
            fresh |= {codec.name} if result.scored else set()
        results.append(result)
    results.sort(key=lambda result: [*CODECS].index(result.codec.name))

    published = published_curves() if [picture.name for picture in pictures] == KODAK else ({}, {})
    title = f"{out.name}, {len(pictures)} pictures"
    lossy = [result for result in results if not result.codec.lossless]
    lossless = [result for result in results if result.codec.lossless]
    out.mkdir(parents=True, exist_ok=True)
    for result in results:
        if result.codec.name in fresh:
            (out / f"{result.codec.name}.json").write_text(as_json(result), "utf-8")
    drawn: list[Path] = []
    if lossy:
        curves, similarities = ({r.codec.title: r.curve(pick) for r in lossy} for pick in (in_psnr, in_decibels))
        scores = {r.codec.title: r.curve(in_scores) for r in lossy if r.scored}
        drawn += [
            plots.rate_distortion(curves, published[0], title, "PSNR, dB (RGB)", out / "rd"),
            plots.rate_distortion(similarities, published[1], title, "MS-SSIM, dB (RGB)", out / "rd_msssim"),
            plots.rate_distortion(scores, {}, title, "SSIMULACRA2", out / "rd_ssimulacra2"),
        ]
    if lossless:
        sizes = {result.codec.title: result.points[0].bpp / 3 for result in lossless}
        drawn.append(plots.bars(sizes, f"{title}, lossless", "bits per sub-pixel", out / "lossless_sizes"))
    facts = [comparison_table(lossy, published), seen_table(lossy)] if lossy else []
    facts += [lossless_table(lossless)] if lossless else []
    (out / "report.html").write_text(report.page(title, facts, drawn, views), "utf-8")
    text = document(title, results, published)
    (out / "table.md").write_text(text, "utf-8")
    print(text)
