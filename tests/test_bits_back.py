"""Codecs made of codecs: chains, and bits-back with the rate that theory gives it."""

from typing import Any

import numpy as np
import pytest
from conftest import random_words
from hypothesis import given, settings, strategies as st

from bitstream import AnsStack, Codec, Parts, Tables, bits_back, chain, gaussian_tables, table_codec
from bitstream.tables import Ints

SEEDS = st.integers(0, 2**32 - 1)
SCALES = np.geomspace(0.3, 40, 12)
ESCAPED, CUT = (gaussian_tables(SCALES, escape=escape) for escape in (True, False))


def equal(a: Any, b: Any) -> bool:
    """The same array, or the same list of arrays."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(np.array_equal, a, b))
    return np.array_equal(a, b)


def check_inverse(codec: Codec[Any], value: Any, prior: bytes, lanes: int = 1) -> None:
    """Pushing and popping restores the data and the stack below it; pushing again gives the same bytes."""
    stack = AnsStack(prior, lanes)
    codec.push(stack, value)
    pushed = stack.to_bytes()
    popped = codec.pop(stack)
    assert equal(popped, value) and stack.to_bytes() == prior
    codec.push(stack, popped)
    assert stack.to_bytes() == pushed


# Chains


def three(tables: Tables, n: int) -> Parts:
    """Three arrays, of which each decides the tables and means of the next."""
    a = yield "a", table_codec(tables, np.full(n, 4))
    b = yield "b", table_codec(tables, a % len(SCALES), a)
    yield "c", table_codec(tables, b[::2] % len(SCALES), b[::2] // 2)


def drawn(rng: np.random.Generator, n: int) -> list[Any]:
    """Values for ``three``: what the tables expect, and some that they escape."""
    a = np.rint(rng.normal(0, 3, n)).astype(np.int32)
    b = a + np.rint(rng.standard_cauchy(n).clip(-1e6, 1e6)).astype(np.int32)
    return [a, b, rng.integers(-99, 99, len(b[::2]), np.int32)]


@pytest.mark.usefixtures("backend")
def test_a_chain_is_inverse_on_the_data_and_on_the_stack() -> None:
    @settings(max_examples=30)
    @given(SEEDS, st.integers(0, 40), st.integers(0, 4))
    def check(seed: int, n: int, words: int) -> None:
        rng = np.random.default_rng(seed)
        check_inverse(chain(lambda: three(ESCAPED, n)), drawn(rng, n), random_words(rng, words))
        codec, prior = chain(lambda: three(CUT, n)), random_words(rng, 9 + n)
        stack = AnsStack(prior)
        codec.push(stack, codec.pop(stack))
        assert stack.to_bytes() == prior

    check()


def test_a_chain_refuses_another_number_of_values() -> None:
    codec, values = chain(lambda: three(ESCAPED, 5)), drawn(np.random.default_rng(0), 5)
    for wrong in (values[:2], [*values, values[0]], []):
        with pytest.raises(ValueError, match=r"zip|values"):
            codec.push(AnsStack(), wrong)


@pytest.mark.usefixtures("backend")
def test_records_add_up_to_the_change_of_the_stack() -> None:
    rng, counts = np.random.default_rng(1), dict[str, list[float]]()
    codec = chain(lambda: three(ESCAPED, 50), lambda name, bits: counts.setdefault(name, []).append(bits))
    stack = AnsStack(random_words(rng, 3))
    before = stack.bits()
    codec.push(stack, drawn(rng, 50))
    pushed = stack.bits()
    codec.pop(stack)
    assert stack.bits() == before and list(counts) == ["c", "b", "a"]
    assert sum(first for first, _ in counts.values()) == pytest.approx(before - pushed)
    assert all(popped == pytest.approx(-first) and popped > 0 for first, popped in counts.values())


# Bits-back for z ~ N(0, S^2) and x ~ N(z, T^2) in integers; the posterior is a Gaussian, too.

S, T, STEPS = 40.0, 9.0, 8
GAIN, SPREAD = S**2 / (S**2 + T**2), S * T / np.hypot(S, T)
PRIOR, LIKELIHOOD = (gaussian_tables([scale], escape=True) for scale in (S, T))
POSTERIOR = gaussian_tables(np.full(STEPS, SPREAD), np.arange(STEPS) / STEPS, escape=False)


def prior_of(n: int) -> Codec[Any]:
    return table_codec(PRIOR, np.zeros(n, int))


def likelihood_of(z: Ints) -> Codec[Any]:
    return table_codec(LIKELIHOOD, np.zeros(len(z), int), z)


def posterior_of(x: Ints) -> Codec[Any]:
    steps = np.rint(GAIN * x * STEPS).astype(np.int64)
    return table_codec(POSTERIOR, steps % STEPS, steps // STEPS)


def observed(rng: np.random.Generator, n: int) -> Ints:
    return np.rint(rng.normal(0, np.hypot(S, T), n)).astype(np.int32)


@pytest.mark.usefixtures("backend")
def test_bits_back_is_inverse_on_the_data_and_on_the_stack() -> None:
    @settings(max_examples=30)
    @given(SEEDS, st.integers(0, 60), st.sampled_from([1, 2, 16]))
    def check(seed: int, n: int, lanes: int) -> None:
        rng = np.random.default_rng(seed)
        n *= lanes
        codec = bits_back(prior_of(n), likelihood_of, posterior_of)
        words = [random_words(rng, 100) for _ in range(lanes)]
        check_inverse(codec, observed(rng, n), bytes([100]) * (lanes if lanes > 1 else 0) + b"".join(words), lanes)

    check()


def test_the_net_rate_is_the_sampled_elbo_and_here_that_is_the_evidence() -> None:
    rng, n, latents = np.random.default_rng(2), 4000, list[Ints]()

    def noted(x: Ints) -> Codec[Any]:
        codec = posterior_of(x)

        def pop(stack: AnsStack) -> Ints:
            latents.append(codec.pop(stack))
            return latents[-1]

        return Codec(codec.push, pop)

    def information(codec: Codec[Any], values: Ints) -> float:
        """Bits of the values, by the counts of the table that codes each."""
        seen: list[float] = []

        class Counting(AnsStack):
            def push(self, values: Ints, tables: Tables, ids: Ints, locs: Ints | None = None) -> None:
                at = values - tables.lows[ids] - (0 if locs is None else locs)
                assert ((at >= 0) & (at < tables.sizes[ids] - tables.escape)).all()
                seen.extend(24 - np.log2(tables.counts[t][i]) for t, i in zip(ids, at, strict=True))

        codec.push(Counting(), values)
        return sum(seen)

    x = observed(rng, n).clip(-200, 200)
    stack = AnsStack(random_words(rng, 1000))
    before = stack.bits()
    bits_back(prior_of(n), likelihood_of, noted).push(stack, x)
    rate = stack.bits() - before
    (z,) = latents
    returned = information(posterior_of(x), z)
    elbo = information(likelihood_of(z), x) + information(prior_of(n), z) - returned
    assert rate == pytest.approx(elbo, rel=1e-3) and returned > 0.5 * elbo
    evidence = information(table_codec(gaussian_tables([np.hypot(S, T)], escape=True), np.zeros(n, int)), x)
    assert rate == pytest.approx(evidence, rel=5e-3)


@pytest.mark.usefixtures("backend")
def test_chains_nest_in_bits_back() -> None:
    """Two groups of latents, the first above the second, and two parts of x."""
    n = 30

    def prior() -> Parts:
        z = yield "z_2", prior_of(n)
        yield "z_1", likelihood_of(z)

    def posterior(x: list[Any]) -> Parts:
        z = yield "z_2", posterior_of(x[0])
        yield "z_1", posterior_of((x[1] + z) // 2)

    def likelihood(z: list[Any]) -> Parts:
        x = yield "x_1", likelihood_of(z[0])
        yield "x_2", likelihood_of((z[1] + x) // 2)

    rng = np.random.default_rng(3)
    codec = bits_back(chain(prior), lambda z: chain(lambda: likelihood(z)), lambda x: chain(lambda: posterior(x)))
    check_inverse(codec, [observed(rng, n), observed(rng, n)], random_words(rng, 60))
    outer = bits_back(codec, lambda z: chain(lambda: likelihood(z)), lambda x: chain(lambda: posterior(x)))
    check_inverse(outer, [observed(rng, n), observed(rng, n)], random_words(rng, 90))
