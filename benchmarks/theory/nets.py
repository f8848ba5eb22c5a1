"""Patches, principal components, and the one small autoencoder that all experiments share.

    x [3, 8, 8] --- two 3x3 convolutions --- linear --(+)--> code [K] --- linear --- two 3x3 convolutions --(+)--> x_hat
        |                                              |        |                                           |
        +------------------ linear --------------------+        +----------------- linear -----------------+

Without its convolutions it is the linear autoencoder, whose best solution is PCA. It is trained
in three ways: ``Plain`` on squared error alone, ``RateDistortion`` on bits + lambda * squared error with a
uniform posterior (Balle et al. 2018, arXiv:1802.01436), ``GaussianVae`` on the negative ELBO of 8-bit pixels (Kingma &
Welling 2014, arXiv:1312.6114).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

PATCH = 8
PIXELS, SAMPLES = PATCH**2, 3 * PATCH**2
PIXEL_SCALE = 64
"""Grey levels in one unit of the networks."""
WIDTH = 32
COMPONENTS = 3
"""Of each channel's prior: a mixture of logistic distributions."""
LEARNING_RATE = 3e-3
RECORDS = 40
"""How many times a training is measured."""

Bytes = NDArray[np.uint8]


def cut_patches(files: Sequence[Path], per_picture: int, seed: int) -> Bytes:
    """uint8 [N, 3, 8, 8] from random places of each picture; pictures that are too small are left out."""
    rng, patches = np.random.default_rng(seed), []
    for file in files:
        with Image.open(file) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        height, width, _ = pixels.shape
        if min(height, width) < PATCH:
            continue
        rows = rng.integers(0, height - PATCH + 1, per_picture)[:, None, None] + np.arange(PATCH)[:, None]
        columns = rng.integers(0, width - PATCH + 1, per_picture)[:, None, None] + np.arange(PATCH)
        patches.append(pixels[rows, columns].transpose(0, 3, 1, 2))
    return np.concatenate(patches)


def centre_crops(files: Sequence[Path], count: int, side: int) -> list[tuple[str, Bytes]]:
    """Name and centre uint8 [side, side, 3] of ``count`` pictures, spread over all that are large enough."""
    crops = []
    for file in files:
        with Image.open(file) as opened:
            if min(opened.size) < side:
                continue
            left, top = ((length - side) // 2 for length in opened.size)
            crops.append((file.stem, np.array(opened.convert("RGB").crop((left, top, left + side, top + side)))))
    if not crops:
        raise ValueError(f"no picture has {side} pixels on both sides")
    return [crops[i * len(crops) // count] for i in range(min(count, len(crops)))]


def psnr(mse: float) -> float:
    """dB, of a mean squared error in grey levels."""
    return 10 * math.log10(255**2 / mse)


class Pca(NamedTuple):
    """Principal components of patches in grey levels: mean [192], orthonormal columns [192, 192] and variances [192],
    largest first; float64."""

    mean: NDArray[np.float64]
    vectors: NDArray[np.float64]
    values: NDArray[np.float64]


def principal_components(patches: Bytes) -> Pca:
    rows = patches.reshape(len(patches), -1).astype(np.float64)
    mean = rows.mean(0)
    values, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return Pca(mean, vectors[:, ::-1].copy(), values[::-1].copy())


def interval(upper: Tensor, lower: Tensor) -> Tensor:
    """log(sigmoid(upper) - sigmoid(lower)), nats; exact in the tails, where the difference itself would cancel."""
    return F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))


class Autoencoder(nn.Module):
    """``heads`` numbers for each code and each sub-pixel: one, or mean and logarithm of a scale."""

    def __init__(self, codes: int, heads: int = 1) -> None:
        super().__init__()
        self.codes, self.heads = codes, heads
        inner = WIDTH * PIXELS // 4
        self.conv_a = nn.Conv2d(12, WIDTH, 3, padding=1)
        self.conv_b = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.shrink = nn.Linear(inner, heads * codes)
        self.linear_in = nn.Linear(SAMPLES, heads * codes)
        self.grow = nn.Linear(codes, inner)
        self.conv_c = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv_d = nn.Conv2d(WIDTH, 12 * heads, 3, padding=1)
        self.linear_out = nn.Linear(codes, heads * SAMPLES)
        with torch.no_grad():
            # It starts as a projection on random directions.
            for layer in (self.shrink, self.conv_d, self.linear_in, self.linear_out):
                for parameter in layer.parameters():
                    parameter.zero_()
            nn.init.orthogonal_(self.linear_in.weight[:codes])
            self.linear_out.weight[:SAMPLES].copy_(self.linear_in.weight[:codes].T)

    def start_at(self, pca: Pca) -> None:
        """Start as PCA instead: what the convolutions add is still zero."""
        project = torch.from_numpy(pca.vectors[:, : self.codes].T.copy())
        mean = (torch.from_numpy(pca.mean) - 128) / PIXEL_SCALE
        with torch.no_grad():
            self.linear_in.weight[: self.codes].copy_(project)
            self.linear_in.bias[: self.codes].copy_(-project @ mean)
            self.linear_out.weight[:SAMPLES].copy_(project.T)
            self.linear_out.bias[:SAMPLES].copy_(mean)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 8, 8] in 0..255 to [B, heads * K]."""
        x = (pixels - 128) / PIXEL_SCALE
        h = F.gelu(self.conv_a(F.pixel_unshuffle(x, 2)))
        h = self.shrink(F.gelu(self.conv_b(h)).flatten(1))
        code: Tensor = h + self.linear_in(x.flatten(1))
        return code

    def decode(self, code: Tensor) -> Tensor:
        """[B, K] to [B, heads * 3, 8, 8]; the first three channels in grey levels."""
        h = F.gelu(self.grow(code)).view(len(code), WIDTH, PATCH // 2, PATCH // 2)
        h = F.pixel_shuffle(self.conv_d(F.gelu(self.conv_c(h))), 2)
        h = h + self.linear_out(code).view(h.shape)
        return torch.cat([h[:, :3] * PIXEL_SCALE + 128, h[:, 3:]], 1)

    def loss(self, pixels: Tensor) -> Tensor:
        """What is minimised, of one batch."""
        raise NotImplementedError

    def measure(self, pixels: Tensor) -> dict[str, float]:
        """What a training's history records."""
        return {"loss": float(self.loss(pixels))}


class Plain(Autoencoder):
    """Squared error and nothing else."""

    def loss(self, pixels: Tensor) -> Tensor:
        return F.mse_loss(self.decode(self.encode(pixels)), pixels) / PIXEL_SCALE**2


class RateDistortion(Autoencoder):
    """Codes in steps of the quantiser, a uniform posterior one step wide, a learned prior for each code.

    weight: lambda, bits per pixel for a grey level squared.
    """

    def __init__(self, codes: int, weight: float) -> None:
        super().__init__(codes)
        self.weight = weight
        self.prior_mean = nn.Parameter(torch.zeros(codes, COMPONENTS))
        self.prior_log_scale = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0]).repeat(codes, 1))
        self.prior_logit = nn.Parameter(torch.zeros(codes, COMPONENTS))
        # The best step at high rate: it minimises -log2(step) / 64 + lambda * step^2 / (12 * 192).
        step = math.sqrt(18 / (math.log(2) * weight))
        with torch.no_grad():
            self.linear_in.weight.mul_(PIXEL_SCALE / step)
            self.linear_out.weight.mul_(step / PIXEL_SCALE)

    def bits(self, code: Tensor) -> Tensor:
        """Bits [B, K] of the unit interval around each code, which is also the density of code plus noise."""
        distance, inverse = code[..., None] - self.prior_mean, torch.exp(-self.prior_log_scale)
        log_mass = interval((distance + 0.5) * inverse, (distance - 0.5) * inverse)
        return -torch.logsumexp(log_mass + F.log_softmax(self.prior_logit, 1), 2) / math.log(2)

    def terms(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Bits per pixel and squared error, with the posterior's noise."""
        code = self.encode(pixels)
        code = code + torch.rand_like(code) - 0.5
        return self.bits(code).sum() / (len(code) * PIXELS), F.mse_loss(self.decode(code), pixels)

    def loss(self, pixels: Tensor) -> Tensor:
        rate, mse = self.terms(pixels)
        return rate + self.weight * mse

    def measure(self, pixels: Tensor) -> dict[str, float]:
        rate, mse = self.terms(pixels)
        return {"bpp": float(rate), "mse": float(mse)}


class GaussianVae(Autoencoder):
    """Prior N(0, I), Gaussian posterior, a discretised logistic likelihood of each sub-pixel (arXiv:1606.04934)."""

    def __init__(self, codes: int) -> None:
        super().__init__(codes, 2)
        with torch.no_grad():
            self.linear_in.bias[codes:] = -1.0  # of log sigma

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation [B, K]."""
        mean, log_sigma = self.encode(pixels).chunk(2, 1)
        return mean, log_sigma.clamp(-6, 2)

    def given(self, pixels: Tensor, code: Tensor) -> Tensor:
        """-log2 p(x | z) of each patch [B], pixels integers in 0..255."""
        mean, log_scale = self.decode(code).chunk(2, 1)
        inverse = torch.exp(-(log_scale + 2).clamp(-2, 5))
        upper, lower = (pixels + 0.5 - mean) * inverse, (pixels - 0.5 - mean) * inverse
        inside = interval(upper, lower)
        # The tails belong to 0 and 255: the probabilities of the 256 values sum to one.
        log_p = torch.where(pixels < 0.5, F.logsigmoid(upper), inside)
        log_p = torch.where(pixels > 254.5, F.logsigmoid(-lower), log_p)
        return -log_p.sum((1, 2, 3)) / math.log(2)

    def terms(self, pixels: Tensor, mean: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """-E_q[log2 p(x | z)], one sample, and KL(q || p) in closed form: bits of each patch [B]."""
        code = mean + torch.randn_like(mean) * log_sigma.exp()
        kl = 0.5 * (mean.square() + torch.exp(2 * log_sigma) - 1) - log_sigma
        return self.given(pixels, code), kl.sum(1) / math.log(2)

    def importance_bound(self, pixels: Tensor, mean: Tensor, log_sigma: Tensor, samples: int) -> float:
        """-log2 of the mean importance weight, bits per sub-pixel: at most -ELBO, at least -log2 p(x), both in
        expectation (Burda et al. 2016, arXiv:1509.00519)."""
        weights = []
        for _ in range(samples):
            noise = torch.randn_like(mean)
            code = mean + noise * log_sigma.exp()
            # log2 p(z) - log2 q(z); the constants cancel.
            ratio = (0.5 * (noise.square() - code.square()) + log_sigma).sum(1) / math.log(2)
            weights.append((ratio - self.given(pixels, code)) * math.log(2))
        log_mean = torch.logsumexp(torch.stack(weights).double(), 0) - math.log(samples)
        return float(-log_mean.mean() / math.log(2) / SAMPLES)

    def loss(self, pixels: Tensor) -> Tensor:
        given, kl = self.terms(pixels, *self.posterior(pixels))
        return (given + kl).mean() / SAMPLES

    def measure(self, pixels: Tensor) -> dict[str, float]:
        given, kl = self.terms(pixels, *self.posterior(pixels))
        return {"reconstruction": float(given.mean()) / SAMPLES, "kl": float(kl.mean()) / SAMPLES}


@dataclass(frozen=True, eq=False)
class Job:
    """One training. weight: lambda, of "rate" alone; patches and held_out: uint8 [N, 3, 8, 8]; start: PCA in place of
    random directions."""

    kind: str  # "plain", "rate" or "gaussian"
    codes: int
    seed: int
    steps: int
    batch: int
    patches: Bytes
    held_out: Bytes
    weight: float = 0.0
    start: Pca | None = None

    def build(self) -> Plain | RateDistortion | GaussianVae:
        if self.kind == "plain":
            return Plain(self.codes)
        return RateDistortion(self.codes, self.weight) if self.kind == "rate" else GaussianVae(self.codes)


@dataclass(frozen=True)
class Trained:
    """state: the weights as arrays, which cross process borders without shared memory. history: what ``measure`` said
    of held-out patches, with the step."""

    state: dict[str, NDArray[Any]]
    history: list[dict[str, float]]


def tensor_of(pixels: Bytes) -> Tensor:
    return torch.from_numpy(pixels).float()


def train(job: Job) -> Trained:
    """Adam, linear decay over the second half."""
    torch.manual_seed(job.seed)
    model = job.build()
    if job.start is not None:
        model.start_at(job.start)
    optim = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    held_out, history = tensor_of(job.held_out[:: max(1, len(job.held_out) // 1000)]), []
    for step in range(job.steps + 1):
        if step % max(1, job.steps // RECORDS) == 0 or step == job.steps:
            with torch.no_grad():
                history.append({"step": step, **model.measure(held_out)})
        for group in optim.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 30, 2 * (1 - step / (job.steps + 1)), 1)
        chosen = torch.randint(len(job.patches), (job.batch,)).numpy()
        loss = model.loss(tensor_of(job.patches[chosen]))
        optim.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optim.step()
    return Trained({name: value.numpy() for name, value in model.state_dict().items()}, history)


def restore(job: Job, trained: Trained) -> Any:
    """The trained model, frozen."""
    model = job.build()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in trained.state.items()})
    return model.eval().requires_grad_(False)
