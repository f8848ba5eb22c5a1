import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import random_words
from hypothesis import given, settings, strategies as st

from bitstream import AnsStack, Codec, CorruptError, Tables, gaussian_tables, normalise, rans, table_codec
from bitstream.container import LANES
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


def random_stack(rng: np.random.Generator, words: int, lanes: int) -> bytes:
    """The bytes of a stack of lanes that have up to so many words each."""
    sizes = rng.integers(0, words, lanes, endpoint=True)
    body = b"".join(random_words(rng, size) for size in sizes)
    return bytes(sizes.astype(np.uint8)) + body if lanes > 1 else body


def check_inverse(codec: Codec[Any], values: Ints, prior: bytes, lanes: int = 1) -> None:
    """Pushing and popping restores both the data and the stack below it."""
    stack = AnsStack(prior, lanes)
    codec.push(stack, values)
    pushed = stack.to_bytes()
    popped = codec.pop(stack)
    assert popped.dtype == np.int32 and (popped == values).all()
    assert stack.to_bytes() == prior and stack.is_empty() == (not any(prior))
    codec.push(stack, popped)
    assert stack.to_bytes() == pushed


def check_bits_back(codec: Codec[Any], prior: bytes, lanes: int = 1) -> None:
    """Popping from any stack and pushing the result restores it."""
    stack = AnsStack(prior, lanes)
    codec.push(stack, codec.pop(stack))
    assert stack.to_bytes() == prior


SEEDS = st.integers(0, 2**32 - 1)
LANE_COUNTS = st.sampled_from(LANES)
SIZES = st.one_of(st.integers(0, 60), st.integers(0, 3000))


@pytest.mark.usefixtures("backend")
def test_inverse() -> None:
    @settings(max_examples=60, deadline=None)
    @given(SEEDS, SIZES, st.integers(0, 4), LANE_COUNTS, st.booleans())
    def check(seed: int, n: int, words: int, lanes: int, escape: bool) -> None:
        rng = np.random.default_rng(seed)
        tables = random_tables(rng, escape)
        values, ids = random_values(rng, tables, n)

        def prior() -> tuple[bytes, int]:
            return random_stack(rng, words, lanes), lanes

        check_inverse(table_codec(tables, ids), values, *prior())
        locs = rng.integers(-500, 500, n)
        moved = np.clip(values.astype(np.int64), INT32.min + 500, INT32.max - 500)
        if escape:
            check_inverse(table_codec(tables, ids, locs), moved, *prior())
        else:
            check_inverse(table_codec(tables, ids, locs), values + locs, *prior())
            check_bits_back(table_codec(tables, ids, locs), *prior())

    check()


def test_both_coders_write_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction")

    @settings(max_examples=60, deadline=None)
    @given(SEEDS, SIZES, st.integers(0, 9), LANE_COUNTS, st.booleans(), st.sampled_from([2, 3, 40, 3000]))
    def check(seed: int, n: int, words: int, lanes: int, escape: bool, size: int) -> None:
        rng = np.random.default_rng(seed)
        tables = random_tables(rng, escape, size)
        values, ids = random_values(rng, tables, n)
        prior = random_stack(rng, words, lanes)
        pushed = []
        for name in ("constriction", "numpy"):
            monkeypatch.setenv("VAECODEC_CODER", name)
            stack = AnsStack(prior, lanes)
            stack.push(values, tables, ids)
            pushed.append(stack.to_bytes())
        assert pushed[0] == pushed[1]
        # The two also agree on what words that nobody wrote decode to.
        plain = Tables(tables.lows, tables.counts, escape=False)
        for name in ("constriction", "numpy"):
            monkeypatch.setenv("VAECODEC_CODER", name)
            stack = AnsStack(prior, lanes)
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


@pytest.mark.usefixtures("backend")
def test_values_go_to_the_lanes_in_turn() -> None:
    """Each lane is a stack of its own."""
    rng = np.random.default_rng(5)
    tables = gaussian_tables([1.0, 9.0], escape=False)
    values, ids = random_values(rng, tables, 1500)
    stack = AnsStack(lanes=4)
    stack.push(values, tables, ids)
    order = np.argsort(ids, kind="stable")
    singles = []
    for lane in range(4):
        single, some = AnsStack(), order[np.arange(1500) // rans.RUN % 4 == lane]
        single.push(values[some], tables, ids[some])
        singles.append(single.to_bytes())
    sizes = bytes(len(single) // 4 for single in singles)
    assert stack.to_bytes() == sizes + b"".join(singles)
    assert stack.bits() == pytest.approx(sum(AnsStack(single).bits() for single in singles))
    assert stack.least() == min(AnsStack(single).bits() for single in singles)


def test_a_new_stack_has_as_many_lanes_as_are_cheap() -> None:
    rng = np.random.default_rng(6)
    tables, alone = gaussian_tables([1.0, 9.0], escape=True), dict[int, int]()
    for n in (0, 10, 1000, 40_000, 200_000):
        values, ids = random_values(rng, tables, n)
        sizes = []
        for lanes in (1, None):
            stack = AnsStack(lanes=lanes)
            stack.push(values[: n // 2], tables, ids[: n // 2])
            stack.push(values[n // 2 :], tables, ids[n // 2 :])
            sizes.append(len(stack.to_bytes()))
            alone[n] = stack.lanes
            assert (stack.pop(tables, ids[n // 2 :]) == values[n // 2 :]).all()
        assert sizes[1] <= 1.002 * sizes[0]
    assert alone[1000] == 1 and alone[200_000] > alone[40_000] > 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        b"\0\x80",
        b"\0\x80\0",
        b"\1\0",
        b"\0\0\1",
        b"\1\0\1\0\0",
        b"\0\1\1\0\0\0\0",
        b"\1\0\0\0\0\0",
        b"\2\0\1\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\1\1\1\0\0\0",
    ],
)
@pytest.mark.usefixtures("backend")
def test_corrupt_lanes(data: bytes) -> None:
    with pytest.raises(CorruptError):
        AnsStack(data, 2)
    assert not AnsStack(b"\0\1\1\0\0\0", 2).is_empty() and AnsStack(b"\0\0", 2).is_empty()


def test_choice_of_coder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAECODEC_CODER", "quick")
    with pytest.raises(ValueError, match="quick"):
        AnsStack()
    monkeypatch.delenv("VAECODEC_CODER")
    monkeypatch.setattr(rans, "constriction", None)
    stack = AnsStack()
    stack.push(np.array([3]), gaussian_tables([1.0], escape=True), np.array([0]))
    assert not stack.is_empty()
    monkeypatch.setenv("VAECODEC_CODER", "constriction")
    with pytest.raises(ValueError, match="not installed"):
        AnsStack()
