"""Latents of one picture, refined: what ``effort`` buys.

The inference network g_a gives latents that are good on average over pictures. Gradient descent on the negative ELBO,
rate + lambda * distortion, of the picture at hand goes on from there; the decoder does not change. The latents that
count are integers, so while they descend they are rounded by chance, up or down, more and more surely: stochastic
Gumbel annealing (Yang, Bamler and Mandt 2020, arXiv:2006.04240).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .exact import UNIT, interpolate, per_channel
from .model import GAIN_BITS, PATCH, Rounded, lagrangian, stream
from .weights import Lossy

STEPS = (0, 60, 90, 120, 160, 200, 250, 300, 400, 500)
"""Of the descent, by effort."""
RATE = 0.004
"""Of Adam, in steps of the quantiser."""
HOT, COLD = 0.5, 0.2
"""Temperature at the start and at the end."""
EDGE = 1e-5


def refined(
    weights: Lossy,
    x: Tensor,
    y: Tensor,
    inside: tuple[slice, slice],
    quality: Tensor,
    steps: int,
    seen: Tensor | None = None,
) -> Tensor:
    """Latents of a tile, float [1, M, h, w] in steps of the quantiser.

    x: [1, 3, H, W] in 0..255, and y: [1, M, H / 16, W / 16] what g_a makes of it, both with a margin around the tile,
    whose latents are ``inside``. quality: int64 [1]. seen: see ``model.of_seen``. The same arguments give the same
    latents.
    """
    model, generator = weights.model, torch.Generator(y.device).manual_seed(0)
    inverse = per_channel(interpolate(weights.inverse, quality)).to(y.dtype) * 2**-GAIN_BITS
    z_mean = per_channel(interpolate(weights.z_mean, quality)).to(y.dtype) * UNIT
    z_index = per_channel(interpolate(weights.z_index, quality)).to(y.dtype)
    rows, columns = (slice(PATCH * part.start, PATCH * part.stop) for part in inside)
    target, weight = x[..., rows, columns], float(lagrangian(quality, model.config.lambda_max)) / 3
    with torch.enable_grad():
        tile = y[..., *inside].clone().requires_grad_()
        optimiser = torch.optim.Adam([tile], lr=RATE)
        for step in range(steps):
            temperature = HOT * (COLD / HOT) ** (step / steps)
            rounding = partial(by_chance, temperature=temperature, generator=generator)
            coded = model.quantised(tile, z_mean, z_index, quality, rounding)
            around = y.clone()
            around[..., *inside] = coded.y_hat
            x_hat = model.g_s(stream(around * inverse, True), quality, seen)[..., rows, columns]
            loss = coded.bits.sum() + weight * (x_hat - target).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return tile.detach()


def by_chance(value: Tensor, temperature: float, generator: torch.Generator) -> Rounded:
    """Between the integers below and above, the nearer one more likely and the sample nearer to either the colder it
    is: a sample of the Gumbel-softmax distribution whose logits are -atanh(distance) / temperature (eq. 11 there)."""
    below = torch.floor(value)
    part = (value - below).clamp(EDGE, 1 - EDGE)
    chance = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype).clamp(EDGE, 1 - EDGE)
    up = (torch.atanh(part) - torch.atanh(1 - part)) / temperature + torch.logit(chance)
    sample = below + torch.sigmoid(up / temperature)
    return sample, sample
