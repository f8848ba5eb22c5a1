"""Commands that look at files and write none."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bitstream import MAGIC, Limits, TruncatedError, VaeError, read_header, unpack

from .. import __version__, folders
from . import batch, files, inout, options
from .group import fail, main
from .pictures import picture_in

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..image import DeepPicture


@main.command()
@options.SOURCES
@options.RECURSIVE
@options.QUIET
@options.MAX_PIXELS
@options.computing
def verify(sources: tuple[str, ...], recursive: bool, limits: Limits, machine: options.Machine) -> None:
    """Decode .vae files, check every tile, write nothing: files, folders, quoted patterns, or - for standard input."""

    def start() -> batch.Work:
        codec = machine.codec()

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            data = inout.read(job.source)
            header = read_header(data)
            pixels = header.width * header.height
            for _ in codec.decode_tiles(data, limits, follow(pixels, 1)):
                pass
            return batch.Done(pixels, len(data), 0, len(data), f"{job.source}: good")

        return work

    batch.run(files.listed(sources, files.VAE, recursive), start, quiet=machine.quiet)


@main.command()
@options.SOURCES
@options.RECURSIVE
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; of several files a line for each.")
@click.option("--bits", is_flag=True, help="Decode the files and show where their bits went.")
@options.computing
def info(sources: tuple[str, ...], recursive: bool, as_json: bool, bits: bool, machine: options.Machine) -> None:
    """Show what .vae files hold, without decoding them: files, folders, quoted patterns, or - for standard input.

    Of a file that ends early, what decompress --preview draws, this and how much of it is there are shown before it
    fails.
    """
    from ..info import read_info, what_is_there

    if not bits:
        refuse_machine("--bits")
    codec = machine.codec() if bits else None
    plan = files.listed(sources, files.VAE, recursive)
    several = len(plan.jobs) > 1 or any(os.path.isdir(source) for source in sources)

    def show(job: files.Job) -> None:
        data = inout.read(job.source)
        facts, there = asdict(read_info(data, preview=True)), what_is_there(data)
        found: dict[str, Any] = {}
        if codec and not there:
            found = {"arithmetic": codec.arithmetic(data), "bits": codec.account(data)}
        if as_json:
            name = {"file": str(job.source)} if several else {}
            click.echo(json.dumps(name | facts | found))
        else:
            if several:
                click.echo(f"{folders.shown(str(job.source))}:")
            for key, value in (facts | {"model": facts["model"] or "no weights are needed"}).items():
                click.echo(f"{key:9} {value}")
            if found:
                click.echo(f"decoded   in {found['arithmetic']}")
            samples = facts["width"] * facts["height"] * len(facts["mode"].split(";")[0].replace("I", "L"))
            for key, value in found.get("bits", {}).items():
                click.echo(f"{key:22} {value:14.1f} bits {value / samples:9.5f} a sample {value / len(data) / 8:8.2%}")
        if there:
            raise TruncatedError(f"cut off: {there}")

    batch.each(plan, show)


@main.command()
@click.argument("a", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("b", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; null for an infinite PSNR.")
@options.computing
def compare(a: Path, b: Path, as_json: bool, machine: options.Machine) -> None:
    """Show how near B is to A: PSNR, MS-SSIM and SSIMULACRA2, and the bits a pixel if B, or else A, is a .vae file.

    Both may be .vae files or pictures. MS-SSIM needs sides of 161 pixels. SSIMULACRA2 needs the extra "metrics", and
    a second a megapixel; it is made for sRGB of 8 bits, to which deeper samples are rounded.
    """
    contents = [inout.read(path) for path in (a, b)]
    packed = [data for data in contents if data.startswith(MAGIC)]
    if not packed:
        refuse_machine("a .vae file")
    from ..engines import installed
    from ..image import DeepPicture
    from ..metrics import compare as measured

    codec = machine.codec() if packed else None

    def shown(path: Path, data: bytes) -> Image | DeepPicture:
        if codec is None or data not in packed:
            return picture_in(io.BytesIO(data), suffix=path.suffix)
        if (depth := read_header(data).depth) > 8:
            return DeepPicture.of(codec.decode_array(data), depth, unpack(data).sections)
        return codec.decompress(data)

    pictures = list["Image | DeepPicture"]()
    for path, data in zip((a, b), contents, strict=True):
        try:
            pictures.append(shown(path, data))
        except (VaeError, MemoryError) as error:
            message = batch.described(error, files.Job(path, path))
            fail(f"{path}: {message}", error.exit_code if isinstance(error, VaeError) else 1)
    likeness = measured(*pictures)
    bpp = 8 * len(packed[-1]) / (pictures[0].width * pictures[0].height) if packed else None
    if as_json:
        psnr = likeness.psnr if math.isfinite(likeness.psnr) else None
        score = likeness.ssimulacra2
        click.echo(json.dumps({"psnr": psnr, "ms_ssim": likeness.ms_ssim, "ssimulacra2": score, "bpp": bpp}))
        return
    lacking = "-" if installed("ssimulacra2") else "-  (pip install 'vaecodec[metrics]')"
    click.echo(f"PSNR        {likeness.psnr:.3f} dB")
    click.echo(f"MS-SSIM     {'-' if likeness.ms_ssim is None else f'{likeness.ms_ssim:.5f}'}")
    click.echo(f"SSIMULACRA2 {lacking if likeness.ssimulacra2 is None else f'{likeness.ssimulacra2:.2f}'}")
    if bpp is not None:
        click.echo(f"bpp         {bpp:.4f}")


@main.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@options.ENGINE
def selftest(device: str, engine: str) -> None:
    """Check that this machine decodes files to the pixels that every other machine does.

    Says in which arithmetic the networks are exact here. Of one version, the last line is the same everywhere.
    """
    from importlib.metadata import PackageNotFoundError, version

    from ..selftest import checks

    found = [f"vaecodec {__version__}"]
    for name in ("onnxruntime", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    click.echo(", ".join(found))
    for line in checks(options.Machine(device, None, engine=engine).codec()):
        click.echo(line)


def refuse_machine(wanted: str) -> None:
    """Raises UsageError for options of ``computing`` where nothing is computed."""
    context = click.get_current_context()
    for name in ("device", "engine", "threads", "weights"):
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} has no effect without {wanted}")
