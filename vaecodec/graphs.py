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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from .exact import Conv, ExactConv

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

    def size(self, x: str, axis: int) -> str:
        """int64 [1]."""
        return self.add("Slice", self.add("Shape", x), np.array([axis]), np.array([axis + 1]))

    def resized(self, x: str, *shape: Dimension) -> str:
        """x in a shape of which some parts are only known as it runs, see ``size``."""
        parts = [part if isinstance(part, str) else self.constant(np.array([part])) for part in shape]
        return self.add("Reshape", x, self.add("Concat", *parts, axis=0))

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


def stored_graphs(graphs: dict[str, Graph]) -> dict[str, Tensor]:
    """What a weights file holds beside other tensors, uint8: "graph.NAME", an ONNX model, and "graphs", a JSON object
    that says which tensors each graph wants as initializers."""
    parts = {f"graph.{name}": graph.build(name) for name, graph in graphs.items()}
    parts["graphs"] = json.dumps({name: graph.used() for name, graph in graphs.items()}).encode()
    return {name: torch.frombuffer(bytearray(part), dtype=torch.uint8) for name, part in parts.items()}
