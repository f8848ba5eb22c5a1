"""Layers that compute integers in floating point, and the interpolation between stored integers."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaecodec import Codec
from vaecodec.exact import ACCUMULATOR_LIMIT, QUALITY_MAX, STREAM_UNIT, UNIT, Conv, interpolate, requantise, snap

QUALITIES = st.integers(0, QUALITY_MAX)


def layer(seed: int = 0, kernel: int = 3, knots: int = 3, size: float = 1.0) -> Conv:
    torch.manual_seed(seed)
    conv = Conv(12, 8, kernel, knots=knots)
    with torch.no_grad():
        conv.weight.mul_(size)
        conv.bias.normal_()
    conv.exact = True
    return conv


def frozen(conv: Conv) -> Conv:
    out_channels, in_channels, kernel, _ = conv.shape
    copy = Conv(in_channels, out_channels, kernel, knots=len(conv.bias))
    copy.freeze(*conv.integers())
    return copy


def activations(conv: Conv, seed: int, height: int = 6, width: int = 7, batch: int = 2) -> Tensor:
    limit = int(conv.in_max[0])
    torch.manual_seed(seed)
    shape = (batch, conv.shape[1], height, width)
    return torch.randint(-limit, limit + 1, shape).to(conv.weight.dtype) * conv.in_unit


def worst_inputs(conv: Conv) -> Tensor:
    """For each output channel a patch, every input at its limit and of the weight's sign; then those negated."""
    worst = (conv.weight.detach().sign() * conv.in_max).view(conv.shape).to(conv.weight.dtype) * conv.in_unit
    return torch.cat([worst, -worst])


def test_snap_rounds_to_the_nearest_multiple_and_ties_upwards() -> None:
    x = torch.tensor([0.24, 0.25, 0.26, -0.24, -0.25, -0.26, -0.75])
    assert snap(x, 0.5).tolist() == [0, 0.5, 0.5, 0, 0, -0.5, -0.5]


def test_snap_passes_the_gradient_straight_through() -> None:
    x = torch.tensor([0.3, -7.9], requires_grad=True)
    y = snap(x, 1.0)
    y.backward(torch.tensor([2.0, 3.0]))
    assert y.tolist() == [0, -8] and x.grad is not None and x.grad.tolist() == [2, 3]


def test_requantise_clamps_and_rounds_only_where_exact() -> None:
    x = torch.tensor([-9.0, 0.3, 9.0])
    assert requantise(x, 0.25, 0, 4, True).tolist() == [0, 0.25, 4]
    assert requantise(x, 0.25, 0, 4, False).tolist() == [0, x[1].item(), 4]


@settings(max_examples=60)
@given(st.lists(st.integers(-(2**30), 2**30), min_size=1, max_size=9), st.lists(QUALITIES, min_size=1, max_size=3))
def test_interpolate_integers_is_the_rounded_fraction(knots: list[int], qualities: list[int]) -> None:
    q, column = torch.tensor(qualities), torch.tensor(knots)[:, None]
    result = interpolate(column, q)
    assert result.dtype == torch.int64 and result.shape == (len(qualities), 1)
    for quality, value in zip(qualities, result[:, 0].tolist(), strict=True):
        position = Fraction(quality * (len(knots) - 1), QUALITY_MAX)
        left = min(int(position), max(len(knots) - 2, 0))
        right = min(left + 1, len(knots) - 1)
        true = knots[left] + (knots[right] - knots[left]) * (position - left)
        assert value == (true + Fraction(1, 2)).__floor__()
    assert torch.allclose(interpolate(column.double(), q), result.double(), rtol=0, atol=0.51)


def test_interpolate_gives_the_knots_at_their_qualities() -> None:
    knots = torch.tensor([[3, -5], [10, 7], [-2, 0]])
    q = torch.tensor([0, 5000, 10000])
    assert torch.equal(interpolate(knots, q), knots)
    assert torch.equal(interpolate(knots.float(), q), knots.float())


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from([1, 3]), st.floats(1e-3, 20))
def test_freezing_reproduces_the_exact_training_forward_bit_for_bit(seed: int, kernel: int, size: float) -> None:
    conv = layer(seed, kernel, size=size)
    x, quality = activations(conv, seed), torch.tensor([5000, 10000])  # knots: between them training lerps
    assert torch.equal(conv(x, quality), frozen(conv)(x, quality))


@given(QUALITIES)
@settings(max_examples=25)
def test_frozen_outputs_are_multiples_of_their_grid_at_every_quality(quality: int) -> None:
    conv = frozen(layer(1))
    x = activations(conv, 1)
    out = snap(conv(x, torch.tensor([quality] * 2)), UNIT)
    training = layer(1)(x, torch.tensor([quality] * 2))
    assert (out - training).abs().max() <= UNIT


def test_integers_are_within_the_bound_and_use_its_range() -> None:
    conv = layer(size=3)
    weight, bias, shift = conv.integers()
    assert (weight.dtype, bias.dtype, shift.dtype) == (torch.int16, torch.int32, torch.int8)
    scale = torch.exp2(shift.double())
    reach = (weight.double().abs() * conv.in_max).sum(1) + bias.double().abs().amax(0) * scale
    assert (reach < ACCUMULATOR_LIMIT).all() and (reach > 0.25 * ACCUMULATOR_LIMIT).all()


def test_room_is_left_for_what_is_added_to_the_result() -> None:
    conv = layer(size=3)
    plain, conv.added = conv.shifts(), 20000
    weight, bias, shift = conv.integers()
    scale = torch.exp2(shift.double())
    reach = (weight.double().abs() * conv.in_max).sum(1) + (bias.double().abs().amax(0) + 20000.5) * scale
    assert (reach < ACCUMULATOR_LIMIT).all() and (shift < plain).any()


def test_integers_refuses_a_row_that_rounding_lengthens_beyond_the_limit() -> None:
    conv = Conv(512, 1, 3, in_max=2047)
    with torch.no_grad():
        conv.weight.fill_(1.6)  # every weight becomes 2
    with pytest.raises(ValueError, match=f"limit is {ACCUMULATOR_LIMIT}"):
        conv.integers()


def test_integers_refuses_weights_so_large_that_sums_are_coarser_than_the_output() -> None:
    conv = layer(size=1e6)
    with pytest.raises(ValueError, match="finer than the grid"):
        conv.integers()


def test_freeze_refuses_integers_of_another_shape() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Conv(12, 8, 1).freeze(*layer(kernel=3, knots=1).integers())


@pytest.mark.parametrize("kernel", [1, 3])
def test_worst_inputs_are_exact_in_float32(kernel: int) -> None:
    single, double = (frozen(layer(kernel=kernel, knots=1, size=5)) for _ in range(2))
    double.double()
    x = worst_inputs(single)
    assert torch.equal(single(x).double(), double(x.double()))


@pytest.mark.parametrize("kind", ["lossy", "lossless"])
def test_every_layer_of_the_decoder_is_exact_on_its_worst_inputs(tiny: Codec, lossless_codec: Codec, kind: str) -> None:
    quality = torch.tensor([3333])
    convs = tiny.lossy.model.decoder_convs() if kind == "lossy" else dict(lossless_codec.lossless.model.convs())
    for name, conv in convs.items():
        x = worst_inputs(conv)
        double = Conv(conv.shape[1], conv.shape[0], conv.shape[2], out_unit=conv.out_unit, knots=len(conv.bias))
        double.load_state_dict(conv.state_dict())
        double.double().frozen = True
        q = quality.expand(len(x))
        assert torch.equal(conv(x, q).double(), double(x.double(), q)), name


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_arithmetic_does_not_depend_on_threads_layout_or_library(count: int, onednn: bool) -> None:
    conv = frozen(layer(size=3, knots=1))
    x = activations(conv, 5, 33, 47, 1)
    expected = frozen(layer(size=3, knots=1)).double()(x.double())
    torch.set_num_threads(count)
    with torch.backends.mkldnn.flags(enabled=onednn):
        for layout in (torch.contiguous_format, torch.channels_last):
            assert torch.equal(conv(x.contiguous(memory_format=layout)).double(), expected)


def test_networks_give_the_known_answer_without_onednn(tiny: Codec, lossless_codec: Codec) -> None:
    for weights in (tiny.lossy, lossless_codec.lossless):
        expected = weights.known_answer()
        with torch.backends.mkldnn.flags(enabled=False):
            assert weights.known_answer() == expected


def test_wide_layers_ignore_autocast() -> None:
    conv = Conv(4, 4, in_unit=STREAM_UNIT, in_max=2047, wide=True)
    x = activations(conv, 0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = conv(x)
    assert cast.dtype == torch.float32 and torch.equal(cast, conv(x))
