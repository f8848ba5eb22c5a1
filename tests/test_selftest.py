"""`vaecodec selftest`: what anyone can run to see whether files decode alike on a machine."""

from typing import Any

import pytest
import torch
from conftest import cli

from vaecodec import Codec, selftest
from vaecodec.lossy.engine import KERNELS
from vaecodec.weights import WeightsError


@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize(("engine", "kernels"), [("torch", ["float32", "float32"]), ("auto", list(KERNELS))])
def test_every_line_is_said(engine: str, kernels: list[str]) -> None:
    result = cli("selftest", "--device", "cpu", "--engine", engine)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and len(lines) == 4 + len(selftest.QUALITIES)
    assert torch.__version__.split("+")[0] in lines[0]
    names = ("torch", "torch") if engine == "torch" else ("onnx", "onnx")
    for line, name in zip(lines[1:3], names, strict=True):
        assert any(f"known answer in {kernel} ({name}) on cpu" in line for kernel in kernels)
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
