"""Layers that compute integers in floating point, and the interpolation between stored integers."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaecodec import Codec
from vaecodec.exact import (
    ACCUMULATOR_LIMIT,
    QUALITY_MAX,
    WEIGHT_MAX,
    WEIGHT_MAX_8,
    Conv,
    ExactConv,
    interpolate,
    requantise,
    snap,
)
from vaecodec.lossy.layers import UNIT

QUALITIES = st.integers(0, QUALITY_MAX)


def blank(kernel: int = 3, knots: int = 3, bits: int = 16) -> ExactConv:
    """12 channels to 8; in 8 bits each has a unit of its own."""
    conv = ExactConv(
        12,
        8,
        kernel,
        in_unit=UNIT,
        in_max=255,
        out_unit=UNIT,
        low=-128 if bits == 8 else -4000,
        high=127 if bits == 8 else 4000,
        weight_max=WEIGHT_MAX_8 if bits == 8 else WEIGHT_MAX,
        calibrated=bits == 8,
        knots=knots,
    )
    if bits == 8:
        conv.in_units.copy_(torch.exp2(-(torch.arange(12) % 4) - 2))
        conv.out_units.copy_(torch.exp2(-(torch.arange(8) % 3) - 1))
    return conv


def layer(seed: int = 0, kernel: int = 3, knots: int = 3, size: float = 1.0, bits: int = 16) -> ExactConv:
    torch.manual_seed(seed)
    conv = blank(kernel, knots, bits)
    with torch.no_grad():
        conv.weight.mul_(size)
        conv.bias.normal_()
    conv.exact = True
    return conv


def frozen(conv: ExactConv) -> ExactConv:
    copy = blank(conv.shape[2], len(conv.bias), 8 if conv.calibrated else 16)
    copy.freeze(conv.integers())
    return copy


def activations(conv: ExactConv, seed: int, height: int = 6, width: int = 7, batch: int = 2) -> Tensor:
    limit = int(conv.in_max[0])
    torch.manual_seed(seed)
    shape = (batch, conv.shape[1], height, width)
    return torch.randint(-limit, limit + 1, shape).to(conv.weight.dtype) * conv.in_units[:, None, None]


def worst_inputs(conv: ExactConv) -> Tensor:
    """For each output channel a patch, every input at its limit and of the weight's sign; then those negated."""
    limits = (conv.in_max * conv.in_units)[:, None, None]
    worst = (conv.weight.detach().sign().view(conv.shape) * limits).to(conv.weight.dtype)
    return torch.cat([worst, -worst])


def test_snap_rounds_to_the_nearest_multiple_and_ties_to_even() -> None:
    x = torch.tensor([0.24, 0.25, 0.26, 0.75, -0.24, -0.25, -0.26, -0.75])
    assert snap(x, 0.5).tolist() == [0, 0, 0.5, 1, 0, 0, -0.5, -1]


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
@given(st.integers(0, 999), st.sampled_from([1, 3]), st.floats(1e-3, 20), st.sampled_from([8, 16]))
def test_freezing_reproduces_the_exact_training_forward_bit_for_bit(
    seed: int, kernel: int, size: float, bits: int
) -> None:
    conv = layer(seed, kernel, size=size, bits=bits)
    x, quality = activations(conv, seed), torch.tensor([5000, 10000])  # knots: between them training lerps
    assert torch.equal(conv(x, quality), frozen(conv)(x, quality))


@given(QUALITIES, st.sampled_from([8, 16]))
@settings(max_examples=25)
def test_frozen_layers_compute_what_the_format_says_at_every_quality(quality: int, bits: int) -> None:
    conv = layer(1, bits=bits)
    parts, q = conv.integers(), torch.tensor([quality] * 2)
    x = activations(conv, 1)
    steps = torch.round(x / conv.in_units[:, None, None]).double()
    weight, bias = parts["weight"].double().view(conv.shape), interpolate(parts["bias"].long(), q)[0].double()
    sums = F.conv2d(steps, weight, bias, padding=1)
    out = np.float32(sums.numpy()) * parts["scale"].numpy()[:, None, None]
    expected = np.rint(out).clip(conv.low, conv.high) * conv.out_units.numpy()[:, None, None]
    assert np.array_equal(frozen(conv)(x, q).numpy(), expected)
    # Training interpolates before it rounds to the same grid.
    assert ((conv(x, q) - torch.from_numpy(expected)).abs() <= conv.out_units[:, None, None]).all()


def test_integers_are_within_the_bound_and_use_its_range() -> None:
    parts = layer(size=3).integers()
    assert [parts[name].dtype for name in ("weight", "bias", "scale")] == [torch.int16, torch.int32, torch.float32]
    reach = (parts["weight"].double().abs() * 255).sum(1) + parts["bias"].double().abs().amax(0)
    largest = parts["weight"].abs().amax(1)
    assert (reach < ACCUMULATOR_LIMIT).all()
    assert ((largest == WEIGHT_MAX) | (reach > 0.98 * ACCUMULATOR_LIMIT)).all()


def test_eight_bits_are_stored_as_such_with_scales_that_use_them() -> None:
    conv = layer(size=3, bits=8)
    parts = conv.integers()
    assert parts["weight"].dtype == torch.int8 and (parts["weight"].abs().amax(1) == WEIGHT_MAX_8).all()
    assert parts["in_units"].tolist() == [-2, -3, -4, -5] * 3 and parts["in_units"].dtype == torch.int8
    assert parts["out_units"].tolist() == [-1, -2, -3, -1, -2, -3, -1, -2]


@given(st.integers(0, 99), st.sampled_from([8, 16]), st.floats(0.01, 1e6), st.floats(0, 1e5))
@settings(max_examples=40)
def test_no_weights_and_biases_lead_past_the_limit(seed: int, bits: int, size: float, offset: float) -> None:
    conv = layer(seed, size=size, bits=bits)
    with torch.no_grad():
        conv.bias.add_(offset)
    parts = conv.integers()
    reach = (parts["weight"].double().abs() * 255).sum(1) + parts["bias"].double().abs().amax(0)
    assert float(reach.max()) < ACCUMULATOR_LIMIT


def test_integers_refuses_what_is_not_finite() -> None:
    conv = layer()
    with torch.no_grad():
        conv.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=f"limit is {ACCUMULATOR_LIMIT}"):
        conv.integers()


def test_freeze_refuses_integers_of_another_shape() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        blank(1).freeze(layer(kernel=3, knots=1).integers())


@pytest.mark.parametrize("limit", [2**15 - 1, 2**30])
def test_kernels_that_saturate_give_another_answer(tiny: Codec, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Where products of 8 bits are added in pairs of 16 bits (x86 without VNNI), the self-test must notice."""
    weights, expected = tiny.lossy, tiny.lossy.known_answer()
    plain = ExactConv.convolved

    def saturating(conv: ExactConv, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not conv.calibrated:
            return plain(conv, x, weight, bias)
        columns = F.unfold(x / conv.in_units[:, None, None], conv.shape[2], padding=conv.shape[2] // 2)
        integers = weight * conv.by_column(conv.in_units)
        unsigned = conv.low < 0  # conv_1 reads 0..255; conv_3 reads -128..127, kept as u8 with a zero point of 128
        columns = columns + (0 if unsigned else 128)
        pairs = integers[:, None] * columns.transpose(1, 2)[:, :, None].movedim(2, 1)
        pairs = pairs.unflatten(3, (-1, 2)).sum(4).clamp(-limit - 1, limit)
        sums = pairs.sum(3) - (0 if unsigned else 128 * integers.sum(1)[:, None])
        return sums.view(len(x), -1, *x.shape[2:]) + bias[:, :, None, None]

    monkeypatch.setattr(ExactConv, "convolved", saturating)
    assert (weights.known_answer() == expected) == (limit > 2**15)


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
        double = copy.deepcopy(conv).double()
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
    conv = Conv(4, 4, wide=True)
    x = torch.randn(2, 4, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        cast = conv(x)
    assert cast.dtype == torch.float32 and torch.equal(cast, conv(x))
