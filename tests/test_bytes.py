"""Levels of bytes: what the layers see, how 16-bit weights become 8-bit ones, training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LOSSLESS, TINY, TINY_LOSSLESS, cli, in_bytes, picture
from torch import Tensor

from vaecodec import Codec
from vaecodec.exact import ExactConv
from vaecodec.kinds import load
from vaecodec.lossless.layers import BYTE_UNIT, UNIT, Config, Plain, byte_conv, coarse_bytes, signs
from vaecodec.lossless.model import LosslessModel
from vaecodec.lossless.weights import LosslessWeights
from vaecodec.training.lossless import bits
from vaecodec.training.quantise import compensated, quantise, quantised
from vaecodec.weights import WeightsError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        picture(64, 64, seed=seed).save(folder / f"{seed}.png")
    return folder


def rate(path: Path, x: Tensor) -> float:
    weights = load(path, CPU)
    assert isinstance(weights, LosslessWeights)
    torch.manual_seed(0)
    return float(sum(part.sum() for part in bits(weights.model(x)).values())) / x.numel()


def test_of_16_bits_to_8(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "bytes.safetensors"
    quantise(TINY_LOSSLESS, pictures, out)
    seen = [torch.from_numpy(np.array(picture(96, 64, seed=seed))) for seed in (5, 6)]
    x = torch.stack(seen).permute(0, 3, 1, 2).float()
    assert rate(out, x) == pytest.approx(rate(TINY_LOSSLESS, x), rel=0.01)
    codec, image = Codec("cpu", out, engine="torch"), picture(70, 50)
    assert codec.decompress(codec.compress(image, lossless=True)).tobytes() == image.tobytes()


def test_command(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = cli("quantise", TINY_LOSSLESS, "--data", pictures, "-o", out)
    assert result.exit_code == 0, result.output
    codec, image = Codec("cpu", out, engine="onnx"), picture(70, 50)
    assert codec.decompress(codec.compress(image, lossless=True)).tobytes() == image.tobytes()
    for other in (out, TINY):
        result = cli("quantise", other, "--data", pictures, "-o", tmp_path / "again.safetensors")
        assert result.exit_code and "levels of 16 bits" in result.output
    result = cli("quantise", TINY_LOSSLESS, "--data", tmp_path, "-o", tmp_path / "again.safetensors")
    assert result.exit_code and "Error" in result.output
    assert not (tmp_path / "again.safetensors").exists()
    result = cli("quantise", TINY_LOSSLESS, "--data", pictures, "-o", tmp_path / "none" / "again.safetensors")
    assert result.exit_code == 2


def test_not_twice(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="16 bits"):
        quantise(in_bytes(tmp_path / "bytes.safetensors"), pictures, tmp_path / "out.safetensors")


def test_rounding_is_made_up_for() -> None:
    """Where inputs go together, errors of weights cancel."""
    torch.manual_seed(0)
    common = torch.randn(500, 3, dtype=torch.float64)
    x = common @ torch.randn(3, 12, dtype=torch.float64) + 0.1 * torch.randn(500, 12, dtype=torch.float64)
    spread, weight = x.T @ x / len(x), 10 * torch.randn(8, 12, dtype=torch.float64)

    def error(integers: Tensor) -> float:
        return float(((integers - weight) @ x.T).square().mean())

    found = compensated(weight, spread)
    assert torch.equal(found, found.round())
    assert error(found) < error(weight.round()) / 3


def test_sums_are_bounded() -> None:
    layer = byte_conv(400, 2, 1)
    layer.weight.data.fill_(1)
    moments = torch.eye(401, dtype=torch.float64)
    assert quantised(layer, moments)["weight"].dtype == torch.int8
    layer.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="limit"):
        quantised(layer, moments)


def test_numbers_are_the_sum_of_their_bytes() -> None:
    x = torch.arange(-510, 511).view(1, 1, 1, -1) * UNIT
    up, down, left = coarse_bytes(x, True)[0]
    assert torch.equal(up - down + left, x[0, 0]) and set((left / UNIT).unique().tolist()) == {0, 1}
    assert torch.equal(up, (up / BYTE_UNIT).round() * BYTE_UNIT)
    up, down = signs(x.clamp(-255 * UNIT, 255 * UNIT))[0]
    assert torch.equal(up - down, x[0, 0].clamp(-255 * UNIT, 255 * UNIT))


@pytest.mark.parametrize("exact", [False, True])
def test_training(exact: bool) -> None:
    torch.manual_seed(0)
    model = LosslessModel(Config(**{**vars(LOSSLESS), "activation_bits": 8}))
    for name, layer in model.convs():
        if ".out." in name:  # begin at 0
            layer.weight.data.normal_(std=0.1)
    model.exact(exact)
    x = torch.from_numpy(np.array(picture(32, 32))).permute(2, 0, 1)[None].float()
    loss = torch.stack([part.sum() for part in bits(model(x)).values()]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, layer in model.levels[0].named_modules():
        if isinstance(layer, ExactConv) and not layer.linear:
            assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
            assert layer.weight.grad.any(), name


@torch.no_grad()
def test_a_new_layer_is_near_the_identity() -> None:
    torch.manual_seed(0)
    h = torch.rand(1, 64, 8, 8) * 8
    assert float((Plain(64)(h) - h).square().mean() / h.square().mean()) < 0.5
