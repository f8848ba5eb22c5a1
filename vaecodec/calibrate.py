"""The units of 8-bit layers: for each channel the power of two that loses least of what the channel carries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .exact import STREAM_UNIT, UNIT, ExactConv
from .model import ExactBlock, LossyModel

FINEST, COARSEST = -12, 0
"""Logarithms of the units that are tried."""


@torch.no_grad()
def calibrate(model: LossyModel, x: Tensor, quality: Tensor) -> None:
    """Set the units of the model's 8-bit layers by what flows through them on crops x [B, 3, H, W], quality int64 [B].

    The model is computed in floating point, and its layers clamp to 8 bits of the units that they start with.
    """
    blocks = [module for module in model.modules() if isinstance(module, ExactBlock)]
    layers = [layer for block in blocks for layer in (block.conv_3, block.conv_1)]
    for layer in layers:
        layer.in_units.fill_(UNIT)
        layer.out_units.fill_(UNIT)
    inputs, outputs = dict[ExactConv, Tensor](), dict[ExactConv, Tensor]()

    def keep(layer: Any, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        inputs[layer], outputs[layer] = arguments[0], out

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    exact = [layer.exact for layer in model.decoder_convs().values()]
    try:
        model.exact(False)
        model(x, quality, hard=True)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, was in zip(model.decoder_convs().values(), exact, strict=True):
            layer.exact = was
    for block in blocks:
        conv_3, conv_1 = block.conv_3, block.conv_1
        # What is on the stream's grid, or added to what is, needs no finer one.
        conv_3.in_units.copy_(best_units(inputs[conv_3], -128, 127).clamp(min=STREAM_UNIT))
        conv_3.out_units.copy_(best_units(outputs[conv_3], 0, 255))
        conv_1.in_units.copy_(conv_3.out_units)
        conv_1.out_units.copy_(best_units(outputs[conv_1], -128, 127).clamp(min=STREAM_UNIT))


def best_units(x: Tensor, low: int, high: int) -> Tensor:
    """float32 [C]: for each channel of x [B, C, H, W] the unit at which rounding and clamping to low..high of it has
    the smallest squared error. A channel without any values keeps UNIT."""
    x = x.float()
    units = [2.0**power for power in range(COARSEST, FINEST - 1, -1)]
    errors = torch.stack([((x / u).round().clamp(low, high) * u - x).square().sum((0, 2, 3)) for u in units])
    best = torch.tensor(units, device=x.device)[errors.argmin(0)]
    return torch.where(x.abs().amax((0, 2, 3)) > 0, best, UNIT)
