"""What the code knows: experiment 5, pictures made from codes and codes laid out on a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray
from torch import Tensor

from vaecodec.codec import Codec
from vaecodec.exact import exact_arithmetic, interpolate, per_channel
from vaecodec.lossy.layers import UNIT, gaussian_bits, scale_of
from vaecodec.lossy.model import Walk
from vaecodec.lossy.weights import LossyWeights

from .codes import Data
from .nets import PATCH, Bytes, GaussianVae, centre_crops, psnr, tensor_of
from .posteriors import CPU, Posterior, encoded, lossy_terms, synthesis
from .report import Finding, Numbers, Settings, listed, save, spread, verdict

MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)
STRIP_QUALITY = 75
SAMPLE_QUALITIES = (0, 25, 50)
GRID = (26, 15)
"""Columns and rows of the map: the patch that is nearest to the middle of each cell is shown."""
ACTIVE = 0.01
"""Bits of KL from which a code counts as used."""


def tensor_of_picture(pixels: Bytes) -> Tensor:
    """float32 [1, 3, H, W] of uint8 [H, W, 3]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()


def picture_of_tensor(x: Tensor) -> Bytes:
    """uint8 [H, W, 3] of [1, 3, H, W] or [3, H, W]."""
    pixels: Bytes = x.reshape(-1, *x.shape[-2:]).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return pixels


def detail(x: Tensor) -> float:
    """Mean squared difference of horizontal neighbours, grey levels squared."""
    return float((x[..., 1:] - x[..., :-1]).square().mean())


def interpolation(data: Data, settings: Settings, out: Path, weights: Path | None = None) -> Finding:
    """Two photographs mixed in the lossy model's latent space, beside the same mixture of their pixels."""
    lossy, quality = Codec("cpu", weights, engine="torch").lossy, torch.tensor([100 * STRIP_QUALITY])
    side = settings.latents_side
    crops = centre_crops(data.pictures, settings.crops, side)
    pairs = list(pairwise([tensor_of_picture(pixels) for _, pixels in crops]))
    rows, strip = [], list[list[Tensor]]()
    with exact_arithmetic(CPU):
        for pair in pairs:
            codes = [encoded(lossy, x, quality).y for x in pair]
            ends = [synthesis(lossy, y, quality) for y in codes]
            mixed, faded = [], []
            for t in MIXTURES:
                y = (1 - t) * codes[0] + t * codes[1]
                mixed.append(synthesis(lossy, y, quality))
                faded.append((1 - t) * ends[0] + t * ends[1])
            middle = len(MIXTURES) // 2
            between = (codes[0] + codes[1]) / 2
            rows.append(
                {
                    "apart": float((mixed[middle] - faded[middle]).square().mean()),
                    "ends apart": float((ends[0] - ends[1]).square().mean()),
                    "detail of latents": detail(mixed[middle]),
                    "detail of pixels": detail(faded[middle]),
                    "detail of ends": (detail(ends[0]) + detail(ends[1])) / 2,
                    "bits of latents": rate_of(lossy, between, pair[0], quality),
                    "bits of pixels": rate_of(lossy, encoded(lossy, faded[middle], quality).y, pair[0], quality),
                    "bits of ends": sum(rate_of(lossy, y, pair[0], quality) for y in codes) / 2,
                }
            )
            strip = strip or [mixed, faded]
    numbers: Numbers = {"pictures": [name for name, _ in crops], "quality": STRIP_QUALITY, "pairs": rows}
    figure, panels = plt.subplots(2, len(MIXTURES), figsize=(2.1 * len(MIXTURES), 4.4))
    for row, (name, images) in enumerate(zip(("latents mixed", "pixels mixed"), strip, strict=True)):
        for axes, image, t in zip(panels[row], images, MIXTURES, strict=True):
            axes.imshow(picture_of_tensor(image))
            axes.set(xticks=[], yticks=[])
            axes.set_title("" if row else f"{round(100 * t)} % of the second", fontsize=9)
        panels[row, 0].set_ylabel(name)
    figure.tight_layout()
    save(figure, out / "interpolation.jpg")
    return Finding(
        "interpolation",
        "Between two photographs",
        "a codec's latents are nearly linear in the pixels: half-way between two codes lies nearly the cross-fade of "
        "the two pictures, not a third photograph.",
        interpolation_caption(numbers),
        numbers,
    )


def rate_of(weights: LossyWeights, y: Tensor, like: Tensor, quality: Tensor) -> float:
    """Bits per pixel of the rounded latents y under the model."""
    z = weights.model.h_a(y, quality)
    zero = torch.zeros(())
    return float(
        lossy_terms(weights, like, Posterior(y, zero.expand_as(y), z, zero.expand_as(z)), quality, "rounded")[0]
    )


def interpolation_caption(numbers: Numbers) -> str:
    rows = numbers["pairs"]
    share = [100 * row["apart"] / row["ends apart"] for row in rows]
    similar = [psnr(row["apart"]) for row in rows]
    detail_of = {
        kind: [row[f"detail of {kind}"] / row["detail of ends"] for row in rows] for kind in ("latents", "pixels")
    }
    bits = {kind: [row[f"bits of {kind}"] for row in rows] for kind in ("latents", "pixels", "ends")}
    return (
        f"{verdict(max(share) < 5)} At quality {numbers['quality']} the decoded middle of two codes is "
        f"{spread(similar, '.1f', 'dB')} from the cross-fade of the decoded ends; their squared difference is "
        f"{spread(share, '.2g', '%')} of that between the two pictures. The squared differences of neighbouring "
        f"pixels are {spread(detail_of['latents'])} times those of the photographs in the middle of the codes and "
        f"{spread(detail_of['pixels'])} times in the cross-fade (two unrelated pictures: 0.5). Coded, the middle "
        f"takes {spread(bits['latents'])} bits per pixel, the cross-fade {spread(bits['pixels'])}, a photograph "
        f"{spread(bits['ends'])}. {len(rows)} pairs; the first is shown."
    )


def ancestral(weights: LossyWeights, quality: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """A picture [1, 3, side, side] of latents drawn from the prior, hyper-latents first, then step by step, and its
    latents' bits per pixel."""
    model, c = weights.model, weights.model.config
    z_scale = scale_of(per_channel(interpolate(weights.z_index, quality)).float())
    z_mean = per_channel(interpolate(weights.z_mean, quality)).float() * UNIT

    def draw(scale: Tensor) -> Tensor:
        # Rounding gives each integer the Gaussian's mass over its unit interval.
        return torch.round(torch.randn(scale.shape, generator=generator) * scale)

    z = draw(z_scale.expand(1, c.hyper_latent, side // 64, side // 64))
    bits = gaussian_bits(z, z_scale).sum()
    features = model.h_s(z + z_mean, quality)
    walk = Walk(model.context, features, torch.zeros(1, c.latent, side // 16, side // 16), quality)
    for mean, index in walk:
        value = draw(scale_of(index))
        bits += gaussian_bits(value, scale_of(index)).sum()
        walk.take(value + mean)
    picture = synthesis(weights, walk.y_hat, quality)
    return picture, float(bits) / side**2


def prior(
    data: Data, models: Sequence[GaussianVae], settings: Settings, out: Path, weights: Path | None = None
) -> Finding:
    """Samples of two priors: of the small Gaussian VAE for each seed, and of the lossy model's latents."""
    lossy = Codec("cpu", weights, engine="torch").lossy
    side = settings.latents_side
    crops = [tensor_of_picture(pixels) for _, pixels in centre_crops(data.pictures, settings.crops, side)]
    patches = tensor_of(data.held_out)
    small, large, images = [], [], list[tuple[str, Tensor]]()
    drawn = list[Tensor]()
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        with torch.no_grad():
            samples = model.decode(torch.randn(2000, model.codes))[:, :3].clamp(0, 255)
        drawn = drawn or [samples]
        small.append(statistics(samples))
    with exact_arithmetic(CPU):
        for percent in SAMPLE_QUALITIES:
            quality = torch.tensor([100 * percent])
            pictures = [ancestral(lossy, quality, side, torch.Generator().manual_seed(seed)) for seed in settings.seeds]
            photographs = [rate_of(lossy, encoded(lossy, x, quality).y, x, quality) for x in crops]
            details = [detail(picture) for picture, _ in pictures]
            large.append(
                {
                    "quality": percent,
                    "bits of samples": [bits for _, bits in pictures],
                    "bits of photographs": photographs,
                    "detail of samples": details,
                    "detail of photographs": [detail(x) for x in crops],
                }
            )
            images.append((f"lossy model, quality {percent}", pictures[0][0]))
    real = statistics(patches)
    numbers: Numbers = {"small": small, "photographs": real, "shipped": large}
    figure, panels = plt.subplots(1, 2 + len(images), figsize=(3 * (2 + len(images)), 3.4))
    tiles = [
        ("patches of photographs", mosaic(data.held_out[:: max(1, len(patches) // 64)][:64])),
        ("samples of the small VAE", mosaic(drawn[0][:64].round().byte().numpy())),
        *((name, picture_of_tensor(image)) for name, image in images),
    ]
    for axes, (name, image) in zip(panels, tiles, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=10)
    figure.tight_layout()
    save(figure, out / "prior.jpg")
    return Finding(
        "prior",
        "Samples from the prior",
        "samples of the small VAE have the contrast and smoothness of patches of photographs; samples of the codec's "
        "prior cost about as many bits as photographs, yet show no objects, for the prior knows what is near, not "
        "what is far.",
        prior_caption(numbers),
        numbers,
    )


def statistics(patches: Tensor) -> dict[str, float]:
    """Of patches [N, 3, 8, 8] in 0..255: variance within a patch, and the share of it between neighbours."""
    variance = float(patches.var((2, 3)).mean())
    return {"contrast": math.sqrt(variance), "roughness": detail(patches) / (2 * variance)}


def mosaic(patches: Bytes) -> Bytes:
    """uint8 [80, 80, 3] of up to 64 patches [N, 3, 8, 8], white between them."""
    canvas = np.full((8 * (PATCH + 2), 8 * (PATCH + 2), 3), 255, np.uint8)
    for i, patch in enumerate(patches):
        top, left = (PATCH + 2) * (i // 8) + 1, (PATCH + 2) * (i % 8) + 1
        canvas[top : top + PATCH, left : left + PATCH] = patch.transpose(1, 2, 0)
    return canvas


def prior_caption(numbers: Numbers) -> str:
    real, small = numbers["photographs"], numbers["small"]
    contrast = [row["contrast"] / real["contrast"] for row in small]
    rough = [row["roughness"] / real["roughness"] for row in small]
    parts, checks = [], [min(contrast) > 0.7, max(contrast) < 1.4, min(rough) > 0.5, max(rough) < 2]
    for row in numbers["shipped"]:
        samples, photographs = row["bits of samples"], row["bits of photographs"]
        checks.append(min(photographs) <= np.mean(samples) <= max(photographs))
        parts.append(
            f"at quality {row['quality']} samples cost {spread(samples)} bits per pixel and photographs "
            f"{spread(photographs)}, with neighbouring pixels {np.sqrt(np.mean(row['detail of samples'])):.1f} and "
            f"{np.sqrt(np.mean(row['detail of photographs'])):.1f} grey levels apart"
        )
    return (
        f"{verdict(*checks)} Samples of the small VAE (the likelihood's means, so without noise) have "
        f"{spread(contrast)} times the contrast of photographs' patches and {spread(rough)} times the share of it "
        f"between neighbouring pixels. Of the lossy model, {'; '.join(parts)}. Whether objects can be seen is left to "
        "the reader."
    )


def attributes(pixels: Tensor) -> dict[str, NDArray[np.float64]]:
    """What can be said of a patch without a network, [N] each."""
    x = pixels.double()
    grey = x.mean(1)
    rows, columns = grey.mean(2), grey.mean(1)
    half = PATCH // 2
    return {
        "brightness": x.mean((1, 2, 3)).numpy(),
        "log contrast": torch.log(grey.var((1, 2)) + 1).numpy(),
        "red less blue": (x[:, 0] - x[:, 2]).mean((1, 2)).numpy(),
        "light from above": (rows[:, :half].mean(1) - rows[:, half:].mean(1)).numpy(),
        "light from the left": (columns[:, :half].mean(1) - columns[:, half:].mean(1)).numpy(),
    }


def plane(model: GaussianVae, pixels: Tensor) -> tuple[NDArray[np.float64], Numbers]:
    """Posterior means [N, K] on their first two principal axes [N, 2], and what these axes are correlated with."""
    with torch.no_grad():
        mean, log_sigma = (part.double() for part in model.posterior(pixels))
    kl = (0.5 * (mean.square() + torch.exp(2 * log_sigma) - 1) - log_sigma).mean(0) / math.log(2)
    rows = (mean - mean.mean(0)).numpy()
    values, vectors = np.linalg.eigh(rows.T @ rows)
    places = rows @ vectors[:, ::-1][:, :2]
    known = attributes(pixels)
    correlations = [
        {name: float(abs(np.corrcoef(places[:, axis], values)[0, 1])) for name, values in known.items()}
        for axis in (0, 1)
    ]
    numbers = {
        "used codes": int((kl > ACTIVE).sum()),
        "variance of the axes": float(values[::-1][:2].sum() / values.sum()),
        "correlations": correlations,
    }
    return places, numbers


def patch_map(data: Data, models: Sequence[GaussianVae], out: Path) -> Finding:
    """Held-out patches where their codes lie, on the codes' first two principal axes."""
    pixels = tensor_of(data.held_out)
    results = [plane(model, pixels) for model in models]
    numbers: Numbers = {"codes": models[0].codes, "patches": len(pixels), "seeds": [entry for _, entry in results]}
    draw_map(results[0][0], data.held_out, numbers["seeds"][0], out / "map.png")
    return Finding(
        "map",
        "A map of patches",
        "the two axes along which codes vary most stand for something one can name: brightness, contrast, colour, or "
        "the direction of light.",
        map_caption(numbers),
        numbers,
    )


def draw_map(places: NDArray[np.float64], patches: Bytes, entry: Numbers, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 6))
    # Ranks, not distances, so that the crowd in the middle is spread over the plane.
    ranks = places.argsort(0).argsort(0) / len(places) * GRID
    cells = ranks.astype(int)
    off_centre = np.square(ranks - cells - 0.5).sum(1)
    order = np.lexsort((off_centre, cells[:, 1], cells[:, 0]))
    _, first = np.unique(cells[order], axis=0, return_index=True)
    for i in order[first]:
        image = OffsetImage(patches[i].transpose(1, 2, 0), zoom=2.4, interpolation="nearest")
        axes.add_artist(AnnotationBbox(image, cells[i] + 0.5, frameon=False))
    axes.set(xlim=(0, GRID[0]), ylim=(0, GRID[1]), xticks=[], yticks=[])
    for axis, label in ((0, axes.set_xlabel), (1, axes.set_ylabel)):
        name, value = strongest(entry["correlations"][axis])
        label(f"axis {axis + 1} of the codes, by rank (correlation with {name}: {value:.2f})")
    save(figure, path)


def strongest(correlations: dict[str, float]) -> tuple[str, float]:
    name = max(correlations, key=lambda key: correlations[key])
    return name, correlations[name]


def map_caption(numbers: Numbers) -> str:
    seeds, parts, checks = numbers["seeds"], [], []
    for axis in (0, 1):
        found = [strongest(entry["correlations"][axis]) for entry in seeds]
        checks.append(min(value for _, value in found) > 0.5)
        names = listed(sorted({name for name, _ in found}))
        parts.append(f"axis {axis + 1} goes with {names} (correlation {spread([value for _, value in found])})")
    used = [entry["used codes"] for entry in seeds]
    return (
        f"{verdict(*checks)} Over {numbers['patches']} held-out patches and {len(seeds)} seeds {listed(parts)}; "
        "correlations are magnitudes. The two axes hold "
        f"{spread([100 * e['variance of the axes'] for e in seeds], '.0f', '%')} of the variance of the codes, of "
        f"which {spread(used, '.0f')} of {numbers['codes']} are used (KL above {ACTIVE} bits); were the codes the "
        f"independent unit Gaussians of the prior, it would be {spread([200 / n for n in used], '.0f', '%')}. Each "
        "cell shows the patch nearest to its middle, for the first seed."
    )
