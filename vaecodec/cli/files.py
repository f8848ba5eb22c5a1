"""Which files a command reads and writes, and how. Neither torch nor Pillow is imported here."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import click

from bitstream import MAGIC, Limits, VaeError, unpack

from ..folders import PICTURES, entries_of, is_pattern, special

STANDARD = Path("-")
VAE = frozenset({".vae"})
# fmt: off
NEVER_OURS = PICTURES | frozenset("." + name for name in (
    "arw", "avifs", "bw", "cr2", "cr3", "dcx", "dds", "dng", "eps", "exr", "hdr", "heics", "icns", "ico", "im",
    "j2c", "jpc", "jpf", "jpx", "msp", "nef", "orf", "pcx", "pdf", "pef", "pfm", "ps", "psd", "raf", "ras", "rgb",
    "rgba", "rw2", "sgi", "svg", "xbm", "xcf", "xpm",
))
# fmt: on
"""Suffixes that no .vae file has: such an output is a mistake, or somebody's photograph."""
SIGNATURES = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*|BM|....ftyp|\xff\x0a|\0\0\0\x0c(JXL|jP)|\xff\x4f\xff\x51"
    rb"|qoif|P[1-7fF]\s|8BPS|DDS |%PDF|\0\0[\1\2]\0",
    re.DOTALL,
)
"""Of files that are pictures, whatever their names."""
UNLIMITED = Limits(max_pixels=2**64, max_side=2**32, max_tiles=2**64)

Existing = Literal["fail", "skip", "overwrite", "named"]


@dataclass(frozen=True)
class Job:
    """One file to read and the one to write, whose folder may have to be made; or what is wrong with them.

    replace: whether the target may be there already. code: the exit code that the problem has.
    """

    source: Path
    target: Path
    problem: str = ""
    make_folder: bool = False
    replace: bool = False
    code: int = 1


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    sources: files, folders, patterns, or - alone. output: a file or folder; without one, outputs go beside their
    sources. existing: what becomes of a file whose output exists; "named" is an output that the user has named, which
    is replaced unless it is something else than a .vae file. shard (i, n): only every n-th file, from the i-th.
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
    candidates. notes: what else is left out, one line each."""

    jobs: list[Job]
    skipped: int = 0
    left_out: int = 0
    notes: list[str] = field(default_factory=list)


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
    if suffix == ".vae" and output is not None and not into_folder and request.existing != "overwrite":
        ending = Path(output).suffix.lower()
        if ending in NEVER_OURS:
            raise click.UsageError(f"{output}: what is written is a .vae file, and {ending} is the suffix of pictures")

    seen = found(sources, suffixes, request.recursive)
    jobs = seen.problems
    targets = dict[Path, Path]()
    for file, root in seen.files:
        if output is not None and not into_folder:
            targets[file] = Path(output)
        elif file == STANDARD:
            targets[file] = STANDARD
        else:
            target = file.with_suffix(suffix)
            targets[file] = Path(output) / target.relative_to(root) if output is not None else target
    takers = Counter(os.path.abspath(target) for target in targets.values())
    writers = dict[str, Path]()
    for file, target in targets.items():
        if takers[os.path.abspath(target)] > 1:  # of a.png and a.jpg
            target = target.with_name(file.name + suffix)
        earlier = writers.setdefault(os.path.abspath(target), file)
        if earlier is file:
            replaced = request.existing in ("overwrite", "named")
            jobs.append(Job(file, target, make_folder=into_folder, replace=replaced))
        else:
            problem = f"{target} is what {earlier} is written to: give them folders of their own"
            jobs.append(Job(file, target, problem))

    first, count = request.shard
    jobs = sorted(jobs, key=lambda job: str(job.source))[first - 1 :: count]
    looked = [checked(job, request.existing, vae=suffixes == VAE) for job in jobs]
    kept = [job for job in looked if job is not None]
    return Plan(kept, len(jobs) - len(kept), seen.left_out, seen.notes)


def listed(sources: Sequence[str], suffixes: frozenset[str], recursive: bool) -> Plan:
    """Jobs that only read. Raises UsageError."""
    if recursive and not any(os.path.isdir(source) or is_pattern(source) for source in sources):
        raise click.UsageError("--recursive is for folders")
    seen = found(sources, suffixes, recursive)
    jobs = seen.problems + [read_checked(Job(file, STANDARD), vae=suffixes == VAE) for file, _ in seen.files]
    return Plan(sorted(jobs, key=lambda job: str(job.source)), 0, seen.left_out, seen.notes)


@dataclass(frozen=True)
class Found:
    """files: each once, sorted, with the folder at which the tree begins that outputs mirror. problems: what cannot be
    looked into. left_out and notes: see Plan."""

    files: list[tuple[Path, Path]]
    problems: list[Job]
    left_out: int
    notes: list[str]


def found(sources: Sequence[str], suffixes: frozenset[str], recursive: bool) -> Found:
    """What the sources stand for."""
    files, problems, notes, left_out = dict[str, tuple[Path, Path]](), list[Job](), list[str](), 0
    for source in sources:
        taken = 0
        for entry in entries_of(source, recursive):
            if entry.problem:
                problems.append(Job(entry.path, STANDARD, entry.problem))
                taken += 1
            elif entry.note:
                notes.append(f"{entry.path}: {entry.note}: left out")
            elif not entry.named and entry.path.suffix.lower() not in suffixes:
                left_out += 1
            elif not entry.named and special(entry.path):
                notes.append(f"{entry.path}: no regular file: left out")
            else:
                files.setdefault(os.path.abspath(entry.path), (entry.path, entry.root))
                taken += 1
        if not taken:
            below = "" if recursive else "; --recursive looks into those below"
            problem = f"nothing to work on in this folder{below}" if os.path.isdir(source) else "no such file"
            problems.append(Job(Path(source), STANDARD, problem))
    return Found(sorted(files.values(), key=lambda pair: str(pair[0])), problems, left_out, notes)


def is_folder(output: str) -> bool:
    """Whether an output is a folder to write into: one that exists, or whose name ends like one's."""
    return output.endswith(("/", os.sep)) or os.path.isdir(output)


def checked(job: Job, existing: Existing, *, vae: bool) -> Job | None:
    """With a problem, if there is nothing to read, or if the target cannot be or may not be written. None for what is
    done already and to be passed over."""
    if job.problem:
        return job
    job = read_checked(job, vae=vae)
    if job.problem or job.target == STANDARD:
        return job
    try:
        if existing == "skip" and os.path.lexists(job.target):
            reason = unfinished(job)
            if not reason:
                return None
            return replace(job, problem=f"{job.target} exists, but {reason}; --overwrite replaces it")
        return replace(job, problem=refusal(job, existing, vae=vae))
    except OSError as error:
        return replace(job, problem=f"{job.target}: {error.strerror}")


def read_checked(job: Job, *, vae: bool) -> Job:
    """With a problem, if the source is not there or is no file of the kind that is read: a .vae file, or a picture."""
    if job.source == STANDARD or special(job.source):
        return job
    try:
        with job.source.open("rb") as file:
            head = file.read(len(MAGIC))
    except FileNotFoundError:
        return replace(job, problem="no such file")
    except OSError as error:
        return replace(job, problem=str(error.strerror))
    if vae and not MAGIC.startswith(head):
        return replace(job, problem="not a .vae file", code=3)
    if not vae and head == MAGIC:
        return replace(job, problem="already a .vae file")
    return job


def refusal(job: Job, existing: Existing, *, vae: bool) -> str:
    """Why a target is not to be written, "" if it is. vae: it is .vae files that are read. Raises OSError."""
    target = job.target
    try:
        status = target.stat()
    except FileNotFoundError:
        if os.path.lexists(target) and not job.replace:
            return f"{target} exists, and leads nowhere"
        folder = Path(os.path.realpath(target)).parent
        while job.make_folder and not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir():
            return f"{target}: no such folder" if not folder.exists() else f"{target}: {folder} is no folder"
        if not permitted(folder, os.W_OK | os.X_OK):
            return f"{target}: {os.strerror(errno.EACCES)}"
        return ""
    if job.source != STANDARD and os.path.exists(job.source) and os.path.samefile(target, job.source):
        return "the output would replace it"
    if existing == "fail":
        return f"{target} exists; --overwrite replaces it, --skip-existing leaves it"
    if stat.S_ISDIR(status.st_mode):
        return f"{target}: {os.strerror(errno.EISDIR)}"
    if not permitted(target, os.W_OK):
        return f"{target}: {os.strerror(errno.EACCES)}"
    if special(target):
        return ""
    if existing == "named" and not vae and foreign(target):
        return f"{target} exists and is no .vae file; --overwrite replaces it"
    folder = Path(os.path.realpath(target)).parent
    return "" if permitted(folder, os.W_OK | os.X_OK) else f"{target}: {os.strerror(errno.EACCES)}"


def permitted(path: Path, mode: int) -> bool:
    """Whether this process may do so."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def foreign(target: Path) -> bool:
    """Whether a file is something that nobody would name as the output of a compression."""
    with target.open("rb") as file:
        head = file.read(16)
    if not head or head.startswith(MAGIC):
        return False
    return bool(SIGNATURES.match(head)) or target.suffix.lower() not in ("", ".vae")


def unfinished(job: Job) -> str:
    """Why a target that exists does not stand for what would be made of the source, "" if it does."""
    if not job.target.exists():
        return "leads nowhere"
    if job.target.is_dir():
        return "is a folder"
    if job.source != STANDARD and job.source.stat().st_mtime_ns > job.target.stat().st_mtime_ns:
        return "is older than its source"
    if job.target.suffix == ".vae":
        try:
            unpack(job.target.read_bytes(), UNLIMITED)
        except VaeError:
            return "is no whole .vae file"
    return "" if job.target.stat().st_size else "is empty"
