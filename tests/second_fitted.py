"""Fitted phases of plain pictures, written from FORMAT.md alone: a part of the second decoder."""

from collections.abc import Callable, Sequence
from functools import cache

TOTAL = 2**24

Values = Callable[[list[int], list[list[int]], bool, list[int]], list[int]]
"""Pops an array: lows, counts, whether they have an escape, ids."""


@cache
def family(number: int) -> tuple[int, list[int]]:
    """A table's low and counts."""
    i, rest = divmod(number, 24)
    k, f = divmod(rest, 8)
    reach = 8 + 2 ** (i // 4)
    s = (2 ** (k + 2) - 1) * (41, 58)[i % 2] * 2 ** (i // 2)
    sums = []
    for v in range(-reach, reach + 1):
        w = 0
        for h in range(-7, 8, 2):
            t = 2**30 * s // (s + (4 * (16 * v + h - 2 * f)) ** 2)
            for _ in range(k + 1):
                t = t**2 // 2**30
            w += t
        sums.append(w)
    counts = [1 + w * (TOTAL - 64 - len(sums)) // sum(sums) for w in sums]
    counts[reach] += TOTAL - 64 - sum(counts)
    return -reach, [*counts, 64]


def uniform(bits: int) -> list[int]:
    return [TOTAL >> bits] * 2**bits


def pop_family(values: Values, numbers: Sequence[int]) -> list[int]:
    used = sorted(set(numbers))
    place = {number: i for i, number in enumerate(used)}
    tables = [family(number) for number in used]
    return values([low for low, _ in tables], [counts for _, counts in tables], True, [place[n] for n in numbers])


def pop_uniform(values: Values, bits: Sequence[int]) -> list[int]:
    return values([0] * 16, [uniform(b) for b in range(1, 17)], False, [b - 1 for b in bits])


def pop_weights(values: Values, count: int, most: int) -> list[int] | None:
    """None if they are corrupt."""
    upper = pop_family(values, [760] * count)
    lower = pop_uniform(values, [3] * count)
    weights = [8 * u + low for u, low in zip(upper, lower, strict=True)]
    return weights if sum(map(abs, weights)) <= most else None


def middle(four: Sequence[int]) -> int:
    _, b, c, _ = sorted(four)
    return b + c


class Sample:
    """What is known of a sample's surroundings: of its own plane values and errors of the neighbours; of each plane
    before values and errors of the neighbours and at its place."""

    def __init__(self, n: list[int], errors: list[int], before: list[tuple[list[int], list[int], int, int]]) -> None:
        a, b, c, d = sorted(n[:4])
        self.inputs, self.error_inputs = [*n, b + c], [d - a + c - b, sum(errors[:4]), 8]
        for g, g_errors, here, error in before:
            guided = [one - other for one, other in zip(n[:4], g[:4], strict=True)]
            self.inputs += [*g, here, middle(guided) + 2 * here]
            self.error_inputs += [error, sum(g_errors[:4])]


def pop_phase(values: Values, samples: list[Sample], limit: int) -> list[tuple[int, int]] | None:
    """Value and error of each sample; None if they are corrupt."""
    weights = pop_weights(values, len(samples[0].inputs), 2**14)
    if weights is None:
        return None
    sums = (sum(w * x for w, x in zip(weights, sample.inputs, strict=True)) for sample in samples)
    means = [min(max((s + 64) // 128, 0), 8 * (limit - 1)) for s in sums]
    weights = pop_weights(values, len(samples[0].error_inputs), 2**11)
    if weights is None:
        return None
    contexts = []
    for sample in samples:
        size = max(1, sum(w * x for w, x in zip(weights, sample.error_inputs, strict=True)))
        e = size.bit_length() - 1
        contexts.append(min(max(4 * e + 4 * size // 2**e - 34, 0), 79))
    first, last = pop_uniform(values, [7, 7])
    if not (first <= min(contexts) and max(contexts) <= last < 80):
        return None
    likely = [(1 + (k == 1)) * 2 ** (18 - abs(j - 8)) for j in range(16) for k in range(3)]
    likely[25] += TOTAL - sum(likely)
    moves = values([0], [likely], False, [0] * (last - first + 1))
    opened = [max(0, (c - 28) // 4) for c in range(80)]
    tables = []
    for c, m in zip(contexts, means, strict=True):
        j, k = divmod(moves[c - first], 3)
        i = min(max(c - 4 * opened[c] + j - 8, 0), 31)
        tables.append(24 * i + 8 * k + m % 8)
    upper = pop_family(values, tables)
    lower = iter(pop_uniform(values, [opened[c] for c in contexts if opened[c]]))
    coded = []
    for m, u, c in zip(means, upper, contexts, strict=True):
        value = m // 8 + (u << opened[c]) + (next(lower) if opened[c] else 0)
        coded.append((value, abs(8 * value - m)))
    return coded if all(0 <= value < limit for value, _ in coded) else None
