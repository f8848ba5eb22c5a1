"""Training steps: that shortcuts equal the plain functions, and what optimisers, guard and phases do."""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG, TINY_LOSSLESS_CONFIG, picture, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vaecodec.exact import QUALITY_MAX, Conv, interpolate, rounded, shares
from vaecodec.lossy.layers import STREAM_UNIT, UNIT, ExactBlock
from vaecodec.lossy.model import Context, LossyModel
from vaecodec.training import lossless, steps
from vaecodec.training.calibrate import calibrate, smallest_units
from vaecodec.training.crops import Crops
from vaecodec.training.loop import read_config
from vaecodec.training.lossy import LossyObjective, rate_distortion_loss
from vaecodec.training.objective import Phase
from vaecodec.training.soap import LEARN_EVERY, Kernel, Soap, iterated
from vaecodec.training.steps import CLIP, JUDGE_EVERY, NORM_LERP, Trainer, UnsoundError, clip

CPU = torch.device("cpu")
CONFIGS = {"lossy": TINY_CONFIG, "lossless": TINY_LOSSLESS_CONFIG}
SMALL = Phase(batch=4, crop=32)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "LINEAR_CROPS", 8)


def crops_of(count: int = 3) -> Crops:
    images = [torch.from_numpy(np.array(picture(96, 80, seed=seed))) for seed in range(count)]
    return Crops([image.permute(2, 0, 1) for image in images], CPU)


def trainer_of(kind: str = "lossy", **options: Any) -> Trainer:
    objective, config = read_config(CONFIGS[kind])
    torch.manual_seed(0)
    crops = crops_of()
    model = objective.build()
    objective.start(model, crops, 32)
    return Trainer(objective, model, crops, **{"lr": config.lr, "soap": config.soap, **options})


def values(trainer: Trainer) -> list[Tensor]:
    return [tensor.clone() for tensor in trainer.changing()]


# Shortcuts and the plain functions


def test_shares_of_knots_interpolate_as_two_neighbours_do() -> None:
    quality, knots = torch.randint(0, QUALITY_MAX + 1, (200,)), torch.randn(9, 5, dtype=torch.float64)
    position = quality * 8 / QUALITY_MAX
    left = position.floor().long().clamp(max=7)
    plain = torch.lerp(knots[left], knots[left + 1], (position - left).double()[:, None])
    parts = shares(quality, 9)
    assert torch.allclose(interpolate(knots, quality), plain, atol=1e-6)
    assert torch.allclose(parts @ knots, plain, atol=1e-6) and torch.allclose(
        interpolate(knots, parts), plain, atol=1e-6
    )
    assert torch.allclose(parts.sum(1), torch.ones(200, dtype=torch.float64)) and ((parts > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("exact", [False, True])
def test_layers_take_shares_for_a_quality(exact: bool) -> None:
    model = small_model()
    model.exact(exact)
    quality = torch.tensor([0, 3333, 10000])
    for conv in (model.g_a.fine[0].conv_3, model.h_s.conv_a, model.g_s.fine[0].conv_3):
        assert isinstance(conv, Conv)
        x = torch.randn(3, conv.shape[1], 4, 5)
        assert torch.equal(conv(x, quality), conv(x, shares(quality, len(conv.bias))))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (4, 6)])
def test_all_quarters_of_a_context_step_at_once_are_those_of_each_position(exact: bool, size: tuple[int, int]) -> None:
    model = small_model()
    model.exact(exact)
    features, y_hat = torch.rand(2, 8, *size), torch.randn(2, 16, *size)
    quality = torch.tensor([1234, 9876])
    for context in model.context:
        assert isinstance(context, Context)
        h = torch.rand(2, 8, *size)
        for whole, part in zip(context.at_once(h), context.by_parity(h), strict=True):
            torch.testing.assert_close(whole, part)
        trained = context(features, y_hat, quality)
        with torch.no_grad():
            torch.testing.assert_close(context(features, y_hat, quality), trained)


@pytest.mark.parametrize("soap", [0.0, 1e-3])
@pytest.mark.parametrize("kind", ["lossy", "lossless"])
def test_steps_are_those_of_a_plain_loop(kind: str, soap: float) -> None:
    trainer = trainer_of(kind, soap=soap)
    model, objective = copy.deepcopy(trainer.model), trainer.objective
    average = copy.deepcopy(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    phase = replace(SMALL, batch=2)
    convs = [m for m in model.modules() if isinstance(m, Conv) and m.weight.requires_grad] if soap else []
    plain = [PlainSoap(conv, soap) for conv in convs]
    matrices = {id(conv.weight) for conv in convs}
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad and id(p) not in matrices], lr=1e-3)
    usual = 0.0
    for step in range(12):
        torch.manual_seed(step)
        trainer.launch(phase, 0.7)
        torch.manual_seed(step)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective.loss(model, trainer.crops, phase)
        loss.backward()  # type: ignore[no-untyped-call]
        assert float(loss.detach()) == pytest.approx(float(trainer.loss), rel=1e-3), step
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        limit = CLIP * usual if usual else norm
        for gradient in gradients:
            gradient.mul_(min(1.0, limit / norm))
        usual = (1 - NORM_LERP) * (usual or norm) + NORM_LERP * min(norm, limit)
        adam.param_groups[0]["lr"] = 0.7 * read_config(CONFIGS[kind])[1].lr
        adam.step()
        for each in plain:
            each.step(0.7, step)
        if (step + 1) % 5 == 0:
            keep = min(trainer.ema**5, (step + 1) / (step + 51))
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.data.lerp_(parameter.data, 1 - keep)
    for mine, theirs in ((trainer.model, model), (trainer.average, average)):
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            moved = float((a - start[name]).detach().norm())
            assert float((a - b).detach().norm()) <= 0.5 * moved + 1e-6, name  # bfloat16 of some CPUs is coarse


class PlainSoap:
    """SOAP of one kernel, position by position, in float64."""

    def __init__(self, conv: Conv, rate: float) -> None:
        self.conv, self.rate, self.decay = conv, rate, 0.0 if conv.wide else 0.05
        out, inputs, k, _ = conv.shape
        self.shape = (out, inputs, k * k)
        self.first, self.second = torch.zeros(2, *self.shape, dtype=torch.float64)
        self.left, self.right = (torch.zeros(d, d, dtype=torch.float64) for d in (out, inputs))
        self.bases = [torch.eye(d, dtype=torch.float64) for d in (out, inputs)]

    def step(self, part: float, step: int) -> None:
        assert self.conv.weight.grad is not None
        gradient = self.conv.weight.grad.double().view(self.shape)
        left, right = self.bases
        positions = range(self.shape[2])
        self.first = 0.95 * self.first + 0.05 * gradient
        turned = torch.stack([left.T @ gradient[..., k] @ right for k in positions], 2)
        mean = torch.stack([left.T @ self.first[..., k] @ right for k in positions], 2)
        self.second = 0.99 * self.second + 0.01 * turned**2
        root = self.second.sqrt() + 0.02 * self.second.mean().sqrt() + 1e-12
        update = torch.stack([left @ (mean / root)[..., k] @ right.T for k in positions], 2).view(self.shape[0], -1)
        weight = self.conv.weight.data.double()
        self.conv.weight.data.copy_(weight - self.rate * part * (update + self.decay * weight))
        self.left = 0.85 * self.left + 0.15 * sum(gradient[..., k] @ gradient[..., k].T for k in positions)
        self.right = 0.85 * self.right + 0.15 * sum(gradient[..., k].T @ gradient[..., k] for k in positions)
        if (step + 1) % 5 == 0:
            for i, factor in enumerate((self.left, self.right)):
                if (size := factor.diagonal().mean()) > 0:
                    ridge = 1e-3 * torch.eye(len(factor), dtype=torch.float64)
                    q, r = torch.linalg.qr((factor / size + ridge) @ self.bases[i])
                    self.bases[i] = q * r.diagonal().sign()


# SOAP


def test_bases_turn_towards_the_eigenvectors() -> None:
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(2, 6, 6)).Q
    factor = vectors @ torch.diag(2.0 ** torch.arange(6)) @ vectors.mT
    basis = torch.eye(6).repeat(2, 1, 1)
    for _ in range(100):
        basis = iterated(factor, basis)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6).repeat(2, 1, 1), atol=1e-5, rtol=0)
    turned = basis.mT @ factor @ basis
    assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 1e-2
    assert torch.equal(iterated(torch.zeros(2, 6, 6), basis), basis)
    assert torch.equal(iterated(torch.full((2, 6, 6), math.nan), basis), basis)


def test_kernels_without_a_gradient_stay_and_large_sides_are_not_turned() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(600, 8)) for _ in range(2)]
    before = [weight.detach().clone() for weight in weights]
    soap = Soap([Kernel(weight, 8, True) for weight in weights], torch.tensor(0.1))
    (group,) = soap.param_groups
    assert set(soap.state[weights[0]]) == {"first", "second", "right", "right_basis"} and group["shape"] == [600, 8, 1]
    weights[0].grad = torch.randn(600, 8)
    for _ in range(3):
        soap.step()
        soap.learn()
        soap.turn()
    assert torch.equal(weights[1], before[1]) and not torch.equal(weights[0], before[0])


def test_rows_that_are_hardly_active_hardly_move() -> None:
    """Adam, without the floor, would move them as fast as the others."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(8, 16))
    soap = Soap([Kernel(weight, 16, False)], torch.tensor(1e-2))
    for _ in range(50):
        weight.grad = torch.randn(8, 16)
        weight.grad[0] *= 1e-6
        soap.step()
        soap.learn()
    moved = weight.detach().abs().mean(1)
    assert moved[0] < 1e-3 * moved[1:].min()


def test_factors_learn_every_fourth_step_after_the_first_hundred() -> None:
    soap = Soap([Kernel(nn.Parameter(torch.zeros(2, 2)), 2, False)], torch.tensor(0.0))
    assert all(soap.learns(step) for step in range(100))
    assert [step for step in range(100, 120) if soap.learns(step)] == list(range(100, 120, LEARN_EVERY))
    assert [step for step in range(1, 150) if soap.turns(step)] == [*range(5, 100, 5), 100, 120, 140]


# Clipping and the guard


def test_gradients_are_clipped_at_twice_their_usual_norm() -> None:
    usual, gradient = torch.zeros(()), torch.tensor([3.0, 4.0])
    assert float(clip([gradient], usual)) == 5 and gradient.tolist() == [3, 4] and float(usual) == 5
    large = torch.tensor([300.0, 400.0])
    assert float(clip([large], usual)) == 500
    assert large.tolist() == pytest.approx([6, 8]) and float(usual) == pytest.approx(5 + NORM_LERP * 5)
    small = torch.tensor([0.3, 0.4])
    clip([small], usual)
    assert small.tolist() == pytest.approx([0.3, 0.4]) and float(usual) < 5.1


def judged(trainer: Trainer, mean: float) -> str:
    trainer.total.fill_(mean * JUDGE_EVERY)
    trainer.count = JUDGE_EVERY
    return trainer.judge()


def test_the_guard_goes_back_where_the_loss_jumps_and_then_more_slowly() -> None:
    trainer = trainer_of()
    trainer.launch(SMALL, 1.0)
    assert not judged(trainer, 2.0)
    kept = [weight.clone() for weight in trainer.weights()]
    trainer.launch(SMALL, 1.0)
    assert not all(map(torch.equal, trainer.weights(), kept))
    assert "back to the weights" in judged(trainer, 2.4)
    assert all(map(torch.equal, trainer.weights(), kept)) and trainer.slowed == pytest.approx(2 / 3)
    trainer.launch(SMALL, 1.0)
    assert float(trainer.rates[0][0]) == pytest.approx(2 / 3 * trainer.rates[0][1])
    assert not judged(trainer, 2.2)  # no jump
    trainer.enter(replace(SMALL, crop=48))
    assert not judged(trainer, 9.0)  # another phase has other losses


def test_what_is_not_finite_is_noticed_and_sound_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("loss", "gradient"):
        trainer = trainer_of()
        trainer.launch(SMALL, 1.0)
        trainer.check()
        assert not judged(trainer, 1.0)
        kept = [weight.clone() for weight in trainer.weights()]
        plain = LossyObjective.loss

        def broken(self: LossyObjective, model: Any, *rest: Any, kind: str = kind, plain: Any = plain) -> Tensor:
            loss: Tensor = plain(self, model, *rest)
            # The root's slope at 0 is infinite.
            return loss * math.nan if kind == "loss" else loss + (model.log_ratio * 0).sum().sqrt()

        with monkeypatch.context() as patch:
            patch.setattr(LossyObjective, "loss", broken)
            trainer.launch(SMALL, 1.0)
            trainer.launch(SMALL, 1.0)
        with pytest.raises(UnsoundError, match="the loss is nan" if kind == "loss" else "step 2|the loss is nan"):
            trainer.check()
        assert all(map(torch.equal, trainer.weights(), kept))
        assert all(tensor.isfinite().all() for tensor in trainer.changing())


# Phases


def test_hard_phases_leave_the_encoder_and_train_the_rest() -> None:
    trainer = trainer_of()
    trainer.launch(SMALL, 1.0)
    hard = replace(SMALL, exact=True, hard=True)
    trainer.enter(hard)
    encoder = {id(p) for p in trainer.objective.frozen(trainer.model)}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(3):
        trainer.launch(hard, 1.0)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) in encoder), name
    assert trainer.model.g_s.head.exact and trainer.average.g_s.head.exact
    trainer.launch(SMALL, 1.0)
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_hard_losses_are_those_of_rounded_latents() -> None:
    model, x, quality = small_model(), torch.rand(2, 3, 64, 64), torch.tensor([2000, 8000])
    losses = [float(rate_distortion_loss(model, x, quality, 0.4, 0.25, hard=True)) for _ in range(2)]
    noisy = [float(rate_distortion_loss(model, x, quality, 0.4, 0.25)) for _ in range(2)]
    assert losses[0] == losses[1] and noisy[0] != noisy[1]
    model.log_ratio.requires_grad_(False)
    assert rounded(torch.tensor([0.5, 1.5, 2.5])).tolist() == [0, 2, 2]


def test_means_of_the_error_weigh_more_at_low_qualities() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor, quality: Tensor, **_: object) -> Any:
            return type("Pass", (), {"bits": torch.zeros(len(x)), "x_hat": x + self.error})()

        def __init__(self, error: Tensor) -> None:
            super().__init__()
            self.error = error

    x = torch.zeros(1, 3, 32, 32)
    checks = torch.ones(32, 32)
    checks[::2, ::2] = checks[1::2, 1::2] = -1

    def loss(error: Tensor, quality: int, lowpass: float) -> float:
        return float(rate_distortion_loss(Flat(error), x, torch.tensor([quality]), 1.0, 0.25, lowpass))

    assert loss(checks, 0, 3.0) == pytest.approx(1) == loss(torch.ones(32, 32), 0, 0.0)
    assert loss(torch.ones(32, 32), 0, 3.0) == pytest.approx(4)
    assert loss(torch.ones(32, 32), 5000, 3.0) == pytest.approx(1.75)
    assert loss(torch.ones(32, 32), 10000, 3.0) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["lossy", "lossless"])
def test_all_that_a_step_changes_can_be_put_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph's warm-up needs: nothing is replaced, and ``changing`` lists everything."""
    trainer = trainer_of(kind)
    trainer.launch(SMALL, 1.0)
    places, before = [t.data_ptr() for t in trainer.changing()], values(trainer)
    first = copy.deepcopy(trainer.state_dict())
    for _ in range(2):
        trainer.step(SMALL)
    assert [t.data_ptr() for t in trainer.changing()] == places
    torch._foreach_copy_(trainer.changing(), before)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)

    assert same(first, trainer.state_dict())


def test_graphs_are_of_the_step_and_put_back_what_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, a graph that calls what it has captured."""
    calls: list[tuple[Phase, bool]] = []
    trainer = trainer_of()
    step = trainer.step

    def recorded(phase: Phase, learn: bool = True) -> None:
        calls.append((phase, learn))
        step(phase, learn)

    trainer.step = recorded  # type: ignore[method-assign]
    before = values(trainer)
    phases = [SMALL, replace(SMALL, crop=48)]
    with fake_cuda(monkeypatch):
        trainer.capture(phases)
    assert all(map(torch.equal, trainer.changing(), before))
    assert set(trainer.graphs) == {(phase, learn) for phase in phases for learn in (True, False)}
    assert calls == [call for p in phases for call in ([(p, True)] * (steps.WARM_UP + 1) + [(p, False)])]


class Recorded(TorchDispatchMode):
    """Names of what is called, of what cannot be part of a CUDA graph."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for part in args
            if isinstance(part, list | tuple)
            for index in part
        )
        if name in self.WAITING or by_mask:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        ("lossy", SMALL),
        ("lossy", replace(SMALL, exact=True, hard=True)),
        ("lossless", SMALL),
        ("lossless", replace(SMALL, exact=True)),
    ],
    ids=["lossy", "lossy hard", "lossless", "lossless exact"],
)
def test_a_step_waits_for_nothing_and_makes_no_tensors_of_numbers(kind: str, phase: Phase) -> None:
    """After a first one, which fills the tables that are kept."""
    trainer = trainer_of(kind)
    trainer.step(phase)
    with Recorded() as seen:
        trainer.step(phase)
    assert seen.waiting == []


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Nothing:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def wait_stream(self, *_: object) -> None:
            pass

        def pool(self) -> None:
            pass

        def replay(self) -> None:
            pass

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "Stream", Nothing)
            patch.setattr(torch.cuda, "CUDAGraph", Nothing)
            patch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
            patch.setattr(torch.cuda, "stream", lambda *_: contextlib.nullcontext())
            patch.setattr(torch.cuda, "current_stream", Nothing)
            patch.setattr(torch.cuda, "get_rng_state", lambda *_: None)
            patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
            yield

    return patched()


# Units of 8-bit layers


def test_units_are_the_smallest_powers_of_two_that_hold_all_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16) * torch.tensor([0.01, 1.0, 20.0]).view(1, 3, 1, 1)
    units = smallest_units(torch.cat([x, torch.zeros(4, 1, 16, 16)], 1), 127)
    assert torch.equal(units.log2(), units.log2().round()) and units[3] == UNIT
    steps = x.abs().amax((0, 2, 3)) / units[:3]
    assert (steps <= 127).all() and (steps > 127 / 2).all()


def test_calibration_makes_rounding_cheaper() -> None:
    torch.manual_seed(0)
    model = small_model()
    with torch.no_grad():
        for block in model.g_s.modules():
            if isinstance(block, ExactBlock):
                block.conv_3.weight.mul_(torch.exp2(torch.randint(-6, 1, (len(block.conv_3.weight), 1))))
    x, quality = torch.rand(4, 3, 64, 64) * 255, torch.tensor([0, 3000, 6000, 10000])
    x = F.avg_pool2d(x, 5, 1, 2)

    def cost() -> float:
        with torch.no_grad():
            model.exact(False)
            plain = model(x, quality, hard=True).x_hat
            model.exact(True)
            return float((model(x, quality, hard=True).x_hat - plain).square().mean())

    before = cost()
    calibrate(model, x, quality)
    assert all(conv.exact for conv in model.decoder_convs().values())  # as they were
    assert cost() < before
    for block in model.g_s.modules():
        if isinstance(block, ExactBlock):
            assert torch.equal(block.conv_1.in_units, block.conv_3.out_units)
            assert (block.conv_1.out_units >= STREAM_UNIT).all() and (block.conv_3.in_units >= STREAM_UNIT).all()


def test_the_first_exact_phase_calibrates_model_and_average() -> None:
    trainer = trainer_of()
    assert isinstance(trainer.model, LossyModel)
    before = trainer.model.g_s.fine[0].conv_3.in_units.clone()
    trainer.enter(replace(SMALL, exact=True))
    units = trainer.model.g_s.fine[0].conv_3.in_units
    assert not torch.equal(units, before) and torch.equal(units, trainer.average.g_s.fine[0].conv_3.in_units)
    units.fill_(1.0)
    trainer.enter(replace(SMALL, exact=True, hard=True))
    assert (units == 1).all()  # once is enough
