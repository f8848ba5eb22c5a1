"""What autoencoders learn when only squared error counts, and what they lack as codecs: experiments 1 to 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from torch import Tensor

from benchmarks.bd_rate import bd_rate
from bitstream import AnsStack, Tables, normalise

from .nets import PIXELS, SAMPLES, Bytes, Pca, Plain, RateDistortion, principal_components, psnr, tensor_of
from .report import Finding, Numbers, Settings, band, listed, parallel, save, spread, verdict

LINEAR_SIZES = (8, 16)
LINEAR_RATE, MOMENTUM = 0.1, 0.9
HALVINGS = np.arange(-2, 6.5, 0.5)
"""Quantiser steps of the sweep: the codes' mean standard deviation, halved this often."""

Codes = NDArray[np.float64]


@dataclass(frozen=True)
class Data:
    """Patches uint8 [N, 3, 8, 8] and pictures' files; held out: nothing was trained or fitted on them."""

    patches: Bytes
    held_out: Bytes
    pictures: list[Path]
    pca: Pca


def descend(seed: int, pca: Pca, codes: int, steps: int) -> Numbers:
    """Gradient descent with momentum on tr((D E - I) C (D E - I)'), C the patches' covariance, largest variance 1.

    That is the squared error over all patches, so nothing is random but the start. Gives what is left of the error
    beside PCA's and the principal angles in degrees between the columns of D [192, K] and the first K components, at
    steps that grow geometrically.
    """
    rng, top = np.random.default_rng(seed), pca.values[0]
    covariance = (pca.vectors * pca.values) @ pca.vectors.T / top
    encoder, decoder = rng.normal(0, 0.05, (codes, SAMPLES)), rng.normal(0, 0.05, (SAMPLES, codes))
    speed_e, speed_d = np.zeros_like(encoder), np.zeros_like(decoder)
    optimum = pca.values[codes:].sum() / top
    marks = set(np.unique(np.geomspace(1, steps, 60).round().astype(int)).tolist())
    history: Numbers = {"step": [], "excess": [], "largest": [], "mean": []}
    for step in range(1, steps + 1):
        error = decoder @ encoder
        error.flat[:: SAMPLES + 1] -= 1
        weighted = error @ covariance
        if step in marks:
            angles = np.degrees(subspace_angles(decoder, pca.vectors[:, :codes]))
            history["step"].append(step)
            history["excess"].append(float((weighted * error).sum() / optimum - 1))
            history["largest"].append(float(angles.max()))
            history["mean"].append(float(angles.mean()))
        speed_e = MOMENTUM * speed_e - 2 * LINEAR_RATE * decoder.T @ weighted
        speed_d = MOMENTUM * speed_d - 2 * LINEAR_RATE * weighted @ encoder.T
        encoder, decoder = encoder + speed_e, decoder + speed_d
    history["correlation"] = off_diagonal(encoder @ covariance @ encoder.T)
    return history


def off_diagonal(covariance: NDArray[np.float64]) -> float:
    """Mean magnitude of the correlations between different codes."""
    deviation = np.sqrt(np.diag(covariance))
    correlation = np.abs(covariance / np.outer(deviation, deviation))
    size = len(covariance)
    return float((correlation.sum() - size) / (size * (size - 1)))


def linear(data: Data, settings: Settings, out: Path) -> Finding:
    """A linear autoencoder finds the subspace of PCA (Baldi & Hornik 1989), not its axes."""
    numbers: Numbers = {}
    for codes in LINEAR_SIZES:
        run = partial(descend, pca=data.pca, codes=codes, steps=settings.linear_steps)
        ratio = float(data.pca.values[codes - 1] / data.pca.values[codes])
        numbers[str(codes)] = {"eigenvalue ratio": ratio, "runs": parallel(run, settings.seeds, settings.processes)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for codes, colour in zip(LINEAR_SIZES, ("tab:blue", "tab:orange"), strict=True):
        runs = numbers[str(codes)]["runs"]
        steps = runs[0]["step"]
        band(left, steps, [r["largest"] for r in runs], color=colour, label=f"K = {codes}, largest angle")
        band(left, steps, [r["mean"] for r in runs], color=colour, linestyle="--", label=f"K = {codes}, mean angle")
        band(right, steps, [[100 * e for e in r["excess"]] for r in runs], color=colour, label=f"K = {codes}")
    left.set(
        xscale="log", yscale="log", xlabel="steps of gradient descent", ylabel="angle to the PCA subspace, degrees"
    )
    right.set(xscale="log", yscale="log", xlabel="steps of gradient descent", ylabel="error above PCA's, %")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.tight_layout()
    save(figure, out / "linear.png")
    return Finding(
        "linear",
        "A linear autoencoder finds the PCA subspace",
        "gradient descent on squared error ends in the span of the first K principal components, with PCA's error "
        "and never below it; the codes themselves are some mixture of the components.",
        linear_caption(numbers),
        numbers,
    )


def linear_caption(numbers: Numbers) -> str:
    parts, checks = [], []
    for codes, entry in numbers.items():
        runs = entry["runs"]
        angles = [run["largest"][-1] for run in runs]
        excess = [100 * run["excess"][-1] for run in runs]
        checks += [max(angles) < 1, max(excess) < 1, min(excess) > -1e-6]
        parts.append(
            f"K = {codes}: after {runs[0]['step'][-1]} steps the largest principal angle is {spread(angles, '.2g')} "
            f"degrees, the mean one {spread([run['mean'][-1] for run in runs], '.2g')}, the error "
            f"{spread(excess, '.2g')} % above PCA's; the codes' correlations average "
            f"{spread([r['correlation'] for r in runs])} in magnitude (PCA: 0); component {codes} has "
            f"{entry['eigenvalue ratio']:.2f} times the variance of the next."
        )
    best = min(min(run["excess"]) for entry in numbers.values() for run in entry["runs"])
    bound = "No run is ever below PCA's error." if best > -1e-9 else f"A run is {-best:.1g} below PCA's error."
    ratios = {codes: entry["eigenvalue ratio"] for codes, entry in numbers.items()}
    angle = {codes: fmean(run["largest"][-1] for run in entry["runs"]) for codes, entry in numbers.items()}
    near = min(ratios, key=lambda codes: ratios[codes])
    slow = (
        f" The subspace converges last where the next component is nearly as large (K = {near}): there turning it "
        "changes the error least."
        if angle[near] == max(angle.values())
        else f" The nearly equal components at K = {near} do not make it the slowest here."
    )
    return f"{verdict(*checks)} {' '.join(parts)} {bound}{slow}"


def dimension(data: Data, models: Mapping[int, Sequence[Plain]], at_pca: Sequence[Plain], out: Path) -> Finding:
    """Deep against linear at equal code dimension. models: for each K, one for each seed; at_pca: those of one K that
    were started at PCA instead of in random directions."""
    x = tensor_of(data.held_out)
    rows = data.held_out.reshape(len(x), -1) - data.pca.mean

    def quality(net: Plain) -> float:
        return psnr(float((net.decode(net.encode(x)) - x).square().mean()))

    numbers: Numbers = {"codes": list(models), "pca": [], "deep": []}
    for codes, nets in models.items():
        basis = data.pca.vectors[:, :codes]
        numbers["pca"].append(psnr(float(np.square(rows - rows @ basis @ basis.T).mean())))
        numbers["deep"].append([quality(net) for net in nets])
    gains = [[deep - linear for deep in row] for row, linear in zip(numbers["deep"], numbers["pca"], strict=True)]
    started = at_pca[0].codes
    numbers |= {"gain": gains, "started at PCA": started}
    numbers["gain of those"] = [quality(net) - numbers["pca"][list(models).index(started)] for net in at_pca]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot(list(models), numbers["pca"], color="grey", marker="o", label="PCA")
    seeds = list(zip(*numbers["deep"], strict=True))
    band(left, list(models), seeds, color="tab:blue", marker="o", label="deep autoencoder")
    band(right, list(models), list(zip(*gains, strict=True)), color="tab:blue", marker="o", label="random start")
    right.plot([started] * len(at_pca), numbers["gain of those"], "x", color="tab:red", label="started at PCA")
    right.axhline(0, color="grey", linewidth=0.8)
    left.set(ylabel="PSNR of held-out patches, dB")
    right.set(ylabel="gain of depth over PCA, dB")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(models), [str(codes) for codes in models])
        axes.set_xlabel(f"numbers in the code of a patch (of {SAMPLES})")
    figure.tight_layout()
    save(figure, out / "dimension.png")
    return Finding(
        "dimension",
        "A deep autoencoder against PCA",
        "at the same code dimension a deep autoencoder has less error on held-out patches, because patches do not "
        "fill a linear subspace.",
        dimension_caption(numbers),
        numbers,
    )


def dimension_caption(numbers: Numbers) -> str:
    gains = dict(zip(numbers["codes"], numbers["gain"], strict=True))
    better = [codes for codes, row in gains.items() if min(row) > 0]
    worse = [codes for codes, row in gains.items() if max(row) < 0]
    parts = [f"{spread(row, '+.2f', 'dB')} at K = {codes}" for codes, row in gains.items()]
    started, others = numbers["gain of those"], gains[numbers["started at PCA"]]
    # The start at PCA was added after a trial, so it tests no prediction.
    checks = [codes in better for codes in gains]
    text = f"{verdict(*checks)} Gain over PCA from a random start: {listed(parts)}."
    if better:
        text += f" All seeds gain at K = {listed([str(codes) for codes in better])}."
    if worse:
        text += (
            f" All seeds lose at K = {listed([str(codes) for codes in worse])}: PCA is the optimum of all linear "
            "codes, and so short a training does not come as near to it as that."
        )
    text += " Started at PCA (added after a trial run, so nothing was predicted),"
    text += f" K = {numbers['started at PCA']} gains {spread(started, '+.3f', 'dB')}"
    if max(started) < min(others):
        text += (
            ", less than from a random start: PCA's error is orthogonal to its components, so that the gradient of "
            "the encoder is zero there, which may be a saddle that training does not leave."
            if max(map(abs, started)) < 0.05
            else ", less than from a random start."
        )
    else:
        text += "."
    return text


def tables_for(codes: NDArray[np.int64]) -> Tables:
    """A static table for each code from integers [N, K] seen in training, with a little weight on what was not."""
    lows, counts = [], []
    for column in codes.T:
        low, high = int(column.min()) - 1, int(column.max()) + 1
        histogram = np.bincount(column - low, minlength=high - low + 1) + 0.05
        lows.append(low)
        counts.append(normalise(np.append(histogram, 1.0)))
    return Tables(np.array(lows, np.int64), counts, escape=True)


def real_bits(fitted_on: NDArray[np.int64], codes: NDArray[np.int64]) -> float:
    """Bits for each pixel of the ANS words that hold the codes [N, K]; the way back is checked."""
    tables, ids = tables_for(fitted_on), np.tile(np.arange(codes.shape[1]), len(codes))
    stack, values = AnsStack(), codes.ravel().astype(np.int32)
    stack.push(values, tables, ids)
    size = len(stack.to_bytes())
    if not np.array_equal(stack.pop(tables, ids), values):
        raise RuntimeError("the codes do not survive the coder")
    return 8 * size / (len(codes) * PIXELS)


def quantised(fitted_on: Codes, codes: Codes, step: NDArray[np.float64], decode: Any, pixels: Tensor) -> list[float]:
    """Bits per pixel and PSNR of codes [N, K] rounded to multiples of step [K]."""
    symbols = np.round(codes / step).astype(np.int64)
    rate = real_bits(np.round(fitted_on / step).astype(np.int64), symbols)
    decoded = decode(torch.from_numpy(symbols * step).float())
    return [rate, psnr(float((decoded.clamp(0, 255) - pixels).square().mean()))]


def sensitivity(net: Plain, codes: Codes) -> NDArray[np.float64]:
    """Root mean square change of a patch's reconstruction [192] for a unit of each code [K]."""
    z, slopes = torch.from_numpy(codes[:500]).float(), []
    for k, deviation in enumerate(codes.std(0)):
        shift = torch.zeros(codes.shape[1])
        shift[k] = 0.1 * float(deviation)
        difference = (net.decode(z + shift) - net.decode(z - shift)) / (0.2 * float(deviation))
        slopes.append(float(difference.square().sum((1, 2, 3)).mean().sqrt()))
    return np.array(slopes)


def envelope(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Those points (rate, PSNR) that no other one beats in both."""
    best: list[list[float]] = []
    for point in sorted(map(list, points), key=lambda point: (point[0], -point[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def sweep(fitted_on: Codes, codes: Codes, unit: NDArray[np.float64], decode: Any, pixels: Tensor) -> list[list[float]]:
    return [quantised(fitted_on, codes, unit * 2.0**-halving, decode, pixels) for halving in HALVINGS]


def not_a_codec(
    data: Data,
    plain: Mapping[int, Sequence[Plain]],
    trained: Mapping[float, Sequence[RateDistortion]],
    out: Path,
) -> Finding:
    """Rate and distortion of a plain autoencoder that is quantised afterwards, of the same network as a VAE, of PCA.

    plain: for each K, one for each seed; trained: for each lambda, one for each seed, all with the largest K.
    """
    x, fit = tensor_of(data.held_out), tensor_of(data.patches[:: max(1, len(data.patches) // 40000)])
    largest = max(plain)
    naive, fitted, correlations, vae = [], [], [], list[list[list[float]]]()
    for seed in range(len(plain[largest])):
        best: list[list[float]] = []
        for codes, nets in plain.items():
            net = nets[seed]
            z_fit, z = (net.encode(part).double().numpy() for part in (fit, x))
            spread_of = np.sqrt(z_fit.var(0).mean())
            if codes == largest:
                naive.append(envelope(sweep(z_fit, z, np.full(codes, spread_of), net.decode, x)))
                correlations.append(off_diagonal(np.cov(z.T)))
            slopes = sensitivity(net, z_fit)
            unit = spread_of * slopes.mean() / slopes
            best += sweep(z_fit, z, unit, net.decode, x)
        fitted.append(envelope(best))
        vae.append([])
        for nets_of in trained.values():
            model = nets_of[seed]
            z_fit, z = (model.encode(part).double().numpy() for part in (fit, x))
            vae[-1].append(quantised(z_fit, z, np.ones(largest), model.decode, x))
    vectors, mean = data.pca.vectors, data.pca.mean
    rows_fit, rows = ((part.flatten(1).double().numpy() - mean) @ vectors for part in (fit, x))

    def pca_decode(code: Tensor) -> Tensor:
        size = code.shape[1]
        return torch.from_numpy(code.double().numpy() @ vectors[:, :size].T + mean).view(-1, *x.shape[1:]).float()

    unit = np.full(SAMPLES, np.sqrt(data.pca.values[:largest].mean()))
    pca = envelope(sweep(rows_fit, rows, unit, pca_decode, x))
    few = envelope(sweep(rows_fit[:, :largest], rows[:, :largest], unit[:largest], pca_decode, x))
    numbers: Numbers = {
        "codes": largest,
        "lambdas": list(trained),
        "one step": naive,
        "steps fitted to the decoder": fitted,
        "vae": vae,
        "pca, all components": pca,
        "pca, as many components": few,
        "correlation of plain codes": correlations,
    }
    opponents = {
        "one step": naive,
        "fitted": fitted,
        "pca": [pca] * len(vae),
        "few": [few] * len(vae),
    }
    for name, curves in opponents.items():
        numbers[f"vae against {name}"] = [percent(a, b) for a, b in zip(curves, vae, strict=True)]
    plot_codec(numbers, out / "codec.png")
    return Finding(
        "codec",
        "A plain autoencoder is not a codec",
        "the same network needs fewer bits at equal PSNR when it is trained on bits and error together than when it "
        "is trained on error alone and quantised afterwards; PCA, whose codes are uncorrelated, lies between the two.",
        codec_caption(numbers),
        numbers,
    )


def percent(anchor: Sequence[Sequence[float]], test: Sequence[Sequence[float]]) -> float | None:
    """BD-rate of ``test`` over all PSNRs that both reach."""
    a, b = ([(rate, quality) for rate, quality in envelope(curve)] for curve in (anchor, test))
    result = bd_rate(a, b) if min(len(a), len(b)) > 1 else None
    return None if result is None else result.percent


def plot_codec(numbers: Numbers, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    k = numbers["codes"]
    styles = (
        ("vae", "tab:blue", "o", "-", f"VAE, K = {k}: one network for each lambda"),
        ("steps fitted to the decoder", "tab:orange", None, "-", "plain autoencoder, best K and steps"),
        ("one step", "tab:red", None, "--", f"plain autoencoder, K = {k}, one step for all codes"),
    )
    for name, colour, marker, line, label in styles:
        for i, curve in enumerate(numbers[name]):
            x, y = zip(*curve, strict=True)
            text = None if i else label
            axes.plot(x, y, color=colour, marker=marker, linestyle=line, linewidth=1.2, markersize=4, label=text)
    axes.plot(*zip(*numbers["pca, all components"], strict=True), color="black", label="PCA, all components")
    few = numbers["pca, as many components"]
    axes.plot(*zip(*few, strict=True), color="grey", linestyle=":", label=f"PCA, {k} components")
    points = [point for curve in numbers["vae"] for point in curve]
    rates, qualities = zip(*points, strict=True)
    axes.set_xlim(0, 1.6 * max(rates))
    axes.set_ylim(min(qualities) - 2.5, max(qualities) + 2.5)
    axes.set(xlabel="bits per pixel, real ANS words of held-out patches", ylabel="PSNR, dB")
    axes.legend(fontsize=8, loc="lower right")
    save(figure, path)


def codec_caption(numbers: Numbers) -> str:
    words = {
        "one step": f"the plain autoencoder with one quantiser step for all {numbers['codes']} codes",
        "fitted": "plain autoencoders given every help (best K, steps fitted to the decoder's sensitivity)",
        "few": f"PCA with {numbers['codes']} components",
        "pca": "PCA with all components",
    }
    parts, means = [], {}
    for name, opponent in words.items():
        values = [value for value in numbers[f"vae against {name}"] if value is not None]
        if values:
            means[name] = fmean(values)
            parts.append(f"{spread(values, '+.1f', '%')} bytes against {opponent}")
        else:
            parts.append(f"no PSNR in common with {opponent}")
    checks = [means.get("one step", 1) < 0, means.get("fitted", 1) < 0, means.get("pca", 1) < 0]
    between = means.get("pca", 1) < 0 and means.get("fitted", 1) < means.get("pca", 1)
    order = (
        "PCA lies between the two."
        if between
        else "PCA is better than the VAE here: so short a training does not pay for its network."
        if means.get("pca", 1) >= 0
        else "PCA does not lie between the two: the plain autoencoder with every help is nearer to the VAE."
    )
    return (
        f"{verdict(*checks, between)} The VAE at equal PSNR (BD-rate over all that both curves reach, one value for "
        f"each seed): {listed(parts)}. {order} The correlations between the plain autoencoder's codes average "
        f"{spread(numbers['correlation of plain codes'])} in magnitude: static tables pay for each code as if it "
        "stood alone. Every rate is the size of real ANS words under tables fitted on training patches."
    )


def make_data(patches: Bytes, held_out: Bytes, pictures: list[Path]) -> Data:
    return Data(patches, held_out, pictures, principal_components(patches))
