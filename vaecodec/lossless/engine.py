"""The lossless networks on a CPU through ONNX Runtime, see ``engine_onnx``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..engine_onnx import Answer, Array, Bytes, Floats, Integers, Sessions
from ..weights import Stored, WeightsError, scrambled_array as scrambled, tables_of
from .numbers import (
    BYTE_MAX,
    CENTRE,
    CHANNEL_ORDER,
    FLOATING,
    LATENT_MAX,
    LATENT_SCALES,
    PHASES,
    SCALE_MAX,
    SCALE_MIN,
    SCALES as PIXEL_SCALES,
    SHAPES as PIXEL_SHAPES,
    Config,
)
from .pixels import MARGIN, halved, local_mean, nearest, padded
from .refine import STATE_MAX, layers_of

Result = TypeVar("Result")

GIVEN_MAX = 512
LOGARITHMS = np.array([round(32 * math.log2(1 + n / 8)) for n in range(4096)], np.float32)
"""32 log2(1 + |x|) for |x| in eighths."""
LOGARITHM_BYTES = LOGARITHMS.clip(max=BYTE_MAX).astype(np.uint8)
INVERSES = np.array(
    [round(128 / (SCALE_MIN * (SCALE_MAX / SCALE_MIN) ** (n / (PIXEL_SCALES - 1)))) / 64 for n in range(PIXEL_SCALES)],
    np.float32,
)
"""By scale index: from a residual in eighths to one in scales, in steps of an activation."""
KERNELS = {
    "8-bit integers": ("", False),
    "8-bit integers, without saturation": ("", True),
    "float32": (FLOATING, False),
}
"""Ways to run layers of bytes, the fastest first: how the graphs' names end, and whether x86 kernels are to be those
that do not add pairs of products in 16 bits."""
STRIPE = 8192
"""Pixels of a phase that are computed together: what lies between two layers then stays in the caches."""


class Above(NamedTuple):
    """What coarser latents say: activations [width, h, w], a linear prediction [C, h, w] and, but after the finest,
    the next prior's mean, in quarters of a step, and scale index, int32 [C, h, w]."""

    h: Floats
    linear: Floats
    prior: tuple[Integers, Integers] | None


class LosslessNetworks(Sessions):
    """The networks of the lossless codec. ``kernel``: of ``KERNELS``, the first that gives the known answer; weights
    without layers of bytes have the last.

    Raises WeightsError also where none gives the known answer.
    """

    def __init__(self, source: str | os.PathLike[str] | Stored, threads: int = 1) -> None:
        super().__init__(source, threads)
        self.config, decoder = Config(**self.settings), self.part("decoder")
        self.pixel_tables, self.prior_tables, self.posterior_tables = (
            tables_of(name, decoder) for name in ("pixels", "prior", "posterior")
        )
        self.refiners = layers_of(decoder, self.config)
        self._intra_op = 1  # stripes are shared out among threads, which waits less than sharing out operators
        self.groups = len(self.config.latents)
        self.kernel = ""
        kernels = list(KERNELS) if self.config.in_bytes else ["float32"]
        for self.kernel in kernels:
            if f"{self.known_answer():08x}" == self.answer:
                return
        raise WeightsError(f"{self.path.name} fails its self-test in ONNX Runtime {onnxruntime.__version__}")

    def computed(self, graph: str, inputs: dict[str, Array]) -> list[Array]:
        """The outputs of a graph, which may have layers of bytes, by the kernel in use."""
        ending, careful = KERNELS[self.kernel]
        return self.run(graph + ending if self.config.in_bytes else graph, inputs, careful=careful)

    def _forget(self) -> None:
        super()._forget()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def each(self, f: Callable[[int], Result], count: int) -> list[Result]:
        """f of 0..count - 1, on as many threads as there are to be."""
        return list(map(f, range(count)) if self._pool is None else self._pool.map(f, range(count)))

    def inference(self, x: Bytes) -> list[Floats]:
        """Features of the coarsest picture x [3, 8 h, 8 w] (for three groups of latents), finest first."""
        return [part[0] for part in self.run("inference", {"x": x[None]})]

    def prior(self, g: int, above: Above | None, rows: int, columns: int) -> tuple[Integers, Integers]:
        """Mean, in quarters of a step, and scale index of p(z_g | coarser latents), int32 [C, rows, columns]."""
        if above is not None:
            assert above.prior is not None
            return above.prior
        size = (-1, rows, columns)
        mean, index = (self.tensors[f"decoder.top_{part}"][:, None, None] for part in ("mean", "index"))
        limit = 4 * LATENT_MAX
        mean, index = mean.clip(-limit, limit), index.clip(0, LATENT_SCALES - 1)
        return np.broadcast_to(mean, (len(mean), *size[1:])), np.broadcast_to(index, (len(index), *size[1:]))

    def posterior(self, g: int, above: Above | None, features: Floats, x: Bytes) -> tuple[Integers, Integers]:
        """Mean and scale index of q(z_g | coarser latents, x), as those of ``prior``."""
        inputs: dict[str, Array] = {"features": features[None], "x": x[None]}
        if above is not None:
            inputs["above"] = above.h[None]
        mean, index = self.run(f"posterior.{g}", inputs)
        return mean[0], index[0]

    def descend(self, g: int, above: Above | None, z: Integers) -> Above:
        """What is known after z_g int32 [C, h, w], in steps of its grid, at twice its resolution."""
        inputs = {"z": z[None]} if above is None else {"z": z[None], "above": above.h[None]}
        h, linear, *prior = (part[0] for part in self.run(f"descend.{g}", inputs))
        return Above(h, linear, (prior[0], prior[1]) if prior else None)

    def likelihood(self, above: Above, rows: int, columns: int) -> Colours:
        """p(x | latents) of the coarsest picture."""
        h = self.run("last", {"above": above.h[None]})[0][:, :, :rows, :columns]
        centre = (above.linear[:, :rows, :columns] + np.float32(2 * CENTRE)).astype(np.int16)
        x = np.zeros((1, rows + 2, columns, h.shape[1] + self.config.beside), np.float32)
        x[0, 1:-1, :, : h.shape[1]] = h[0].transpose(1, 2, 0)
        return Colours(self, self.run, "likelihood", x, centre, 8 * 64)

    def level(self, depth: int, a: Bytes, features: Array | None) -> LevelState:
        """p(D, B, C | A) of the level ``depth``, 0 for the coarsest. a [3, h, w]; features [F, h, w]: of the coarser
        level, None at the coarsest."""
        return LevelState(self, f"levels.{depth}", a, features)

    def known_answer(self) -> int:
        """CRC-32 of what the networks answer to fixed inputs, as ``LosslessWeights.known_answer``."""
        answer, levels = Answer(), self.config.levels
        step = 2**levels
        for spread in (24, 2**20):
            side = 2 ** (levels + self.groups)
            picture = (scrambled(3, 2 * side, 3 * side, spread) + 128).clip(0, 255).astype(np.uint8)
            x = np.ascontiguousarray(picture[:, ::step, ::step])
            features, above = self.inference(x), None
            for g in range(self.groups - 1, -1, -1):
                mean, index = self.posterior(g, above, features[g], x)
                for part in (*self.prior(g, above, *mean.shape[1:]), mean, index):
                    answer.add(part)
                z = mean + scrambled(len(mean), mean.shape[1], mean.shape[2], spread)
                above = self.descend(g, above, np.rint(z / 4).astype(np.int32))
            assert above is not None
            self._answer(answer, self.likelihood(above, *x.shape[1:]), x)
            coarser = None
            for depth in range(levels):
                step //= 2
                fine = picture[:, ::step, ::step]
                level = self.level(depth, np.ascontiguousarray(fine[:, ::2, ::2]), coarser)
                for row, column in ((1, 1), (0, 1), (1, 0)):
                    self._answer(answer, level, fine[:, row::2, column::2])
                if depth < levels - 1:
                    coarser = level.features()
            step = 2**levels
        return answer.crc

    def _answer(self, answer: Answer, state: Colours | LevelState, x: Array) -> None:
        """One phase's residuals, indices and shapes, in eighths."""
        parts = []
        for c in CHANNEL_ORDER:
            mean, index, shape = state.predict()
            state.see(x[c])
            parts.append((x[c].astype(np.int32) * 8 - mean, index * 8, shape * 8))
        for part in zip(*parts, strict=True):
            answer.add(np.stack(part))


class Colours:
    """The colours of a phase, one after the other: ``predict``, then ``see``.

    run: runs graphs; x: the state, [1, h + 2, w, width + beside], whose channels beside are filled here; centre: where
    means start, in halves, int16 [3, h, w], of red and blue less green if there are known pixels; span: the mean's
    change, in 2048ths, for an output's 256th; spread: how far known pixels lie apart, in eighths [3, h, w]; known:
    these pixels, uint8 [1, 3 phases, h + 4, w + 4].
    """

    def __init__(
        self,
        networks: LosslessNetworks,
        run: Callable[[str, dict[str, Array]], list[Array]],
        graph: str,
        x: Array,
        centre: NDArray[np.int16],
        span: int,
        spread: NDArray[np.int16] | None = None,
        known: Array | None = None,
    ) -> None:
        self._networks, self._run, self._graph, self._state, self._span = networks, run, graph, x, span
        self._centre, self._known = centre, known
        self._width = x.shape[3] - networks.config.beside
        rows, columns = centre.shape[1:]
        self._stripes = stripes_of(rows, columns)
        self._linear: list[Array | None] = [None] * len(self._stripes)
        self._residuals: list[Array] = []
        self._prediction = np.empty((3, rows, columns), np.int32)
        self._given = self._width + 3
        if spread is not None:
            place(x, self._width, logarithm(spread, x.dtype))
        self.colour = 0
        self.x = np.empty((3, rows, columns), np.uint8)
        self.normal = np.empty((3, rows, columns), np.int16)
        """Samples and residuals in scales, in coding order."""

    def predict(self) -> Integers:
        """int32 [3, h, w] for the next colour, green, red or blue: mean in eighths, scale index, shape."""
        self._prediction = np.empty_like(self._prediction)
        self._networks.each(self._predict, len(self._stripes))
        return self._prediction

    def _predict(self, stripe: int) -> None:
        k, rows = self.colour, self._stripes[stripe]
        inputs = {"x": self._state[:, rows.start + 1 : rows.stop + 1]}
        if not k and self._known is not None:
            inputs["known"] = np.ascontiguousarray(self._known[:, :, rows.start : rows.stop + 2 * MARGIN])
        out, *linear = self._run(f"{self._graph}.{k}", inputs)
        if linear:
            self._linear[stripe] = linear[0][0]
        self._finish(out[0], rows, self._linear[stripe])

    def _finish(self, out: Array, rows: slice, linear: Array | None) -> None:
        """Rows of the prediction from the networks' outputs [C, h, w] in steps of 1/256. All sums are of 2048ths."""
        k = self.colour
        out = out.clip(-16 * 256, 16 * 256, out=out)
        filters = 0 if linear is None else len(linear) // 3 - 1
        mean = self._centre[CHANNEL_ORDER[k], rows] * np.float32(1024)
        mean += out[0] * np.float32(self._span)
        if linear is not None:
            own = linear[k * (1 + filters) : (k + 1) * (1 + filters)]
            if k:
                mean += self.x[0, rows] * np.float32(2048)
            mean += own[0] * np.float32(256)
            gates = out[3 : 3 + filters]
            gates *= np.float32(1 / 8)
            mean += np.einsum("chw,chw->hw", own[1:], np.rint(gates, out=gates))
        for residual, share in zip(self._residuals, out[3 + filters :], strict=True):
            share *= np.float32(1 / 2)
            share = np.rint(share, out=share).clip(-512, 512, out=share)
            mean += np.multiply(residual[rows], share, out=share)
        mean *= np.float32(1 / 256)
        index, shape = out[1], out[2]
        index *= np.float32(1 / 64)
        index += np.float32(16)
        shape *= np.float32(1 / 128)
        shape += np.float32(1)
        most = (255 * 8, PIXEL_SCALES - 1, PIXEL_SHAPES - 1)
        for number, (part, limit) in enumerate(zip((mean, index, shape), most, strict=True)):
            self._prediction[number, rows] = np.rint(part, out=part).clip(0, limit, out=part)

    def see(self, x: Bytes) -> None:
        """The colour's samples [h, w]."""
        k = self.colour
        mean, index, _ = self._prediction
        self.x[k] = x
        residual = ((self.x[k].astype(np.int16) << 3) - mean).astype(np.int16)
        self.normal[k] = np.rint(residual * INVERSES.take(index)).clip(-256, 256)
        if k < 2:
            kind, one = self._state.dtype, slice(k, k + 1)
            self._given = place(
                self._state,
                self._given,
                *coarse(halved(residual[None], 1), kind),
                *signs(self.normal[one], kind),
                logarithm(abs(residual[None]), kind),
            )
        self._residuals.append(residual)
        self.colour += 1


def stripes_of(rows: int, columns: int) -> list[slice]:
    """Rows that are computed together."""
    height = max(1, STRIPE // columns)
    return [slice(top, min(top + height, rows)) for top in range(0, rows, height)]


def place(x: Array, channel: int, *parts: Array) -> int:
    """Put parts [C, h, w] into x [1, h + 2, w, channels] from a channel on; where the next begins."""
    for part in parts:
        x[0, 1:-1, :, channel : channel + len(part)] = part.transpose(1, 2, 0)
        channel += len(part)
    return channel


def coarse(x: NDArray[np.int16], kind: np.dtype[Any]) -> list[Array]:
    """Numbers in steps of an activation, limited, or of their halves, rounded down, what is above and below 0, and what
    is left: see ``layers.coarse_bytes``."""
    x = x.clip(-GIVEN_MAX, GIVEN_MAX)
    if kind != np.uint8:
        return [x]
    half = x >> 1
    return [half.clip(0, BYTE_MAX), (-half).clip(0, BYTE_MAX), x & 1]


def signs(x: NDArray[np.int16], kind: np.dtype[Any]) -> list[Array]:
    """Or what is above and below 0."""
    return [x.clip(0, BYTE_MAX), (-x).clip(0, BYTE_MAX)] if kind == np.uint8 else [x]


def logarithm(x: NDArray[np.int16], kind: np.dtype[Any]) -> Array:
    """Of numbers in eighths that are not negative."""
    table: Array = LOGARITHM_BYTES if kind == np.uint8 else LOGARITHMS
    return table.take(x)


class LevelState:
    """The phases D, B and C of a level and of each phase green, red and blue, one after the other: ``predict``, then
    ``see``; after the last, ``features``."""

    def __init__(self, networks: LosslessNetworks, name: str, a: Bytes, features: Array | None) -> None:
        self._networks, self._name, c = networks, name, networks.config
        self._known = [padded(a)]
        steps = a.astype(np.int16)
        self._mean = halved(local_mean(steps), 2)  # quarters
        wide = 2 * (self._mean - halved(local_mean(self._mean), 4))
        bands = np.concatenate([4 * steps - self._mean, self._mean - 4 * CENTRE, wide])
        self._x = np.zeros((1, a.shape[1] + 2, a.shape[2], c.entered(0 if features is None else len(features))), c.kind)
        if features is None:
            place(self._x, 0, *coarse(bands, c.kind))
        elif c.in_bytes:
            place(self._x, 0, features, *coarse(bands, c.kind))
        else:
            place(self._x, 0, bands.clip(-GIVEN_MAX, GIVEN_MAX), features)
        layers = ["entry"]
        while f"{name}.blocks.{len(layers) - 1}" in networks.initializers:
            layers.append(f"blocks.{len(layers) - 1}")
        for layer in layers:
            self._layer(layer, c.beside if layer == layers[-1] else 0)
        self._begin()

    def _layer(self, graph: str, beside: int) -> None:
        """A 3x3 layer over the state, which then has room for channels beside."""
        before, width = self._x, self._networks.config.width
        self._x = np.zeros((*before.shape[:3], width + beside), before.dtype)
        stripes = stripes_of(before.shape[1] - 2, before.shape[2])

        def layer(stripe: int) -> None:
            rows = stripes[stripe]
            inputs = {"x": before[:, rows.start : rows.stop + 2]}
            (y,) = self._networks.computed(f"{self._name}.{graph}", inputs)
            self._x[:, rows.start + 1 : rows.stop + 1, :, :width] = y

        self._networks.each(layer, len(stripes))

    def _begin(self) -> None:
        phase = PHASES[len(self._known) - 1]
        centre, spread = nearest(phase, self._known)
        known = np.concatenate(self._known)[None]
        networks, graph = self._networks, f"{self._name}.{phase}"
        self._colours = Colours(networks, networks.computed, graph, self._x, centre, 8 * 8, 8 * spread, known)

    def activations(self) -> Bytes:
        """See ``tile.State``."""
        x: Array = self._x[0, 1:-1, :, : self._networks.config.width]
        return x if x.dtype == np.uint8 else x.clip(max=STATE_MAX).astype(np.uint8)

    def predict(self) -> Integers:
        """int32 [3, h, w] for the next colour: mean in eighths, scale index, shape."""
        return self._colours.predict()

    def see(self, x: Bytes) -> None:
        """The colour's samples [h, w]."""
        done, c = self._colours, self._networks.config
        done.see(x)
        if done.colour < 3:
            return
        picture = done.x[[CHANNEL_ORDER.index(c) for c in range(3)]]
        more = len(self._known) < len(PHASES)
        graph = f"updates.{PHASES[len(self._known) - 1]}"
        if f"{self._name}.{graph}" in self._networks.initializers:
            difference = 4 * picture.astype(np.int16) - self._mean
            place(self._x, c.width, *coarse(difference, c.kind), *signs(done.normal, c.kind))
            self._layer(graph, c.beside if more else 0)
        self._known.append(padded(picture))
        if more:
            self._begin()

    def features(self) -> Array:
        """What the next finer level takes, [F, 2 h, 2 w]."""
        x = self._x[:, 1:-1]
        (y,) = self._networks.computed(f"{self._name}.features", {"x": x})
        rows, columns = x.shape[1:3]
        shuffled: Array = y.reshape(rows, columns, -1, 2, 2).transpose(0, 3, 1, 4, 2)
        return shuffled.reshape(2 * rows, 2 * columns, -1).transpose(2, 0, 1)
