"""`vaecodec selftest`: what anyone can run to see whether files decode alike on a machine."""

from typing import Any

import pytest
import torch
from conftest import cli

from vaecodec import Codec, selftest
from vaecodec.weights import WeightsError


@pytest.mark.usefixtures("small_weights")
def test_every_line_is_said() -> None:
    result = cli("selftest", "--device", "cpu")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and len(lines) == 4 + len(selftest.QUALITIES)
    assert torch.__version__ in lines[0]
    assert all("known answer in float32 on cpu" in line for line in lines[1:3])
    assert "every pixel equal" in lines[-1]


@pytest.mark.usefixtures("small_weights")
def test_other_pixels_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = Codec.decode_array, list[bytes]()

    def wrong(codec: Codec, data: bytes) -> Any:
        calls.append(data)
        return decode(codec, data) + (len(calls) == 3)

    monkeypatch.setattr(Codec, "decode_array", wrong)
    with pytest.raises(WeightsError, match="other pixels"):
        list(selftest.checks(Codec("cpu")))
