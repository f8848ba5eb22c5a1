"""The command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bitstream import Kind, Limits, VaeError, read_header, unpack

from . import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from .codec import Codec


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

    Exit codes: 0 done, 1 the input failed, 2 wrong usage, 3 damaged or too new a file, 4 weights missing,
    5 a limit exceeded.
    """


SOURCE = click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
OUTPUT = click.argument("target", type=click.Path(path_type=Path, allow_dash=True), required=False)
OPTION_OUTPUT = click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True), help="Where to write; - for standard output."
)


def computing(command: Any) -> Any:
    """Options of the commands that run the networks."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: torch's."),
        click.option(
            "--weights", type=click.Path(path_type=Path), help="Exported weights other than the packaged ones."
        ),
        click.option("--quiet", is_flag=True, help="No progress bar and no summary."),
    ):
        command = option(command)
    return command


@main.command()
@SOURCE
@OUTPUT
@OPTION_OUTPUT
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=75.0, show_default=True, help="0..100.")
@click.option("--lossless", is_flag=True, help="Keep every pixel as it is, by bits-back coding.")
@click.option("--verify/--no-verify", default=True, help="Decode the written file before it takes its name.")
@computing
def compress(
    source: Path,
    target: Path | None,
    output: Path | None,
    quality: float,
    lossless: bool,
    verify: bool,
    device: str,
    threads: int | None,
    weights: Path | None,
    quiet: bool,
) -> None:
    """Compress the picture SOURCE to TARGET (by default: SOURCE with the suffix .vae)."""
    from .image import open_picture

    if math.isnan(quality):
        raise click.BadParameter("nan is no quality", param_hint="--quality")
    if lossless and click.get_current_context().get_parameter_source("quality") != ParameterSource.DEFAULT:
        raise click.UsageError("--lossless keeps every pixel: it has no --quality")
    target = destination(source, target, output, ".vae")
    picture = open_picture(read(source))
    codec = load_codec(device, threads, weights)
    began = time.perf_counter()
    with bar(picture.width * picture.height * (1 + verify), quiet) as progress:
        data = codec.compress(picture, quality, progress, lossless=lossless)
        with written(target, data) as temporary:
            if verify:
                decoded = codec.decompress(read(temporary) if temporary else data, progress=progress)
                if lossless and not same_pixels(picture, decoded):
                    raise VaeError("the decoded pixels are not those of the picture: nothing was written")
    if not quiet:
        pixels = picture.width * picture.height
        fidelity = "every pixel equal" if lossless else f"{psnr(picture, decoded):.2f} dB" if verify else ""
        quality_text = f", {fidelity}" if verify else ""
        summary = f"{len(data)} bytes, {8 * len(data) / pixels:.3f} bpp{quality_text}"
        click.echo(f"{target}: {summary}, {time.perf_counter() - began:.2f} s", err=True)


@main.command()
@SOURCE
@OUTPUT
@OPTION_OUTPUT
@computing
def decompress(
    source: Path,
    target: Path | None,
    output: Path | None,
    device: str,
    threads: int | None,
    weights: Path | None,
    quiet: bool,
) -> None:
    """Decompress SOURCE to TARGET, a picture in the format of its suffix (by default PNG)."""
    target = destination(source, target, output, ".png")
    format = picture_format(target)
    data = read(source)
    header = read_header(data)
    from .image import encode_picture

    codec = load_codec(device, threads, weights)
    with bar(header.width * header.height, quiet) as progress:
        picture = codec.decompress(data, progress=progress)
    encoded, lost = encode_picture(picture, format)
    with written(target, encoded):
        pass
    if lost:
        click.echo(f"vaecodec: {format} did not take the picture's {', '.join(lost)}", err=True)
    if not quiet:
        click.echo(f"{target}: {header.width} x {header.height}", err=True)


@main.command()
@SOURCE
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--bits", is_flag=True, help="Decode a lossless file and show where its bits went.")
def info(source: Path, as_json: bool, bits: bool) -> None:
    """Show what a .vae file holds, without decoding it."""
    data = read(source)
    container = unpack(data, Limits(max_pixels=2**64, max_side=2**32))
    header = container.header
    facts = {
        "kind": header.kind.name.lower(),
        "width": header.width,
        "height": header.height,
        "mode": header.mode.name,
        "depth": header.depth,
        "quality": header.quality / 100 if header.kind == Kind.LOSSY else None,
        "tile": header.tile,
        "tiles": len(container.tiles),
        "model": header.model.hex(),
        "bytes": len(data),
        "bpp": round(8 * len(data) / (header.width * header.height), 4),
        "metadata": {s.tag.decode().strip().lower(): len(s.payload) for s in container.sections},
    }
    account = load_codec("auto", None, None).account(data) if bits else {}
    if as_json:
        click.echo(json.dumps(facts | ({"bits": account} if bits else {})))
        return
    for key, value in facts.items():
        click.echo(f"{key:9} {value}")
    samples = header.width * header.height * len(header.mode.name.split(";")[0].replace("I", "L"))
    for key, value in account.items():
        click.echo(f"{key:22} {value:14.1f} bits {value / samples:9.5f} a sample {value / len(data) / 8:8.2%}")


@main.command()
@SOURCE
@computing
def verify(source: Path, device: str, threads: int | None, weights: Path | None, quiet: bool) -> None:
    """Decode a .vae file, check every tile, write nothing."""
    data = read(source)
    header = read_header(data)
    codec = load_codec(device, threads, weights)
    with bar(header.width * header.height, quiet) as progress:
        # Pillow has no mode for all that a lossless file may hold.
        decode = codec.decompress_array if header.kind == Kind.LOSSLESS else codec.decompress
        decode(data, progress=progress)
    if not quiet:
        click.echo(f"{source}: good", err=True)


@main.command()
@click.argument("config")
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), required=True, help="Time to train.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for what is written. Default: runs/CONFIG.")
@click.option("--val", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Pictures to validate on.")
@click.option("--resume", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A checkpoint.")
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
    device: str,
    threads: int | None,
    seed: int,
) -> None:
    """Train CONFIG, a .toml file, or `lossy` or `lossless` for the packaged ones.

    Writes checkpoints, curve.csv and, at the end, the exported weights, CONFIG.safetensors, to --out. The same command
    works under torchrun.
    """
    import torch

    from . import export as exporting
    from . import train as training

    if threads:
        torch.set_num_threads(threads)
    path = Path(config)
    if not path.suffix:
        path = Path(__file__).parent / "configs" / f"{config}.toml"
    out = out or Path("runs") / path.stem
    try:
        training.train(path, data, minutes, out, val=val, resume=resume, device_name=device, seed=seed)
        if int(os.environ.get("RANK", "0")) == 0:
            exporting.export(out / "last.pt", data, out / f"{path.stem}.safetensors")
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def export(checkpoint: Path, data: Path, output: Path) -> None:
    """Turn a training CHECKPOINT into a weights file, its entropy tables fitted to the pictures in --data."""
    from . import export as exporting

    exporting.export(checkpoint, data, output)


def load_codec(device: str, threads: int | None, weights: Path | None) -> Codec:
    import torch

    from .codec import Codec

    if threads:
        torch.set_num_threads(threads)
    try:
        return Codec(device, weights)
    except (RuntimeError, AssertionError) as error:  # torch's own words for a device that is not there
        raise click.UsageError(f"device {device}: {str(error).splitlines()[0]}") from None


def destination(source: Path, target: Path | None, output: Path | None, suffix: str) -> Path:
    """Where to write. A name that the user did not give never replaces a file."""
    if target is not None and output is not None:
        raise click.UsageError("TARGET and --output both say where to write")
    named = target or output
    if named is not None:
        return named
    if str(source) == "-":
        return source
    default = source.with_suffix(suffix)
    if default.exists():
        fail(f"{default} exists; name it with -o to replace it", 1)
    return default


def read(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read()
    return path.read_bytes()


@contextlib.contextmanager
def written(target: Path, data: bytes) -> Iterator[Path | None]:
    """Write beside the target, and let it take the target's name only if the body raises nothing."""
    if str(target) == "-":
        yield None
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is not what a user expects of a picture
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def bar(pixels: int, quiet: bool) -> Iterator[Any]:
    """A progress bar in megapixels on a terminal; gives the function that moves it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=pixels / 1e6, unit="MP", unit_scale=False, leave=False, file=sys.stderr) as progress:
        yield lambda done: progress.update(done / 1e6)


def picture_format(target: Path) -> str:
    from PIL import Image

    from .image import ImageError

    if str(target) == "-":
        return "PNG"
    format = Image.registered_extensions().get(target.suffix.lower())
    if format is None or format not in Image.SAVE:
        raise ImageError(f"no picture format for the suffix {target.suffix!r}")
    return format


def same_pixels(a: Image, b: Image) -> bool:
    from .image import samples_of

    (x, *kind_a), (y, *kind_b) = samples_of(a), samples_of(b)
    return kind_a == kind_b and x.shape == y.shape and bool((x == y).all())


def psnr(a: Image, b: Image) -> float:
    import numpy as np

    x, y = (np.asarray(i.convert("RGB"), np.float64) for i in (a, b))
    error = float(((x - y) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf
