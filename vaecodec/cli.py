"""The command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bitstream import MAGIC, Limits, VaeError, read_header

from . import __version__, batch, files, options

if TYPE_CHECKING:
    from PIL.Image import Image


class Group(click.Group):
    """Turns the package's errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VaeError as error:
            fail(str(error), error.exit_code)
        except MemoryError:
            fail("out of memory", 1)
        except OSError as error:
            name = error.filename2 or error.filename  # of a rename, the target
            fail(f"{name}: {error.strerror}" if name else str(error), 1)


def fail(message: str, code: int) -> None:
    click.echo(f"vaecodec: {message}", err=True)
    raise click.exceptions.Exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
def main() -> None:
    """A learned image codec: photographs to .vae files and back.

    Exit codes: 0 done, 1 an input failed, 2 wrong usage, and of a single input 3 damaged or too new a file, 4 weights
    missing, 5 a limit exceeded.

    Completion in bash: eval "$(_VAECODEC_COMPLETE=bash_source vaecodec)"; in zsh and fish with zsh_source, fish_source.
    """


@main.command()
@options.batching(files.PICTURES, files.VAE)
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=75.0, show_default=True, help="0..100.")
@click.option("--target-bpp", type=click.FloatRange(0, min_open=True), help="Bits a pixel to aim at, within 1 %.")
@click.option("--target-size", **options.SIZE, help="Bytes to aim at, within 1 %; k and M are 10^3 and 10^6.")
@click.option("--target-psnr", type=click.FloatRange(0, min_open=True), help="dB to aim at, within 0.05.")
@click.option("-l", "--lossless", is_flag=True, help="Keep every pixel as it is, by bits-back coding.")
@click.option(
    "-e",
    "--effort",
    type=click.IntRange(0, 9),
    default=0,
    show_default=True,
    help="0 fast to 9 small: refine what is coded for this picture. Files decode as fast as ever.",
)
@click.option(
    "--metadata", **options.METADATA, default="all", show_default=True, help="What to keep of EXIF, ICC and XMP."
)
@click.option("--verify/--no-verify", default=True, help="Decode the written file before it takes its name.")
@options.MAX_PIXELS
@options.computing
def compress(
    request: files.Request,
    quality: float,
    target_bpp: float | None,
    target_size: float | None,
    target_psnr: float | None,
    lossless: bool,
    effort: int,
    metadata: list[str],
    verify: bool,
    limits: Limits,
    machine: options.Machine,
) -> None:
    """Compress pictures: files, folders, quoted patterns, or - for standard input. x.png becomes x.vae.

    In folders, suffixes say what is a picture. A file of several frames is refused, but of the JPEG files of phones
    and cameras that carry previews (MPO) the first picture is taken. A target costs about three encodes. Bytes may
    depend on --device and --threads, which change how sums are rounded, and never on --jobs or --shard.
    """
    aims = {"bpp": target_bpp, "size": target_size, "psnr": target_psnr}
    targets = {name: value for name, value in aims.items() if value is not None}
    if not all(math.isfinite(value) for value in (quality, *targets.values())):
        raise click.UsageError("nan and inf are neither qualities nor targets")
    asked = click.get_current_context().get_parameter_source("quality") != ParameterSource.DEFAULT
    if len(targets) + asked + lossless > 1:
        raise click.UsageError("--lossless, --quality and the targets exclude each other")
    passes = 6 if target_psnr else 3 if targets else 1  # about; a search for a PSNR decodes as well
    plan = files.planned(request, files.PICTURES, ".vae")

    def start() -> batch.Work:
        from .image import INFO_KEYS, open_picture
        from .metrics import fidelity
        from .targets import missed, search

        codec = machine.codec("lossless" if lossless else "lossy")
        _ = codec.lossless if lossless else codec.lossy  # what is wrong with them is wrong once, and not for each file
        names = {key.split("_")[0]: key for key in INFO_KEYS.values()}
        dropped = [key for name, key in names.items() if name not in metadata]

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            with files.opened(job.source) as source:
                return compressed(job, follow, open_picture(source, limits), source.seek(0, os.SEEK_END))

        def compressed(job: files.Job, follow: batch.Follow, picture: Image, read: int) -> batch.Done:
            for key in dropped:
                picture.info.pop(key, None)
            pixels = picture.width * picture.height
            progress, notes, warning = follow(pixels, passes + verify), list[str](), ""
            if targets:
                found = search(codec, picture, effort=effort, limits=limits, progress=progress, **targets)
                data, warning = found.data, "" if found.near else missed(found, target_psnr is not None)
                notes.append(f"quality {found.quality:g}")
            else:
                data = codec.compress(picture, quality, progress, lossless=lossless, effort=effort, limits=limits)
            size = len(data)
            with files.written(job, data, keep_times=request.keep_times) as temporary:
                written = temporary or data
                del data  # large ones leave no room for a second
                if verify:
                    psnr, equal = fidelity(picture, codec.decode_tiles(written, limits, progress))
                    if lossless and not equal:
                        raise VaeError("the decoded pixels are not those of the picture: nothing was written")
                    notes.append("every pixel equal" if lossless else f"{psnr:.2f} dB")
            note = ", ".join([f"{job.target}: {size} bytes, {8 * size / pixels:.3f} bpp", *notes])
            return batch.Done(pixels, read, size, size, note, warning)

        return work

    with pillow_limit(limits):
        batch.run(plan, start, request.workers, machine.quiet)


@main.command()
@options.batching(files.VAE, files.PICTURES)
@click.option("--format", help="Suffix of outputs without a name of their own: jpg, webp, tiff ...  [default: png]")
@click.option("--region", **options.REGION, help="Only this part, in pixels; other tiles are not decoded.")
@click.option("--downsample", type=click.Choice(["2", "4", "8"]), help="Average squares of so many pixels.")
@click.option("--allow-partial", is_flag=True, help="Leave tiles black that are cut off or damaged, and say which.")
@options.MAX_PIXELS
@options.computing
def decompress(
    request: files.Request,
    format: str | None,
    region: tuple[int, int, int, int] | None,
    downsample: str | None,
    allow_partial: bool,
    limits: Limits,
    machine: options.Machine,
) -> None:
    """Decompress .vae files: files, folders, quoted patterns, or - for standard input. x.vae becomes x.png.

    The suffix of -o chooses the format. JPEG and AVIF lose once more, at their quality 95; WebP is written lossless.
    """
    if format is not None and request.output not in (None, "-") and not files.is_folder(str(request.output)):
        raise click.UsageError("--format is for outputs without a name of their own; the suffix of -o says the format")
    suffix = f".{(format or 'png').lstrip('.')}"
    plan = files.planned(request, files.VAE, suffix)

    def start() -> batch.Work:
        from .image import ImageError, encode_picture

        if request.output is None or files.is_folder(request.output) or request.output == "-":
            picture_format(suffix)  # a wrong one is wrong once, and not for each file
        codec = machine.codec()

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            encoding = picture_format(suffix if job.target == files.STANDARD else job.target.suffix)
            data = files.read(job.source)
            header = read_header(data)
            x, y, width, height = region or (0, 0, header.width, header.height)
            if x + width > header.width or y + height > header.height:
                raise ImageError(f"the region is not inside its {header.width} x {header.height} pixels")
            progress, damaged = follow(width * height, 1), list[tuple[int, int, int, int]]()
            picture = codec.decompress(
                data, limits, progress, region=region, damaged=damaged if allow_partial else None
            )
            if downsample:
                picture = reduced(picture, int(downsample))
            read = len(data)
            del data  # a large picture leaves no room for it
            encoded, lost = encode_picture(picture, encoding)
            with files.written(job, encoded, keep_times=request.keep_times):
                pass
            said = [f"{encoding} did not take the picture's {', '.join(lost)}"] if lost else []
            if damaged:
                regions = " ".join(",".join(map(str, tile)) for tile in damaged)
                said.append(f"{len(damaged)} of {header.tile_count} tiles are damaged: {regions}")
            part = read * width * height // (header.width * header.height)
            note = f"{job.target}: {picture.width} x {picture.height}"
            return batch.Done(width * height, read, len(encoded), part, note, "; ".join(said))

        return work

    with pillow_limit(limits):
        batch.run(plan, start, request.workers, machine.quiet)


@main.command()
@click.argument("sources", type=click.Path(path_type=Path, allow_dash=True), nargs=-1, required=True)
@options.QUIET
@options.MAX_PIXELS
@options.computing
def verify(sources: tuple[Path, ...], limits: Limits, machine: options.Machine) -> None:
    """Decode .vae files, check every tile, write nothing."""

    def start() -> batch.Work:
        codec = machine.codec()

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            data = files.read(job.source)
            header = read_header(data)
            pixels = header.width * header.height
            for _ in codec.decode_tiles(data, limits, follow(pixels, 1)):
                pass
            return batch.Done(pixels, len(data), 0, len(data), f"{job.source}: good")

        return work

    plan = files.Plan([files.Job(source, files.STANDARD) for source in sources], 0, 0)
    batch.run(plan, start, quiet=machine.quiet)


@main.command()
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--bits", is_flag=True, help="Decode a lossless file and show where its bits went.")
@options.computing
def info(source: Path, as_json: bool, bits: bool, machine: options.Machine) -> None:
    """Show what a .vae file holds, without decoding it."""
    from .info import read_info

    if not bits:
        refuse_machine("--bits")
    data = files.read(source)
    facts = asdict(read_info(data))
    account = machine.codec("lossless").account(data) if bits else {}
    if as_json:
        click.echo(json.dumps(facts | ({"bits": account} if bits else {})))
        return
    for key, value in facts.items():
        click.echo(f"{key:9} {value}")
    samples = facts["width"] * facts["height"] * len(facts["mode"].split(";")[0].replace("I", "L"))
    for key, value in account.items():
        click.echo(f"{key:22} {value:14.1f} bits {value / samples:9.5f} a sample {value / len(data) / 8:8.2%}")


@main.command()
@click.argument("a", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("b", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; null for an infinite PSNR.")
@options.computing
def compare(a: Path, b: Path, as_json: bool, machine: options.Machine) -> None:
    """Show how near B is to A: PSNR and MS-SSIM, and the bits a pixel if B, or else A, is a .vae file.

    Both may be .vae files or pictures. MS-SSIM needs sides of 161 pixels.
    """
    contents = [files.read(path) for path in (a, b)]
    packed = [data for data in contents if data.startswith(MAGIC)]
    if not packed:
        refuse_machine("a .vae file")
    from .image import open_picture
    from .metrics import compare as measured

    codec = machine.codec() if packed else None
    pictures = [
        codec.decompress(data) if codec and data in packed else open_picture(io.BytesIO(data)) for data in contents
    ]
    likeness = measured(*pictures)
    bpp = 8 * len(packed[-1]) / (pictures[0].width * pictures[0].height) if packed else None
    if as_json:
        psnr = likeness.psnr if math.isfinite(likeness.psnr) else None
        click.echo(json.dumps({"psnr": psnr, "ms_ssim": likeness.ms_ssim, "bpp": bpp}))
        return
    click.echo(f"PSNR    {likeness.psnr:.3f} dB")
    click.echo(f"MS-SSIM {'-' if likeness.ms_ssim is None else f'{likeness.ms_ssim:.5f}'}")
    if bpp is not None:
        click.echo(f"bpp     {bpp:.4f}")


@main.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def selftest(device: str) -> None:
    """Check that this machine decodes files to the pixels that every other machine does.

    Says in which arithmetic the networks are exact here. Of one version, the last line is the same everywhere.
    """
    import torch

    from .selftest import checks

    click.echo(f"vaecodec {__version__}, torch {torch.__version__}")
    for line in checks(options.Machine(device, None, None).codec()):
        click.echo(line)


@main.command()
@click.argument("config")
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), required=True, help="Time to train.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for what is written. Default: runs/CONFIG.")
@click.option("--val", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Pictures to validate on.")
@click.option("--resume", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Checkpoint or weights.")
@click.option("--overwrite", is_flag=True, help="Begin anew in a folder that holds a run.")
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
def train(
    config: str,
    data: Path,
    minutes: float,
    out: Path | None,
    val: Path | None,
    resume: Path | None,
    overwrite: bool,
    device: str,
    threads: int | None,
    seed: int,
) -> None:
    """Train CONFIG, a .toml file, or `lossy` or `lossless` for the packaged ones.

    Writes checkpoints, curve.csv and, at the end, the exported weights, CONFIG.safetensors, to --out. The same command
    works under torchrun. What is no picture in --data and --val is named and left out, hidden files are passed over.
    Where the loss is not finite any more, training stops, the last sound weights are exported, and the exit code is 1.
    """
    import torch

    from . import train as training
    from .steps import UnsoundError

    if threads:
        torch.set_num_threads(threads)
    path = training.found_config(config)
    out = out or Path("runs") / path.stem
    unsound = None
    try:
        training.train(
            path, data, minutes, out, val=val, resume=resume, overwrite=overwrite, device_name=device, seed=seed
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except UnsoundError as error:
        unsound = error
    if int(os.environ.get("RANK", "0")) == 0:
        exported(out / "last.pt", data, out / f"{path.stem}.safetensors")
    if unsound is not None:
        raise unsound


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def export(checkpoint: Path, data: Path, output: Path) -> None:
    """Turn a training CHECKPOINT into a weights file, its entropy tables fitted to the pictures in --data."""
    if not output.parent.is_dir():
        raise click.UsageError(f"{output.parent}: no such folder")
    exported(checkpoint, data, output)


def exported(checkpoint: Path, data: Path, output: Path) -> None:
    """Write the weights file of a checkpoint; one line where its numbers do not fit into one."""
    from .export import export

    try:
        export(checkpoint, data, output)
    except ValueError as error:
        raise click.ClickException(f"{checkpoint}: {error}") from None


def refuse_machine(wanted: str) -> None:
    """Raises UsageError for options of ``computing`` where nothing is computed."""
    context = click.get_current_context()
    for name in ("device", "threads", "weights"):
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} has no effect without {wanted}")


def picture_format(suffix: str) -> str:
    """Pillow's name. Raises ImageError."""
    from PIL import Image

    from .image import ImageError

    format = Image.registered_extensions().get(suffix.lower())
    if format is None or format not in Image.SAVE:
        raise ImageError(f"no picture format for the suffix {suffix!r}")
    return format


def reduced(picture: Image, factor: int) -> Image:
    """Averages of factor x factor pixels; where alpha is, weighed by it."""
    if picture.mode.startswith("I"):
        return picture.convert("I").reduce(factor).convert("I;16")
    return picture.reduce(factor)


@contextlib.contextmanager
def pillow_limit(limits: Limits) -> Iterator[None]:
    """Let Pillow open what the limits allow. Its own limit is the whole process's, so this is for commands alone."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limits.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
