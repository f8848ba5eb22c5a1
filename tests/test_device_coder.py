"""The coder on a GPU writes the words of the others: on CUDA or, where there is none, by Triton's interpreter."""

import os

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made
pytest.importorskip("triton", reason="Triton is not installed: torch's CUDA build brings it")

from conftest import TINY, picture  # noqa: E402

from bitstream import AnsStack, CorruptError, Tables, gaussian_tables  # noqa: E402
from vaecodec import Codec  # noqa: E402
from vaecodec.device_coder import DeviceStack, bits, on_device  # noqa: E402
from vaecodec.together import at_once  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
MOST = 100_000 if CUDA else 60  # values; the interpreter takes some milliseconds for each step
ESCAPED, CUT = (gaussian_tables(np.geomspace(0.2, 30, 20), escape=escape) for escape in (True, False))


def drawn(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, some of which ESCAPED does not list, ids and locs."""
    rng = np.random.default_rng(seed)
    values = np.rint(rng.standard_cauchy(n).clip(-1e6, 1e6) * 9)
    ids, locs = rng.integers(0, 20, n), rng.integers(-9, 9, n)
    return tuple(torch.from_numpy(array.astype(np.int32)).to(DEVICE) for array in (values, ids, locs))  # type: ignore[return-value]


def on_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.cpu().numpy() for tensor in tensors]


@pytest.mark.parametrize(("lanes", "n"), [(1, MOST), (2, 140), pytest.param(64, 3 * MOST, marks=pytest.mark.slow)])
def test_the_words_are_those_of_the_other_coders(lanes: int, n: int) -> None:
    stack, other = DeviceStack(DEVICE, lanes=lanes), AnsStack(lanes=lanes)
    below = np.arange(10)
    for each in (stack, other):
        each.push(below, ESCAPED, below)  # an array of numpy, as alpha is
    values, ids, locs = drawn(n, lanes)
    stack.push(values, ESCAPED, ids, locs)
    v, i, where = on_host(values, ids, locs)
    other.push(v, ESCAPED, i, where)
    data = other.to_bytes()
    assert stack.to_bytes() == data and stack.bits() == other.bits() and stack.lanes == lanes
    stack = DeviceStack(DEVICE, data, lanes)
    popped = stack.pop(ESCAPED, ids, locs)
    assert popped.dtype == torch.int32 and torch.equal(popped, values) and not stack.is_empty()
    assert (stack.pop(ESCAPED, below) == below).all() and stack.is_empty()


def test_popping_from_any_words_and_pushing_restores_them() -> None:
    words = np.random.default_rng(1).integers(1, 2**32, 40, np.uint32).astype("<u4").tobytes()
    _, ids, locs = drawn(MOST, 2)
    stack, other = DeviceStack(DEVICE, words), AnsStack(words)
    values = stack.pop(CUT, ids, locs)
    i, where = on_host(ids, locs)
    assert (values.cpu().numpy() == other.pop(CUT, i, where)).all() and stack.to_bytes() == other.to_bytes()
    stack.push(values, CUT, ids, locs)
    assert stack.to_bytes() == words


def test_the_number_of_lanes_is_what_others_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitstream.coder._LANES_SHARE", 4)
    values, ids, locs = drawn(MOST, 3)
    stack, other = DeviceStack(DEVICE, lanes=None), AnsStack(lanes=None)
    stack.push(values, ESCAPED, ids, locs)
    v, i, where = on_host(values, ids, locs)
    other.push(v, ESCAPED, i, where)
    assert stack.lanes == other.lanes > 1 and stack.to_bytes() == other.to_bytes()


def test_what_cannot_be_coded() -> None:
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="no escape"):
        DeviceStack(DEVICE).push(zero + 999, CUT, zero)
    stack = DeviceStack(DEVICE)
    stack.push(zero + 2**31 - 1, ESCAPED, zero)
    with pytest.raises(CorruptError, match="int32"):
        stack.pop(ESCAPED, zero, zero + 99)
    with pytest.raises(CorruptError):
        DeviceStack(DEVICE, b"\1", 2)


def test_tables_on_a_device() -> None:
    tables = Tables(np.array([0, 5]), [np.array([2**23, 2**23]), np.array([1, 2, 2**24 - 3])], escape=True)
    found = on_device(tables, DEVICE)
    assert on_device(tables, DEVICE) is found and found.bits == 2
    assert found.lefts.tolist() == [0, 2**23, 0, 1, 3] and found.first.tolist() == [0, 2]


def test_bits_on_a_device_are_those_on_the_host() -> None:
    values, ids, _ = drawn(5000, 4)
    v, i = on_host(values, ids)
    assert bits(ESCAPED, ids, values.long()).cpu().numpy() == pytest.approx(ESCAPED.bits(i, v))


@pytest.mark.parametrize("mode", ["RGB", pytest.param("LA", marks=pytest.mark.slow)])
def test_lossy_files_are_the_same(mode: str, torch_tiny: Codec) -> None:
    """Symbols, table numbers and latents stay on the device; alpha comes from the host."""
    image = picture(20, 10, mode)
    expected = torch_tiny.compress(image, 90)
    pixels = torch_tiny.decode_array(expected)
    other = Codec(str(DEVICE), TINY, engine="torch")
    other.lossy.codes = True
    assert other.compress(image, 90) == expected
    assert (other.decode_array(expected) == pixels).all()


def test_tiles_that_are_coded_at_once(torch_tiny: Codec) -> None:
    """Threads share the tables and the kernels, and batches stay on the device."""
    images = [picture(20, 10, seed=seed) for seed in range(2)]
    expected = [torch_tiny.compress(image, 90) for image in images]
    codec = Codec(str(DEVICE), TINY, engine="torch")
    codec.lossy.codes, codec.lossy.gathers, codec._each = True, True, at_once
    assert codec.compress_batch(images, 90) == expected
    for image, file in zip(codec.decompress_batch(expected), expected, strict=True):
        assert (np.asarray(image) == torch_tiny.decode_array(file)).all()
