"""A guest in other people's programs: their torch stays as they had it, and the codec works whatever they have set."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_LOSSLESS, picture, python, same

from vaecodec import Codec

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
