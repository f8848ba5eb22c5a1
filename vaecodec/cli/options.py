"""Options that commands share, and what they are given for them."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitstream import Limits

from .. import folders
from . import files
from .group import fail

if TYPE_CHECKING:
    from ..codec import Codec


def matched(form: str, pattern: str, value: Callable[[re.Match[str]], Any]) -> dict[str, Any]:
    """Arguments of an option whose text has a form: the value is made of the match, and None of what it makes is
    refused."""

    def convert(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        if text is None:
            return None
        match = re.fullmatch(pattern, text)
        converted = value(match) if match else None
        if converted is None:
            raise click.BadParameter(f"{text!r} is not of the form {form}")
        return converted

    return {"metavar": form, "callback": convert}


def shard_of(match: re.Match[str]) -> tuple[int, int] | None:
    i, n = int(match[1]), int(match[2])
    return (i, n) if 1 <= i <= n else None


def region_of(match: re.Match[str]) -> tuple[int, int, int, int] | None:
    x, y, width, height = map(int, match.groups())
    return (x, y, width, height) if width and height else None


def size_of(match: re.Match[str]) -> float | None:
    thousand = 1024 if match[3] else 1000
    return float(match[1]) * thousand ** {"": 0, "k": 1, "m": 2}[match[2].lower()] or None


def metadata_of(match: re.Match[str]) -> list[str]:
    return {"all": METADATA_NAMES, "none": []}.get(match[0], match[0].split(","))


def colour_of(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """A colour in Pillow's words. Raises BadParameter for others."""
    if text is not None:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return text


SHARD = matched("I/N", r"(\d+)/(\d+)", shard_of)
REGION = matched("X,Y,W,H", r"(\d+),(\d+),(\d+),(\d+)", region_of)
SIZE = matched("BYTES[k|M|Ki|Mi]", r"(\d+\.?\d*) ?(|[kKmM])((?<=[kKmM])[iI])?[bB]?", size_of)
METADATA_NAMES = ["exif", "icc", "xmp", "iptc", "text", "dpi", "gain"]
METADATA = matched(
    "all|none|" + ",".join(METADATA_NAMES), "all|none|({0})(,({0}))*".format("|".join(METADATA_NAMES)), metadata_of
)

COLOUR: dict[str, Any] = {"metavar": "COLOUR", "callback": colour_of}


@dataclass(frozen=True)
class Machine:
    """Where the networks run, and with which weights. quiet: no progress bar and no summary."""

    device: str
    threads: int | None
    weights: tuple[Path, ...] = ()
    quiet: bool = False
    engine: str = "auto"

    def codec(self, kind: str | None = None) -> Codec:
        """kind: "lossy" or "lossless", where no other weights are of use. Raises WeightsError if they are others."""
        from bitstream.rans import kind_of_lanes

        from ..codec import Codec
        from ..engines import use_threads
        from ..weights import WeightsError, about

        try:
            kind_of_lanes()
        except ValueError as error:  # a setting of the environment
            fail(str(error), 2)
        if self.threads:
            use_threads(self.threads)
        try:
            codec = Codec(self.device, self.weights, engine=self.engine)
        except (RuntimeError, AssertionError, ValueError) as error:  # torch's own words for a device that is not there
            raise click.UsageError(f"device {self.device}: {str(error).splitlines()[0]}") from None
        found = {about(path).kind: path.name for path in self.weights} if kind else {}
        if found and kind not in found:
            held = ", ".join(f"{name} holds {other}" for other, name in found.items())
            raise WeightsError(f"{held} weights, and these files are {kind}")
        return codec


def with_options(command: Any, *options: Any) -> Any:
    """The command with options, in the order in which its help lists them."""
    for option in reversed(options):
        command = option(command)
    return command


def limits_of(context: click.Context, parameter: click.Parameter, pixels: int) -> Limits:
    """Of a picture of so many pixels, and if these are more than the default, of any shape; the file's own length then
    limits its tiles."""
    if pixels <= Limits().max_pixels:
        return Limits(max_pixels=pixels)
    return Limits(max_pixels=pixels, max_side=pixels, max_tiles=2**64)


MAX_PIXELS = click.option(
    "--max-pixels",
    "limits",
    type=click.IntRange(1),
    callback=limits_of,
    default=Limits().max_pixels,
    show_default=True,
    help="Refuse pictures of more pixels.",
)
ANY = click.Path(allow_dash=True, readable=False)  # of many files, those that cannot be read are no wrong usage
SOURCES = click.argument("sources", type=ANY, nargs=-1, required=True)
RECURSIVE = click.option("-r", "--recursive", is_flag=True, help="Folders with all below them that is not hidden.")
QUIET = click.option("--quiet", is_flag=True, help="No progress bar and no summary.")


ENGINE = click.option(
    "--engine",
    type=click.Choice(["auto", "onnx", "torch"]),
    default="auto",
    show_default=True,
    help="What runs the networks. auto: ONNX Runtime on a CPU, else torch.",
)


def computing(command: Any) -> Any:
    """Options of the commands that run the networks, given to them as one Machine."""

    @functools.wraps(command)
    def grouped(*, device: str, engine: str, threads: int | None, weights: tuple[Path, ...], **others: Any) -> Any:
        return command(machine=Machine(device, threads, weights, others.pop("quiet", False), engine), **others)

    return with_options(
        grouped,
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        ENGINE,
        click.option("--threads", type=click.IntRange(1), help="CPU threads of each job. Default: all cores."),
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Exported weights other than the packaged ones; may be repeated. See VAECODEC_WEIGHTS, too.",
        ),
    )


def second_output(sources: tuple[str, ...], inputs: frozenset[str], outputs: frozenset[str]) -> str | None:
    """The second of two arguments, if it can only be the output. Raises UsageError if it may have been meant so."""
    suffix = Path(sources[-1]).suffix.lower()
    if len(sources) != 2 or suffix in inputs:
        return None
    if sources[1] == "-" or suffix in outputs:
        return sources[1]
    if not os.path.exists(sources[1]) and not folders.is_pattern(sources[1]):
        raise click.UsageError(f"{sources[1]}: no such file; an output is named with -o")
    return None


def batching(inputs: frozenset[str], outputs: frozenset[str]) -> Callable[[Any], Any]:
    """Arguments and options of the commands that take many files, given to them as one Request.

    inputs, outputs: their suffixes. A second argument that can only be an output is taken for it.
    """

    def decorated(command: Any) -> Any:
        @functools.wraps(command)
        def grouped(
            *,
            sources: tuple[str, ...],
            output: str | None,
            recursive: bool,
            jobs: int,
            overwrite: bool,
            skip_existing: bool,
            preserve_times: bool,
            shard: tuple[int, int],
            **others: Any,
        ) -> Any:
            if overwrite and skip_existing:
                raise click.UsageError("--overwrite and --skip-existing exclude each other")
            second = second_output(sources, inputs, outputs) if output is None else None
            if second and overwrite:  # `*` may have named both
                raise click.UsageError(f"to overwrite {second}, name it with -o")
            named = output is not None and output != "-" and not files.is_folder(output)
            existing: files.Existing = (
                "skip" if skip_existing else "overwrite" if overwrite else "named" if named else "fail"
            )
            request = files.Request(
                sources[:1] if second else sources, output or second, recursive, existing, shard, jobs, preserve_times
            )
            return command(request=request, **others)

        return with_options(
            grouped,
            SOURCES,
            click.option(
                "-o",
                "--output",
                type=ANY,
                help="A file for one input, replaced if it exists, or - for standard output; for many a folder, which "
                "exists or ends in /. Default: beside the input.",
            ),
            click.option(
                "-r",
                "--recursive",
                is_flag=True,
                help="Folders with all below them that is not hidden; -o mirrors the tree.",
            ),
            click.option(
                "-j",
                "--jobs",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                help="Files at a time, in threads that share one copy of the weights. Best with --threads 1.",
            ),
            click.option("--overwrite", is_flag=True, help="Replace outputs that exist. Default: they are failures."),
            click.option(
                "--skip-existing",
                is_flag=True,
                help="Pass over inputs whose output exists, is newer and, if a .vae file, not cut off.",
            ),
            click.option("--preserve-times", is_flag=True, help="Give outputs the times of their inputs."),
            click.option(
                "--shard", **SHARD, default="1/1", help="Of the sorted inputs every n-th from the i-th, 1 to n."
            ),
            QUIET,
        )

    return decorated
