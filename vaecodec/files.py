"""Which files a command reads and writes, and how. Neither torch nor Pillow is imported here."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

import click

STANDARD = Path("-")
VAE = frozenset({".vae"})
# fmt: off
PICTURES = frozenset("." + name for name in (
    "apng", "avif", "bmp", "dib", "gif", "heic", "heif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "jxl", "mpo", "pbm", "pgm", "png", "pnm", "ppm", "qoi", "tga", "tif", "tiff", "webp",
))
# fmt: on
"""Suffixes of what is a picture in a folder. Where Pillow needs a plugin that is not there, it fails and says so."""

TEMPORARY = re.compile(r"\.vaecodec-[0-9a-f]{8}\.tmp")
STALE = 3600.0  # seconds; no process takes that long from writing a temporary file to renaming it

Existing = Literal["fail", "skip", "overwrite"]


@dataclass(frozen=True)
class Job:
    """One file to read and the one to write, whose folder may have to be made; or what is wrong with them."""

    source: Path
    target: Path
    problem: str = ""
    make_folder: bool = False


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    sources: files, folders, patterns, or - alone. output: a file or folder; without one, outputs go beside their
    sources. existing: what becomes of a file whose output exists. shard (i, n): only every n-th file, from the i-th.
    workers: threads. keep_times: outputs get the times of their sources.
    """

    sources: Sequence[str]
    output: str | None = None
    recursive: bool = False
    existing: Existing = "fail"
    shard: tuple[int, int] = (1, 1)
    workers: int = 1
    keep_times: bool = False


@dataclass(frozen=True)
class Plan:
    """jobs: sorted by source. skipped: how many outputs exist already. left_out: files in folders that no suffix makes
    candidates."""

    jobs: list[Job]
    skipped: int
    left_out: int


def planned(request: Request, suffixes: frozenset[str], suffix: str) -> Plan:
    """The jobs that are asked for. Raises UsageError where inputs and output do not fit each other.

    suffixes: what is taken from folders. suffix: of outputs that have no name of their own.
    """
    sources, output = request.sources, request.output
    several = [source for source in sources if os.path.isdir(source) or is_pattern(source)]
    into_folder = output is not None and is_folder(output)
    if "-" in sources and len(sources) > 1:
        raise click.UsageError("standard input goes with no other input")
    if "-" in sources and into_folder:
        raise click.UsageError("standard input has no name to be given in a folder")
    if output is not None and not into_folder and (several or len(sources) > 1):
        raise click.UsageError(f"several inputs need a folder to write to: -o {output}{os.sep}")
    standard = (output or sources[0]) == "-"
    if standard and request.existing != "fail":
        raise click.UsageError("--overwrite and --skip-existing mean nothing to standard output")
    if request.keep_times and (standard or "-" in sources):
        raise click.UsageError("--preserve-times is for files")
    if request.recursive and not several:
        raise click.UsageError("--recursive is for folders")

    jobs, files, left_out = list[Job](), list[tuple[Path, Path]](), 0
    for source in sources:
        found = list(files_of(source, request.recursive))
        taken = [(file, root) for file, root, named in found if named or file.suffix.lower() in suffixes]
        left_out += len(found) - len(taken)
        files += taken
        if not taken:
            below = "" if request.recursive else "; --recursive looks into those below"
            problem = f"nothing to work on in this folder{below}" if os.path.isdir(source) else "no such file"
            jobs.append(Job(Path(source), STANDARD, problem))
    writers = dict[str, Path]()
    for file, root in sorted(files, key=lambda pair: str(pair[0])):
        if output is not None and not into_folder:
            target = Path(output)
        elif file == STANDARD:
            target = STANDARD
        else:
            target = file.with_suffix(suffix)
            target = Path(output) / target.relative_to(root) if output is not None else target
        earlier = writers.setdefault(os.path.abspath(target), file)
        if earlier is file:
            jobs.append(Job(file, target, make_folder=into_folder))
        elif os.path.abspath(earlier) != os.path.abspath(file):
            jobs.append(Job(file, target, f"{target} is what {earlier} is written to"))

    first, count = request.shard
    jobs = sorted(jobs, key=lambda job: str(job.source))[first - 1 :: count]
    kept = [job for job in jobs if request.existing != "skip" or job.problem or not os.path.exists(job.target)]
    return Plan([checked(job, request.existing) for job in kept], len(jobs) - len(kept), left_out)


def is_folder(output: str) -> bool:
    """Whether an output is a folder to write into: one that exists, or whose name ends like one's."""
    return output.endswith(("/", os.sep)) or os.path.isdir(output)


def checked(job: Job, existing: Existing) -> Job:
    """With a problem, if there is nothing to read, or if the target exists and may not be replaced."""
    if job.problem:
        return job
    if job.source != STANDARD and not os.path.exists(job.source):
        return replace(job, problem="no such file")
    if job.target == STANDARD or not os.path.exists(job.target):
        return job
    if job.source != STANDARD and job.target.samefile(job.source):
        return replace(job, problem="the output would replace it")
    if existing == "fail":
        return replace(job, problem=f"{job.target} exists; --overwrite replaces it, --skip-existing leaves it")
    return job


def is_pattern(source: str) -> bool:
    return glob.has_magic(source) and not os.path.lexists(source)


def files_of(source: str, recursive: bool) -> Iterator[tuple[Path, Path, bool]]:
    """The files of a source; the folder at which the tree begins that outputs mirror; whether the file was named, and
    not only its folder. Hidden files and folders are passed over."""
    path = Path(source)
    if is_pattern(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        for match in glob.iglob(source, recursive=True):
            for file, _, named in files_of(match, recursive):
                yield file, root, named
    elif os.path.isdir(path):
        for folder, folders, files in os.walk(path):
            folders[:] = [name for name in folders if recursive and not name.startswith(".")]
            for name in files:
                if not name.startswith("."):
                    yield Path(folder, name), path, False
    else:
        yield path, path.parent, True


def read(path: Path) -> bytes:
    return sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()


def opened(path: Path) -> IO[bytes]:
    """For those who read at places of their own choice: standard input comes as a whole first."""
    return io.BytesIO(read(path)) if path == STANDARD else path.open("rb")


@contextlib.contextmanager
def written(job: Job, data: bytes, *, keep_times: bool = False) -> Iterator[Path | None]:
    """Write beside the target, and let it take the target's name only if the body raises nothing.

    Yields the temporary file, None for standard output. keep_times: the target gets those of the source.
    """
    if job.target == STANDARD:
        yield None
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    folder = job.target.parent
    temporary = folder / f".vaecodec-{secrets.token_hex(4)}.tmp"
    try:
        if job.make_folder:
            folder.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(job.target)) from None
    try:
        with file:
            file.write(data)
        del data  # the caller may want the room for what it reads back
        yield temporary
        if keep_times:
            times = job.source.stat()
            os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))
        temporary.replace(job.target)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes have left in a folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > STALE:
                os.unlink(entry)
