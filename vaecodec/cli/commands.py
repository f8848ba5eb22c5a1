"""Compress and decompress."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bitstream import MAGIC, CorruptError, Kind, Limits, VaeError, read_header, unpack

from .. import folders
from . import batch, files, inout, options
from .group import main
from .pictures import overlap, picture_in, pillow_limit, reduced, with_a_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..image import DeepPicture


@main.command()
@options.batching(folders.PICTURES, files.VAE)
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=75.0, show_default=True, help="0..100.")
@click.option("--target-bpp", type=click.FloatRange(0, min_open=True), help="Bits a pixel to aim at, within 1 %.")
@click.option("--target-size", **options.SIZE, help="Bytes to aim at, within 1 %: 20k, 20kB, 20KiB ...")
@click.option("--target-psnr", type=click.FloatRange(0, min_open=True), help="dB to aim at, within 0.05.")
@click.option(
    "--target-ssimulacra2", type=click.FloatRange(0, 100), help="SSIMULACRA2 to aim at, within 0.5: 70 is high quality."
)
@click.option(
    "--visually-lossless",
    is_flag=True,
    help="An SSIMULACRA2 of 90; every pixel, as with --lossless, where no quality reaches it.",
)
@click.option("--best-effort", is_flag=True, help="Take the nearest there is to a target that no quality meets.")
@click.option("-l", "--lossless", is_flag=True, help="Keep every pixel as it is, by bits-back coding.")
@click.option("--fast", is_flag=True, help="With --lossless: without networks, a few times as fast, in more bytes.")
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
    "--progressive",
    is_flag=True,
    help="What is coarse first: decompress --preview draws any part of the file. The same pixels, some bytes more.",
)
@click.option(
    "--metadata", **options.METADATA, default="all", show_default=True, help="What to keep; icc is all about colour."
)
@click.option(
    "--depth",
    type=click.IntRange(9, 16),
    help="Bits in use of 16-bit samples; pictures of 8 bits keep those. Default: what the file says, or else what its "
    "largest sample takes.",
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
    target_ssimulacra2: float | None,
    visually_lossless: bool,
    best_effort: bool,
    lossless: bool,
    fast: bool,
    effort: int,
    progressive: bool,
    metadata: list[str],
    depth: int | None,
    verify: bool,
    limits: Limits,
    machine: options.Machine,
) -> None:
    """Compress pictures: files, folders, quoted patterns, or - for standard input. x.png becomes x.vae.

    In folders, suffixes say what is a picture. A file of several frames is refused, but of the JPEG files of phones
    and cameras that carry previews (MPO) the first picture is taken. A target costs about three encodes; one that is
    not met is a failure, and nothing is written. SSIMULACRA2 follows the eye better than PSNR and needs the extra
    "metrics". Bytes may depend on --device, --engine and --threads, which change how sums are rounded, and never on
    --jobs or --shard.
    """
    aims = {"bpp": target_bpp, "size": target_size, "psnr": target_psnr, "ssimulacra2": target_ssimulacra2}
    targets = {name: value for name, value in aims.items() if value is not None}
    if not all(math.isfinite(value) for value in (quality, *targets.values())):
        raise click.UsageError("nan and inf are neither qualities nor targets")
    asked = click.get_current_context().get_parameter_source("quality") != ParameterSource.DEFAULT
    if len(targets) + asked + lossless + visually_lossless > 1:
        raise click.UsageError("--lossless, --visually-lossless, --quality and the targets exclude each other")
    if fast and not lossless:
        raise click.UsageError("--fast is for --lossless")
    chosen = machine.engine != "auto"
    of_networks = {"effort": effort, "progressive": progressive, "engine": chosen, "weights": machine.weights}
    useless = [name for name, value in of_networks.items() if value]
    if fast and useless:
        raise click.UsageError(f"--{useless[0]} has no effect with --fast")
    if best_effort and not (targets or visually_lossless):
        raise click.UsageError("--best-effort is for targets")
    seen = visually_lossless or target_ssimulacra2 is not None
    passes = 6 if seen or target_psnr else 3 if targets else 1  # about; a search for a likeness decodes as well
    coding: dict[str, Any] = {"effort": effort, "progressive": progressive, "limits": limits}
    quick_check = verify and not effort  # beside a refinement, the time of a decode is nothing
    plan = with_a_picture(files.planned(request, folders.PICTURES, ".vae"))

    def start() -> batch.Work:
        from ..engines import need, torch_for
        from ..image import DeepPicture, keep_metadata
        from ..metadata import left_out
        from ..metrics import fidelity
        from ..targets import VISUALLY_LOSSLESS, missed, search

        if seen:
            need("ssimulacra2", "SSIMULACRA2", "metrics")
        if effort and not lossless:
            torch_for("effort above 0")
        if visually_lossless:
            targets["ssimulacra2"] = VISUALLY_LOSSLESS
        codec = machine.codec("lossless" if lossless else "lossy")
        if not fast:  # what is wrong with the weights is wrong once, and not for each file
            _ = codec.lossless if lossless else codec.lossy

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            with inout.opened(job.source) as source:
                head = source.read(len(MAGIC))
                if head == MAGIC:  # from standard input: files have been looked at
                    raise VaeError("already a .vae file")
                source.seek(0)
                picture, others = picture_in(source, limits, job.source.suffix), left_out(source) if metadata else []
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
                found = search(codec, picture, progress=progress, **coding | targets)
                data = found.data
                if not found.near and not (visually_lossless and found.reached > VISUALLY_LOSSLESS):
                    said.append(missed(found, *targets))
                    if visually_lossless and not best_effort:
                        said.append("kept without loss (--best-effort takes the nearest)")
                        data = codec.compress(picture, 0, progress, lossless=True, **coding)
                    elif not best_effort:
                        raise VaeError(f"{said[-1]}: nothing was written; --best-effort takes that")
                if data is found.data:
                    notes.append(f"quality {found.quality:g}")
                    notes += [f"SSIMULACRA2 {found.reached:.2f}"] if seen else []
            else:
                data = codec.compress(picture, quality, progress, lossless=lossless, fast=fast, **coding)
            size, header = len(data), read_header(data)
            exact = header.kind == Kind.LOSSLESS
            with inout.written(job, data, keep_times=request.keep_times) as temporary:
                written = temporary or data
                del data  # large ones leave no room for a second
                if verify:
                    checking = progress if quick_check else lambda _done: progress(0)
                    psnr, equal = fidelity(picture, codec.decode_tiles(written, limits, checking), header.depth)
                    if exact and not equal:
                        raise VaeError("the decoded pixels are not those of the picture: nothing was written")
                    notes.append("every pixel equal" if exact else f"{psnr:.2f} dB")
            note = ", ".join([f"{job.target}: {size} bytes, {8 * size / pixels:.3f} bpp", *notes])
            return batch.Done(pixels, read, size, size, note, "; ".join(said))

        return work

    with pillow_limit(limits):
        batch.run(plan, start, request.workers, machine.quiet)


@main.command()
@options.batching(files.VAE, folders.PICTURES)
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
@click.option(
    "--preview",
    is_flag=True,
    help="Draw what there is of a file that ends early, or of a pipe that is still being filled, and say how much.",
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
    preview: bool,
    limits: Limits,
    machine: options.Machine,
) -> None:
    """Decompress .vae files: files, folders, quoted patterns, or - for standard input. x.vae becomes x.png.

    The suffix of -o chooses the format. JPEG, AVIF of 8 bits and PDF lose once more, at their quality 95; any other
    format that cannot hold the picture exactly is refused, unless --lossy-output is given.
    """
    output = request.output
    own_name = not (output in (None, "-") or files.is_folder(str(output)) or folders.special(Path(str(output))))
    if format is not None and own_name:
        raise click.UsageError("--format is for outputs without a name of their own; the suffix of -o says the format")
    if format is not None and not re.fullmatch(r"\.?\w+", format):
        raise click.BadParameter(f"{format!r} is no suffix", param_hint="--format")

    from ..image import ImageError
    from ..info import what_is_there
    from ..saving import encode_picture, picture_format

    suffix = Path(str(output)).suffix if own_name else f".{(format or 'png').lstrip('.')}"
    try:
        encoding = picture_format(suffix)
    except ImageError as error:
        if format is None:
            raise ImageError(f"{output}: {error}") from None
        raise click.BadParameter(str(error), param_hint="--format") from None
    plan = files.planned(request, files.VAE, suffix)

    def start() -> batch.Work:
        from ..image import DeepPicture

        codec = machine.codec()

        def work(job: files.Job, follow: batch.Follow) -> batch.Done:
            data = inout.read_so_far(job.source) if preview else inout.read(job.source)
            header = read_header(data)
            x, y, width, height = region or (0, 0, header.width, header.height)
            if x + width > header.width or y + height > header.height:
                raise ImageError(f"the region is not inside its {header.width} x {header.height} pixels")
            progress, damaged = follow(width * height, 1), list[tuple[int, int, int, int]]()
            options: dict[str, Any] = {"region": region, "damaged": damaged if allow_partial else None}
            options["preview"] = preview
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
            read, said = len(data), list[str]()
            if preview:
                said += filter(None, [what_is_there(data)])
            del data  # a large picture leaves no room for it
            encoded, lost = encode_picture(
                picture, encoding, depth=header.depth, lossy=lossy_output, background=background
            )
            with inout.written(job, encoded, keep_times=request.keep_times):
                pass
            if lost:
                said.append(f"{encoding} did not take the picture's {', '.join(lost)}")
            if damaged:
                regions = " ".join(",".join(map(str, tile)) for tile in damaged)
                said.append(f"{len(damaged)} of {header.tile_count} tiles are damaged: {regions}")
            part = read * width * height // (header.width * header.height)
            note = f"{job.target}: {picture.width} x {picture.height}"
            return batch.Done(width * height, read, len(encoded), part, note, "; ".join(said), bool(damaged))

        return work

    with pillow_limit(limits):
        batch.run(plan, start, request.workers, machine.quiet)
