"""The evidence lower bound as a code length: experiment 4, on small VAEs and the shipped lossless model.

-ELBO(x) = E_q[-log p(x | z)] + KL(q(z | x) || p(z)), which bits-back coding reaches (Townsend et al. 2019,
arXiv:1901.04866).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.bitsback import negative_elbo
from bitstream import AnsStack, unpack
from vaecodec.codec import Codec
from vaecodec.exact import exact_arithmetic
from vaecodec.kinds import load, packaged
from vaecodec.lossless.tile import Network
from vaecodec.lossless.weights import LosslessWeights

from .codes import Data
from .nets import SAMPLES, Bytes, GaussianVae, Trained, centre_crops, tensor_of
from .report import EVALUATIONS, Finding, Numbers, Settings, band, save, spread, verdict

CPU = torch.device("cpu")
ASCENT_RATE = 0.1
RECORDED = 20
"""Steps of inference between two records."""


def training(trained: Sequence[Trained], out: Path) -> Finding:
    """Both parts of the bound while a small Gaussian VAE is trained; one run for each seed."""
    numbers: Numbers = {"runs": [run.history for run in trained]}
    steps = [row["step"] for row in trained[0].history]
    figure, axes = plt.subplots(figsize=(7, 3.8))
    total = [[row["reconstruction"] + row["kl"] for row in run.history] for run in trained]
    reconstruction = [[row["reconstruction"] for row in run.history] for run in trained]
    kl = [[row["kl"] for row in run.history] for run in trained]
    band(axes, steps, total, color="black", label="-ELBO")
    band(axes, steps, reconstruction, color="tab:blue", label="reconstruction, E_q[-log p(x | z)]")
    band(axes, steps, kl, color="tab:orange", label="KL(q(z | x) || p(z))")
    axes.set(xlabel="training steps", ylabel="bits per sub-pixel, held-out patches", ylim=(0, 9))
    axes.legend()
    save(figure, out / "training.png")
    return Finding(
        "training",
        "The bound while it is trained",
        "-ELBO falls; the KL term rises from its start, for the code buys more in reconstruction than it costs.",
        training_caption(numbers),
        numbers,
    )


def training_caption(numbers: Numbers) -> str:
    first, last = ([run[end] for run in numbers["runs"]] for end in (0, -1))
    totals = [[row["reconstruction"] + row["kl"] for row in rows] for rows in (first, last)]
    kl = [[row["kl"] for row in rows] for rows in (first, last)]
    lows = [min(row["kl"] for row in run) for run in numbers["runs"]]
    peaks = [max(row["kl"] for row in run) for run in numbers["runs"]]
    falls = all(after < before for before, after in zip(*totals, strict=True))
    rises = all(after > before for before, after in zip(*kl, strict=True))
    if peaks == kl[0]:
        turn = f"it is highest at the start, where the code is still PCA's, and lowest at {spread(lows)}."
    elif peaks == kl[1]:
        turn = f"it is highest at the end and lowest at {spread(lows)}."
    else:
        turn = f"between {spread(lows)} and {spread(peaks)} on the way."
    return (
        f"{verdict(falls, rises)} In bits per sub-pixel, -ELBO goes from {spread(totals[0])} to {spread(totals[1])}, "
        f"the KL term from {spread(kl[0])} to {spread(kl[1])}, {turn} Without a code, eight bits would do for any "
        "sub-pixel."
    )


def network_bits(weights: LosslessWeights, pixels: Bytes) -> int:
    """Bits of the ANS words in which the networks and bits-back hold uint8 [h, w, 3]; the way back is checked."""
    picture, stack = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.int32), AnsStack()
    height, width, _ = pixels.shape
    with exact_arithmetic(CPU):
        Network(weights, height, width, 3, False).push(stack, picture)
        size = 8 * len(stack.to_bytes())
        if not np.array_equal(Network(weights, height, width, 3, False).pop(stack, None), picture):
            raise RuntimeError("the pixels do not survive the coder")
    return size


def lossless(data: Data, settings: Settings, out: Path, weights: Path | None = None) -> Finding:
    """Real lossless sizes of crops beside -ELBO, with the shipped model or other exported weights."""
    path = packaged("lossless") if weights is None else weights
    codec, reference = Codec("cpu", path, engine="torch"), load(path, CPU)
    assert isinstance(reference, LosslessWeights)
    reference.to(CPU, torch.float64)
    rows = list[Numbers]()
    for name, pixels in centre_crops(data.pictures, settings.crops, settings.lossless_side):
        bounds = []
        for seed in settings.seeds:
            torch.manual_seed(seed)
            with exact_arithmetic(CPU):
                bounds.append(sum(negative_elbo(reference, pixels).values()) / pixels.size)
        file = codec.compress(Image.fromarray(pixels), lossless=True)
        rows.append(
            {
                "picture": name,
                "bounds": bounds,
                "words": network_bits(codec.lossless, pixels) / pixels.size,
                "file": 8 * len(file) / pixels.size,
                "method": unpack(file).tiles[0].method,
            }
        )
    numbers: Numbers = {"model": codec.lossless.identity.hex(), "rows": rows}
    figure, axes = plt.subplots(figsize=(7, 3.6))
    places = np.arange(len(rows))
    for shift, (key, label) in enumerate(
        (("bound", "-ELBO"), ("words", "bits-back, real words"), ("file", "file as shipped"))
    ):
        heights = [fmean(row["bounds"]) if key == "bound" else row[key] for row in rows]
        bars = axes.bar(places + 0.27 * (shift - 1), heights, 0.25, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=6.5)
    axes.set_xticks(places, [f"crop {i + 1}" for i in range(len(rows))])
    axes.set(ylabel="bits per sub-pixel", ylim=(0, 1.3 * max(max(row["file"], row["words"]) for row in rows)))
    axes.legend(fontsize=8, ncols=3)
    save(figure, out / "lossless.png")
    return Finding(
        "lossless",
        "Lossless files reach the bound",
        "bits-back coding makes files as long as -ELBO, but for the latents' grid and the coder's start.",
        lossless_caption(numbers),
        numbers,
    )


def lossless_caption(numbers: Numbers) -> str:
    rows = numbers["rows"]
    excess = [100 * (row["words"] / fmean(row["bounds"]) - 1) for row in rows]
    noise = [100 * (max(row["bounds"]) / min(row["bounds"]) - 1) for row in rows]
    plain = sum(row["method"] != 0 for row in rows)
    text = (
        f"{verdict(max(map(abs, excess)) < 1)} Words coded by bits-back differ from -ELBO by "
        f"{spread(excess, '+.3f', '%')}; -ELBO itself varies by up to {max(noise):.3f} % with the sample of the "
        "latents. Headers and checksums make up the rest of a file."
    )
    if plain:
        text += (
            f" {plain} of the {len(rows)} crops are shipped without the networks, for a plain predictor is shorter "
            "there than the bound: it bounds this model's files, not all files."
        )
    return text


def infer(seed_and_model: tuple[int, GaussianVae], pixels: Tensor, settings: Settings) -> Numbers:
    """-ELBO in bits per sub-pixel over gradient steps on mean and log sigma of each patch, from two starts."""
    seed, model = seed_and_model
    record: Numbers = {"step": []}
    with torch.no_grad():
        amortised = model.posterior(pixels)
    prior = (torch.zeros_like(amortised[0]), torch.zeros_like(amortised[1]))
    for name, start in (("network", amortised), ("prior", prior)):
        torch.manual_seed(seed)
        mean, log_sigma = (part.clone().requires_grad_() for part in start)
        optim, values, steps = torch.optim.Adam([mean, log_sigma], lr=ASCENT_RATE), list[float](), list[int]()
        for step in range(settings.inference_steps + 1):
            if step % min(RECORDED, settings.inference_steps) == 0:
                with torch.no_grad():
                    terms = [sum(model.terms(pixels, mean, log_sigma)) for _ in range(EVALUATIONS)]
                values.append(float(torch.stack([torch.as_tensor(term) for term in terms]).mean()) / SAMPLES)
                steps.append(step)
            for group in optim.param_groups:
                group["lr"] = ASCENT_RATE * min(1, 2 * (1 - step / (settings.inference_steps + 1)))
            given, kl = model.terms(pixels, mean, log_sigma)
            optim.zero_grad(set_to_none=True)
            (given + kl).sum().backward()  # type: ignore[no-untyped-call]
            optim.step()
        record |= {"step": steps, name: values}
        if name == "network":
            with torch.no_grad():
                bound = model.importance_bound(pixels, mean.detach(), log_sigma.detach(), settings.samples)
            record["importance bound"] = bound
    return record


def inference(data: Data, models: Sequence[GaussianVae], settings: Settings, out: Path) -> Finding:
    """Amortised inference against gradient ascent for each patch (Cremer et al. 2018, arXiv:1801.03558)."""
    apart = max(1, len(data.held_out) // settings.inference_patches)
    pixels = tensor_of(data.held_out[::apart][: settings.inference_patches])
    runs = [infer((seed, model), pixels, settings) for seed, model in enumerate(models)]
    numbers: Numbers = {"patches": len(pixels), "samples": settings.samples, "runs": runs}
    figure, axes = plt.subplots(figsize=(7, 3.8))
    for name, colour in (("network", "tab:blue"), ("prior", "tab:orange")):
        above = [[value - run["importance bound"] for value in run[name]] for run in runs]
        band(axes, runs[0]["step"], above, color=colour, label=f"started from the {name}")
    alone = fmean(run["network"][0] - run["importance bound"] for run in runs)
    axes.axhline(alone, color="grey", linestyle=":", label="network alone")
    axes.set(yscale="log", xlabel="gradient steps on the patch's posterior")
    axes.set_ylabel("bits per sub-pixel above the\nimportance-weighted bound")
    axes.legend(fontsize=8)
    save(figure, out / "inference.png")
    return Finding(
        "inference",
        "Amortised and per-picture inference",
        "gradient ascent on one patch's posterior lowers -ELBO below what the inference network gives in one pass; "
        "started from the prior it ends at the same place.",
        inference_caption(numbers),
        numbers,
    )


def inference_caption(numbers: Numbers) -> str:
    runs = numbers["runs"]
    gap = [run["network"][0] - run["network"][-1] for run in runs]
    share = [100 * g / run["network"][0] for g, run in zip(gap, runs, strict=True)]
    apart = [run["prior"][-1] - run["network"][-1] for run in runs]
    left = [run["network"][-1] - run["importance bound"] for run in runs]
    behind = [
        next((step for step, value in zip(run["step"], run["prior"], strict=True) if value < run["network"][0]), None)
        for run in runs
    ]
    passed = [step for step in behind if step is not None]
    passes = (
        f"is as good as the network after {max(passed)} steps"
        if len(passed) == len(runs)
        else (f"is as good as the network in {len(passed)} of {len(runs)} runs within {runs[0]['step'][-1]} steps")
    )
    return (
        f"{verdict(min(gap) > 0, max(apart) < 0.2 * min(gap))} The network gives "
        f"{spread([r['network'][0] for r in runs], '.3f')} bits per sub-pixel over {numbers['patches']} held-out "
        f"patches; gradient steps save {spread(gap, '.3f')}, that is {spread(share, '.1f', '%')} (the amortisation "
        f"gap). Started from the prior it {passes} and ends {spread(apart, '+.3f')} from where the network's start "
        f"ends. The importance-weighted bound with {numbers['samples']} samples lies another {spread(left, '.3f')} "
        "lower: at least so much is the price of a factorised Gaussian."
    )
