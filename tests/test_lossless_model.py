"""The lossless networks, their densities and the tables made of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LOSSLESS, few_batches, picture, small_lossless_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitstream import Tables
from vaecodec import weights as weights_module
from vaecodec.kinds import load
from vaecodec.lossless import layers as lossless
from vaecodec.lossless.heads import local_mean
from vaecodec.lossless.layers import (
    LATENT_SCALES,
    LATENT_UNIT,
    LEVEL_UNIT,
    SCALES,
    SHAPES,
    index_of,
    latent_index_of,
    latent_scale_of,
    pixel_bits,
    scale_of,
)
from vaecodec.lossless.model import Latent, LosslessModel
from vaecodec.lossless.weights import LosslessWeights, save_lossless
from vaecodec.training.crops import Crops
from vaecodec.training.lossless import bits, fit_pixel_tables, latent_tables, start_from_linear
from vaecodec.weights import WeightsError

CPU = torch.device("cpu")
LATENTS = latent_tables(True)


def batch(width: int = 48, height: int = 32) -> Tensor:
    images = [torch.from_numpy(np.array(picture(width, height, seed=seed))) for seed in range(2)]
    return torch.stack(images).permute(0, 3, 1, 2).float()


def elbo(model: LosslessModel, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([part.sum() for part in bits(model(x)).values()]).sum() / x.numel()


# Densities


@pytest.mark.parametrize("shape", [0.0, 0.3, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("index", [0.0, 17.5, 30.0])
def test_probabilities_of_integers_sum_to_one(index: float, shape: float) -> None:
    for mean in (0.0, 0.375):
        values = torch.arange(-2000, 2001, dtype=torch.float64) - mean
        total = torch.exp2(-pixel_bits(values, torch.tensor(index), torch.tensor(shape))).sum()
        assert float(total) == pytest.approx(1, abs=1e-4)


def test_scales_and_their_inverses_span_their_ranges() -> None:
    index, latent = torch.arange(SCALES).double(), torch.arange(LATENT_SCALES).double()
    assert scale_of(index[[0, -1]]).tolist() == pytest.approx([lossless.SCALE_MIN, lossless.SCALE_MAX])
    ends = [lossless.LATENT_SCALE_MIN, lossless.LATENT_SCALE_MAX]
    assert latent_scale_of(latent[[0, -1]]).tolist() == pytest.approx(ends)
    torch.testing.assert_close(index_of(scale_of(index)), index)
    torch.testing.assert_close(latent_index_of(latent_scale_of(latent)), latent)


def test_reciprocals_of_scales_lie_far_from_where_their_rounding_turns() -> None:
    """So that exp may differ in its last bits from machine to machine."""
    steps = 256 * 0.5 / scale_of(torch.arange(SCALES).double())
    part = (steps + 0.5) % 1
    assert float((torch.minimum(part, 1 - part) / steps).min()) > 1e-5


def test_divergence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    means, indices = torch.randn(2, 1, 4, 3, 5) * 3, torch.rand(2, 1, 4, 3, 5) * (LATENT_SCALES - 1)
    q, p = (
        torch.distributions.Normal(mean, latent_scale_of(index) * LATENT_UNIT)
        for mean, index in zip(means, indices, strict=True)
    )
    expected = torch.distributions.kl_divergence(q, p) / np.log(2)
    kl = Latent(means[0], indices[0], means[1], indices[1]).kl()
    torch.testing.assert_close(kl, expected, rtol=1e-3, atol=1e-3)


def test_tables_without_data_are_the_density_and_data_shape_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_lossless_model()
    model.exact(True)
    crops = Crops([*batch(64, 64).byte()], CPU)
    few_batches(monkeypatch, 0)
    plain = fit_pixel_tables(model, crops, 64)
    assert len(plain.counts) == SCALES * SHAPES * 8 and plain.escape
    for t in range(0, len(plain.counts), 53):
        values = torch.from_numpy(plain.lows[t] + np.arange(plain.sizes[t] - 1)) - t % 8 / 8
        index, shape = torch.tensor(float(t // 8 // SHAPES)), torch.tensor(float(t // 8 % SHAPES))
        density, counts = torch.exp2(-pixel_bits(values, index, shape)).numpy(), plain.counts[t][:-1] / 2**24
        assert np.abs(density - counts).max() < 1e-4, t
    few_batches(monkeypatch, 1)
    assert fit_pixel_tables(model, crops, 64).digest_bytes() != plain.digest_bytes()


# Networks


def test_the_local_mean_is_on_its_grid_and_that_of_flat_places_is_theirs() -> None:
    a = torch.randint(0, 256, (1, 3, 5, 7)).float()
    centre = local_mean(a)
    assert torch.equal(centre, (centre / LEVEL_UNIT).round() * LEVEL_UNIT)
    assert (centre >= a.amin()).all() and (centre <= a.amax()).all()
    assert torch.equal(local_mean(torch.full((1, 3, 1, 1), 77.0)), torch.full((1, 3, 1, 1), 77.0))


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_reach_every_parameter(exact: bool) -> None:
    model = small_lossless_model()
    model.exact(exact)
    elbo(model, batch()).backward()  # type: ignore[no-untyped-call]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in trained)


def test_every_sample_is_counted_once() -> None:
    levels, coarsest, latents = small_lossless_model()(batch())
    phases = [coarsest, *(phase for level in levels for phase in level)]
    assert sum(phase.residual.numel() for phase in phases) == batch().numel()
    assert [latent.q_mean.shape for latent in latents] == [(2, 2, 2, 3), (2, 3, 4, 6)]


def test_the_linear_start_saves_bits() -> None:
    torch.manual_seed(0)
    model, x = LosslessModel(LOSSLESS), batch(96, 64)
    before = elbo(model, x)
    crops = Crops([*x.byte()], CPU)
    start_from_linear(model, crops.batch(4, 64), crops.batch(4, 16, 4))
    assert elbo(model, x) < before


# Weights


def saved(folder: Path, change: Callable[[LosslessModel], object] = lambda _: None, tables: Tables = LATENTS) -> Path:
    model, path = small_lossless_model(), folder / "small.safetensors"
    model.exact(True)
    with torch.no_grad():
        change(model)
    save_lossless(path, model, LATENTS, tables, LATENTS)
    return path


def test_loaded_networks_are_those_that_were_trained(tmp_path: Path) -> None:
    model = small_lossless_model().eval()
    model.exact(True)
    weights = load(saved(tmp_path), CPU)
    assert isinstance(weights, LosslessWeights) and weights.prior_tables.digest_bytes() == LATENTS.digest_bytes()
    assert weights.known_answer() == LosslessWeights(model, LATENTS, LATENTS, LATENTS, {}, b"").known_answer()


def test_identity_names_all_networks_and_tables(tmp_path: Path) -> None:
    def identity(*arguments: object) -> bytes:
        return load(saved(tmp_path, *arguments), CPU).identity  # type: ignore[arg-type]

    base = identity()
    others = {
        identity(lambda m: m.vae.top_mean.add_(1)),
        identity(lambda m: m.levels[0].heads["B"].base.weight.mul_(1.5)),
        identity(lambda m: m.vae.posterior[0].conv.bias.add_(1)),
        identity(lambda m: None, latent_tables(False)),
    }
    assert len(base) == 16 and identity() == base and len(others | {base}) == 5


@pytest.mark.parametrize(
    ("part", "message"),
    [("levels.1.heads.C.base.weight", "self-test"), ("top_mean", "checksum"), ("top_mean", "identity")],
)
def test_changed_weights_are_noticed(tmp_path: Path, part: str, message: str) -> None:
    path = saved(tmp_path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[f"decoder.{part}"].view(-1)[::3] += 1
    if message != "checksum":
        if message == "self-test":
            del metadata["identity"]
        metadata["digest"] = weights_module.digest_of(tensors, metadata["config"]).hex()
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match=message):
        load(path, CPU)
