"""``python -m vaecodec``, which torchrun needs, and the installed command."""

from __future__ import annotations

import io
import os
import signal
import sys


def run() -> None:
    """The command line, in a process of its own."""
    for descriptor in range(3):  # a file that is opened must not become the standard output of a library
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out = sys.stdout
    if out is not None and isinstance(out.buffer, io.RawIOBase):  # PYTHONUNBUFFERED: text is cut where a disk is full
        sys.stdout = open(1, "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # there is nothing yet that an import could leave behind
    from .cli import main

    signal.signal(signal.SIGINT, before)
    sys.exit(main(prog_name="vaecodec"))


if __name__ == "__main__":
    run()
