"""The work of a command on many files, some side by side. Neither torch nor Pillow is imported here."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bitstream import VaeError

from ..folders import say, shown
from .files import STANDARD, Job, Plan
from .inout import sweep, waiting


@dataclass(frozen=True)
class Done:
    """What became of one file: its pixels, bytes read and written, and which of them are a ``.vae`` file.

    note: the summary where this is the only file. warning: said in any case. damaged: something is missing.
    """

    pixels: int
    read: int
    written: int
    compressed: int
    note: str
    warning: str = ""
    damaged: bool = False


INTERRUPTED = 130  # as shells have it

Follow = Callable[[int, int], Callable[[int], None]]
"""Takes a picture's pixels and how often the work goes over them, and gives what is to be called with pixels done, of
which there may be none: it raises where the user has interrupted."""
Work = Callable[[Job, Follow], Done]


def run(plan: Plan, start: Callable[[], Work], workers: int = 1, quiet: bool = False) -> None:
    """Do all jobs. What fails is reported and the others go on; at the end Exit is raised if any did, or gave a damaged
    picture, with 1 or, of a single job, with its own code.

    start: gives the work; called only if there is any. workers: threads, so that all share one copy of the weights;
    each has one picture in memory at a time, and no file's bytes depend on how many there are.
    """
    tally = Tally(plan, workers)
    for note in plan.notes:
        say(f"vaecodec: {note}")
    for job in plan.jobs:
        if job.problem:
            tally.fail(job, job.problem, job.code)
    todo = [job for job in plan.jobs if not job.problem]
    for folder in {os.path.dirname(os.path.realpath(job.target)) for job in todo if job.target != STANDARD}:
        sweep(Path(folder))
    if todo:
        with abrupt():
            work = start()
        queue, lock = iter(todo), threading.Lock()

        def worker() -> None:
            while not tally.stopped.is_set():
                with lock:
                    job = next(queue, None)
                if job is None:
                    return
                attempt(job, work, tally)

        with tally.bar(not quiet and sys.stderr is not None and sys.stderr.isatty()):
            threads = [threading.Thread(target=worker) for _ in range(min(workers, len(todo)) - 1)]
            try:
                for thread in threads:
                    thread.start()
                worker()
                for thread in threads:
                    thread.join()
            finally:
                tally.stopped.set()  # nobody is left to see it, unless the user has interrupted
                for thread in threads:
                    thread.join()
    if not quiet and (summary := tally.summary()):
        say(summary)
    if tally.failed or tally.damaged:
        raise click.exceptions.Exit(tally.code if len(plan.jobs) == 1 else 1)


def each(plan: Plan, show: Callable[[Job], None]) -> None:
    """Do what takes no time for all jobs, one after another; failures as in ``run``."""
    tally = Tally(plan)
    for note in plan.notes:
        say(f"vaecodec: {note}")
    for job in plan.jobs:
        try:
            if job.problem:
                tally.fail(job, job.problem, job.code)
            else:
                show(job)
        except VaeError as error:
            tally.fail(job, str(error), error.exit_code)
        except OSError as error:
            if not error.filename:  # of standard output
                raise
            tally.fail(job, described(error, job))
    if tally.failed:
        raise click.exceptions.Exit(tally.code if len(plan.jobs) == 1 else 1)


@contextlib.contextmanager
def abrupt() -> Iterator[None]:
    """While nothing but imports and the like is going on, Ctrl-C ends the process at once: where it is raised within
    them, some print it and others take it for an error of their own."""
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def attempt(job: Job, work: Work, tally: Tally) -> None:
    """Do one job, whatever it raises."""
    share = 0.0  # of the file, as far as the bar has been moved
    waiting.seconds = 0.0

    def follow(pixels: int, passes: int) -> Callable[[int], None]:
        def step(done: int) -> None:
            nonlocal share
            part = min(done / (pixels * passes), 1 - share)  # tiles at the edges count more pixels than there are
            share += part
            tally.move(part, pixels)
            if tally.stopped.is_set():
                raise StoppedError

        return step

    try:
        done = work(job, follow)
    except StoppedError:
        return
    except Exception as error:
        tally.fail(job, described(error, job), error.exit_code if isinstance(error, VaeError) else 1)
        tally.move(1 - share, 0)
    else:
        tally.add(job, done, waiting.seconds)
        tally.move(1 - share, done.pixels)


def described(error: Exception, job: Job) -> str:
    """One line."""
    if isinstance(error, VaeError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # of a rename, the target
        return error.strerror if name in (None, str(job.source), job.source) else f"{name}: {error.strerror}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


class StoppedError(Exception):
    """The user has interrupted, and another thread is to end."""


class Tally:
    """What the jobs have come to, and the bar that shows it; shared by the threads."""

    def __init__(self, plan: Plan, workers: int = 1) -> None:
        self.plan, self.workers, self.stopped = plan, workers, threading.Event()
        self.done, self.failed, self.damaged, self.code, self.note = 0, 0, 0, 1, ""
        self.waited = 0.0  # seconds, of all threads together
        self.pixels, self.read, self.written, self.compressed = 0, 0, 0, 0
        self.seen = 0.0  # pixels, those of unfinished files among them
        self.began = time.perf_counter()
        self._lock = threading.Lock()
        self._bar: Any = None

    @contextlib.contextmanager
    def bar(self, shown: bool) -> Iterator[None]:
        """The time of the work, with a bar over the files if it is to be shown."""
        self.began = time.perf_counter()
        if not shown:
            yield
            return
        from tqdm import tqdm

        layout = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"
        # miniters: how far an update moves the bar says nothing about the time that it took.
        options = {"initial": self.failed, "bar_format": layout, "miniters": 0, "leave": False}
        with tqdm(total=len(self.plan.jobs), **options) as self._bar:
            yield
        self._bar = None

    def move(self, part: float, pixels: int) -> None:
        """Part of a file of so many pixels is done."""
        with self._lock:
            self.seen += part * pixels
            if self._bar is not None:
                ratio = f", {self.read / self.written:.1f}:1" if self.written else ""
                self._bar.set_postfix_str(f"{self.speed(self.seen)}{ratio}", refresh=False)
                self._bar.update(part)

    def add(self, job: Job, done: Done, waited: float) -> None:
        with self._lock:
            self.done += 1
            self.damaged += done.damaged
            self.waited += waited
            self.pixels += done.pixels
            self.read += done.read
            self.written += done.written
            self.compressed += done.compressed
            self.note = done.note
        if done.warning:
            self.say(job, done.warning)

    def fail(self, job: Job, message: str, code: int = 1) -> None:
        with self._lock:
            self.failed, self.code = self.failed + 1, code
        self.say(job, message)

    def say(self, job: Job, message: str) -> None:
        line = f"vaecodec: {job.source}: {message}"
        if self._bar is not None:
            self._bar.write(shown(line), file=sys.stderr)
        else:
            say(line)

    def speed(self, pixels: float) -> str:
        """Of the work, without the time for which others have been waited for."""
        seconds = time.perf_counter() - self.began - self.waited / self.workers
        return f"{pixels / 1e6 / max(seconds, 1e-9):.3g} MP/s"

    def summary(self) -> str:
        """One line, "" where a single file has failed: that has been said."""
        others = {
            "damaged": self.damaged,
            "failed": self.failed,
            "skipped": self.plan.skipped,
            "other files left out": self.plan.left_out,
        }
        if len(self.plan.jobs) == 1 and not self.plan.skipped and not self.plan.left_out:
            return f"{self.note}, {self.speed(self.pixels)}" if self.done else ""
        line = ", ".join(
            [
                f"{self.done} file{'s' * (self.done != 1)}",
                *(f"{count} {name}" for name, count in others.items() if count),
            ]
        )
        if self.done:
            sizes = f"{self.read} -> {self.written}" if self.written else f"{self.read}"
            line += f"; {sizes} bytes, {8 * self.compressed / self.pixels:.3f} bpp, {self.speed(self.pixels)}"
        return line
