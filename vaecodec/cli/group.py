"""The group of all commands, and what becomes of their errors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from bitstream import VaeError

from .. import __version__, folders
from . import batch


class Group(click.Group):
    """Turns the package's errors into one line and an exit code."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            code = super().main(args, standalone_mode=False, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()
        except click.ClickException as error:
            error.message = folders.shown(error.message)  # type: ignore[misc]
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = batch.INTERRUPTED
        except OSError as error:  # of standard output: other files have their lines
            if error.errno != errno.EPIPE:  # who has closed it knows
                folders.say(f"vaecodec: standard output: {error.strerror}")
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what it holds is not to fail once more at exit
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VaeError as error:
            fail(str(error), error.exit_code)
        except MemoryError:
            fail("out of memory", 1)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(batch.INTERRUPTED) from None
        except OSError as error:
            name = error.filename2 or error.filename  # of a rename, the target
            if not name:
                raise
            fail(f"{name}: {error.strerror}", 1)


def fail(message: str, code: int) -> None:
    folders.say(f"vaecodec: {message}")
    raise click.exceptions.Exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
def main() -> None:
    """A learned image codec: photographs to .vae files and back.

    Exit codes: 0 done, 1 an input failed or is damaged, 2 wrong usage, 130 interrupted, and of a single input 3 damaged
    or too new a file, 4 weights missing, 5 a limit exceeded.

    Completion in bash: eval "$(_VAECODEC_COMPLETE=bash_source vaecodec)"; in zsh and fish with zsh_source, fish_source.
    """
