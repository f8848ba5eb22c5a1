"""Latents of one picture, refined: what ``effort`` buys.

The inference network g_a gives latents that are good on average over pictures. Gradient descent on the negative ELBO,
rate + lambda * distortion, of the picture at hand goes on from there; the decoder does not change.

A few long steps on latents as they are, not rounded, give the most: 1.2 % of BD-rate on two pictures, more at high
qualities and less at low ones, for ten times the time of an encode. The latents that count are integers, so many short
steps follow in which they are rounded by chance, up or down, more and more surely: stochastic Gumbel annealing (Yang,
Bamler and Mandt 2020, arXiv:2006.04240). They take minutes a megapixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..exact import interpolate, per_channel
from .layers import GAIN_BITS, PATCH, UNIT, lagrangian, stream
from .model import Rounded
from .weights import LossyWeights

DESCENT = 3
"""Steps on latents that are not rounded, of every effort but 0."""
ANNEALING = (0, 0, 60, 90, 120, 160, 200, 250, 300, 400)
"""Steps on latents that are, by effort."""
LONG, SHORT = 0.006, 0.004
"""Step for each bit that a latent's step of the quantiser changes, in steps of the quantiser; that of Adam."""
MOMENTUM = 0.5
HOT, COLD = 0.5, 0.2
"""Temperature at the start and at the end."""
EDGE = 1e-5


def steps_of(effort: int) -> int:
    return DESCENT + ANNEALING[effort] if effort else 0


def refined(
    weights: LossyWeights,
    x: Tensor,
    y: Tensor,
    inside: tuple[slice, slice],
    quality: Tensor,
    effort: int,
    seen: Tensor | None,
    stepped: Callable[[], None],
) -> Tensor:
    """Latents of a tile, float [1, M, h, w] in steps of the quantiser.

    x: [1, 3, H, W] in 0..255, and y: [1, M, H / 16, W / 16] what g_a makes of it, both with a margin around the tile,
    whose latents are ``inside``. quality: int64 [1]. seen: see ``model.of_seen``. stepped: called after each of the
    steps. The same arguments give the same latents.
    """
    model, generator = weights.model, torch.Generator(y.device).manual_seed(0)
    inverse = per_channel(interpolate(weights.inverse, quality)).to(y.dtype) * 2**-GAIN_BITS
    z_mean = per_channel(interpolate(weights.z_mean, quality)).to(y.dtype) * UNIT
    z_index = per_channel(interpolate(weights.z_index, quality)).to(y.dtype)
    rows, columns = (slice(PATCH * part.start, PATCH * part.stop) for part in inside)
    target, weight = x[..., rows, columns], float(lagrangian(quality, model.config.lambda_max)) / 3

    def cost(tile: Tensor, rounding: Callable[[Tensor], Rounded]) -> Tensor:
        coded = model.quantised(tile, z_mean, z_index, quality, rounding)
        around = y.clone()
        around[..., *inside] = coded.y_hat
        x_hat = model.g_s(stream(around * inverse, True), quality, seen)[..., rows, columns]
        total: Tensor = coded.bits.sum() + weight * (x_hat - target).square().sum()
        return total

    with torch.enable_grad():
        tile = y[..., *inside].clone().requires_grad_()
        best, least, move, rate = tile.detach(), math.inf, torch.zeros_like(tile), LONG
        for _ in range(DESCENT):
            loss = cost(tile, as_it_is)
            (gradient,) = torch.autograd.grad(loss, tile)
            if not loss < least:  # a step too far
                rate, move = rate / 4, torch.zeros_like(move)
            else:
                best, least, slope = tile.detach(), float(loss.detach()), gradient
            move = MOMENTUM * move - rate * slope
            tile = (best + move).requires_grad_()
            stepped()
        if not float(cost(tile.detach(), as_it_is)) < least:
            tile = best.requires_grad_()
        optimiser = torch.optim.Adam([tile], lr=SHORT)
        for step in range(ANNEALING[effort]):
            temperature = HOT * (COLD / HOT) ** (step / ANNEALING[effort])
            loss = cost(tile, partial(by_chance, temperature=temperature, generator=generator))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            stepped()
    return tile.detach()


def as_it_is(value: Tensor) -> Rounded:
    return value, value


def by_chance(value: Tensor, temperature: float, generator: torch.Generator) -> Rounded:
    """Between the integers below and above, the nearer one more likely and the sample nearer to either the colder it
    is: a sample of the Gumbel-softmax distribution whose logits are -atanh(distance) / temperature (eq. 11 there)."""
    below = torch.floor(value)
    part = (value - below).clamp(EDGE, 1 - EDGE)
    chance = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype).clamp(EDGE, 1 - EDGE)
    up = (torch.atanh(part) - torch.atanh(1 - part)) / temperature + torch.logit(chance)
    sample = below + torch.sigmoid(up / temperature)
    return sample, sample
