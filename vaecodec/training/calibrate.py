"""The units of 8-bit layers: for each channel the power of two at which 8 bits hold what it carries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..exact import ExactConv
from ..lossy.layers import STREAM_UNIT, UNIT, Block, ExactBlock, centred, in_8_bits
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
    """Put the blocks of g_a in 8 bits, by what flows through them in batches as ``calibrate`` takes them: at 1/8, and
    of the first at 1/16, what is around the centre; and the 3x3 layers of h_a.

    Nobody else computes what the encoder does, so its units need be no powers of two. In g_a they hold the mean of the
    batches' largest values: as much as the largest of all costs twice as much rate, and what is beyond is rare. In h_a
    they hold the largest of all: how large its values are depends on the quality, and at 100 none are rare.
    """
    for blocks, whole in ((model.g_a.fine, 0), (model.g_a.coarse, len(model.g_a.coarse) - 1)):
        for k, block in enumerate(blocks):
            assert isinstance(block, Block)
            blocks[k] = in_8_bits(block) if k >= len(blocks) - whole else centred(block)
    model.h_a.in_8_bits()
    layers = model.encoder_convs()
    largest: dict[ExactConv, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers.values()}

    def keep(layer: Any, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        inputs, outputs = (x.float().abs().amax((0, 2, 3)) for x in (arguments[0], out))
        largest[layer].append((inputs, outputs))

    for name, layer in layers.items():  # limits that are never reached, or those of ``Block``
        layer.in_units.fill_(1)
        layer.out_units.fill_(UNIT if layer.low == 0 and name.startswith("g_a.") else 1)
    hooks = [layer.register_forward_hook(keep) for layer in largest]
    try:
        for x, quality in batches:
            model(x, quality, hard=True)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        seen = (torch.stack(each) for each in zip(*largest[layer], strict=True))
        kept = (each.mean(0) if name.startswith("g_a.") else each.amax(0) for each in seen)
        inputs, outputs = (each.clamp(min=UNIT) for each in kept)
        layer.in_units.copy_(inputs / {128: 127, 255: 255}[int(layer.in_max[0])])
        layer.out_units.copy_(outputs / layer.high)


def smallest_units(x: Tensor, high: int) -> Tensor:
    """float32 [C]: for each channel of x [B, C, H, W] the smallest power of two of which ``high`` hold all its values.
    A channel without any values keeps UNIT.

    Finer units, at which the squared error of rounding and clamping together is smallest, cost 0.5 % of rate more:
    outliers matter.
    """
    largest = x.float().abs().amax((0, 2, 3))
    units = torch.exp2(torch.log2(largest.clamp(min=1e-9) / high).ceil())
    return torch.where(largest > 0, units, UNIT)
