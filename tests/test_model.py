"""The networks, their likelihoods and the order of the context steps."""

import pytest
import torch
from conftest import picture, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vaecodec import Codec
from vaecodec.lossy.layers import (
    LAMBDA_MIN,
    SCALE_MAX,
    SCALE_MIN,
    STEPS,
    gaussian_bits,
    lagrangian,
    pick,
    place,
    scale_of,
    step_quarters,
)

SIZES = st.integers(1, 9)


def batch(height: int = 64, width: int = 128) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.rand(3, 3, height, width) * 255, torch.tensor([0, 4321, 10000])


def steps_of(channels: int, height: int, width: int) -> Tensor:
    """[4, channels, height, width]: how often each step places each latent."""
    places = []
    for step in range(STEPS):
        quarters = step_quarters(height, width, step, torch.device("cpu"))
        values = torch.ones(1, channels // 4, height, width)
        places.append(place(torch.zeros(1, channels, height, width), quarters, values)[0])
    return torch.stack(places)


@settings(max_examples=30)
@given(st.integers(1, 10), SIZES, SIZES)
def test_steps_cover_each_latent_once(quarter: int, height: int, width: int) -> None:
    placed = steps_of(4 * quarter, height, width)
    assert (placed.sum(0) == 1).all() and (placed.sum(1) == quarter).all()


def test_what_is_placed_is_picked() -> None:
    y, quarters = torch.randn(2, 8, 5, 3), step_quarters(5, 3, 1, torch.device("cpu"))
    values = torch.randn(2, 2, 5, 3)
    assert torch.equal(pick(place(y, quarters, values), quarters), values)
    assert torch.equal(place(y, quarters, pick(y, quarters)), y)


def test_last_two_steps_see_all_four_neighbours_of_their_channel() -> None:
    step = steps_of(16, 6, 7).argmax(0)
    middle = step[:, 1:-1, 1:-1]
    neighbours = (step[:, :-2, 1:-1], step[:, 2:, 1:-1], step[:, 1:-1, :-2], step[:, 1:-1, 2:])
    for near in neighbours:
        assert (near[middle >= 2] < 2).all()


def test_gaussian_bits_are_those_of_compressai() -> None:
    pytest.importorskip("compressai", reason="compares with CompressAI's likelihood")
    from compressai.entropy_models import GaussianConditional

    values = torch.arange(-60, 61, dtype=torch.float64)[:, None] / 4
    scales = torch.logspace(-0.95, 2.4, 40, dtype=torch.float64)[None]
    oracle = GaussianConditional(None).double()
    likelihood = oracle._likelihood(values.expand(-1, 40), scales.expand(121, -1)).clamp(min=1e-9)
    torch.testing.assert_close(gaussian_bits(values, scales), -torch.log2(likelihood), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.11, 0.7, 5.0])
def test_gaussian_probabilities_of_integers_sum_to_one(scale: float) -> None:
    values = torch.arange(-60, 61, dtype=torch.float64)
    total = torch.exp2(-gaussian_bits(values, torch.tensor(scale, dtype=torch.float64))).sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_scales_and_lambda_span_their_ranges() -> None:
    ends = scale_of(torch.tensor([0.0, 63.0]))
    assert ends.tolist() == pytest.approx([SCALE_MIN, SCALE_MAX])
    assert lagrangian(torch.tensor([0, 10000]), 0.5).tolist() == pytest.approx([LAMBDA_MIN, 0.5])


@pytest.mark.parametrize("exact", [False, True])
def test_shapes(exact: bool) -> None:
    model = small_model()
    model.exact(exact)
    x, quality = batch()
    out = model(x, quality)
    assert out.x_hat.shape == x.shape and out.bits.shape == (3,)
    assert out.residual.shape == out.scale_index.shape == (3, 16, 4, 8)
    assert (out.bits > 0).all() and all(tensor.isfinite().all() for tensor in out)
    if exact:
        hard = model(x, quality, hard=True)
        for integers in (hard.residual, hard.scale_index, hard.x_hat * 16):
            assert torch.equal(integers, integers.round())


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_reach_every_parameter(exact: bool) -> None:
    model = small_model()
    model.exact(exact)
    x, quality = batch()
    out = model(x, quality)
    (out.bits.sum() + (out.x_hat - x).square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Scrambled:
    """Mirrors one input of the given networks while the body runs."""

    def __init__(self, networks: list[nn.Module], argument: int) -> None:
        def mirror(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            changed = list(arguments)
            changed[argument] = -changed[argument].flip(1)
            return tuple(changed)

        self.hooks = [network.register_forward_pre_hook(mirror) for network in networks]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(("part", "argument"), [("h_s", 0), ("context", 0), ("context", 1)])
def test_entropy_networks_use_what_they_are_given(tiny: Codec, part: str, argument: int) -> None:
    model = tiny.lossy.model
    networks = [model.h_s] if part == "h_s" else list(model.context)
    image = picture(96, 80)
    plain = tiny.compress(image)
    with Scrambled(networks, argument):
        assert tiny.compress(image) != plain
    assert tiny.compress(image) == plain
