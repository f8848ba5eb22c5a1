"""Files of folders and patterns, and words about them. Neither torch nor Pillow is imported here."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click

# fmt: off
PICTURES = frozenset("." + name for name in (
    "apng", "avif", "bmp", "dib", "gif", "heic", "heif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "hif", "jxl", "mpo", "pbm", "pgm", "png", "pnm", "ppm", "qoi", "tga", "tif", "tiff", "webp",
))
# fmt: on
"""Suffixes of what is a picture in a folder. Where Pillow needs a plugin that is not there, it fails and says so."""


@dataclass(frozen=True)
class Entry:
    """A file of a source. named: by the user, and not only its folder. problem, note: why it is none."""

    path: Path
    root: Path
    named: bool = False
    problem: str = ""
    note: str = ""


def entries_of(source: str, recursive: bool) -> Iterator[Entry]:
    """The files of a source. Hidden files and folders are passed over."""
    path = Path(source)
    if is_pattern(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        for match in glob.iglob(source, recursive=True):
            for entry in entries_of(match, recursive):
                yield replace(entry, root=root, named=entry.named and not special(entry.path))
        for error in unreadable_of(path):
            yield Entry(Path(error.filename), root, problem=error.strerror or "cannot be read")
    elif os.path.isdir(path):
        errors = list[OSError]()
        for folder, folders, files in os.walk(path, onerror=errors.append):
            visible = [name for name in folders if recursive and not name.startswith(".")]
            folders[:] = [name for name in visible if not os.path.islink(os.path.join(folder, name))]
            for name in sorted({*visible} - {*folders}):
                yield Entry(Path(folder, name), path, note="a symbolic link to a folder")
            for name in files:
                if not name.startswith("."):
                    yield Entry(Path(folder, name), path)
        for error in errors:
            yield Entry(Path(error.filename), path, problem=error.strerror or "cannot be read")
    else:
        yield Entry(path, path.parent, named=True)


def unreadable_of(pattern: Path) -> list[OSError]:
    """Of the folders in which a pattern looks, those that cannot be read: glob passes over them without a word."""
    errors, parts = dict[str, OSError](), pattern.parts

    def note(error: OSError) -> None:
        errors[str(error.filename)] = error

    for number, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        above = str(Path(*parts[:number]))
        for folder in glob.iglob(above, recursive=True) if glob.has_magic(above) else [above]:
            if not os.path.isdir(folder):
                continue
            for _, folders, _ in os.walk(folder, onerror=note):
                folders[:] = [name for name in folders if part == "**" and not name.startswith(".")]
    return list(errors.values())


def is_pattern(source: str) -> bool:
    return glob.has_magic(source) and not os.path.lexists(source)


def special(path: Path) -> bool:
    """Whether a path is there and leads to a device, a FIFO, a socket or an open descriptor: what is written through,
    and not replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return (not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)) or descriptor_of(path) is not None


def descriptor_of(path: Path) -> int | None:
    """The descriptor of this process that a name such as /dev/stdout stands for. If it is a file's, its links would
    lead to the file, and replacing that would leave the descriptor with the old one."""
    if not path.is_absolute() and not path.is_symlink():
        return None
    for _ in range(40):
        folder = os.path.realpath(path.parent)
        if re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd|/dev/fd", folder) and path.name.isdecimal():
            return int(path.name)
        try:
            path = Path(folder, os.readlink(path))
        except OSError:
            return None
    return None


def shown(text: str) -> str:
    """Text for a terminal: characters that would steer it, or break the line, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def say(line: str) -> None:
    """A line on standard error. Where that is closed or broken, the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(shown(line), err=True)
