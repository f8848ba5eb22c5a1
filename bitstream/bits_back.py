"""Codecs made of codecs: one part after another, and bits-back (Townsend et al. 2019, arXiv:1901.04866).

In every function `push` stands above `pop`, which is its inverse, step by step in reverse.
"""

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .coder import AnsStack, Codec

X = TypeVar("X")
Z = TypeVar("Z")

Array = NDArray[np.int32]
Parts = Generator[tuple[str, Codec[Array]], Array, None]
"""Yields the name and the codec of the next part, and is sent the part's values."""
Record = Callable[[str, float], None]
"""Is told by how many bits the stack became shorter with a part; pushing makes it longer, so that is negative."""


def bits_back(prior: Codec[Z], likelihood: Callable[[Z], Codec[X]], posterior: Callable[[X], Codec[Z]]) -> Codec[X]:
    """Codes x with latents z at a net cost of log q(z|x) - log p(x|z) - log p(z): the sampled -ELBO.

    The stack must hold enough to pop z from; what is popped from it comes back when x is popped.
    """

    def push(stack: AnsStack, x: X) -> None:
        z = posterior(x).pop(stack)
        likelihood(z).push(stack, x)
        prior.push(stack, z)

    def pop(stack: AnsStack) -> X:
        z = prior.pop(stack)
        x = likelihood(z).pop(stack)
        posterior(x).push(stack, z)
        return x

    return Codec(push, pop)


def pushed(codec: Codec[X], value: X, stack: AnsStack) -> X:
    codec.push(stack, value)
    return value


class Depths:
    """A ``Record`` of how far down a stack reaches what ``chain`` pushes on it."""

    def __init__(self, stack: AnsStack) -> None:
        self._stack, self._heights = stack, [stack.words()]

    def __call__(self, name: str, bits: float) -> None:
        self._heights.append(self._stack.words())

    def parts(self, first: int = 1) -> tuple[int, ...]:
        """When all is pushed: how many of the stack's words, from its top, popping the first part takes, how many more
        the second one, and so on; the last part is what is left. first: how many steps the first part has."""
        size = len(self._stack.to_bytes()) // 4
        # Where popping pushes, as bits-back does, what it pops next is its own: only the lowest counts.
        lows = accumulate(reversed(self._heights[:-1]), min)
        taken = [size - low for low in lows][first - 1 :]
        parts = [after - before for before, after in pairwise([0, *taken])]
        return tuple(parts if taken[-1] < size else parts[:-1])


def chain(parts: Callable[[], Parts], record: Record | None = None, held: int | None = None) -> Codec[list[Array]]:
    """Codes a list of arrays, each under a codec that may depend on those before it: p(a) p(b|a) p(c|a,b) ...

    held: only so many of them are on the stack; the others are guessed.
    """

    def code(stack: AnsStack, name: str, step: Callable[[AnsStack], X]) -> X:
        before = stack.bits() if record else 0.0
        value = step(stack)
        if record:
            record(name, before - stack.bits())
        return value

    def push(stack: AnsStack, values: list[Array]) -> None:
        generator, steps = parts(), list[tuple[str, Codec[Array]]]()
        with contextlib.suppress(StopIteration):
            steps.append(next(generator))
            for value in values:
                steps.append(generator.send(value))
        for (name, codec), value in zip(reversed(steps), reversed(values), strict=True):
            code(stack, name, partial(pushed, codec, value))

    def pop(stack: AnsStack) -> list[Array]:
        generator, values = parts(), list[Array]()
        with contextlib.suppress(StopIteration):
            name, codec = next(generator)
            while True:
                if held is None or len(values) < held:
                    values.append(code(stack, name, codec.pop))
                else:
                    assert codec.guess is not None
                    values.append(codec.guess())
                name, codec = generator.send(values[-1])
        return values

    return Codec(push, pop)
