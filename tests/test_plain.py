import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

import bitstream
from bitstream import AnsStack, CorruptError, fitted
from bitstream.plain import _family, pop_plain, push_plain

BELOW = b"\1\2\3\4\5\6\7\x08"  # what the stack already holds


def push(samples: NDArray[Any], depth: int, prior: bytes = BELOW) -> bytes:
    """The stack with a picture on it, after a round trip that restores the picture and the stack."""
    stack = AnsStack(prior)
    push_plain(stack, samples, depth)
    pushed = stack.to_bytes()
    popped = pop_plain(stack, samples.shape, depth)
    assert popped.dtype == np.uint16 and popped.shape == samples.shape and (popped == samples).all()
    assert stack.to_bytes() == prior and stack.is_empty() == (not prior)
    return pushed


def draw(seed: int, shape: tuple[int, int, int], depth: int, content: str) -> NDArray[np.uint16]:
    """A picture of noise, of a gradient with little noise, or of a few colours in stripes, specks or both."""
    rng, top = np.random.default_rng(seed), (1 << depth) - 1
    y, x = np.mgrid[: shape[0], : shape[1]][..., None]
    if content == "noise":
        return rng.integers(0, top, shape, np.uint16, endpoint=True)
    if content == "gradient":
        slopes = rng.integers(0, top // 40, (3, shape[2]), endpoint=True)
        picture = slopes[0] * x + slopes[1] * y + rng.integers(0, 2, shape)
        clipped: NDArray[np.uint16] = np.minimum(picture, top).astype(np.uint16)
        return clipped
    colours = rng.integers(0, top, (3, shape[2]), np.uint16, endpoint=True)
    specks = rng.random(shape[:2]) < 0.1 * (content == "specks")
    stripes = (x // 3 + y // 5)[..., 0] % rng.integers(1, 3)
    return colours.take(np.where(specks, 2, stripes), 0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.sampled_from([1, 2, 3, 5, 8, 13, 34])] * 2, st.integers(1, 4)),
    st.sampled_from([8, 10, 16]),
    st.sampled_from(["noise", "gradient", "stripes", "specks"]),
    st.sampled_from([BELOW, b""]),
)
def test_inverse(seed: int, shape: tuple[int, int, int], depth: int, content: str, prior: bytes) -> None:
    push(draw(seed, shape, depth, content), depth, prior)


def test_larger_pictures() -> None:
    """Runs of the memory, each layout, and samples that take more than one byte."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (70, 90, 3), np.uint8)
    specks = draw(2, (101, 203, 3), 8, "specks")
    for picture, depth, most in (
        (noise, 8, noise.size * 1.01),
        (noise.astype(np.uint16) * 257, 16, noise.size * 1.03),
        (rng.integers(0, 1 << 14, (64, 64, 1)).astype(">i8"), 14, 64 * 64 * 14 / 8 * 1.01),
        (specks, 8, specks.size / 18),
        (np.tile(rng.integers(0, 2, (16, 16, 1)), (12, 12, 1)), 8, 2000),
    ):
        assert len(push(picture, depth)) <= most


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 300, 1), (300, 1, 3), (400, 500, 4)])
def test_flat_pictures_cost_almost_nothing(shape: tuple[int, int, int]) -> None:
    for depth in (8, 16):
        assert len(push(np.full(shape, 200, np.uint8), depth)) <= len(BELOW) + 28


def photograph(height: int, width: int, channels: int, depth: int) -> NDArray[np.uint16]:
    """Slopes, edges, and noise of which the channels share a part."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width][..., None]
    planes = 0.45 + 0.2 * np.sin(x / 19 + np.arange(channels) / 9) + 0.15 * np.cos(y / 11) + 0.2 * (x + 2 * y > width)
    planes = planes + rng.normal(0, 0.02, (height, width, 1)) + rng.normal(0, 0.01, (height, width, channels))
    samples: NDArray[np.uint16] = (planes.clip(0, 1) * ((1 << depth) - 1)).astype(np.uint16)
    return samples


@pytest.mark.parametrize(
    ("shape", "depth", "bits"),
    [((256, 300, 3), 8, 4.3), ((2100, 16, 1), 8, 4.9), ((150, 270, 4), 12, 8.4), ((190, 200, 2), 16, 13)],
)
def test_fitted_pictures(shape: tuple[int, int, int], depth: int, bits: float) -> None:
    """Grids that are just large enough, all numbers of channels, values of which the low bits are open."""
    assert 8 * len(push(photograph(*shape, depth), depth)) < bits * np.prod(shape)


def test_extremes_are_fitted() -> None:
    """Sums reach their limits, where float32 is still exact."""
    rng = np.random.default_rng(5)
    push((rng.integers(0, 2, (200, 200, 3)) * 255).astype(np.uint8), 8)
    push((rng.integers(0, 2, (180, 200, 1)) * 65535 + rng.integers(-1, 1, (180, 200, 1))).clip(0, 65535), 16)


def test_known_answers() -> None:
    y, x = np.mgrid[:16, :16]
    smooth = np.stack([x * y * 9, 40 * x + y, 250 - 3 * x], -1)[:3, :4]
    letters = np.array([[9, 900], [500, 30]])[(x * x + y * y) % 8 // 4]
    assert push(smooth, 8, b"").hex() == (
        "52ca10af7baefad7eb7389d26f74470f563a7ae13bf4000084ae050c3b740009c257247410c40000c03fc1dc"
    )
    assert push(letters, 10, b"").hex() == (
        "969cfa3ad056908e0f6e54b4cc3b2d0054fc0800b0ca57a0cc8600003858def7a70061beddc3092f9d04400400901d01"
    )
    digest = "3179e32123a0cf92a5d57fe6a0f8c22e86022e58dc0e5dcb9253f46a5ca9ae9c"
    assert hashlib.sha256(_family().digest_bytes()).hexdigest() == digest
    digest = "89d8d4f516ca3c136a3396b444e5975c69089c1131c678864d031cfae2724363"
    assert hashlib.sha256(fitted._family().digest_bytes()).hexdigest() == digest
    assert digest in (Path(bitstream.__file__).parent / "FORMAT.md").read_text("utf-8")


def test_both_coders_write_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction")
    for depth, content in ((8, "specks"), (16, "gradient")):
        picture, pushed = draw(3, (40, 30, 3), depth, content), []
        for name in ("constriction", "numpy"):
            monkeypatch.setenv("VAECODEC_CODER", name)
            pushed.append(push(picture, depth))
        assert pushed[0] == pushed[1]


def test_corrupt_words() -> None:
    """Whatever the words, popping ends, in a picture or in CorruptError."""
    rng = np.random.default_rng(4)
    stack = AnsStack()
    push_plain(stack, draw(5, (24, 40, 3), 10, "specks"), 10)
    good = np.frombuffer(stack.to_bytes(), "<u4")
    failures = 0
    for i in range(80):
        words = rng.integers(1, 2**32, rng.integers(1, 400), np.uint32)
        if i % 2:
            words = good.copy()
            words[rng.integers(-9, 0)] ^= np.uint32(1 << rng.integers(0, 31))
        try:
            samples = pop_plain(AnsStack(words.astype("<u4").tobytes()), (24, 40, 3), 10)
            assert samples.shape == (24, 40, 3) and samples.max() < 1 << 10
        except CorruptError:
            failures += 1
    assert 0 < failures < 80


def test_push_refuses_before_it_changes_anything() -> None:
    good = np.zeros((2, 3, 1), np.uint8)
    stack = AnsStack(BELOW)
    for samples, depth, error in (
        (good.astype(float), 8, TypeError),
        (good[0], 8, ValueError),
        (good[:0], 8, ValueError),
        (np.zeros((2, 3, 5), np.uint8), 8, ValueError),
        (good, 7, ValueError),
        (good, 17, ValueError),
        (good.astype(np.int16) - 1, 8, ValueError),
        (good.astype(np.uint16) + 1024, 10, ValueError),
    ):
        with pytest.raises(error):
            push_plain(stack, samples, depth)
    assert stack.to_bytes() == BELOW
