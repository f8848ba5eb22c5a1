"""The networks as ONNX graphs, written when weights are exported; ``engine_onnx`` runs them.

A graph is kept inside the weights file, as bytes, and holds no weights: its initializers are external data whose
location is the name of a tensor of that file, with the tensor's type and shape. So nothing is stored twice, the file's
digest covers the graphs, and a runtime gives each initializer the bytes that it has read and checked. Weights are cast
and reshaped by nodes that a runtime folds into constants when it opens a session.

Between exact layers everything is an integer, in steps of the layer's unit, held in float32: a layer is a convolution,
a product with the row's scale, a rounding and a clip. Blocks of 8 bits are QLinearConv nodes. What depends on the
quality comes in as an input that is added to a convolution, but for the biases of QLinearConv, which some kernels only
take as initializers: there the runtime gives a row for the quality in place of the knots.

``disabled_optimizers=["ConvMulFusion"]`` is needed wherever these graphs run: with the scale of a row in its weights,
they are integers no more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import lossless
from .exact import HIDDEN_MAX, STREAM_MAX, STREAM_UNIT, UNIT, Conv, ExactConv
from .lossless import (
    CENTRE,
    LATENT_MAX,
    LATENT_SCALES,
    PHASES,
    Gauss,
    Head,
    Level,
    LosslessModel,
    Residual,
    Vae,
)
from .model import (
    CONTEXT_MAX,
    INDEX_GAIN,
    MEAN_MAX,
    PIXEL_SCALE,
    PIXEL_UNIT,
    SCALES,
    STEP_ORDER,
    STEPS,
    Block,
    Context,
    ExactBlock,
    LossyModel,
)
from .weights import _digest, load

OPSET, IR_VERSION = 17, 8
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT32
TYPES = {torch.int8: TensorProto.INT8, torch.int16: TensorProto.INT16, torch.int32: INT}
TYPES |= {torch.float16: TensorProto.FLOAT16, torch.float32: FLOAT}

EVERYTHING = slice(None)
Dimension = int | str
Parts = str | list[tuple[str, int]]


class Graph:
    """An ONNX graph under construction. ``tensors``: those of the weights file, by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.outputs: list[Any] = []
        self.shapes: list[Any] = []

    def input(self, name: str, *shape: Dimension, kind: int = FLOAT) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, kind, shape)
        return name

    def output(self, x: str, name: str, *shape: Dimension, kind: int = FLOAT) -> None:
        """Give x, float32, under a name; cast to another type if that is asked for."""
        if kind == FLOAT:
            self.nodes.append(helper.make_node("Identity", [x], [name]))
        else:
            self.nodes.append(helper.make_node("Cast", [x], [name], to=kind))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def constant(self, value: Any) -> str:
        array = np.ascontiguousarray(value) if np.ndim(value) else np.array(value)
        name = f"{array.dtype} {array.shape} {array.tobytes().hex() if array.size < 8 else len(self.initializers)}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def add(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """A node; inputs that are no names are constants."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output

    def split(self, x: str, sizes: Sequence[int], axis: int = 1) -> list[str]:
        outputs = [f"v{len(self.nodes)}.{k}" for k in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [x, self.constant(np.array(sizes, np.int64))], outputs, axis=axis))
        return outputs

    def stored(self, name: str) -> str:
        """An initializer that the weights file holds, as it is there; biases with knots as one row."""
        if name not in self.initializers:
            tensor = self.tensors[name]
            shape = (1, tensor.shape[1]) if has_knots(name, tensor) else tuple(tensor.shape)
            proto = TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=shape)
            proto.data_location = TensorProto.EXTERNAL
            proto.external_data.add(key="location", value=name)
            self.initializers[name] = proto
        return name

    def shaped(self, x: str, *shape: int) -> str:
        return self.add("Reshape", x, np.array(shape, np.int64))

    def real(self, x: str) -> str:
        return self.add("Cast", x, to=FLOAT)

    def rows(self, x: str, part: slice) -> str:
        if part == EVERYTHING:
            return x
        return self.add("Slice", x, np.array([part.start], np.int64), np.array([part.stop], np.int64))

    def row(self, name: str, part: slice = EVERYTHING) -> str:
        """A bias [C], or part of it, float32, that does not depend on the quality."""
        return self.rows(self.shaped(self.real(self.stored(name)), -1), part)

    def at_quality(self, name: str) -> str:
        """A stored bias with knots, at the quality, as an input [1, C, 1, 1]."""
        return self.input(name, 1, self.tensors[name].shape[1], 1, 1)

    def clip(self, x: str, low: float, high: float) -> str:
        return self.add("Clip", x, np.float32(low), np.float32(high))

    def shuffled(self, x: str, factor: int) -> str:
        """torch's pixel_shuffle."""
        return self.add("DepthToSpace", x, blocksize=factor, mode="CRD")

    def joined(self, *parts: str) -> str:
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=1)

    def kernel(self, name: str, conv: Conv, *, unshuffled: int = 1, part: slice = EVERYTHING) -> str:
        """A layer's stored weight, or some rows of it, float32 [out, in, k, k]. ``unshuffled``: its input comes from
        SpaceToDepth, where torch's pixel_unshuffle has another order of channels."""
        i, k = conv.shape[1:3]
        o = len(range(conv.shape[0])[part])
        weight = self.real(self.rows(self.stored(f"{name}.weight"), part))
        if unshuffled > 1:
            area = unshuffled**2
            weight = self.add("Transpose", self.shaped(weight, o, i // area, area, k, k), perm=[0, 2, 1, 3, 4])
        return self.shaped(weight, o, i, k, k)

    def used(self) -> list[str]:
        """The stored tensors among the initializers."""
        return [name for name in self.initializers if name in self.tensors]

    def build(self, name: str) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            name,
            list(self.inputs.values()),
            self.outputs,
            list(self.initializers.values()),
            value_info=self.shapes,
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="vaecodec")
        data: bytes = model.SerializeToString()
        return data


def has_knots(name: str, tensor: Tensor) -> bool:
    return name.endswith(".bias") and len(tensor) > 1


def column(values: Tensor) -> NDArray[np.float32]:
    """Values of channels, to go with [1, C, h, w]."""
    return values.detach().float().view(1, -1, 1, 1).numpy()


def reaches(conv: ExactConv) -> bool:
    """Whether an output of a frozen layer can come to its limits at all, so that it has to be clipped."""
    weight = (conv.weight * conv.by_column(conv.in_units)).double().abs()
    most = (weight * conv.by_column(conv.in_max)).sum(1) + conv.bias.double().abs().amax(0)
    return bool((most * conv.scale.double() + 1 > min(-conv.low, conv.high)).any())


def exact(
    g: Graph,
    x: Parts,
    name: str,
    conv: ExactConv,
    *,
    clip: bool = True,
    pads: Sequence[int] | None = None,
    unshuffled: int = 1,
    part: slice = EVERYTHING,
) -> str:
    """An exact layer, or some rows of it, from integers in steps of its input's unit to integers in steps of its
    output's. Without ``clip``, the limits are left to what follows. pads: zeros around the input, above, left, below
    and right; by default as many as keep its size.

    x: the input, or parts of it with their channels. Parts are convolved on their own and added up, which copies
    less than joining them; fast kernels want channels in sixteens, too, and where they are told that two sums have one
    shape they add the second to the first as they compute it.
    """
    weight, bias = g.kernel(name, conv, unshuffled=unshuffled, part=part), f"{name}.bias"
    pads = [conv.shape[2] // 2] * 4 if pads is None else pads
    knots = has_knots(bias, g.tensors[bias])
    sums, first = "", 0
    for each, channels in [(x, conv.shape[1])] if isinstance(x, str) else x:
        kernel = weight
        if channels < conv.shape[1]:
            starts, ends, axes = ([value] for value in (first, first + channels, 1))
            kernel = g.add("Slice", weight, *(np.array(values, np.int64) for values in (starts, ends, axes)))
        inputs = [each, kernel] if knots or first else [each, kernel, g.row(bias, part)]
        partial = g.add("Conv", *inputs, pads=pads)
        if not isinstance(x, str):
            g.shapes.append(helper.make_tensor_value_info(partial, FLOAT, [1, None, f"{name} h", f"{name} w"]))
        sums, first = g.add("Add", sums, partial) if first else partial, first + channels
    if knots:
        sums = g.add("Add", sums, g.at_quality(bias))
    return finished(g, sums, g.shaped(g.rows(g.stored(f"{name}.scale"), part), 1, -1, 1, 1), conv, clip)


def finished(g: Graph, sums: str, scale: str, conv: ExactConv, clip: bool) -> str:
    steps = g.add("Round", g.add("Mul", sums, scale))
    return g.clip(steps, conv.low, conv.high) if clip and reaches(conv) else steps


def stored_graphs(model: LossyModel | LosslessModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a weights file holds beside ``tensors``, uint8: "graph.NAME", an ONNX model, and "graphs", a JSON object
    that says which tensors each graph wants as initializers."""
    graphs = lossy_graphs(model, tensors) if isinstance(model, LossyModel) else lossless_graphs(model, tensors)
    parts = {f"graph.{name}": graph.build(name) for name, graph in graphs.items()}
    parts["graphs"] = json.dumps({name: graph.used() for name, graph in graphs.items()}).encode()
    return {name: torch.frombuffer(bytearray(part), dtype=torch.uint8) for name, part in parts.items()}


def add_graphs(path: Path) -> None:
    """Write the graphs of its networks into an exported weights file, in place of those it has. Its identity stays."""
    with torch.random.fork_rng():
        model = load(path, torch.device("cpu")).model
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        names = [name for name in file.keys() if not name.startswith("graph")]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    tensors |= stored_graphs(model, tensors)
    metadata["digest"] = _digest(tensors, metadata["config"]).hex()
    save_file(tensors, path, metadata)


# The lossy codec


def lossy_graphs(model: LossyModel, tensors: dict[str, Tensor]) -> dict[str, Graph]:
    """The graphs of the lossy networks by name. ``tensors``: those of the weights file, by name."""
    graphs = {
        "analysis": analysis(model, Graph(tensors)),
        "hyper_analysis": hyper_analysis(model, Graph(tensors)),
        "hyper_synthesis": hyper_synthesis(model, Graph(tensors)),
        "synthesis": synthesis(model, Graph(tensors), integer=True),
        "synthesis.float": synthesis(model, Graph(tensors), integer=False),
    }
    return graphs | {f"context.{step}": context(model, step, Graph(tensors)) for step in range(STEPS)}


def floating(g: Graph, x: str, name: str, conv: Conv, *, unshuffled: int = 1) -> str:
    """A layer in floating point."""
    bias, pads = f"{name}.bias", [conv.shape[2] // 2] * 4
    weight = g.kernel(name, conv, unshuffled=unshuffled)
    if has_knots(bias, g.tensors[bias]):
        return g.add("Add", g.add("Conv", x, weight, pads=pads), g.at_quality(bias))
    return g.add("Conv", x, weight, g.row(bias), pads=pads)


def analysis(model: LossyModel, g: Graph) -> Graph:
    """x float32 [1, 3, 16 h, 16 w], 0..255, and ``gain`` [1, M, 1, 1] to y [1, M, h, w] in steps of the quantiser."""
    g_a, limit = model.g_a, STREAM_MAX * STREAM_UNIT
    x = g.input("x", 1, 3, "H", "W")
    x = g.add("Mul", g.add("Sub", x, np.float32(128)), np.float32(1 / PIXEL_SCALE))
    x = g.add("SpaceToDepth", x, blocksize=8)

    def block(x: str, name: str, part: Block) -> str:
        h = g.clip(floating(g, x, f"{name}.conv_3", part.conv_3), 0, HIDDEN_MAX * UNIT)
        h = g.clip(floating(g, h, f"{name}.conv_1", part.conv_1), -limit, limit)
        return g.clip(g.add("Add", x, h), -limit, limit)

    x = g.clip(floating(g, x, "encoder.g_a.stem", g_a.stem, unshuffled=8), -limit, limit)
    for k, part in enumerate(g_a.fine):
        assert isinstance(part, Block)
        x = block(x, f"encoder.g_a.fine.{k}", part)
    x = g.add("SpaceToDepth", x, blocksize=2)
    x = g.clip(floating(g, x, "encoder.g_a.down", g_a.down, unshuffled=2), -limit, limit)
    for k, part in enumerate(g_a.coarse):
        assert isinstance(part, Block)
        x = block(x, f"encoder.g_a.coarse.{k}", part)
    y = g.add("Mul", x, g.input("gain", 1, model.config.latent, 1, 1))
    g.output(y, "y", 1, model.config.latent, "h", "w")
    return g


def hyper_analysis(model: LossyModel, g: Graph) -> Graph:
    """y float32 [1, M, 4 h, 4 w] in steps of the quantiser to z [1, C_z, h, w]."""
    h_a = model.h_a
    # asinh(y), written so that it loses nothing at small y; Asinh has no kernel for float32 on all machines.
    y = g.input("y", 1, model.config.latent, "H", "W")
    size = g.add("Abs", y)
    root = g.add("Sqrt", g.add("Add", g.add("Mul", size, size), np.float32(1)))
    h = g.add("Mul", g.add("Log", g.add("Add", size, root)), g.add("Sign", y))
    h = g.add("Relu", floating(g, h, "encoder.h_a.conv_a", h_a.conv_a))
    h = g.add("SpaceToDepth", h, blocksize=2)
    h = g.add("Relu", floating(g, h, "encoder.h_a.conv_b", h_a.conv_b, unshuffled=2))
    h = g.add("Relu", floating(g, h, "encoder.h_a.conv_c", h_a.conv_c))
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


def synthesis(model: LossyModel, g: Graph, integer: bool) -> Graph:
    """stream int16 [1, M, h, w] in steps of STREAM_UNIT to x_hat int32 [1, 3, 16 h, 16 w] in sixteenths of a level.

    integer: blocks as QLinearConv, else the same integers in float32.
    """
    g_s, c = model.g_s, model.config
    block = integer_block if integer else float_block
    x = g.real(g.input("stream", 1, c.latent, "h", "w", kind=TensorProto.INT16))
    for k, part in enumerate(g_s.coarse):
        assert isinstance(part, ExactBlock)
        x = block(g, x, f"decoder.g_s.coarse.{k}", part)
    x = g.shuffled(exact(g, x, "decoder.g_s.up", g_s.up), 2)
    for k, part in enumerate(g_s.fine):
        assert isinstance(part, ExactBlock)
        x = block(g, x, f"decoder.g_s.fine.{k}", part)
    x = exact(g, x, "decoder.g_s.head", g_s.head)
    to_sixteenths = PIXEL_UNIT * PIXEL_SCALE * 16
    x = x if to_sixteenths == 1 else g.add("Mul", x, np.float32(to_sixteenths))
    x = g.shuffled(g.add("Add", x, np.float32(128 * 16)), 8)
    g.output(x, "x_hat", 1, 3, "H", "W", kind=INT)
    return g


def float_block(g: Graph, x: str, name: str, part: ExactBlock) -> str:
    h = g.add("Mul", x, STREAM_UNIT / column(part.conv_3.in_units))
    h = g.clip(g.add("Round", h), -128, 127)
    h = exact(g, h, f"{name}.conv_3", part.conv_3)
    h = exact(g, h, f"{name}.conv_1", part.conv_1)
    h = g.add("Mul", h, column(part.conv_1.out_units) / STREAM_UNIT)
    return g.clip(g.add("Add", x, h), -STREAM_MAX, STREAM_MAX)


def integer_block(g: Graph, x: str, name: str, part: ExactBlock) -> str:
    """Zero points of 128 make unsigned bytes of -128..127, which all kernels take."""
    one, zeros = np.float32(1), [np.uint8(128), np.uint8(0), np.uint8(128)]
    units = STREAM_UNIT / column(part.conv_3.in_units)
    h = g.add("QuantizeLinear", g.add("Mul", x, units), one, zeros[0])
    for layer, before, after in zip(("conv_3", "conv_1"), zeros, zeros[1:], strict=False):
        conv = getattr(part, layer)
        weight = g.shaped(g.stored(f"{name}.{layer}.weight"), *conv.shape)
        bias = g.shaped(g.stored(f"{name}.{layer}.bias"), -1)
        scale, zero = g.stored(f"{name}.{layer}.scale"), np.zeros(conv.shape[0], np.int8)
        pads = [conv.shape[2] // 2] * 4
        h = g.add("QLinearConv", h, one, before, weight, scale, zero, one, after, bias, pads=pads)
    h = g.add("DequantizeLinear", h, one, zeros[2])
    h = g.add("Mul", h, column(part.conv_1.out_units) / STREAM_UNIT)
    return g.clip(g.add("Add", x, h), -STREAM_MAX, STREAM_MAX)


# The lossless codec
#
# Only what has many channels is in these graphs; the arithmetic of single samples, in integers, is the engine's.
# Activations are in steps of 1/32, what the last layers give in steps of 1/256. 3x3 layers want a row more above and
# below, which the engine fills with neighbours or zeros, so that a picture can be taken in stripes.

ACTIVATION_MAX = lossless.HIDDEN_MAX
PIXEL = TensorProto.UINT8


def lossless_graphs(model: LosslessModel, tensors: dict[str, Tensor]) -> dict[str, Graph]:
    """The graphs of the lossless networks by name, see ``lossy_graphs``."""
    graphs = vae_graphs(model.vae, tensors)
    for k, level in enumerate(model.levels):
        assert isinstance(level, Level)
        name, stored = f"levels.{k}", f"decoder.levels.{k}"
        graphs[f"{name}.entry"] = entry(level.entry, f"{stored}.entry", Graph(tensors))
        for number, part in enumerate(level.blocks):
            assert isinstance(part, Residual)
            graphs[f"{name}.blocks.{number}"] = striped(part, f"{stored}.blocks.{number}", Graph(tensors))
        for phase in PHASES:
            for colour in range(3):
                head = level.head(phase)
                graphs[f"{name}.{phase}.{colour}"] = predict(head, f"{stored}.heads.{phase}", colour, Graph(tensors))
        for phase, part in level.updates.items():
            assert isinstance(part, Residual)
            graphs[f"{name}.{phase}.update"] = striped(part, f"{stored}.updates.{phase}", Graph(tensors))
        if level.up is not None:
            g, channels = Graph(tensors), level.up.shape[0] // 4
            h = g.input("h", 1, level.up.shape[1], "h", "w")
            up = exact(g, h, f"{stored}.up", level.up)
            g.output(g.shuffled(up, 2), "features", 1, channels, "H", "W")
            graphs[f"{name}.features"] = g
    return graphs


def act(g: Graph, x: str) -> str:
    return g.clip(x, 0, ACTIVATION_MAX)


def residual(g: Graph, h: str, name: str, part: Residual) -> str:
    """The layer's own limits change nothing: h is in 0..ACTIVATION_MAX, and so is what comes out."""
    return act(g, g.add("Add", h, exact(g, h, f"{name}.conv", part.conv, clip=False)))


def striped(part: Residual, name: str, g: Graph) -> Graph:
    """A residual layer: h [1, width, h, w] and, with a row more above and below, ``around``, the same, and ``more``
    channels, if there are any, to ``state`` [1, width, h, w]."""
    width, inputs = part.conv.shape[:2]
    h = g.input("h", 1, width, "h", "w")
    parts = [(g.input("around", 1, width, "h + 2", "w"), width)]
    if inputs > width:
        parts.append((g.input("more", 1, inputs - width, "h + 2", "w"), inputs - width))
    sums = exact(g, parts, f"{name}.conv", part.conv, clip=False, pads=[0, 1, 0, 1])
    g.output(act(g, g.add("Add", h, sums)), "state", 1, width, "h", "w")
    return g


def entry(conv: ExactConv, name: str, g: Graph) -> Graph:
    """bands [1, 9, h + 2, w] and, but for the coarsest level, features [1, F, h + 2, w] of the coarser one to the
    state [1, width, h, w]."""
    width, inputs = conv.shape[:2]
    parts = [(g.input("bands", 1, 9, "h + 2", "w"), 9)]
    if inputs > 9:
        parts.append((g.input("features", 1, inputs - 9, "h + 2", "w"), inputs - 9))
    g.output(exact(g, parts, name, conv, pads=[0, 1, 0, 1]), "state", 1, width, "h", "w")
    return g


def predict(head: Head, name: str, colour: int, g: Graph) -> Graph:
    """What ``Head.colour`` computes first: ``out`` [1, 3 + filters + colour, h, w], not yet limited.

    h [1, width, h, w]: the state; spread [1, 3, h, w]; for colours 1 and 2 ``given`` [1, 3 colour, h, w]. Where there
    are filters colour 0 wants the known phases too, uint8 [1, 3 known, h + 4, w + 4], repeated at the border, and gives
    ``linear`` [1, 3 (1 + filters), h, w] in eighths for all colours.
    """
    spread = 3 if head.filters else 0
    width = head.hidden.shape[1] - spread
    inputs = [(g.input("h", 1, width, "h", "w"), width)]
    if spread:
        inputs.append((g.input("spread", 1, spread, "h", "w"), spread))
    rows = head.hidden.shape[0] // 3
    # Of the layer's limits, at least as wide as what is added and the range of activations, nothing is left after act.
    part = slice(colour * rows, (colour + 1) * rows)
    hidden = exact(g, inputs, f"{name}.hidden", head.hidden, clip=False, part=part)
    if colour:
        given = g.input("given", 1, 3 * colour, "h", "w")
        more = exact(g, given, f"{name}.given.{colour - 1}", layer(head.given[colour - 1]))
        hidden = g.add("Add", hidden, more)
    out = layer(head.out[colour])
    values = exact(g, act(g, hidden), f"{name}.out.{colour}", out, clip=False)
    g.output(values, "out", 1, out.shape[0], "h", "w")
    if head.filters and colour == 0:
        known = g.real(g.input("known", 1, head.base.shape[1], "h + 4", "w + 4", kind=PIXEL))
        centred = g.add("Sub", known, np.float32(CENTRE))
        linear = exact(g, centred, f"{name}.base", head.base, pads=[0, 0, 0, 0])
        g.output(linear, "linear", 1, head.base.shape[0], "h", "w")
    return g


# Latents are in steps of LATENT_UNIT, means of latents in quarters of it, and linear predictions in steps of 1/256.


def vae_graphs(vae: Vae, tensors: dict[str, Tensor]) -> dict[str, Graph]:
    graphs, top = dict[str, Graph](), len(vae.project) - 1
    graphs["inference"] = inference(vae, Graph(tensors))
    for k in range(top + 1):
        graphs[f"posterior.{k}"] = posterior(vae, k, Graph(tensors))
        graphs[f"descend.{k}"] = descend(vae, k, Graph(tensors))
    g, width, name = Graph(tensors), vae.last.conv.shape[0], "decoder.vae"
    above = g.input("above", 1, width, "h", "w")
    g.output(residual(g, above, f"{name}.last", vae.last), "h", 1, width, "h", "w")
    graphs["last"] = g
    for colour in range(3):
        graphs[f"likelihood.{colour}"] = predict(vae.head, f"{name}.head", colour, Graph(tensors))
    return graphs


def layer(conv: Any) -> ExactConv:
    assert isinstance(conv, ExactConv)
    return conv


def blocks(g: Graph, h: str, name: str, parts: Any) -> str:
    for k, block in enumerate(parts):
        h = residual(g, h, f"{name}.{k}", block)
    return h


def inference(vae: Vae, g: Graph) -> Graph:
    """x uint8 [1, 3, 8 h, 8 w] (for three groups of latents) to features.G, finest first."""
    x = g.real(g.input("x", 1, 3, "H", "W", kind=PIXEL))
    x = g.add("Mul", g.add("Sub", x, np.float32(CENTRE)), np.float32(4))
    x = g.add("SpaceToDepth", x, blocksize=2)
    h = exact(g, x, "decoder.vae.entry", vae.entry, unshuffled=2)
    for k, parts in enumerate(vae.bottom_up):
        if k:
            h = g.add("SpaceToDepth", h, blocksize=2)
            h = exact(g, h, f"decoder.vae.down.{k - 1}", layer(vae.down[k - 1]), unshuffled=2)
        h = blocks(g, h, f"decoder.vae.bottom_up.{k}", parts)
        g.output(h, f"features.{k}", 1, vae.entry.shape[0], f"h{k}", f"w{k}")
    return g


def gauss(g: Graph, part: Gauss, name: str, h: str, linear: str, prefix: str) -> None:
    """Outputs ``mean``, in quarters of steps, and ``index``, int32 [1, C, h, w]."""
    channels = part.conv.shape[0] // 2
    mean, index = g.split(exact(g, h, f"{name}.conv", part.conv), [channels] * 2)
    mean = g.add("Round", g.add("Mul", g.add("Add", mean, linear), np.float32(0.25)))
    index = g.add("Round", g.add("Add", g.add("Mul", index, np.float32(1 / 32)), np.float32(24)))
    g.output(g.clip(mean, -4 * LATENT_MAX, 4 * LATENT_MAX), f"{prefix}mean", 1, channels, "h", "w", kind=INT)
    g.output(g.clip(index, 0, LATENT_SCALES - 1), f"{prefix}index", 1, channels, "h", "w", kind=INT)


def posterior(vae: Vae, k: int, g: Graph) -> Graph:
    """features and, but for the coarsest latents, ``above``, [1, width, h, w] both, and the whole x (see
    ``inference``) to mean and index of q(z_k | coarser latents, x)."""
    width, top = vae.entry.shape[0], k == len(vae.project) - 1
    x = g.real(g.input("x", 1, 3, "H", "W", kind=PIXEL))
    blocks = g.add("SpaceToDepth", g.add("Sub", x, np.float32(CENTRE)), blocksize=2 ** (k + 1))
    linear = exact(g, blocks, f"decoder.vae.project.{k}", layer(vae.project[k]), unshuffled=2 ** (k + 1))
    h = g.input("features", 1, width, "h", "w")
    h = h if top else g.joined(h, g.input("above", 1, width, "h", "w"))
    part = vae.posterior[k]
    assert isinstance(part, Gauss)
    gauss(g, part, f"decoder.vae.posterior.{k}", h, linear, "")
    return g


def descend(vae: Vae, k: int, g: Graph) -> Graph:
    """z int32 [1, C, h, w] and, but for the coarsest latents, ``above`` to what is known at twice the resolution,
    ``h`` [1, width, 2 h, 2 w] and ``linear``, and, but for the finest, the next prior's mean and index."""
    width, top = vae.entry.shape[0], k == len(vae.project) - 1
    take, expand = layer(vae.take[k]), layer(vae.expand[k])
    seen = g.clip(g.real(g.input("z", 1, take.shape[1], "h", "w", kind=INT)), -LATENT_MAX, LATENT_MAX)
    h = exact(g, seen, f"decoder.vae.take.{k}", take, clip=False)
    h = act(g, h if top else g.add("Add", h, g.input("above", 1, width, "h", "w")))
    h = blocks(g, h, f"decoder.vae.top_down.{k}", vae.top_down[k])
    h = g.shuffled(exact(g, h, f"decoder.vae.up.{k}", layer(vae.up[k])), 2)
    linear = g.shuffled(exact(g, seen, f"decoder.vae.expand.{k}", expand), 2)
    g.output(h, "h", 1, width, "H", "W")
    g.output(linear, "linear", 1, expand.shape[0] // 4, "H", "W")
    if k:
        part = vae.prior[k - 1]
        assert isinstance(part, Gauss)
        gauss(g, part, f"decoder.vae.prior.{k - 1}", h, linear, "")
    return g
