"""Pictures, and tiles, that are coded at once in threads, so that a GPU runs their networks as batches.

The coder of a tile asks for one network after the other. In a thread of its own it waits with what it asks until all
others wait too; then those that ask for the same network and shapes get their answers from one batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

ROOM = 2**24
"""Pixels that are coded at once, about; a larger picture or tile is alone."""
MOST = 16
"""Pictures, and tiles of all of them, at once: on a GPU each thread takes some megabytes to work in."""


def one_by_one(function: Callable[[T], R], items: Iterable[T], _size: Callable[[T], int]) -> Iterator[Callable[[], R]]:
    """For each item, in their order, what gives or raises the function's result: it is computed then."""
    return (partial(function, item) for item in items)


def at_once(function: Callable[[T], R], items: Iterable[T], size: Callable[[T], int]) -> Iterator[Callable[[], R]]:
    """The same, but some items ahead are being worked on, each in a thread: so many that their sizes, in pixels, sum to
    ROOM at most. The items are taken in the caller's thread."""
    running, used = deque[tuple[int, Future[R]]](), 0
    pool = ThreadPoolExecutor(MOST)
    try:
        for item in items:
            needed = size(item)
            while running and (used + needed > ROOM or len(running) == MOST):
                yield running[0][1].result
                used -= running.popleft()[0]
            running.append((needed, pool.submit(function, item)))
            used += needed
        while running:
            yield running.popleft()[1].result
    finally:  # in whichever thread an abandoned generator ends, so that it must not wait there for any
        for _, future in running:
            future.cancel()
        pool.shutdown(wait=False)


@dataclass
class _Question:
    """key: of those that are asked together; the least comes first. together: answers several."""

    key: tuple[Any, ...]
    together: Callable[[list[Any]], list[Any]]
    asked: Any
    answer: Any = None
    error: BaseException | None = None
    done: bool = False


class Gathering:
    """Where threads wait for each other, MOST of them. Which are the faster decides what the batches are, no more."""

    def __init__(self) -> None:
        self._members = set[int]()
        self._waiting: list[_Question] = []
        self._changed = threading.Condition()
        self._places = threading.Semaphore(MOST)

    def member(self, function: Callable[[T], R]) -> Callable[[T], R]:
        """The function, whose thread the others wait for while it runs. It is to wait for nothing but what it asks."""

        def joined(item: T) -> R:
            thread = threading.get_ident()
            with self._places:
                with self._changed:
                    self._members.add(thread)
                try:
                    return function(item)
                finally:
                    with self._changed:
                        self._members.remove(thread)
                        self._changed.notify_all()

        return joined

    def ask(self, key: tuple[Any, ...], together: Callable[[list[Any]], list[Any]], asked: Any) -> Any:
        """What ``together`` answers to one of a list. key: equal where lists may be joined. Of several the least comes
        first, so that who is behind catches up. Threads that are no members ask for themselves."""
        if threading.get_ident() not in self._members:
            return together([asked])[0]
        question = _Question(key, together, asked)
        with self._changed:
            self._waiting.append(question)
            while not question.done:
                if len(self._waiting) == len(self._members):
                    self._answer()
                else:
                    self._changed.wait()
        if question.error is not None:
            raise question.error
        return question.answer

    def _answer(self) -> None:
        """Of those that wait, all with the least key; in whichever thread found that all wait."""
        least = min(question.key for question in self._waiting)
        group = [question for question in self._waiting if question.key == least]
        self._waiting = [question for question in self._waiting if question.key != least]
        _answer(group)
        self._changed.notify_all()


def _answer(group: list[_Question]) -> None:
    """A batch that fails, for want of memory perhaps, is tried one by one: an error is only of who made it."""
    answers, alone = list[Any](), len(group) == 1
    try:
        answers = group[0].together([question.asked for question in group])
    except BaseException as error:
        if alone:
            group[0].error, group[0].done = error, True
    if not answers and not alone:  # out of the handler, where the error would hold what the batch took
        for question in group:
            _answer([question])
    for question, answer in zip(group, answers, strict=False):
        question.answer, question.done = answer, True
