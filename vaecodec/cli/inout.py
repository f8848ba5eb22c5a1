"""How the files of a command are read and written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..folders import descriptor_of, special
from .files import STANDARD, Job

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\.vaecodec-[0-9a-f]{8}\.tmp")
PATIENCE = 0.2  # seconds
STALE = 3600.0  # seconds; between the making of a temporary file and its lock there is less


class Waiting(threading.local):
    """seconds: how long this thread has waited for others, who read or write the other end of a pipe."""

    seconds = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


waiting = Waiting()


def read(path: Path) -> bytes:
    """All of a file, or of standard input."""
    if path != STANDARD and not special(path):
        return path.read_bytes()
    with waiting(), contextlib.ExitStack() as stack:
        if path == STANDARD:
            if sys.stdin is None:
                raise OSError(errno.EBADF, "standard input is closed")
            file: Any = sys.stdin.buffer
        else:
            file = stack.enter_context(path.open("rb"))
        parts = list[bytes]()
        while (part := file.read()) != b"":
            if part is None:  # a pipe that does not block, and is empty
                select.select([file], [], [])
            else:
                parts.append(part)
        return b"".join(parts)


def read_so_far(path: Path) -> bytes:
    """What a file holds, or a pipe that is still being filled: what has come when nothing comes for a while."""
    with contextlib.ExitStack() as stack:
        try:
            file: Any = sys.stdin.buffer if path == STANDARD else stack.enter_context(path.open("rb", buffering=0))
            number = file.fileno()
        except (AttributeError, io.UnsupportedOperation):  # closed, or no file of the system
            return read(path)
        if fcntl is None or not stat.S_ISFIFO(os.fstat(number).st_mode):
            return read(path)
        parts = list[bytes]()
        with waiting():
            select.select([number], [], [])
            while select.select([number], [], [], PATIENCE)[0] and (part := os.read(number, 1 << 20)):
                parts.append(part)
        return b"".join(parts)


def opened(path: Path) -> IO[bytes]:
    """For those who read at places of their own choice: what is no regular file comes as a whole first."""
    return io.BytesIO(read(path)) if path == STANDARD or special(path) else path.open("rb")


def write_all(file: Any, data: bytes) -> None:
    """Write to a binary file until everything has been written. Raises OSError.

    A raw file, which standard output is under PYTHONUNBUFFERED, may take a part and say so only by what it returns.
    """
    file.flush()
    raw, left = getattr(file, "raw", file), memoryview(data)
    while left:
        count = raw.write(left)
        if count is None:  # a pipe that does not block, and is full
            select.select([], [raw], [])
        else:
            left = left[count:]
    raw.flush()


def write_through(target: Path, data: bytes) -> None:
    """Into what is no regular file: standard output, a device, a FIFO, an open descriptor. Raises OSError."""
    name = "standard output" if target == STANDARD else str(target)
    try:
        with waiting():
            if target == STANDARD:
                if sys.stdout is None:
                    raise OSError(errno.EBADF, "closed")
                write_all(sys.stdout.buffer, data)
                return
            number = descriptor_of(target)
            handle = os.dup(number) if number is not None else os.open(target, os.O_WRONLY)
            with open(handle, "wb", buffering=0) as file:
                write_all(file, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


@contextlib.contextmanager
def written(job: Job, data: bytes, *, keep_times: bool = False) -> Iterator[Path | None]:
    """Write beside the target, and let it take the target's name only if the body raises nothing.

    Yields the temporary file; None where the target is no regular file, which is written through after the body. A
    symbolic link stays, and what it leads to is replaced; a replaced file's mode and owner stay. keep_times: the target
    gets those of the source. Raises FileExistsError if the target is there and the job is not to replace it, also if it
    has come since the job was planned.
    """
    if job.target == STANDARD or (job.replace and special(job.target)):
        yield None
        write_through(job.target, data)
        return
    target = Path(os.path.realpath(job.target)) if job.replace else job.target
    temporary = target.parent / f".vaecodec-{secrets.token_hex(4)}.tmp"
    try:
        if job.make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        before = target.stat() if job.replace and target.exists() else None
        file = open(temporary, "xb", buffering=0, opener=private if before else None)  # noqa: SIM115
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(job.target)) from None
    try:
        with file:
            try:
                lock(file)
                write_all(file, data)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(job.target)) from None
            del data  # the caller may want the room for what it reads back
            if fcntl is None:
                file.close()
            yield temporary
            if before:
                like(temporary, before)
            place(temporary, target, job.replace)
        if keep_times:  # last: a temporary file with an old time would look like a dead process's
            times = job.source.stat()
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    finally:
        temporary.unlink(missing_ok=True)


def private(path: str, flags: int) -> int:
    """Opens a file that nobody else may read: the one that it will replace may be such a file."""
    return os.open(path, flags, 0o600)


def like(path: Path, status: os.stat_result) -> None:
    """Give a file the owner, where that is allowed, and the mode of another."""
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(path, status.st_uid, status.st_gid)
    path.chmod(stat.S_IMODE(status.st_mode))


def place(temporary: Path, target: Path, replace: bool) -> None:
    """Give the temporary file its name. Raises FileExistsError if there is such a file that is not to be replaced."""
    if replace:
        temporary.replace(target)
        return
    try:
        if os.name == "nt":
            temporary.rename(target)  # which never replaces there
        else:
            os.link(temporary, target)
    except FileExistsError:
        words = "exists by now; --overwrite replaces it, --skip-existing leaves it"
        raise FileExistsError(errno.EEXIST, words, str(target)) from None
    except OSError:  # a file system without links
        target.open("xb").close()
        temporary.replace(target)


def lock(file: IO[bytes]) -> None:
    """As long as it is open, the file is one that a process is at work on."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: see ``sweep``
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder: old ones, that nobody has a lock on."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            if time.time() - entry.stat().st_mtime <= STALE:
                continue
            with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry)
            if fcntl is None:
                with contextlib.suppress(OSError):
                    os.unlink(entry)
