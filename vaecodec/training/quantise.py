"""A lossless model's levels from 16 bits to 8: the layers are the same functions of bytes, but for what is rounded.

Weights are rounded one column after the other, and what each rounding adds to the sums is taken back by the columns
that are still open, as far as these go with it (Frantar et al. 2022, arXiv:2210.17323); the bias takes the rest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..exact import ACCUMULATOR_LIMIT, WEIGHT_MAX, WEIGHT_MAX_8, ExactConv
from ..kinds import load
from ..lossless.heads import ByteHead
from ..lossless.layers import BYTE_MAX, BYTE_UNIT, PHASES
from ..lossless.model import Level, LosslessModel
from ..lossless.weights import LosslessWeights, assembled
from ..networks import nothing_drawn, tensors_in, write
from ..weights import WeightsError, read
from .crops import Crops, load_images

BATCHES, SIDE = 12, 128
"""Batches of four crops by which layers are rounded, and their side."""
DAMPING = 0.003
"""Part of an input's mean square that is added to each, so that columns can be told apart."""
SHRUNK = (1.0, 0.8, 0.6, 0.45)
"""Parts of a row's range that are tried for its weights; those beyond are clamped."""


def quantise(path: Path, data: Path, out: Path) -> None:
    """Write the weights file of ``path``, with levels of 16 bits, with levels of 8, rounded by training pictures.

    It has no graphs: see ``export.add_graphs``. Raises WeightsError for other files, ValueError if there are no
    pictures.
    """
    weights = load(path, torch.device("cpu"))
    if not isinstance(weights, LosslessWeights) or weights.config.in_bytes:
        raise WeightsError(f"{path} holds no lossless model with levels of 16 bits")
    config = replace(weights.config, activation_bits=8)
    torch.manual_seed(2)  # for crops
    crops = Crops(load_images(data), torch.device("cpu"))
    side = min(SIDE, crops.largest())
    side -= side % 2**config.levels
    with nothing_drawn():
        model = LosslessModel(config).eval().requires_grad_(False)
    for old, new in zip(weights.model.levels, model.levels, strict=True):
        assert isinstance(old, Level) and isinstance(new, Level)
        translate(old, new)
    layers = {name: layer for name, layer in model.levels.named_modules() if is_byte_layer(layer)}
    moments = moments_of(model, layers, [crops.batch(4, side) for _ in range(BATCHES)])
    decoder = {name: part for name, part in tensors_in(read(path), "decoder").items() if is_kept(name)}
    for name, layer in layers.items():
        for part, tensor in quantised(layer, moments[name]).items():
            decoder[f"levels.{name}.{part}"] = tensor
    for name in [name for name in decoder if name.startswith("levels.") and ".out." in name]:
        if name.endswith(".scale"):  # of steps of 1/16 in place of 1/32
            decoder[name] = 2 * decoder[name]
        elif name.endswith(".bias"):
            decoder[name] = (decoder[name].double() / 2).round().to(torch.int32)
    write(out, "lossless", config, decoder, {}, assembled)


def is_byte_layer(module: nn.Module) -> bool:
    return isinstance(module, ExactConv) and module.weight_max == WEIGHT_MAX_8


def is_kept(name: str) -> bool:
    return not name.startswith("levels.") or ".base." in name or ".out." in name


def translate(old: Level, new: Level) -> None:
    """Give a level of bytes the weights of one of 16 bits, not yet rounded. A number x that comes in as bytes of its
    sides, and what is left of it, has x's weight for what counts up, and its negative for what counts down."""

    def coarse(weight: Tensor) -> list[Tensor]:
        return [weight, -weight, weight]

    def signs(weight: Tensor) -> list[Tensor]:
        return [weight, -weight]

    def put(layer: Any, bias: Tensor, *columns: Tensor) -> None:
        layer.weight.copy_(torch.cat(columns, 1).flatten(1))
        layer.bias.copy_(bias)

    def taken(layer: Any) -> tuple[Tensor, Tensor]:
        """Weight [out, in, k, k] and bias."""
        weight, bias = layer.thawed()
        return weight.view(layer.shape), bias

    width = new.entry.shape[0]
    identity = torch.eye(width)
    weight, bias = taken(old.entry)
    put(new.entry, bias, weight[:, 9:], *coarse(weight[:, :9]))
    pairs = [*zip(old.blocks, new.blocks, strict=True), *((old.updates[p], new.updates[p]) for p in new.updates)]
    for before, after in pairs:
        weight, bias = taken(before.conv)
        beside = 3 * (weight.shape[1] > width)
        h, difference, normal = torch.split(weight.clone(), [width, beside, beside], 1)
        h[:, :, 1, 1] += identity
        put(after.conv, bias, h, *coarse(difference), *signs(normal))
    if old.up is not None:
        weight, bias = taken(old.up)
        put(new.up, bias, weight)
    for phase in PHASES:
        was, head = old.head(phase), new.head(phase)
        assert isinstance(head, ByteHead)
        put(head.base, taken(was.base)[1], taken(was.base)[0])
        weights, biases = (part.chunk(3, dim) for part, dim in zip(taken(was.hidden), (0, 1), strict=True))
        for k in range(3):
            columns, bias = [weights[k]], biases[k]
            if k:
                given, more = taken(was.given[k - 1])
                bias = bias + more
                for difference, normal, logarithm in (part.chunk(3, 1) for part in given.chunk(k, 1)):
                    columns += [*coarse(difference), *signs(normal), logarithm]
            put(head.hidden[k], bias, *columns)
            put(head.out[k], taken(was.out[k])[1], taken(was.out[k])[0])


def moments_of(model: LosslessModel, layers: dict[str, ExactConv], batches: list[Tensor]) -> dict[str, Tensor]:
    """float64 [n + 1, n + 1] for each layer: the mean of products of the bytes, and of 1, that a row of its weight is
    multiplied by. Places count by the size of the rate's gradient there: by its square, a hundredth of them would be
    all that counts. Computed with weights of 16 bits."""
    sizes = {name: layer.weight.shape[1] + 1 for name, layer in layers.items()}
    moments = {name: torch.zeros(size, size, dtype=torch.float64) for name, size in sizes.items()}

    def keep(name: str) -> Any:
        def hook(layer: ExactConv, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            steps = arguments[0].detach() / layer.in_units[:, None, None]
            inside = (out.detach() > 0) & (out.detach() < BYTE_MAX * BYTE_UNIT)

            def weigh(gradient: Tensor) -> None:
                columns = F.unfold(steps, layer.shape[2], padding=layer.reach).transpose(0, 1).flatten(1)
                columns = torch.cat([columns, torch.ones(1, columns.shape[1])]).double()
                counts = (gradient * inside).square().sum(1).sqrt().flatten() + 1e-12
                moments[name] += (columns * counts) @ columns.T

            out.register_hook(weigh)  # type: ignore[no-untyped-call]

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    model.exact(True)
    for layer in layers.values():
        layer.weight_max = WEIGHT_MAX
    for x in batches:
        rate = sum(phase.bits().sum() for phases in model.phases(x.requires_grad_()) for phase in phases)
        assert isinstance(rate, Tensor)
        rate.backward()  # type: ignore[no-untyped-call]
    for layer, hook in zip(layers.values(), hooks, strict=True):
        layer.weight_max = WEIGHT_MAX_8
        hook.remove()
    return {name: moment / moment[-1, -1] for name, moment in moments.items()}


def quantised(layer: ExactConv, moments: Tensor) -> dict[str, Tensor]:
    """The layer's integers, as ``ExactConv.integers`` gives them. Raises ValueError where a sum could leave the range
    in which float32 is exact."""
    weight = layer.weight.detach().double() * layer.by_column(layer.in_units) / layer.out_units[:, None]
    bias = layer.bias.detach().double() / layer.out_units
    mean = moments[-1, :-1]
    spread = moments[:-1, :-1] - mean[:, None] * mean
    best, least = weight, torch.full((len(weight),), float("inf"), dtype=torch.float64)
    scale = torch.ones(len(weight), dtype=torch.float64)
    for part in SHRUNK:
        # Of what the file holds, a single; and a row of zeros has some.
        steps = (part / WEIGHT_MAX_8 * weight.abs().amax(1)).clamp(min=2.0**-20).float().double()
        tried = compensated(weight / steps[:, None], spread)
        difference = tried * steps[:, None] - weight
        error = ((difference @ spread) * difference).sum(1)
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, steps, scale)
        best = torch.where(better[:, None], tried, best)
    bias = ((bias + (weight - best * scale[:, None]) @ mean) / scale).round()
    reach = (best.abs() * layer.by_column(layer.in_max)).sum(1) + bias[0].abs()
    if not reach.max() < ACCUMULATOR_LIMIT:
        raise ValueError(f"a sum may reach {float(reach.max()):.0f}, the limit is {ACCUMULATOR_LIMIT}")
    return {"weight": best.to(torch.int8), "bias": bias.to(torch.int32), "scale": scale.float()}


def compensated(weight: Tensor, spread: Tensor) -> Tensor:
    """Integers for weights [out, n] that keep the sums of inputs with covariance [n, n]: those of much weight first."""
    damping = DAMPING * spread.diagonal().mean() + 1e-3  # and inputs may be constant
    spread = spread + damping * torch.eye(len(spread), dtype=spread.dtype)
    order = spread.diagonal().argsort(descending=True)
    open_, spread = weight[:, order].clone(), spread[order][:, order]
    root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(spread)), upper=True)
    for column in range(len(order)):
        rounded = open_[:, column].round().clamp(-WEIGHT_MAX_8, WEIGHT_MAX_8)
        error = (open_[:, column] - rounded) / root[column, column]
        open_[:, column + 1 :] -= error[:, None] * root[column, column + 1 :]
        open_[:, column] = rounded
    return open_[:, order.argsort()]
