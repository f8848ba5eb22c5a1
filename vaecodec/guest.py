"""The codec as a guest in other programs: it steps out of graphs that they compile, and does not hang where they fork.

A forked process has one thread, and whatever the others held stays held. torch's pool of threads is gone: whoever waits
for it waits for ever, so that a child works with one thread. If another thread was inside the codec when the process
was forked, locks of torch's libraries may be held, and to raise is all that is left.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .engines import torch_if_loaded, use_threads

P = ParamSpec("P")
R = TypeVar("R")

_at_work: dict[int, int] = {}  # calls by thread
_forked, _amid_work = False, False


def public(method: Callable[P, R]) -> Callable[P, R]:
    """Of what programs call. Raises RuntimeError in processes that were forked while another thread was inside."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch = torch_if_loaded()
        if torch is not None and torch.compiler.is_compiling():
            outside: Callable[P, R] = torch.compiler.disable(call)
            return outside(*args, **kwargs)
        if _forked:
            _settle()
        thread = threading.get_ident()
        _at_work[thread] = _at_work.get(thread, 0) + 1
        try:
            return method(*args, **kwargs)
        finally:
            _at_work[thread] -= 1
            if not _at_work[thread]:
                del _at_work[thread]

    return call


def _settle() -> None:
    global _forked
    if _amid_work:
        raise RuntimeError(
            "this process was forked while another thread was coding: start it by spawn or forkserver, or fork earlier"
        )
    use_threads(1)
    _forked = False


def _before_fork() -> None:
    global _others
    _others = any(thread != threading.get_ident() for thread in list(_at_work))


def _in_child() -> None:
    global _forked, _amid_work
    _forked, _amid_work = True, _amid_work or _others
    for thread in list(_at_work):
        if thread != threading.get_ident():
            del _at_work[thread]


_others = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
