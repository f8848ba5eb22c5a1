"""A guest in other people's programs: their torch stays as they had it, and the codec works whatever they have set."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_LOSSLESS, picture, python, same

import vaecodec
from vaecodec import Codec, guest

KINDS = pytest.mark.parametrize("lossless", [False, True], ids=["lossy", "lossless"])


def fresh(lossless: bool) -> Codec:
    return Codec("cpu", TINY_LOSSLESS if lossless else TINY)


@KINDS
def test_random_state_is_left_alone(lossless: bool) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    codec = fresh(lossless)
    codec.decompress(codec.compress(picture(70, 50), lossless=lossless, effort=1))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


@pytest.fixture(params=["meta", "float64", "bfloat16", "inference", "autocast", "no grad"])
def setting(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a program may have set for itself."""
    contexts = {
        "meta": torch.device("meta"),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "no grad": torch.no_grad(),
    }
    if request.param in contexts:
        with contexts[request.param]:
            yield
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_dtype(before)


@KINDS
@pytest.mark.usefixtures("setting")
def test_under_any_setting(lossless: bool, tiny: Codec, lossless_codec: Codec) -> None:
    image, codec = picture(70, 50), fresh(lossless)
    mine, usual = codec.compress(image, lossless=lossless), lossless_codec if lossless else tiny
    assert same(codec.decompress(mine), usual.decompress(mine))
    assert mine == usual.compress(image, lossless=lossless)
    if not lossless:
        assert codec.compress(image, effort=1)


def test_imported_under_a_default_device() -> None:
    code = (
        "import torch, numpy as np, sys\n"
        "with torch.device('meta'):\n"
        "    import vaecodec\n"
        "    codec = vaecodec.Codec('cpu', sys.argv[1])\n"
        "    data = codec.compress(np.zeros((40, 40, 3), np.uint8), lossless=True, effort=1)\n"
        "    print(codec.decode_array(data).max())\n"
    )
    assert python(code, TINY_LOSSLESS).stdout.strip() == b"0"


# Compiled programs

CALLS: dict[str, Callable[[Codec, bytes], Any]] = {
    "compress": lambda codec, _: len(codec.compress(np.zeros((20, 20, 3), np.uint8))),
    "compress_batch": lambda codec, _: len(codec.compress_batch(np.zeros((2, 20, 20, 3), np.uint8))),
    "decompress": lambda codec, data: codec.decompress(data).width,
    "decompress_batch": lambda codec, data: len(codec.decompress_batch([data, data])),
    "decode_array": lambda codec, data: int(codec.decode_array(data)[0, 0, 0]),
    "decode_tensor": lambda codec, data: codec.decode_tensor(data).float(),
    "decode_tiles": lambda codec, data: sum(int(part.size) for _, part in codec.decode_tiles(data)),
    "load": lambda codec, _: len(Codec("cpu", TINY).compress(np.zeros((20, 20, 3), np.uint8))),
    "shared": lambda codec, data: vaecodec.decompress(data).width,
}


@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("name", CALLS)
def test_in_compiled_programs(tiny: Codec, name: str) -> None:
    data = tiny.compress(picture(40, 30))

    def work(x: torch.Tensor) -> Any:
        return CALLS[name](tiny, data) * (x + 1)

    compiled = torch.compile(work, backend="eager")
    assert torch.equal(compiled(torch.ones(1)), work(torch.ones(1)))


# Other processes


def job(path: str) -> bytes:
    """What a child does."""
    codec, image = Codec("cpu", path), picture(200, 150)
    data = codec.compress(image, lossless=True)
    assert same(codec.decompress(data), image)
    return data


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_children_of_any_kind(lossless_codec: Codec, method: str, threads: Any) -> None:
    torch.set_num_threads(2)
    data = lossless_codec.compress(picture(200, 150), lossless=True)  # torch has a pool of threads now
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(job, (str(TINY_LOSSLESS),)).get(timeout=60) == data


def in_child(work: Callable[[], int]) -> int:
    """The exit code of a forked process that does something; it is killed if that takes too long."""
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(work()))
    child.start()
    child.join(30)
    if child.exitcode is None:
        child.kill()
        pytest.fail("the child hangs")
    return child.exitcode


FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@FORKS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_amid_work_of_its_own_thread(tiny: Codec, threads: Any) -> None:
    torch.set_num_threads(2)
    codes = list[int]()
    size = len(tiny.compress(picture(70, 50)))
    tiny.compress(
        picture(60, 40), progress=lambda _: codes.append(in_child(lambda: len(tiny.compress(picture(70, 50))) != size))
    )
    assert codes == [0]


@FORKS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_amid_work_of_another_thread(tiny: Codec, threads: Any) -> None:
    torch.set_num_threads(2)
    entered, leave = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        entered.set()
        leave.wait(30)

    other = threading.Thread(target=lambda: tiny.compress(picture(60, 40), progress=slow))
    other.start()
    entered.wait(30)

    def refused() -> int:
        for call in (
            lambda: tiny.compress(picture(9, 9)),
            lambda: Codec("cpu", TINY),
            lambda: vaecodec.compress(picture(9, 9)),
        ):
            try:
                call()
            except RuntimeError as error:
                if "forked" in str(error):
                    continue
            return 1
        return 0

    assert in_child(refused) == 0
    leave.set()
    other.join()
    assert tiny.compress(picture(9, 9)) and not guest._at_work
    assert in_child(lambda: len(tiny.compress(picture(9, 9))) == 0) == 0
