"""The smallest version of each experiment, on synthetic pictures."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, picture
from PIL import Image

pytest.importorskip("scipy")  # of the "bench" extra
pytest.importorskip("matplotlib")

from benchmarks import theory
from benchmarks.theory import Settings, bound, codes, latents, nets, posteriors, report
from vaecodec import Codec

SMALL = Settings(
    seeds=(0, 1),
    linear_steps=400,
    steps=60,
    batch=32,
    code_sizes=(2, 8),
    lambdas=(0.002, 0.02),
    crops=2,
    lossless_side=64,
    lossy_side=64,
    latents_side=64,
    qualities=(50,),
    lossy_steps=3,
    inference_patches=8,
    inference_steps=40,
    samples=16,
    processes=1,
)
"""It takes seconds; the results mean nothing but what holds for any network."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> codes.Data:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(4):
        picture(96, 80, seed=seed).save(folder / f"{seed}.png")
    files = sorted(folder.iterdir())
    return codes.make_data(nets.cut_patches(files[2:], 300, 0), nets.cut_patches(files[:2], 60, 1), files[:2])


def job(kind: str, data: codes.Data, seed: int = 0, weight: float = 0.0, size: int = 8) -> nets.Job:
    return nets.Job(kind, size, seed, SMALL.steps, SMALL.batch, data.patches, data.held_out, weight)


def trained(kind: str, data: codes.Data, weight: float = 0.0, size: int = 8) -> list[Any]:
    jobs = [job(kind, data, seed, weight, size) for seed in SMALL.seeds]
    return [nets.restore(j, nets.train(j)) for j in jobs]


@pytest.fixture(scope="module")
def gaussian(data: codes.Data) -> list[nets.GaussianVae]:
    return trained("gaussian", data)


def check(finding: report.Finding, out: Path) -> None:
    """Drawn, worded, and fit for JSON."""
    assert next(out.glob(f"{finding.name}.[jp][pn]g")).stat().st_size > 1000
    assert finding.caption.startswith(("As expected.", "In part as expected.", "Contrary to what was expected."))
    json.dumps(finding.numbers, allow_nan=False)


def test_patches_are_cut_from_pictures(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    picture(7, 9).save(tmp_path / "too small.png")
    patches = nets.cut_patches(sorted(tmp_path.iterdir()), 3, 0)
    assert patches.dtype == np.uint8 and patches.shape == (3, 3, 8, 8)
    assert (patches == np.asarray(picture(8, 8)).transpose(2, 0, 1)).all()


def test_linear_autoencoder_approaches_pca_from_above(data: codes.Data, tmp_path: Path) -> None:
    finding = codes.linear(data, SMALL, tmp_path)
    check(finding, tmp_path)
    for entry in finding.numbers.values():
        for run in entry["runs"]:
            assert min(run["excess"]) > -1e-9  # Eckart and Young: no linear code of K numbers has less error
            assert run["excess"][-1] < run["excess"][0] and run["mean"][-1] < run["mean"][0]


def test_captions_follow_the_numbers(data: codes.Data, tmp_path: Path) -> None:
    numbers = codes.linear(data, replace(SMALL, linear_steps=20), tmp_path).numbers
    assert codes.linear_caption(numbers).startswith(("In part", "Contrary"))
    for entry in numbers.values():
        for run in entry["runs"]:
            run["largest"][-1] = run["excess"][-1] = 0.001
    assert codes.linear_caption(numbers).startswith("As expected.")
    started = {"started at PCA": 4, "gain of those": [0.3, 0.2]}
    good = {"codes": [2, 4], "gain": [[0.5, 0.4], [0.1, 0.2]], **started}
    assert codes.dimension_caption(good).startswith("As expected.")
    bad = {"codes": [2, 4], "gain": [[-0.5, -0.4], [-0.1, -0.2]], **started, "gain of those": [-0.3]}
    assert "All seeds lose at K = 2 and 4" in codes.dimension_caption(bad)
    assert codes.dimension_caption(bad).startswith("Contrary")


def test_numbers_in_words() -> None:
    assert report.spread([1, 2, 3], ".1f", "dB") == "2.0 dB (1.0 to 3.0)"
    assert report.spread([1, 1], ".0f") == "1"
    assert report.listed(["a", "b", "c"]) == "a, b and c" and report.listed(["a"]) == "a"
    assert report.verdict(True, False).startswith("In part")


def test_pca_is_the_best_linear_code(data: codes.Data) -> None:
    rows = data.patches.reshape(len(data.patches), -1) - data.pca.mean
    basis = data.pca.vectors[:, :5]
    assert np.square(rows - rows @ basis @ basis.T).sum(1).mean() == pytest.approx(data.pca.values[5:].sum())


def test_dimension(data: codes.Data, tmp_path: Path) -> None:
    at_pca = nets.Plain(8)
    at_pca.start_at(data.pca)
    plain = {size: trained("plain", data, size=size) for size in SMALL.code_sizes}
    finding = codes.dimension(data, plain, [at_pca.requires_grad_(False)], tmp_path)
    check(finding, tmp_path)
    assert finding.numbers["pca"][1] > finding.numbers["pca"][0]
    assert finding.numbers["gain of those"] == pytest.approx([0], abs=1e-4)  # before training it is PCA


def test_not_a_codec(data: codes.Data, tmp_path: Path) -> None:
    plain = {size: trained("plain", data, size=size) for size in SMALL.code_sizes}
    finding = codes.not_a_codec(data, plain, {w: trained("rate", data, w) for w in SMALL.lambdas}, tmp_path)
    check(finding, tmp_path)
    for curve in finding.numbers["steps fitted to the decoder"]:
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(curve))


def test_real_bits_are_near_the_entropy() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([rng.binomial(8, 0.5, 20000), rng.integers(-2, 2, 20000)], 1)
    shares = [np.bincount(column - column.min()) / len(column) for column in values.T]
    entropy = sum(-(share * np.log2(share)).sum() for share in shares)
    assert codes.real_bits(values, values) * nets.PIXELS == pytest.approx(entropy, rel=0.002)


def test_noisy_bits_are_a_density(data: codes.Data) -> None:
    model = nets.RateDistortion(2, 0.01)
    grid = torch.arange(-400, 401).float()[:, None].expand(-1, 2)
    assert torch.exp2(-model.bits(grid + 0.3)).sum(0).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_likelihood_sums_to_one(gaussian: list[nets.GaussianVae]) -> None:
    code = torch.randn(1, 8)
    pixels = torch.full((256, 3, 8, 8), 100.0)
    pixels[:, 1, 3, 4] = torch.arange(256)
    bits = gaussian[0].given(pixels, code.expand(256, -1)).double()
    mean, log_scale = (part[0, 1, 3, 4].double() for part in gaussian[0].decode(code).chunk(2, 1))
    zero = torch.sigmoid((0.5 - mean) / torch.exp((log_scale + 2).clamp(-2, 5)))
    assert float((torch.exp2(bits[0] - bits) * zero).sum()) == pytest.approx(1, abs=1e-3)


def test_bounds_are_ordered(data: codes.Data, gaussian: list[nets.GaussianVae], tmp_path: Path) -> None:
    finding = bound.inference(data, gaussian, SMALL, tmp_path)
    check(finding, tmp_path)
    for run in finding.numbers["runs"]:
        assert run["network"][-1] < run["network"][0] and run["prior"][-1] < run["prior"][0]
        # By Jensen's inequality; the tolerance is for the samples.
        assert run["importance bound"] < run["network"][-1] + 0.05


def test_training(data: codes.Data, tmp_path: Path) -> None:
    runs = [nets.train(job("gaussian", data, seed)) for seed in SMALL.seeds]
    finding = bound.training(runs, tmp_path)
    check(finding, tmp_path)
    for history in finding.numbers["runs"]:
        assert history[-1]["step"] == SMALL.steps and min(row["kl"] for row in history) > 0
        assert sum(map(history[-1].get, ("reconstruction", "kl"))) < sum(map(history[0].get, ("reconstruction", "kl")))


def test_training_repeats_itself(data: codes.Data) -> None:
    first, second = (nets.train(replace(job("plain", data), steps=3)) for _ in range(2))
    assert all((first.state[name] == second.state[name]).all() for name in first.state)


def test_lossless_words_are_near_the_bound(data: codes.Data, lossless_weights: Path, tmp_path: Path) -> None:
    finding = bound.lossless(data, SMALL, tmp_path, lossless_weights)
    check(finding, tmp_path)
    for row in finding.numbers["rows"]:
        assert 0.97 < row["words"] / np.mean(row["bounds"]) < 1.05


def test_lossy(data: codes.Data, tmp_path: Path) -> None:
    finding = posteriors.lossy(data, SMALL, tmp_path, TINY)
    check(finding, tmp_path)
    (entry,) = (finding.numbers[str(q)] for q in SMALL.qualities)
    assert all(set(row) == set(posteriors.BARS) for row in entry["crops"])


def test_rounded_latents_are_what_a_file_holds(data: codes.Data) -> None:
    codec, quality = Codec("cpu", TINY, engine="torch"), torch.tensor([5000])
    ((_, pixels),) = nets.centre_crops(data.pictures, 1, 64)
    x = latents.tensor_of_picture(pixels)
    with torch.no_grad():
        start = posteriors.encoded(codec.lossy, x, quality)
        _, mse = posteriors.lossy_terms(codec.lossy, x, start, quality, "rounded")
    decoded = np.asarray(codec.decompress(codec.compress(Image.fromarray(pixels), 50)), float)
    assert float(mse) == pytest.approx(np.square(decoded - pixels).mean(), rel=0.02, abs=0.2)


def test_pictures_from_codes(data: codes.Data, gaussian: list[nets.GaussianVae], tmp_path: Path) -> None:
    finding = latents.interpolation(data, SMALL, tmp_path, TINY)
    check(finding, tmp_path)
    assert len(finding.numbers["pairs"]) == 1
    check(latents.prior(data, gaussian, SMALL, tmp_path, TINY), tmp_path)
    check(latents.patch_map(data, gaussian, tmp_path), tmp_path)


def test_the_whole_run(data: codes.Data, tmp_path: Path) -> None:
    settings = replace(SMALL, seeds=(0,), per_training_picture=300, per_picture=60, linear_steps=20, steps=5)
    findings = theory.run(data.pictures, data.pictures, tmp_path, settings)
    text = (tmp_path / "theory.md").read_text("utf-8")
    record = json.loads((tmp_path / "theory.json").read_text("utf-8"))
    assert record["settings"]["steps"] == 5 and record["training patches"] == 600
    assert [entry["name"] for entry in record["experiments"]] == [finding.name for finding in findings]
    for finding in findings:
        check(finding, tmp_path)
        assert f"({finding.name}." in text and finding.caption in text and finding.hypothesis in text
