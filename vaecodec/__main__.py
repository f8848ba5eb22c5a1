"""``python -m vaecodec``, which torchrun needs, and the installed command."""

from __future__ import annotations

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
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # there is nothing yet that an import could leave behind
    from .cli import main

    signal.signal(signal.SIGINT, before)
    sys.exit(main(prog_name="vaecodec"))


if __name__ == "__main__":
    run()
