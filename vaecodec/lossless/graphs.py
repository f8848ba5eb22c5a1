"""The lossless networks as ONNX graphs, see ``graphs``.

Only what has many channels is in these graphs; the arithmetic of single samples, in integers, is the engine's.
Activations are in steps of 1/32, what the last layers give in steps of 1/256. 3x3 layers want a row more above and
below, which the engine fills with neighbours or zeros, so that a picture can be taken in stripes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from ..exact import ExactConv
from ..graphs import INT, Graph, exact
from .heads import Head
from .layers import CENTRE, HIDDEN_MAX as ACTIVATION_MAX, LATENT_MAX, LATENT_SCALES, PHASES, Residual
from .model import Gauss, Level, LosslessModel, Vae

PIXEL = TensorProto.UINT8


def graphs_of(model: LosslessModel, tensors: dict[str, Tensor]) -> dict[str, Graph]:
    """The graphs of the lossless networks by name. ``tensors``: those of the weights file."""
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
