"""The command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bitstream import MAGIC, CorruptError, Limits, VaeError, read_header, unpack

from . import __version__, batch, files, options

if TYPE_CHECKING:
    from PIL.Image import Image

    from .image import DeepPicture


class Group(click.Group):
    """Turns the package's errors into one line and an exit code."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            code = super().main(args, standalone_mode=False, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()
        except click.ClickException as error:
            error.message = files.shown(error.message)  # type: ignore[misc]
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = batch.INTERRUPTED
        except OSError as error:  # of standard output: other files have their lines
            if error.errno != errno.EPIPE:  # who has closed it knows
                files.say(f"vaecodec: standard output: {error.strerror}")
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what it holds is not to fail once more at exit
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VaeError as error:
            fail(str(error), error.exit_code)
        except MemoryError:
            fail("out of memory", 1)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(batch.INTERRUPTED) from None
        except OSError as error:
            name = error.filename2 or error.filename  # of a rename, the target
            if not name:
                raise
            fail(f"{name}: {error.strerror}", 1)


def fail(message: str, code: int) -> None:
    files.say(f"vaecodec: {message}")
    raise click.exceptions.Exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
def main() -> None:
    """A learned image codec: photographs to .vae files and back.

    Exit codes: 0 done, 1 an input failed or is damaged, 2 wrong usage, 130 interrupted, and of a single input 3 damaged
    or too new a file, 4 weights missing, 5 a limit exceeded.

    Completion in bash: eval "$(_VAECODEC_COMPLETE=bash_source vaecodec)"; in zsh and fish with zsh_source, fish_source.
    """


@main.command()
@options.batching(files.PICTURES, files.VAE)
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=75.0, show_default=True, help="0..100.")
@click.option("--target-bpp", type=click.FloatRange(0, min_open=True), help="Bits a pixel to aim at, within 1 %.")
@click.option("--target-size", **options.SIZE, help="Bytes to aim at, within 1 %: 20k, 20kB, 20KiB ...")
@click.option("--target-psnr", type=click.FloatRange(0, min_open=True), help="dB to aim at, within 0.05.")
@click.option("--best-effort", is_flag=True, help="Take the nearest there is to a target that no quality meets.")
@click.option("-l", "--lossless", is_flag=True, help="Keep every pixel as it is, by bits-back coding.")
@click.option(
    "-e",
    "--effort",
    type=click.IntRange(0, 9),
    default=0,
    show_default=True,
    help="0 fast to 9 small: refine what is coded for this picture, at many times the time. Files decode as fast as "
    "ever.",
)
@click.option(
    "--metadata", **options.METADATA, default="all", show_default=True, help="What to keep; icc is all about colour."
)
@click.option(
    "--depth",
    type=click.IntRange(9, 16),
    help="Bits in use of 16-bit samples. Default: what the file says, or else what its largest sample takes.",
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
    best_effort: bool,
    lossless: bool,
    effort: int,
    metadata: list[str],
    depth: int | None,
    verify: bool,
    limits: Limits,
    machine: options.Machine,
) -> None:
    """Compress pictures: files, folders, quoted patterns, or - for standard input. x.png becomes x.vae.

    In folders, suffixes say what is a picture. A file of several frames is refused, but of the JPEG files of phones
    and cameras that carry previews (MPO) the first picture is taken. A target costs about three encodes; one that is
    not met is a failure, and nothing is written. Bytes may depend on --device and --threads, which change how sums are
    rounded, and never on --jobs or --shard.
    """
    aims = {"bpp": target_bpp, "size": target_size, "psnr": target_psnr}
    targets = {name: value for name, value in aims.items() if value is not None}
    if not all(math.isfinite(value) for value in (quality, *targets.values())):
        raise click.UsageError("nan and inf are neither qualities nor targets")
    asked = click.get_current_context().get_parameter_source("quality") != ParameterSource.DEFAULT
    if len(targets) + asked + lossless > 1:
        raise click.UsageError("--lossless, --quality and the targets exclude each other")
    if best_effort and not targets:
        raise click.UsageError("--best-effort is for targets")
    passes = 6 if target_psnr else 3 if targets else 1  # about; a search for a PSNR decodes as well
    quick_check = verify and not effort  # beside a refinement, the time of a decode is nothing
    plan = with_a_picture(files.planned(request, files.PICTURES, ".vae"))

    def start() -> batch.Work:
        from .image import DeepPicture, keep_metadata
        from .metadata import left_out
        from .metrics import fidelity
        from .targets import missed, search

        codec = machine.codec("lossless" if lossless else "lossy")
        _ = codec.lossless if lossless else codec.lossy  # what is wrong with them is wrong once, and not for each file

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            with files.opened(job.source) as source:
                head = source.read(len(MAGIC))
                if head == MAGIC:  # from standard input: files have been looked at
                    raise VaeError("already a .vae file")
                source.seek(0)
                picture, others = picture_in(source, limits), left_out(source) if metadata else []
                return compressed(job, follow, picture, others, source.seek(0, os.SEEK_END))

        def compressed(
            job: files.Job, follow: batch.Follow, picture: Image | DeepPicture, others: list[str], read: int
        ) -> batch.Done:
            keep_metadata(picture, metadata)
            if depth and isinstance(picture, DeepPicture):
                picture = picture.in_depth(depth)
            pixels = picture.width * picture.height
            progress, notes = follow(pixels, passes + quick_check), list[str]()
            said = [f"not kept: {', '.join(others)}"] if others else []
            if targets:
                found = search(codec, picture, effort=effort, limits=limits, progress=progress, **targets)
                if not found.near:
                    said.append(missed(found, target_psnr is not None))
                    if not best_effort:
                        raise VaeError(f"{said[-1]}: nothing was written; --best-effort takes that")
                data = found.data
                notes.append(f"quality {found.quality:g}")
            else:
                data = codec.compress(picture, quality, progress, lossless=lossless, effort=effort, limits=limits)
            size, used = len(data), read_header(data).depth
            with files.written(job, data, keep_times=request.keep_times) as temporary:
                written = temporary or data
                del data  # large ones leave no room for a second
                if verify:
                    checking = progress if quick_check else lambda _done: progress(0)
                    psnr, equal = fidelity(picture, codec.decode_tiles(written, limits, checking), used)
                    if lossless and not equal:
                        raise VaeError("the decoded pixels are not those of the picture: nothing was written")
                    notes.append("every pixel equal" if lossless else f"{psnr:.2f} dB")
            note = ", ".join([f"{job.target}: {size} bytes, {8 * size / pixels:.3f} bpp", *notes])
            return batch.Done(pixels, read, size, size, note, "; ".join(said))

        return work

    with pillow_limit(limits):
        batch.run(plan, start, request.workers, machine.quiet)


@main.command()
@options.batching(files.VAE, files.PICTURES)
@click.option("--format", help="Suffix of outputs without a name of their own: jpg, webp, tiff ...  [default: png]")
@click.option("--region", **options.REGION, help="Only this part, in pixels; other tiles are not decoded.")
@click.option("--downsample", type=click.Choice(["2", "4", "8"]), help="Average squares of so many pixels.")
@click.option("--lossy-output", is_flag=True, help="Write what the format can hold, if that is not all.")
@click.option("--background", **options.COLOUR, help="Lay pictures with alpha over this colour: white, #336699 ...")
@click.option(
    "--allow-partial",
    is_flag=True,
    help="Leave tiles black that are cut off or damaged, say which, and exit with 1. Without a good tile: an error.",
)
@options.MAX_PIXELS
@options.computing
def decompress(
    request: files.Request,
    format: str | None,
    region: tuple[int, int, int, int] | None,
    downsample: str | None,
    lossy_output: bool,
    background: str | None,
    allow_partial: bool,
    limits: Limits,
    machine: options.Machine,
) -> None:
    """Decompress .vae files: files, folders, quoted patterns, or - for standard input. x.vae becomes x.png.

    The suffix of -o chooses the format. JPEG and AVIF lose once more, at their quality 95, and so does PDF; any other
    format that cannot hold the picture exactly is refused, unless --lossy-output is given.
    """
    output = request.output
    own_name = not (output in (None, "-") or files.is_folder(str(output)) or files.special(Path(str(output))))
    if format is not None and own_name:
        raise click.UsageError("--format is for outputs without a name of their own; the suffix of -o says the format")
    if format is not None and not re.fullmatch(r"\.?\w+", format):
        raise click.BadParameter(f"{format!r} is no suffix", param_hint="--format")

    from .image import ImageError
    from .saving import encode_picture, picture_format

    suffix = Path(str(output)).suffix if own_name else f".{(format or 'png').lstrip('.')}"
    try:
        encoding = picture_format(suffix)
    except ImageError as error:
        if format is None:
            raise ImageError(f"{output}: {error}") from None
        raise click.BadParameter(str(error), param_hint="--format") from None
    plan = files.planned(request, files.VAE, suffix)

    def start() -> batch.Work:
        from .image import DeepPicture

        codec = machine.codec()

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            data = files.read(job.source)
            header = read_header(data)
            x, y, width, height = region or (0, 0, header.width, header.height)
            if x + width > header.width or y + height > header.height:
                raise ImageError(f"the region is not inside its {header.width} x {header.height} pixels")
            progress, damaged = follow(width * height, 1), list[tuple[int, int, int, int]]()
            options: dict[str, Any] = {"region": region, "damaged": damaged if allow_partial else None}
            picture: Image | DeepPicture
            if header.depth > 8:
                samples = codec.decode_array(data, limits, progress, **options)
                picture = DeepPicture.of(samples, header.depth, unpack(data, limits, partial=True).sections)
            else:
                picture = codec.decompress(data, limits, progress, **options)
            if sum(overlap(tile, (x, y, width, height)) for tile in damaged) == width * height:
                raise CorruptError("all tiles are damaged")
            if downsample:
                picture = reduced(picture, int(downsample))
            read = len(data)
            del data  # a large picture leaves no room for it
            encoded, lost = encode_picture(
                picture, encoding, depth=header.depth, lossy=lossy_output, background=background
            )
            with files.written(job, encoded, keep_times=request.keep_times):
                pass
            said = [f"{encoding} did not take the picture's {', '.join(lost)}"] if lost else []
            if damaged:
                regions = " ".join(",".join(map(str, tile)) for tile in damaged)
                said.append(f"{len(damaged)} of {header.tile_count} tiles are damaged: {regions}")
            part = read * width * height // (header.width * header.height)
            note = f"{job.target}: {picture.width} x {picture.height}"
            return batch.Done(width * height, read, len(encoded), part, note, "; ".join(said), bool(damaged))

        return work

    with pillow_limit(limits):
        batch.run(plan, start, request.workers, machine.quiet)


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
            data = files.read(job.source)
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
@click.option("--bits", is_flag=True, help="Decode lossless files and show where their bits went.")
@options.computing
def info(sources: tuple[str, ...], recursive: bool, as_json: bool, bits: bool, machine: options.Machine) -> None:
    """Show what .vae files hold, without decoding them: files, folders, quoted patterns, or - for standard input."""
    from .info import read_info

    if not bits:
        refuse_machine("--bits")
    codec = machine.codec("lossless") if bits else None
    plan = files.listed(sources, files.VAE, recursive)
    several = len(plan.jobs) > 1 or any(os.path.isdir(source) for source in sources)

    def show(job: files.Job) -> None:
        data = files.read(job.source)
        facts = asdict(read_info(data))
        account = codec.account(data) if codec else {}
        if as_json:
            name = {"file": str(job.source)} if several else {}
            click.echo(json.dumps(name | facts | ({"bits": account} if codec else {})))
            return
        if several:
            click.echo(f"{files.shown(str(job.source))}:")
        for key, value in facts.items():
            click.echo(f"{key:9} {value}")
        samples = facts["width"] * facts["height"] * len(facts["mode"].split(";")[0].replace("I", "L"))
        for key, value in account.items():
            click.echo(f"{key:22} {value:14.1f} bits {value / samples:9.5f} a sample {value / len(data) / 8:8.2%}")

    batch.each(plan, show)


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
    from .image import DeepPicture
    from .metrics import compare as measured

    codec = machine.codec() if packed else None

    def shown(data: bytes) -> Image | DeepPicture:
        if codec is None or data not in packed:
            return picture_in(io.BytesIO(data))
        if (depth := read_header(data).depth) > 8:
            return DeepPicture(codec.decode_array(data), depth, {})
        return codec.decompress(data)

    pictures = [shown(data) for data in contents]
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


def with_a_picture(plan: files.Plan) -> files.Plan:
    """The plan. If it is one file, that is looked at before anything large is imported."""
    if len(plan.jobs) != 1 or plan.jobs[0].problem or plan.jobs[0].source == files.STANDARD:
        return plan
    from PIL import Image, UnidentifiedImageError

    from .saving import load_plugins

    (job,) = plan.jobs
    if files.special(job.source):
        return plan
    while True:
        try:
            Image.open(job.source).close()
        except UnidentifiedImageError:
            if not load_plugins():
                return replace(plan, jobs=[replace(job, problem="not a picture that Pillow reads")])
        except Exception:  # it will be said where it is read
            return plan
        else:
            return plan


def picture_in(file: IO[bytes], limits: Limits | None = None) -> Image | DeepPicture:
    """The picture that ``open_picture`` gives, by way of a plugin if Pillow alone gives none."""
    from .image import ImageError, open_picture
    from .saving import load_plugins

    try:
        return open_picture(file, limits)
    except ImageError:
        if not load_plugins():
            raise
        file.seek(0)
        return open_picture(file, limits)


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels that two regions share."""
    sides = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return math.prod(max(side, 0) for side in sides)


def refuse_machine(wanted: str) -> None:
    """Raises UsageError for options of ``computing`` where nothing is computed."""
    context = click.get_current_context()
    for name in ("device", "threads", "weights"):
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} has no effect without {wanted}")


def reduced(picture: Image | DeepPicture, factor: int) -> Image | DeepPicture:
    """Averages of factor x factor pixels; where alpha is, weighed by it."""
    from .image import DeepPicture

    return picture.reduced(factor) if isinstance(picture, DeepPicture) else picture.reduce(factor)


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
