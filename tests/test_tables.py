from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from bitstream import AnsStack, Tables, gaussian_tables, normalise

TOTAL = 2**24
HALF = np.array([TOTAL // 2, TOTAL // 2])


def same(a: Tables, b: Tables) -> bool:
    return a.digest_bytes() == b.digest_bytes()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1e300), min_size=2, max_size=50).filter(any)
    | st.lists(st.integers(0, 10**9), min_size=2, max_size=50).filter(any)
)
def test_normalise_is_exact_and_ordered(weights: list[float]) -> None:
    counts = normalise(weights)
    assert counts.dtype == np.int64 and counts.sum() == TOTAL and counts.min() >= 1
    order = np.argsort(weights, kind="stable")
    # Equal weights may differ by one count: remainders go to lower indices.
    assert (np.diff(counts[order]) >= -1).all()
    share = np.array(weights) / np.max(weights)
    assert np.abs(counts - 1 - share / share.sum() * (TOTAL - len(weights))).max() < 1.01


def test_normalise_known() -> None:
    assert normalise([1, 1, 1]).tolist() == [5592406, 5592405, 5592405]
    assert normalise([0, 5]).tolist() == [1, TOTAL - 1]
    counts = normalise(np.random.default_rng(0).random(300))
    assert (normalise(counts - 1) == counts).all()


@pytest.mark.parametrize("weights", [[1], [0, 0], [1, -1], [1, np.nan], [1, np.inf], [[1, 2]], []])
def test_normalise_refuses(weights: Any) -> None:
    with pytest.raises(ValueError, match="weights"):
        normalise(weights)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_arrays_round_trip(data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.lists(st.integers(1, 999), min_size=2, max_size=9), min_size=1, max_size=9))
    lows = data.draw(st.lists(st.integers(-(2**31), 2**31 - 9), min_size=len(weights), max_size=len(weights)))
    tables = Tables(np.array(lows), [normalise(w) for w in weights], data.draw(st.booleans()))
    assert same(Tables.from_arrays(tables.to_arrays()), tables)
    assert tables.sizes.tolist() == [len(w) for w in weights]


def test_digest_bytes_differ_with_every_part() -> None:
    a = Tables(np.array([0]), [HALF], escape=False)
    assert a.digest_bytes().hex() == "000100000000000000020000000000800000008000"
    assert not same(a, Tables(np.array([1]), [HALF], escape=False))
    assert not same(a, Tables(np.array([0]), [HALF], escape=True))
    assert not same(a, Tables(np.array([0]), [HALF + np.array([1, -1])], escape=False))


def test_tables_are_copies_that_cannot_be_changed() -> None:
    counts = HALF.copy()
    tables = Tables(np.array([0]), [counts], escape=False)
    counts[0] = 7
    assert tables.counts[0][0] == HALF[0]
    with pytest.raises(ValueError, match="read-only"):
        tables.counts[0][0] = 7


@pytest.mark.parametrize(
    ("lows", "counts", "error", "match"),
    [
        (np.array([], int), [], ValueError, "tables for lows"),
        ([0, 0], [HALF], ValueError, "tables for lows"),
        ([0] * 1025, [HALF] * 1025, ValueError, "at most 1024"),
        ([0], [np.array([TOTAL])], ValueError, "two entries"),
        ([0], [np.array([[1, TOTAL - 1]])], ValueError, "two entries"),
        ([0], [np.array([0, TOTAL])], ValueError, "at least 1"),
        ([0], [np.array([-1, TOTAL + 1])], ValueError, "at least 1"),
        ([0], [np.array([1, TOTAL])], ValueError, "sum to"),
        ([0], [np.array([2**63 - 1, 2**63 - 1, TOTAL + 2])], ValueError, "sum to"),
        ([2**31 - 1], [HALF], ValueError, "int32"),
        ([-(2**31) - 1], [HALF], ValueError, "int32"),
        ([0], [HALF / 1.0], TypeError, "integer"),
        ([0.0], [HALF], TypeError, "integer"),
    ],
)
def test_tables_refuse(lows: Any, counts: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Tables(np.array(lows), counts, escape=False)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("sizes", np.array([3])),
        ("sizes", np.array([1, 1])),
        ("sizes", np.array([], np.uint32)),
        ("counts", np.array([TOTAL], np.uint32)),
        ("escape", np.array([2], np.uint8)),
        ("escape", np.array([0, 0], np.uint8)),
        ("lows", np.array([0, 0], np.int32)),
    ],
)
def test_from_arrays_refuses(name: str, array: Any) -> None:
    arrays = Tables(np.array([0]), [HALF], escape=False).to_arrays()
    with pytest.raises(ValueError, match=r"escape|disagree|lows"):
        Tables.from_arrays({**arrays, name: array})
    del arrays[name]
    with pytest.raises(ValueError, match="lack"):
        Tables.from_arrays(arrays)


def test_gaussian_tables() -> None:
    sigmas = [0.11, 1.0, 20.0]
    tables = gaussian_tables(sigmas, escape=True)
    for low, counts, sigma in zip(tables.lows, tables.counts, sigmas, strict=True):
        inside = counts[:-1] / TOTAL
        values = low + np.arange(len(inside))
        assert np.allclose(inside, inside[::-1], atol=3e-7)
        # Rounding adds the variance of a uniform error, where sigma is not tiny.
        assert sigma < 1 or np.isclose((inside * values**2).sum(), sigma**2 + 1 / 12, rtol=1e-3)
        assert counts[-1] < 40
    bounded = gaussian_tables([2.0, 2.0], [0.0, 0.25], escape=False)
    means = [(c * (low + np.arange(len(c)))).sum() / TOTAL for low, c in zip(bounded.lows, bounded.counts, strict=True)]
    assert np.allclose(means, [0, 0.25], atol=1e-3)
    for bad in ([0.0], [-1.0], [np.nan], [np.inf]):
        with pytest.raises(ValueError, match="positive"):
            gaussian_tables(bad, escape=True)


def test_bits_are_what_the_coder_takes() -> None:
    tables = gaussian_tables([0.6, 3.0, 20.0], escape=True)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, 20_000)
    values = np.rint(rng.normal(0, 1.2 * np.array([0.6, 3.0, 20.0])[ids])).astype(np.int64)
    values[:50] *= 1000  # escaped
    stack = AnsStack()
    stack.push(values.astype(np.int32), tables, ids.astype(np.int32))
    assert tables.bits(ids, values).sum() == pytest.approx(stack.bits(), rel=1e-3)
    inside = gaussian_tables([2.0], escape=False)
    assert inside.bits(np.zeros(1, np.int64), np.zeros(1, np.int64))[0] == pytest.approx(
        24 - np.log2(inside.counts[0][-inside.lows[0]])
    )
