"""Lossy files beside the bounds of two posteriors: experiment 4, on the shipped lossy model.

A lossy decoder lacks the picture and cannot give bits back. What rounding sends is a uniform posterior as wide as the
quantiser's step (Balle et al. 2018, arXiv:1802.01436).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vaecodec.codec import Codec
from vaecodec.exact import interpolate, per_channel
from vaecodec.kinds import load, packaged
from vaecodec.lossy.layers import GAIN_BITS, UNIT, gaussian_bits, lagrangian, pick, scale_of, stream as to_stream
from vaecodec.lossy.model import Walk
from vaecodec.lossy.weights import LossyWeights

from .codes import Data
from .nets import Bytes, centre_crops
from .report import EVALUATIONS, Finding, Numbers, Settings, listed, parallel, save, spread, verdict

CPU = torch.device("cpu")
ASCENT_RATE = 0.03


class Posterior(NamedTuple):
    """Centres and logarithms of standard deviations of y [1, M, h, w] and z [1, C, h/4, w/4], in quantiser steps."""

    y: Tensor
    log_y: Tensor
    z: Tensor
    log_z: Tensor


def lossy_terms(
    weights: LossyWeights, x: Tensor, posterior: Posterior, quality: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Bits per pixel and squared error of one sample; x [1, 3, H, W] in 0..255, sides multiples of 64.

    kind: "uniform", one step wide, under the prior convolved with a step, so that its rate is -log2 p(y + u);
    "gaussian", closed-form KL(q || p) under the Gaussian with the same mean and the convolved prior's variance,
    scale^2 + 1/12; "rounded", no noise: what a file holds. The decoder, the context networks among it, sees the sample.
    """
    model = weights.model

    def sample(centre: Tensor, log_sigma: Tensor) -> Tensor:
        if kind == "gaussian":
            return centre + torch.randn_like(centre) * log_sigma.exp()
        return centre + torch.rand_like(centre) - 0.5

    def bits(value: Tensor, centre: Tensor, log_sigma: Tensor, index: Tensor) -> Tensor:
        scale = scale_of(index)
        if kind != "gaussian":
            return gaussian_bits(value, scale).sum()
        variance = scale.square() + 1 / 12
        kl = 0.5 * variance.log() - log_sigma + (torch.exp(2 * log_sigma) + centre.square()) / (2 * variance) - 0.5
        return kl.sum() / math.log(2)

    z_mean = per_channel(interpolate(weights.z_mean, quality)).to(x.dtype) * UNIT
    z_index = per_channel(interpolate(weights.z_index, quality)).to(x.dtype)
    z = torch.round(posterior.z - z_mean) + z_mean if kind == "rounded" else sample(posterior.z, posterior.log_z)
    total = bits(z - z_mean, posterior.z - z_mean, posterior.log_z, z_index)
    features = model.h_s(z, quality)
    y = posterior.y if kind == "rounded" else sample(posterior.y, posterior.log_y)
    walk = Walk(model.context, features, torch.zeros_like(y), quality)
    for mean, index in walk:
        value = torch.round(walk.left(y)) if kind == "rounded" else walk.left(y)
        total = total + bits(value, walk.left(posterior.y), pick(posterior.log_y, walk.quarters), index)
        walk.take(value + mean)
    return total / (x.shape[2] * x.shape[3]), (synthesis(weights, walk.y_hat, quality) - x).square().mean()


def synthesis(weights: LossyWeights, y: Tensor, quality: Tensor) -> Tensor:
    """The picture [1, 3, H, W] of latents y [1, M, H/16, W/16] in quantiser steps, which need not be integers."""
    inverse = per_channel(interpolate(weights.inverse, quality)).to(y.dtype) * 2**-GAIN_BITS
    x_hat: Tensor = weights.model.g_s(to_stream(y * inverse, True), quality)
    return x_hat.clamp(0, 255)


def encoded(weights: LossyWeights, x: Tensor, quality: Tensor) -> Posterior:
    """What the inference networks say, with the variance of a uniform posterior."""
    y = weights.quantiser_units(weights.model.g_a(x, quality), quality)
    z = weights.model.h_a(y, quality)
    deviation = -0.5 * math.log(12)
    return Posterior(y, torch.full_like(y, deviation), z, torch.full_like(z, deviation))


def optimise(weights: LossyWeights, x: Tensor, start: Posterior, quality: Tensor, kind: str, steps: int) -> Posterior:
    """Gradient descent on rate + lambda * squared error of one picture, over its posterior alone."""
    parts = Posterior(*(part.clone().requires_grad_(kind == "gaussian" or i % 2 == 0) for i, part in enumerate(start)))
    optim = torch.optim.Adam([part for part in parts if part.requires_grad], lr=ASCENT_RATE)
    weight = float(lagrangian(quality, weights.model.config.lambda_max))
    for step in range(steps):
        for group in optim.param_groups:
            group["lr"] = ASCENT_RATE * min(1, 2 * (1 - step / steps))
        rate, mse = lossy_terms(weights, x, parts, quality, kind)
        optim.zero_grad(set_to_none=True)
        (rate + weight * mse).backward()  # type: ignore[no-untyped-call]
        optim.step()
    return Posterior(*(part.detach() for part in parts))


BARS = {
    "file": "file",
    "rounded": "rounded latents,\nmodel's densities",
    "uniform": "uniform posterior",
    "uniform, optimised": "uniform, optimised\nfor the picture",
    "gaussian": "Gaussian of\nequal variance",
    "gaussian, optimised": "Gaussian, optimised\nfor the picture",
}


def lossy_crop(argument: tuple[Bytes, int], path: Path, steps: int) -> dict[str, list[float]]:
    """For each of ``BARS`` bits per pixel and squared error of one crop at one quality."""
    pixels, percent = argument
    codec = Codec("cpu", path, engine="torch")
    file = codec.compress(Image.fromarray(pixels), percent)
    decoded = np.asarray(codec.decompress(file), np.float64)
    area = pixels.shape[0] * pixels.shape[1]
    rows = {"file": [8 * len(file) / area, float(np.square(decoded - pixels).mean())]}
    weights, quality = load(path, CPU), torch.tensor([100 * percent])  # not the codec's: those know no gradient
    assert isinstance(weights, LossyWeights)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    torch.manual_seed(0)
    with torch.no_grad():
        start = encoded(weights, x, quality)
    points = {"rounded": start, "uniform": start, "gaussian": start}
    for kind in ("uniform", "gaussian"):
        points[f"{kind}, optimised"] = optimise(weights, x, start, quality, kind, steps)
    with torch.no_grad():
        for name, posterior in points.items():
            terms = [lossy_terms(weights, x, posterior, quality, name.split(",")[0]) for _ in range(EVALUATIONS)]
            rows[name] = [fmean(float(term[i]) for term in terms) for i in range(2)]
    return rows


def lossy(data: Data, settings: Settings, out: Path, weights: Path | None = None) -> Finding:
    """Lossy sizes of crops beside the bounds of a uniform and of a Gaussian posterior, all at equal lambda."""
    path = packaged("lossy") if weights is None else weights
    crops = centre_crops(data.pictures, settings.crops, settings.lossy_side)
    arguments = [(pixels, quality) for quality in settings.qualities for _, pixels in crops]
    results = parallel(partial(lossy_crop, path=path, steps=settings.lossy_steps), arguments, settings.processes)
    loaded = Codec("cpu", path, engine="torch").lossy
    numbers: Numbers = {"model": loaded.identity.hex(), "pictures": [name for name, _ in crops]}
    for i, quality in enumerate(settings.qualities):
        numbers[str(quality)] = {
            "lambda": float(lagrangian(torch.tensor([100 * quality]), loaded.model.config.lambda_max)),
            "crops": results[i * len(crops) : (i + 1) * len(crops)],
        }
    figure, panels = plt.subplots(
        1, len(settings.qualities), figsize=(3 * len(settings.qualities) + 1, 3.4), sharex=True, sharey=True
    )
    longest = 0.0
    for axes, quality in zip(np.atleast_1d(panels), settings.qualities, strict=True):
        entry = numbers[str(quality)]
        whole = fmean(cost(row["file"], entry["lambda"]) for row in entry["crops"])
        for i, name in enumerate(BARS):
            rate = 100 * fmean(row[name][0] for row in entry["crops"]) / whole
            distortion = 100 * entry["lambda"] * fmean(row[name][1] for row in entry["crops"]) / whole
            longest = max(longest, rate + distortion)
            axes.barh(i, rate, color="tab:blue", label=None if i else "rate")
            axes.barh(i, distortion, left=rate, color="tab:orange", label=None if i else "lambda x squared error")
            axes.text(rate + distortion + 2, i, f"{rate + distortion:.0f}", va="center", fontsize=8)
        axes.axvline(100, color="black", linewidth=0.6, linestyle=":")
        axes.set_yticks(range(len(BARS)), list(BARS.values()), fontsize=8)
        axes.set_title(f"quality {quality}: file {whole:.2f} bits per pixel", fontsize=9)
        axes.set_xlabel("% of the file's cost")
    np.atleast_1d(panels)[0].set_xlim(0, 1.15 * longest)
    np.atleast_1d(panels)[0].invert_yaxis()
    handles, labels = np.atleast_1d(panels)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 1.06), ncols=2, fontsize=8)
    figure.tight_layout()
    save(figure, out / "lossy.png")
    return Finding(
        "lossy",
        "Lossy files and two bounds",
        "files are as long as the bound of the uniform posterior; a Gaussian posterior, which bits-back could use if "
        "the decoder knew the picture, is cheaper by at most the 0.254 bits a latent by which a Gaussian's entropy "
        "exceeds that of a uniform density of equal variance.",
        lossy_caption(numbers, settings),
        numbers,
    )


def cost(terms: Sequence[float], weight: float) -> float:
    """Rate + lambda * squared error, in bits per pixel."""
    return terms[0] + weight * terms[1]


def lossy_caption(numbers: Numbers, settings: Settings) -> str:
    comparisons = {
        ("file", "uniform"): "A file against the bound of the uniform posterior",
        ("uniform, optimised", "uniform"): "Optimising the uniform posterior's centres for the picture",
        ("gaussian, optimised", "uniform, optimised"): "The Gaussian against the uniform posterior, both optimised",
        ("gaussian, optimised", "file"): "The optimised Gaussian against the file",
    }
    parts = []
    for (name, other), words in comparisons.items():
        values = [f"{spread(differences(numbers[str(q)], name, other), '+.1f', '%')}" for q in settings.qualities]
        parts.append(f"{words}: {listed(values)}.")
    tight = [abs(fmean(differences(numbers[str(q)], "file", "uniform"))) < 3 for q in settings.qualities]
    cheaper = [
        max(differences(numbers[str(q)], "gaussian, optimised", "uniform, optimised")) < 0 for q in settings.qualities
    ]
    below = [q for q in settings.qualities if fmean(differences(numbers[str(q)], "file", "uniform")) < -3]
    text = (
        f"{verdict(*tight, *cheaper)} Compared is the cost rate + lambda x squared error in bits per pixel at each "
        f"quality's lambda, for qualities {listed([str(q) for q in settings.qualities])} in this order. "
        f"{' '.join(parts)}"
    )
    if below:
        errors = {
            name: fmean(row[name][1] for row in numbers[str(below[0])]["crops"]) for name in ("uniform", "rounded")
        }
        text += (
            f" At {'qualities' if len(below) > 1 else 'quality'} {listed([str(q) for q in below])} files are cheaper "
            "than the bound: it holds for latents with noise, and rounded ones, which the decoder was trained on, "
            f"are no sample of that. At quality {below[0]} the noise costs a squared error of {errors['uniform']:.0f} "
            f"where rounding has {errors['rounded']:.0f}, for it also falls on latents that would round to their mean."
        )
    return (
        f"{text} The Gaussian's rate is its KL from a Gaussian prior with the variance of the uniform one's prior; no "
        "file has it, for the decoder would have to know the picture to give the bits back."
    )


def differences(entry: Numbers, name: str, other: str) -> list[float]:
    """By how many per cent one cost is above another, for each crop."""
    weight = entry["lambda"]
    return [100 * (cost(row[name], weight) / cost(row[other], weight) - 1) for row in entry["crops"]]
