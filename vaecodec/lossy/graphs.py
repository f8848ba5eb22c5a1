"""The lossy networks as ONNX graphs, see ``graphs``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from ..exact import Conv, ExactConv
from ..graphs import INT, Graph, column, exact, finished, has_knots
from .layers import (
    CONTEXT_MAX,
    HIDDEN_MAX,
    INDEX_GAIN,
    MEAN_MAX,
    PIXEL_SCALE,
    PIXEL_UNIT,
    SCALES,
    STEP_ORDER,
    STEPS,
    STREAM_MAX,
    STREAM_UNIT,
    UNIT,
    Block,
    CentredBlock,
    ExactBlock,
    limits_of,
)
from .model import Context, LossyModel


def graphs_of(model: LossyModel, tensors: dict[str, Tensor]) -> dict[str, Graph]:
    """The graphs of the lossy networks by name. ``tensors``: those of the weights file, by name."""
    graphs = {
        "analysis": analysis(model, Graph(tensors), integer=True),
        "analysis.float": analysis(model, Graph(tensors), integer=False),
        "hyper_analysis": hyper_analysis(model, Graph(tensors), integer=True),
        "hyper_analysis.float": hyper_analysis(model, Graph(tensors), integer=False),
        "hyper_synthesis": hyper_synthesis(model, Graph(tensors)),
        "synthesis": synthesis(model, Graph(tensors), integer=True),
        "synthesis.float": synthesis(model, Graph(tensors), integer=False),
        # Of pictures of which some tiles are coded without networks.
        "analysis.seen": analysis(model, Graph(tensors), integer=True, masked=True),
        "analysis.float.seen": analysis(model, Graph(tensors), integer=False, masked=True),
        "synthesis.seen": synthesis(model, Graph(tensors), integer=True, masked=True),
        "synthesis.float.seen": synthesis(model, Graph(tensors), integer=False, masked=True),
    }
    return graphs | {f"context.{step}": context(model, step, Graph(tensors)) for step in range(STEPS)}


def floating(g: Graph, x: str, name: str, conv: Conv, *, unshuffled: int = 1) -> str:
    """A layer in floating point."""
    bias, pads = f"{name}.bias", [conv.shape[2] // 2] * 4
    weight = g.kernel(name, conv, unshuffled=unshuffled)
    if has_knots(bias, g.tensors[bias]):
        return g.add("Add", g.add("Conv", x, weight, pads=pads), g.at_quality(bias))
    return g.add("Conv", x, weight, g.row(bias), pads=pads)


def masks(g: Graph, masked: bool) -> tuple[str, str]:
    """Inputs of graphs of what is seen, see ``layers.of_seen``, at 1/16 and at 1/8; none, if nothing is ``masked``."""
    if not masked:
        return "", ""
    return g.input("seen", 1, 1, "h", "w"), g.input("seen_fine", 1, 1, "2 h", "2 w")


def of_seen(g: Graph, x: str, seen: str) -> str:
    return g.add("Mul", x, seen) if seen else x


def analysis(model: LossyModel, g: Graph, integer: bool, masked: bool = False) -> Graph:
    """x float32 [1, 3, 16 h, 16 w], 0..255, and ``gain`` [1, M, 1, 1] to y [1, M, h, w] in steps of the quantiser.

    integer: see ``synthesis``, of those blocks that are in 8 bits.
    """
    seen, seen_fine = masks(g, masked)
    g_a, limit = model.g_a, STREAM_MAX * STREAM_UNIT
    x = g.input("x", 1, 3, "H", "W")
    x = g.add("Mul", g.add("Sub", x, np.float32(128)), np.float32(1 / PIXEL_SCALE))
    x = g.add("SpaceToDepth", x, blocksize=8)

    def block(x: str, name: str, part: nn.Module) -> str:
        if isinstance(part, ExactBlock):
            return channels_first(g, block_of(integer)(g, channels_last(g, x), name, part, 1.0))
        if isinstance(part, CentredBlock):
            h = g.add(
                "Add",
                floating(g, x, f"{name}.centre", part.centre),
                in_8_bits(g, x, f"{name}.around", part.around, integer),
            )
            h = floating(g, g.clip(h, 0, HIDDEN_MAX * UNIT), f"{name}.conv_1", part.conv_1)
            return g.clip(g.add("Add", x, g.clip(h, -limit, limit)), -limit, limit)
        assert isinstance(part, Block)
        h = g.clip(floating(g, x, f"{name}.conv_3", part.conv_3), 0, HIDDEN_MAX * UNIT)
        h = g.clip(floating(g, h, f"{name}.conv_1", part.conv_1), -limit, limit)
        return g.clip(g.add("Add", x, h), -limit, limit)

    x = g.clip(floating(g, x, "encoder.g_a.stem", g_a.stem, unshuffled=8), -limit, limit)
    for k, part in enumerate(g_a.fine):
        x = block(of_seen(g, x, seen_fine), f"encoder.g_a.fine.{k}", part)
    x = g.add("SpaceToDepth", x, blocksize=2)
    x = g.clip(floating(g, x, "encoder.g_a.down", g_a.down, unshuffled=2), -limit, limit)
    for k, part in enumerate(g_a.coarse):
        x = block(of_seen(g, x, seen), f"encoder.g_a.coarse.{k}", part)
    y = g.add("Mul", x, g.input("gain", 1, model.config.latent, 1, 1))
    g.output(y, "y", 1, model.config.latent, "h", "w")
    return g


def hyper_analysis(model: LossyModel, g: Graph, integer: bool) -> Graph:
    """y float32 [1, M, 4 h, 4 w] in steps of the quantiser to z [1, C_z, h, w]. integer: see ``analysis``."""
    h_a = model.h_a
    # asinh(y), written so that it loses nothing at small y; Asinh has no kernel for float32 on all machines.
    y = g.input("y", 1, model.config.latent, "H", "W")
    size = g.add("Abs", y)
    root = g.add("Sqrt", g.add("Add", g.add("Mul", size, size), np.float32(1)))
    h = g.add("Mul", g.add("Log", g.add("Add", size, root)), g.add("Sign", y))
    h = relu(g, h, "encoder.h_a.conv_a", h_a.conv_a, integer)
    h = g.add("SpaceToDepth", h, blocksize=2)
    h = g.add("Relu", floating(g, h, "encoder.h_a.conv_b", h_a.conv_b, unshuffled=2))
    h = relu(g, h, "encoder.h_a.conv_c", h_a.conv_c, integer)
    h = g.add("SpaceToDepth", h, blocksize=2)
    g.output(
        floating(g, h, "encoder.h_a.conv_d", h_a.conv_d, unshuffled=2), "z", 1, model.config.hyper_latent, "h", "w"
    )
    return g


def hyper_synthesis(model: LossyModel, g: Graph) -> Graph:
    """z int32 [1, C_z, h, w] in steps of 1/16 to features [1, hyper, 4 h, 4 w], in steps of ``Config.unit``."""
    h_s, c = model.h_s, model.config
    z = g.real(g.input("z", 1, c.hyper_latent, "h", "w", kind=INT))
    h = g.clip(z, -CONTEXT_MAX, CONTEXT_MAX)
    if c.unit != UNIT:
        h = g.add("Mul", h, np.float32(UNIT / c.unit))
    h = exact(g, h, "decoder.h_s.conv_a", h_s.conv_a)
    h = g.shuffled(exact(g, h, "decoder.h_s.conv_b", h_s.conv_b), 2)
    h = exact(g, h, "decoder.h_s.conv_c", h_s.conv_c)
    h = g.shuffled(exact(g, h, "decoder.h_s.conv_d", h_s.conv_d), 2)
    g.output(h, "features", 1, c.hyper, "H", "W")
    return g


def context(model: LossyModel, step: int, g: Graph) -> Graph:
    """features [1, hyper, h, w] and y_hat int32 [1, M, h, w], both in steps of ``Config.unit``, to ``mean``, in the
    same steps, and ``index``, int32 [1, M / 4, h, w] both."""
    c, part, name = model.config, model.context[step], f"decoder.context.{step}"
    assert isinstance(part, Context)
    limit = round(CONTEXT_MAX * UNIT / c.unit)
    features = g.input("features", 1, c.hyper, "h", "w")
    y_hat = g.real(g.input("y_hat", 1, c.latent, "h", "w", kind=INT))
    seen = g.clip(g.add("Round", g.add("Mul", y_hat, np.float32(0.25))), -limit, limit)
    h = exact(g, g.joined(features, seen), f"{name}.conv_a", part.conv_a)
    h = exact(g, h, f"{name}.conv_b", part.conv_b)
    # conv_c has a mean and an index for all M latents; a position needs only those of its quarter. The four parities
    # of a position become groups of channels; rows and columns are made even first.
    shape = g.add("Shape", features)
    size = g.add("Slice", shape, np.array([2], np.int64), np.array([4], np.int64))
    odd = g.add("Mod", size, np.array([2, 2], np.int64))
    pads = g.add("Concat", np.zeros(6, np.int64), odd, axis=0)
    h = g.add("SpaceToDepth", g.add("Pad", h, pads), blocksize=2)
    rows = np.arange(2 * c.latent).reshape(2, STEPS, -1)
    order = np.concatenate([rows[:, STEP_ORDER[step] ^ parity].ravel() for parity in range(STEPS)])

    def chosen(x: str, axis: int) -> str:
        return g.add("Gather", x, order, axis=axis)

    weight = g.shaped(chosen(g.real(g.stored(f"{name}.conv_c.weight")), 0), 2 * c.latent, c.hyper, 1, 1)
    bias = chosen(g.row(f"{name}.conv_c.bias"), 0)
    scale = g.shaped(chosen(g.stored(f"{name}.conv_c.scale"), 0), 1, -1, 1, 1)
    h = finished(g, g.add("Conv", h, weight, bias, group=STEPS), scale, part.conv_c, True)
    h = g.add("DepthToSpace", h, blocksize=2, mode="DCR")
    h = g.add("Slice", h, np.zeros(2, np.int64), size, np.array([2, 3], np.int64))
    mean, index = g.split(h, [c.latent // STEPS] * 2)
    most = MEAN_MAX / c.unit
    g.output(g.clip(mean, -most, most), "mean", 1, c.latent // STEPS, "h", "w", kind=INT)
    if INDEX_GAIN * c.unit != 1:
        index = g.add("Round", g.add("Mul", index, np.float32(INDEX_GAIN * c.unit)))
    g.output(g.clip(index, 0, SCALES - 1), "index", 1, c.latent // STEPS, "h", "w", kind=INT)
    return g


def synthesis(model: LossyModel, g: Graph, integer: bool, masked: bool = False) -> Graph:
    """stream int16 [1, M, h, w] in steps of STREAM_UNIT to x_hat int32 [1, 3, 16 h, 16 w] in sixteenths of a level.

    integer: blocks as QLinearConv, else the same integers in float32. Channels come last in between: integer kernels
    want them so, and shuffles then move whole rows of them.
    """
    g_s, c = model.g_s, model.config
    block = block_of(integer)
    seen, seen_fine = (channels_last(g, mask) if mask else "" for mask in masks(g, masked))
    x = g.input("stream", 1, c.latent, "h", "w", kind=TensorProto.INT16)
    h, w = g.size(x, 2), g.size(x, 3)
    x = channels_last(g, g.real(x))
    for k, part in enumerate(g_s.coarse):
        assert isinstance(part, ExactBlock)
        x = block(g, of_seen(g, x, seen), f"decoder.g_s.coarse.{k}", part, STREAM_UNIT)
    x = grown(g, x, "decoder.g_s.up", g_s.up, h, w)
    for k, part in enumerate(g_s.fine):
        assert isinstance(part, ExactBlock)
        x = block(g, of_seen(g, x, seen_fine), f"decoder.g_s.fine.{k}", part, STREAM_UNIT)
    x = exact(g, channels_first(g, x), "decoder.g_s.head", g_s.head)
    to_sixteenths = PIXEL_UNIT * PIXEL_SCALE * 16
    x = x if to_sixteenths == 1 else g.add("Mul", x, np.float32(to_sixteenths))
    x = g.shuffled(g.add("Add", x, np.float32(128 * 16)), 8)
    g.output(x, "x_hat", 1, 3, "H", "W", kind=INT)
    return g


def block_of(integer: bool) -> Callable[[Graph, str, str, ExactBlock, float], str]:
    """A block of x [1, h, w, C], in steps of a unit."""
    return integer_block if integer else float_block


def float_block(g: Graph, x: str, name: str, part: ExactBlock, unit: float) -> str:
    h = g.add("Mul", x, unit / by_last(part.conv_3.in_units))
    h = channels_first(g, g.clip(g.add("Round", h), -128, 127))
    h = exact(g, h, f"{name}.conv_3", part.conv_3)
    h = exact(g, h, f"{name}.conv_1", part.conv_1)
    h = g.add("Mul", channels_last(g, h), by_last(part.conv_1.out_units) / unit)
    limit = STREAM_MAX * STREAM_UNIT / unit
    return g.clip(g.add("Add", x, h), -limit, limit)


def integer_block(g: Graph, x: str, name: str, part: ExactBlock, unit: float) -> str:
    """Zero points of 128 make unsigned bytes of -128..127, which all kernels take."""
    one, zeros = np.float32(1), [np.uint8(128), np.uint8(0), np.uint8(128)]
    h = g.add("Mul", x, unit / by_last(part.conv_3.in_units))
    h = channels_first(g, g.add("QuantizeLinear", h, one, zeros[0]))
    h = linear(g, h, f"{name}.conv_3", part.conv_3, *zeros[:2])
    h = linear(g, h, f"{name}.conv_1", part.conv_1, *zeros[1:])
    h = g.add("DequantizeLinear", channels_last(g, h), one, zeros[2])
    h = g.add("Mul", h, by_last(part.conv_1.out_units) / unit)
    limit = STREAM_MAX * STREAM_UNIT / unit
    return g.clip(g.add("Add", x, h), -limit, limit)


def linear(g: Graph, h: str, name: str, conv: ExactConv, before: np.uint8, after: np.uint8) -> str:
    """An exact layer of bytes, to bytes, with their zero points."""
    weight, bias = g.shaped(g.stored(f"{name}.weight"), *conv.shape), g.shaped(g.stored(f"{name}.bias"), -1)
    scale, zero, one = g.stored(f"{name}.scale"), np.zeros(conv.shape[0], np.int8), np.float32(1)
    pads = [conv.shape[2] // 2] * 4
    return g.add("QLinearConv", h, one, before, weight, scale, zero, one, after, bias, pads=pads)


def in_8_bits(g: Graph, x: str, name: str, conv: ExactConv, integer: bool) -> str:
    """A layer in 8 bits of x [1, C, h, w] and its outputs, both in floating point."""
    h, (low, high) = g.add("Mul", x, 1 / column(conv.in_units)), limits_of(conv)
    if integer:
        one, before, after = np.float32(1), np.uint8(-low), np.uint8(-conv.low)
        h = linear(g, g.add("QuantizeLinear", h, one, before), name, conv, before, after)
        h = g.add("DequantizeLinear", h, one, after)
    else:
        h = exact(g, g.clip(g.add("Round", h), low, high), name, conv)
    return g.add("Mul", h, column(conv.out_units))


def relu(g: Graph, x: str, name: str, conv: nn.Module, integer: bool) -> str:
    """A layer whose outputs are not negative, in 8 bits or in floating point."""
    if isinstance(conv, ExactConv):
        return in_8_bits(g, x, name, conv, integer)
    assert isinstance(conv, Conv)
    return g.add("Relu", floating(g, x, name, conv))


def grown(g: Graph, x: str, name: str, conv: ExactConv, h: str, w: str) -> str:
    """An exact 1x1 layer of x [1, h, w, in], and torch's pixel_shuffle of what it gives: [1, 2 h, 2 w, out / 4]."""
    channels = conv.shape[0] // 4
    # Of a position its 2 x 2 places, and of each of them its channels.
    order = np.arange(4 * channels).reshape(channels, 2, 2).transpose(1, 2, 0).ravel()
    weight, bias, scale = (
        g.add("Gather", part, order, axis=0)
        for part in (g.real(g.stored(f"{name}.weight")), g.row(f"{name}.bias"), g.stored(f"{name}.scale"))
    )
    sums = g.add("Conv", channels_first(g, x), g.shaped(weight, *conv.shape), bias)
    x = g.resized(finished(g, channels_last(g, sums), scale, conv, True), h, w, 2, 2, channels)
    h, w = (g.add("Mul", side, np.array([2])) for side in (h, w))
    return g.resized(g.add("Transpose", x, perm=[0, 2, 1, 3, 4]), 1, h, w, channels)


def channels_last(g: Graph, x: str) -> str:
    return g.add("Transpose", x, perm=[0, 2, 3, 1])


def channels_first(g: Graph, x: str) -> str:
    return g.add("Transpose", x, perm=[0, 3, 1, 2])


def by_last(values: Tensor) -> NDArray[np.float32]:
    """Values of channels, to go with [1, h, w, C]."""
    return values.detach().float().numpy()
