import math
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import random_words
from hypothesis import given, settings, strategies as st

from bitstream import AnsStack, Codec, CorruptError, Tables, gaussian_tables, normalise, table_codec
from bitstream.tables import Ints

INT32 = np.iinfo(np.int32)


def random_tables(rng: np.random.Generator, escape: bool, max_size: int = 40) -> Tables:
    sizes = rng.integers(2, max_size, rng.integers(1, 9), endpoint=True)
    return Tables(rng.integers(-99, 99, sizes.size), [normalise(rng.random(n) ** 9 + 1e-9) for n in sizes], escape)


def random_values(rng: np.random.Generator, tables: Tables, n: int) -> tuple[Ints, Ints]:
    """Values and ids; where the tables have an escape, one value in five is anything in int32."""
    ids = rng.integers(0, len(tables.counts), n)
    values = tables.lows[ids] + rng.integers(0, tables.sizes[ids])
    if tables.escape:
        far = rng.integers(INT32.min, INT32.max, n, endpoint=True) >> rng.integers(0, 32, n)
        values = np.where(rng.random(n) < 0.2, far, values)
    return values, ids


def check_inverse(codec: Codec[Any], values: Ints, prior: bytes) -> None:
    """Pushing and popping restores both the data and the stack below it."""
    stack = AnsStack(prior)
    codec.push(stack, values)
    pushed = stack.to_bytes()
    popped = codec.pop(stack)
    assert popped.dtype == np.int32 and (popped == values).all()
    assert stack.to_bytes() == prior and stack.is_empty() == (not prior)
    codec.push(stack, popped)
    assert stack.to_bytes() == pushed


def check_bits_back(codec: Codec[Any], prior: bytes) -> None:
    """Popping from any stack and pushing the result restores it."""
    stack = AnsStack(prior)
    codec.push(stack, codec.pop(stack))
    assert stack.to_bytes() == prior


SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.usefixtures("backend")
def test_inverse() -> None:
    @settings(max_examples=60, deadline=None)
    @given(SEEDS, st.integers(0, 60), st.integers(0, 4), st.booleans())
    def check(seed: int, n: int, words: int, escape: bool) -> None:
        rng = np.random.default_rng(seed)
        tables = random_tables(rng, escape)
        values, ids = random_values(rng, tables, n)
        check_inverse(table_codec(tables, ids), values, random_words(rng, words))
        locs = rng.integers(-500, 500, n)
        moved = np.clip(values.astype(np.int64), INT32.min + 500, INT32.max - 500)
        if escape:
            check_inverse(table_codec(tables, ids, locs), moved, random_words(rng, words))
        else:
            check_inverse(table_codec(tables, ids, locs), values + locs, random_words(rng, words))
            check_bits_back(table_codec(tables, ids, locs), random_words(rng, words))

    check()


def test_both_coders_write_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction")

    @settings(max_examples=60, deadline=None)
    @given(SEEDS, st.integers(0, 300), st.integers(0, 3), st.booleans(), st.sampled_from([2, 3, 40, 3000]))
    def check(seed: int, n: int, words: int, escape: bool, size: int) -> None:
        rng = np.random.default_rng(seed)
        tables = random_tables(rng, escape, size)
        values, ids = random_values(rng, tables, n)
        prior = random_words(rng, words)
        pushed = []
        for name in ("constriction", "python"):
            monkeypatch.setenv("VAECODEC_CODER", name)
            stack = AnsStack(prior)
            stack.push(values, tables, ids)
            pushed.append(stack.to_bytes())
        assert pushed[0] == pushed[1]
        # The two also agree on what words that nobody wrote decode to.
        plain = Tables(tables.lows, tables.counts, escape=False)
        for name in ("constriction", "python"):
            monkeypatch.setenv("VAECODEC_CODER", name)
            stack = AnsStack(prior)
            pushed += [stack.pop(plain, ids).tobytes(), stack.to_bytes()]
        assert pushed[2:4] == pushed[4:6]

    check()


@pytest.mark.usefixtures("backend")
def test_all_escape_lengths() -> None:
    tables = Tables(np.array([0]), [normalise([1, 1])], escape=True)
    powers = 2 ** np.arange(31)
    values = np.concatenate([powers - 1, powers, -powers, -powers - 1, [INT32.min, INT32.max]])
    check_inverse(table_codec(tables, np.zeros_like(values)), values, b"")
    for low in (INT32.min, INT32.max - 1):
        extreme = Tables(np.array([low]), [normalise([1, 1])], escape=True)
        check_inverse(table_codec(extreme, np.zeros(2, int)), np.array([INT32.min, INT32.max]), b"")


@pytest.mark.usefixtures("backend")
def test_rate_is_the_entropy() -> None:
    rng = np.random.default_rng(1)
    tables = gaussian_tables([0.3, 2.0, 30.0], escape=True)
    ids = rng.integers(0, 3, 20_000)
    values = np.rint(rng.normal(0, 1, ids.size) * np.array([0.3, 2.0, 30.0])[ids]).astype(int)
    bits = sum(24 - np.log2(tables.counts[t][v - tables.lows[t]]) for v, t in zip(values, ids, strict=True))
    stack = AnsStack()
    stack.push(values, tables, ids)
    assert 0 <= 8 * len(stack.to_bytes()) - bits < 64


@pytest.mark.usefixtures("backend")
def test_bits_are_the_length_and_change_by_the_information() -> None:
    rng = np.random.default_rng(2)
    tables = Tables(np.array([0]), [np.array([1 << 20, 3 << 20, 12 << 20])], escape=False)
    assert AnsStack().bits() == 0
    for words in range(1, 5):
        stack = AnsStack(random_words(rng, words))
        for value, bits in ((0, 4), (1, 4 - math.log2(3)), (2, 4 - math.log2(12))):
            before = stack.bits()
            assert 8 * len(stack.to_bytes()) - 32 <= before <= 8 * len(stack.to_bytes())
            stack.push(np.full(100, value), tables, np.zeros(100, int))
            assert stack.bits() - before == pytest.approx(100 * bits, abs=0.05)


@pytest.mark.usefixtures("backend")
def test_push_refuses_before_it_changes_anything() -> None:
    escaped, plain = gaussian_tables([1.0], escape=True), gaussian_tables([1.0], escape=False)
    zero = np.zeros(1, int)
    stack = AnsStack(b"\1\0\0\0")
    for values, tables, ids, error in (
        (np.array([999]), plain, zero, ValueError),
        (np.array([2**31]), escaped, zero, ValueError),
        (np.array([2**64 - 1], np.uint64), escaped, zero, ValueError),
        (np.array([0, 0]), escaped, zero, ValueError),
        (zero, escaped, np.array([1]), ValueError),
        (zero, escaped, np.array([-1]), ValueError),
        (np.zeros((1, 1), int), escaped, np.zeros((1, 1), int), ValueError),
        (np.array([0.0]), escaped, zero, TypeError),
        (zero, escaped, np.array([0.0]), TypeError),
        (np.array([True]), escaped, zero, TypeError),
    ):
        with pytest.raises(error):
            stack.push(values, tables, ids)
    with pytest.raises(ValueError, match="int32"):
        table_codec(escaped, zero, np.array([-1])).push(stack, np.array([INT32.max]))
    assert stack.to_bytes() == b"\1\0\0\0"


@pytest.mark.usefixtures("backend")
def test_corrupt_words() -> None:
    for data in (b"\1", b"\1\0\0", b"\1\0\0\0\1", b"\0\0\0\0", b"\1\0\0\0\0\0\0\0"):
        with pytest.raises(CorruptError):
            AnsStack(data)
    tables = Tables(np.array([INT32.max - 1]), [normalise([1, 1])], escape=True)
    stack = AnsStack()
    stack.push(np.array([5]), Tables(np.array([0]), [normalise([1, 1])], escape=True), np.array([0]))
    with pytest.raises(CorruptError, match="int32"):
        stack.pop(tables, np.array([0]))
    # Whatever the bytes, popping ends, in values or in CorruptError.
    tables = Tables(np.array([0]), [np.array([1, 2**24 - 1])], escape=True)
    rng = np.random.default_rng(3)
    failures = 0
    for _ in range(20):
        try:
            AnsStack(random_words(rng, 50)).pop(tables, np.zeros(1000, int))
        except CorruptError:
            failures += 1
    assert failures < 20


@pytest.mark.usefixtures("backend")
def test_threads_share_tables() -> None:
    tables = gaussian_tables(np.geomspace(0.2, 20, 40), escape=True)
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 40, 3000)
    values = rng.integers(-9, 9, 3000)

    def code(_: int) -> bytes:
        stack = AnsStack()
        stack.push(values, tables, ids)
        data = stack.to_bytes()
        assert (stack.pop(tables, ids) == values).all()
        return data

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(code, range(16)))) == 1


def test_choice_of_coder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAECODEC_CODER", "quick")
    with pytest.raises(ValueError, match="quick"):
        AnsStack()
    monkeypatch.delenv("VAECODEC_CODER")
    monkeypatch.setattr(sys.modules["bitstream.coder"], "constriction", None)
    stack = AnsStack()
    stack.push(np.array([3]), gaussian_tables([1.0], escape=True), np.array([0]))
    assert not stack.is_empty()
