"""The synthesis transform through ONNX Runtime's integer kernels gives PyTorch's bits.

A second library, with other arithmetic: 8-bit activations and weights, 32-bit sums. Blocks become QLinearConv, the two
wide layers stay float32.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaecodec import Codec
from vaecodec.exact import ExactConv, interpolate
from vaecodec.lossy.layers import PIXEL_SCALE, STREAM_MAX, STREAM_UNIT, ExactBlock
from vaecodec.lossy.model import Synthesis

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from vaecodec.lossy.engine import KERNELS, LossyNetworks  # noqa: E402

LIMIT = np.float32(STREAM_MAX * STREAM_UNIT)


class Graph:
    """An ONNX graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """A node; inputs that are no names are constants."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        output = f"v{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, names, [output], **attributes))
        return output

    def session(self, x: str, channels: int, output: str, saturating: bool) -> Any:
        kind = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            self.nodes,
            "g_s",
            [onnx.helper.make_tensor_value_info(x, kind, [1, channels, "h", "w"])],
            [onnx.helper.make_tensor_value_info(output, kind, None)],
            self.constants,
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if saturating:  # kernels of processors without VNNI add pairs of products in 16 bits
            options.add_session_config_entry("session.x64quantprecision", "1")
        # It would fold the scale of a row into its weights, which are then no integers.
        return onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConvMulFusion"],
        )


def integers(conv: ExactConv) -> NDArray[np.float32]:
    """Weights [out, in, k, k] as integers."""
    weight: Tensor = conv.weight * conv.by_column(conv.in_units)
    return weight.view(conv.shape).numpy()


def units(values: Tensor) -> NDArray[np.float32]:
    return values.view(1, -1, 1, 1).numpy()


def bias(conv: ExactConv, quality: Tensor) -> NDArray[np.int32]:
    knots = conv.bias.long()
    return (interpolate(knots, quality) if len(knots) > 1 else knots)[0].numpy().astype(np.int32)


def block(graph: Graph, x: str, part: ExactBlock, quality: Tensor) -> str:
    """Zero points of 128 make unsigned bytes of -128..127, which all kernels take."""
    one, zeros = np.float32(1), [np.uint8(128), np.uint8(0), np.uint8(128)]
    h = graph.add("Mul", x, 1 / units(part.conv_3.in_units))
    h = graph.add("QuantizeLinear", h, one, zeros[0])
    for conv, before, after in zip((part.conv_3, part.conv_1), zeros, zeros[1:], strict=False):
        weight, zero = integers(conv).astype(np.int8), np.zeros(conv.shape[0], np.int8)
        scale, pads = conv.scale.numpy(), [conv.shape[2] // 2] * 4
        h = graph.add("QLinearConv", h, one, before, weight, scale, zero, one, after, bias(conv, quality), pads=pads)
    h = graph.add("DequantizeLinear", h, one, zeros[2])
    h = graph.add("Mul", h, units(part.conv_1.out_units))
    return graph.add("Clip", graph.add("Add", x, h), -LIMIT, LIMIT)


def wide(graph: Graph, x: str, conv: ExactConv, quality: Tensor) -> str:
    weight = integers(conv) / conv.in_units[0].numpy()
    sums = graph.add("Conv", x, weight, bias(conv, quality).astype(np.float32))
    steps = graph.add("Round", graph.add("Mul", sums, units(conv.scale)))
    limited = graph.add("Clip", steps, np.float32(conv.low), np.float32(conv.high))
    return graph.add("Mul", limited, np.float32(conv.out_unit))


def synthesis(g_s: Synthesis, quality: Tensor, saturating: bool) -> Any:
    graph, x = Graph(), "x"
    for part in g_s.coarse:
        assert isinstance(part, ExactBlock)
        x = block(graph, x, part, quality)
    x = graph.add("DepthToSpace", wide(graph, x, g_s.up, quality), blocksize=2, mode="CRD")
    for part in g_s.fine:
        assert isinstance(part, ExactBlock)
        x = block(graph, x, part, quality)
    x = graph.add("DepthToSpace", wide(graph, x, g_s.head, quality), blocksize=8, mode="CRD")
    x = graph.add("Add", graph.add("Mul", x, np.float32(PIXEL_SCALE)), np.float32(128))
    return graph.session("x", g_s.up.shape[1], x, saturating)


@pytest.mark.parametrize("saturating", [False, True], ids=["default kernels", "kernels for AVX2"])
def test_integer_kernels_give_the_same_pixels(shipped: Any, saturating: bool) -> None:
    if not saturating and LossyNetworks(shipped).kernel != next(iter(KERNELS)):
        pytest.skip("the default kernels saturate on this machine, and the self-test passes them over")
    weights = Codec("cpu", shipped, engine="torch").lossy
    g_s, generator = weights.model.g_s, torch.Generator().manual_seed(0)
    channels, shape = weights.model.config.latent, (1, weights.model.config.latent, 6, 9)
    for hundredths in (0, 3333, 7500, 10000):
        quality = torch.tensor([hundredths])
        session = synthesis(g_s, quality, saturating)
        ordinary = torch.randn(shape, generator=generator) * torch.rand((1, channels, 1, 1), generator=generator) * 4
        limits = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
        for spread in (1, 4, 64):
            for stream in (ordinary * spread, limits * spread):
                x = (stream / STREAM_UNIT).round().clamp(-STREAM_MAX, STREAM_MAX) * STREAM_UNIT
                with torch.no_grad():
                    expected = g_s(x, quality).numpy()
                (pixels,) = session.run(None, {"x": x.numpy()})
                assert np.count_nonzero(pixels != expected) == 0 and len(np.unique(expected)) > 100
