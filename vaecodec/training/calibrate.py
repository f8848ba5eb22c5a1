"""The units of 8-bit layers: for each channel the power of two at which 8 bits hold what it carries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..exact import Conv, ExactConv
from ..lossy.layers import STREAM_MAX, STREAM_UNIT, UNIT, Block, ExactBlock, in_8_bits
from ..lossy.model import LossyModel


@torch.no_grad()
def calibrate(model: LossyModel, x: Tensor, quality: Tensor) -> None:
    """Set the units of the model's 8-bit layers by what flows through them on crops x [B, 3, H, W], quality int64 [B].

    The model is computed in floating point, with limits as wide as those of the blocks that stay there.
    """
    blocks = [module for module in model.modules() if isinstance(module, ExactBlock)]
    layers = [layer for block in blocks for layer in (block.conv_3, block.conv_1)]
    for block in blocks:
        block.conv_3.in_units.fill_(2 * UNIT)
        block.conv_3.out_units.fill_(UNIT)
        block.conv_1.in_units.fill_(UNIT)
        block.conv_1.out_units.fill_(2 * UNIT)
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
        conv_3.in_units.copy_(smallest_units(inputs[conv_3], 127).clamp(min=STREAM_UNIT))
        conv_3.out_units.copy_(smallest_units(outputs[conv_3], 255))
        conv_1.in_units.copy_(conv_3.out_units)
        conv_1.out_units.copy_(smallest_units(outputs[conv_1], 127).clamp(min=STREAM_UNIT))


@torch.no_grad()
def round_encoder(model: LossyModel, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put blocks of g_a in 8 bits, by what flows through them in batches as ``calibrate`` takes them.

    The last block at 1/8 stays in floating point: it alone would cost more rate than all others together, most of it
    for its weights, of which those at the centre are far larger than the rest. Nobody else computes what the encoder
    does, so units need not be powers of two here, which halves the noise.
    """
    largest = dict[Conv, tuple[Tensor, Tensor]]()

    def keep(layer: Any, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        now = [x.float().abs().amax((0, 2, 3)) for x in (arguments[0], out)]
        before = largest.get(layer, (torch.zeros_like(now[0]), torch.zeros_like(now[1])))
        largest[layer] = torch.maximum(now[0], before[0]), torch.maximum(now[1], before[1])

    fine, coarse = model.g_a.fine, model.g_a.coarse
    places = [(part, k) for part in (fine, coarse) for k in range(len(part)) if part is coarse or k < len(part) - 1]
    blocks = [block for part, k in places if isinstance(block := part[k], Block)]
    hooks = [layer.register_forward_hook(keep) for block in blocks for layer in (block.conv_3, block.conv_1)]
    try:
        for x, quality in batches:
            model.g_a(x, quality)
    finally:
        for hook in hooks:
            hook.remove()
    for (part, k), block in zip(places, blocks, strict=True):
        part[k] = rounded = in_8_bits(block)
        inputs, _ = largest[block.conv_3]
        hidden, outputs = largest[block.conv_1]
        rounded.conv_3.in_units.copy_(inputs.clamp(min=UNIT) / 127)
        rounded.conv_3.out_units.copy_(hidden.clamp(min=UNIT) / 255)
        rounded.conv_1.in_units.copy_(rounded.conv_3.out_units)
        rounded.conv_1.out_units.copy_(outputs.clamp(UNIT, STREAM_MAX * STREAM_UNIT) / 127)


def smallest_units(x: Tensor, high: int) -> Tensor:
    """float32 [C]: for each channel of x [B, C, H, W] the smallest power of two of which ``high`` hold all its values.
    A channel without any values keeps UNIT.

    Finer units, at which the squared error of rounding and clamping together is smallest, cost 0.5 % of rate more:
    outliers matter.
    """
    largest = x.float().abs().amax((0, 2, 3))
    units = torch.exp2(torch.log2(largest.clamp(min=1e-9) / high).ceil())
    return torch.where(largest > 0, units, UNIT)
