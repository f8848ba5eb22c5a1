"""The lossless networks as ONNX graphs, see ``graphs``.

Only what has many channels is in these graphs; the arithmetic of single samples, in integers, is the engine's.
Activations are in steps of their unit, what the last layers give in steps of 1/256. In the levels they have channels
last, as integer kernels want them, and 3x3 layers want a row more above and below, neighbours or zeros: so a stripe of
a picture lies in one piece, and nothing is copied. Inputs may have more channels than a layer takes: the engine keeps
what layers see beside the state in the same array, and kernels are fast where channels come in sixteens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from ..exact import ExactConv
from ..graphs import FLOAT, INT, Graph, exact
from .heads import Head
from .layers import BYTE_MAX, CENTRE, HIDDEN_MAX as ACTIVATION_MAX, LATENT_MAX, LATENT_SCALES, PHASES, Config, Residual
from .model import Gauss, Level, LosslessModel, Vae
from .numbers import FLOATING

BYTE = TensorProto.UINT8


def graphs_of(model: LosslessModel, tensors: dict[str, Tensor]) -> dict[str, Graph]:
    """The graphs of the lossless networks by name. ``tensors``: those of the weights file."""
    graphs = vae_graphs(model.vae, model.config, tensors)
    for k, level in enumerate(model.levels):
        assert isinstance(level, Level)
        for integer in (True, False) if level.in_bytes else (False,):
            parts = level_graphs(level, model.config, f"decoder.levels.{k}", tensors, integer)
            ending = FLOATING if level.in_bytes and not integer else ""
            graphs |= {f"levels.{k}.{name}{ending}": graph for name, graph in parts.items()}
    return graphs


def level_graphs(level: Level, c: Config, stored: str, tensors: dict[str, Tensor], integer: bool) -> dict[str, Graph]:
    """integer: layers of bytes as QLinearConv, else the same integers in float32."""
    graphs = {"entry": plain(level.entry, f"{stored}.entry", c, c.entered(level.takes), Graph(tensors), integer)}
    named = [(f"blocks.{k}", part, c.width) for k, part in enumerate(level.blocks)]
    named += [(f"updates.{phase}", part, c.width_beside) for phase, part in level.updates.items()]
    for name, part, channels in named:
        g, path = Graph(tensors), f"{stored}.{name}.conv"
        if isinstance(part, Residual):
            graphs[name] = striped(part, path, c, channels, g)
        else:
            graphs[name] = plain(layer(part.conv), path, c, channels, g, integer)
    for phase in PHASES:
        for colour in range(3):
            path = f"{stored}.heads.{phase}"
            graphs[f"{phase}.{colour}"] = predict(level.head(phase), path, c, c.width, colour, Graph(tensors), integer)
    if level.up is not None:
        graphs["features"] = plain(level.up, f"{stored}.up", c, c.width, Graph(tensors), integer)
    return graphs


def act(g: Graph, x: str) -> str:
    return g.clip(x, 0, ACTIVATION_MAX)


def residual(g: Graph, h: str, name: str, part: Residual) -> str:
    """The layer's own limits change nothing: h is in 0..ACTIVATION_MAX, and so is what comes out."""
    return act(g, g.add("Add", h, exact(g, h, f"{name}.conv", part.conv, clip=False)))


def channels_first(g: Graph, in_bytes: bool, channels: int, rows: str) -> str:
    """The input ``x`` [1, rows, w, channels], bytes or float32, as layers want it."""
    x = g.input("x", 1, rows, "w", channels, kind=BYTE if in_bytes else FLOAT)
    return g.add("Transpose", x, perm=[0, 3, 1, 2])


def channels_last(g: Graph, x: str, in_bytes: bool, channels: int) -> Graph:
    """x as the output ``y`` [1, h, w, channels]."""
    g.output(g.add("Transpose", x, perm=[0, 2, 3, 1]), "y", 1, "h", "w", channels, kind=BYTE if in_bytes else FLOAT)
    return g


def first(g: Graph, x: str, channels: int, of: int) -> str:
    return x if channels == of else g.split(x, [channels, of - channels])[0]


def of_bytes(g: Graph, x: str, name: str, conv: ExactConv, channels: int, integer: bool) -> str:
    """A layer from the first of x's channels, bytes, to bytes; 3x3 layers are given a row more above and below."""
    edge = conv.shape[2] // 2
    pads = [0, edge, 0, edge]
    if not integer:
        x = first(g, g.real(x), conv.shape[1], channels)
        return g.add("Cast", g.clip(exact(g, x, name, conv, clip=False, pads=pads), 0, BYTE_MAX), to=BYTE)
    weight = g.shaped(g.stored(f"{name}.weight"), *conv.shape)
    if channels > conv.shape[1]:
        more = np.array([0] * 5 + [channels - conv.shape[1], 0, 0], np.int64)
        weight = g.add("Pad", weight, more, np.int8(0))
    one, zero, zeros = np.float32(1), np.uint8(0), np.zeros(conv.shape[0], np.int8)
    scale, bias = g.stored(f"{name}.scale"), g.shaped(g.stored(f"{name}.bias"), -1)
    return g.add("QLinearConv", x, one, zero, weight, scale, zeros, one, zero, bias, pads=pads)


def plain(conv: ExactConv, name: str, c: Config, channels: int, g: Graph, integer: bool) -> Graph:
    """A layer as it is: x [1, h, w, channels], of which it takes the first, to y [1, h, w, out]."""
    edge = conv.shape[2] // 2
    x = channels_first(g, c.in_bytes, channels, "h + 2" if edge else "h")
    if c.in_bytes:
        y = of_bytes(g, x, name, conv, channels, integer)
    else:
        y = exact(g, first(g, x, conv.shape[1], channels), name, conv, pads=[0, edge, 0, edge])
    return channels_last(g, y, c.in_bytes, conv.shape[0])


def striped(part: Residual, name: str, c: Config, channels: int, g: Graph) -> Graph:
    """A residual layer: x [1, h + 2, w, channels], of which it takes the first, to y [1, h, w, width]."""
    width, inputs = part.conv.shape[:2]
    x = channels_first(g, False, channels, "h + 2")
    sums = exact(g, first(g, x, inputs, channels), name, part.conv, clip=False, pads=[0, 1, 0, 1])
    starts, ends, axes = (np.array(values, np.int64) for values in ([0, 1], [width, -1], [1, 2]))
    h = g.add("Slice", x, starts, ends, axes)
    return channels_last(g, act(g, g.add("Add", h, sums)), False, width)


def predict(head: Head, name: str, c: Config, width: int, colour: int, g: Graph, integer: bool) -> Graph:
    """What ``Head.colour`` computes first: ``out`` [1, 3 + filters + colour, h, w], not yet limited.

    x [1, h, w, channels]: the state, of ``width``, the spread and what is given of the colours before. Where there are
    filters colour 0 wants the known phases too, uint8 [1, 3 known, h + 4, w + 4], repeated at the border, and gives
    ``linear`` [1, 3 (1 + filters), h, w] in eighths for all colours.
    """
    channels = width + c.beside
    x = channels_first(g, head.in_bytes, channels, "h")
    if head.in_bytes:
        hidden = g.real(of_bytes(g, x, f"{name}.hidden.{colour}", layer(head.hidden[colour]), channels, integer))
    else:
        h, spread, given, _ = g.split(x, [width, 3, 3 * colour, c.beside - 3 - 3 * colour])
        inputs = [(h, width), (spread, 3)] if head.filters else h
        rows = head.hidden.shape[0] // 3
        # Of the layer's limits, at least as wide as what is added and the range of activations, nothing is left after
        # act.
        part = slice(colour * rows, (colour + 1) * rows)
        hidden = exact(g, inputs, f"{name}.hidden", head.hidden, clip=False, part=part)
        if colour:
            more = exact(g, given, f"{name}.given.{colour - 1}", layer(head.given[colour - 1]))
            hidden = g.add("Add", hidden, more)
        hidden = act(g, hidden)
    out = layer(head.out[colour])
    g.output(exact(g, hidden, f"{name}.out.{colour}", out, clip=False), "out", 1, out.shape[0], "h", "w")
    if head.filters and colour == 0:
        known = g.real(g.input("known", 1, head.base.shape[1], "h + 4", "w + 4", kind=BYTE))
        centred = g.add("Sub", known, np.float32(CENTRE))
        linear = exact(g, centred, f"{name}.base", head.base, pads=[0, 0, 0, 0])
        g.output(linear, "linear", 1, head.base.shape[0], "h", "w")
    return g


# Latents are in steps of LATENT_UNIT, means of latents in quarters of it, and linear predictions in steps of 1/256.


def vae_graphs(vae: Vae, c: Config, tensors: dict[str, Tensor]) -> dict[str, Graph]:
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
        graphs[f"likelihood.{colour}"] = predict(vae.head, f"{name}.head", c, width, colour, Graph(tensors), False)
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
    x = g.real(g.input("x", 1, 3, "H", "W", kind=BYTE))
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
    x = g.real(g.input("x", 1, 3, "H", "W", kind=BYTE))
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
