"""The lossless networks on a CPU through ONNX Runtime, see ``engine_onnx``."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..engine_onnx import Answer, Array, Bytes, Floats, Integers, Sessions
from ..weights import Stored, WeightsError, scrambled_array as scrambled, tables_of
from .numbers import (
    CENTRE,
    CHANNEL_ORDER,
    LATENT_MAX,
    LATENT_SCALES,
    PHASES,
    SCALE_MAX,
    SCALE_MIN,
    SCALES as PIXEL_SCALES,
    SHAPES as PIXEL_SHAPES,
    Config,
)
from .refine import layers_of

Result = TypeVar("Result")

GIVEN_MAX = 512
LOGARITHMS = np.array([round(32 * math.log2(1 + n / 8)) for n in range(4096)], np.float32)
"""32 log2(1 + |x|) for |x| in eighths."""
INVERSES = np.array(
    [round(128 / (SCALE_MIN * (SCALE_MAX / SCALE_MIN) ** (n / (PIXEL_SCALES - 1)))) / 64 for n in range(PIXEL_SCALES)],
    np.float32,
)
"""By scale index: from a residual in eighths to one in scales, in steps of an activation."""
MARGIN = 2
"""Known pixels come with so many more on all sides, those at the border repeated."""
STRIPE = 4096
"""Pixels of a phase that are computed together: what lies between two layers then stays in the caches."""


class Above(NamedTuple):
    """What coarser latents say: activations [width, h, w], a linear prediction [C, h, w] and, but after the finest,
    the next prior's mean, in quarters of a step, and scale index, int32 [C, h, w]."""

    h: Floats
    linear: Floats
    prior: tuple[Integers, Integers] | None


class LosslessNetworks(Sessions):
    """The networks of the lossless codec. Raises WeightsError also where they do not give the known answer."""

    kernel = "float32"

    def __init__(self, source: str | os.PathLike[str] | Stored, threads: int = 1) -> None:
        super().__init__(source, threads)
        self.config, decoder = Config(**self.settings), self.part("decoder")
        self.pixel_tables, self.prior_tables, self.posterior_tables = (
            tables_of(name, decoder) for name in ("pixels", "prior", "posterior")
        )
        self.refiners = layers_of(decoder, self.config.refined)
        self._intra_op = 1  # stripes are shared out among threads, which waits less than sharing out operators
        self.groups = len(self.config.latents)
        if f"{self.known_answer():08x}" != self.answer:
            raise WeightsError(f"{self.path.name} fails its self-test in ONNX Runtime {onnxruntime.__version__}")

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
        return Colours(self, "likelihood", [np.ascontiguousarray(h)], centre, 8 * 64)

    def level(self, depth: int, a: Bytes, features: Floats | None) -> LevelState:
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

    stripes: the state, [1, width, rows, w] each; centre: where means start, in halves, int16 [3, h, w], of red and blue
    less green if there are known pixels; span: the mean's change, in 2048ths, for an output's 256th; spread: how far
    known pixels lie apart, an activation [1, 3, h, w]; known: these pixels, uint8 [1, 3 phases, h + 4, w + 4].
    """

    def __init__(
        self,
        networks: LosslessNetworks,
        graph: str,
        stripes: list[Array],
        centre: NDArray[np.int16],
        span: int,
        spread: Array | None = None,
        known: Array | None = None,
    ) -> None:
        self._networks, self._graph, self._stripes, self._span = networks, graph, stripes, span
        self._centre, self._spread, self._known = centre, spread, known
        rows, columns = centre.shape[1:]
        self._tops = tops_of(stripes)
        self._given = np.empty((1, 6, rows, columns), np.float32)
        self._linear: list[Array | None] = [None] * len(stripes)
        self._residuals: list[Array] = []
        self._prediction = np.empty((3, rows, columns), np.int32)
        self.colour = 0
        self.x = np.empty((3, rows, columns), np.uint8)
        self.normal = np.empty((3, rows, columns), np.float32)
        """Samples and residuals in scales, in coding order."""

    def predict(self) -> Integers:
        """int32 [3, h, w] for the next colour, green, red or blue: mean in eighths, scale index, shape."""
        self._prediction = np.empty_like(self._prediction)
        self._networks.each(self._predict, len(self._stripes))
        return self._prediction

    def _predict(self, stripe: int) -> None:
        k, h, top = self.colour, self._stripes[stripe], self._tops[stripe]
        rows = slice(top, top + h.shape[2])
        inputs = {"h": h}
        if self._spread is not None:
            inputs["spread"] = np.ascontiguousarray(self._spread[:, :, rows])
        if k:
            inputs["given"] = np.ascontiguousarray(self._given[:, : 3 * k, rows])
        elif self._known is not None:
            inputs["known"] = np.ascontiguousarray(self._known[:, :, top : rows.stop + 2 * MARGIN])
        out, *linear = self._networks.run(f"{self._graph}.{k}", inputs)
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
            given = self._given[0, 3 * k :]
            given[0] = halved(residual, 1).clip(-GIVEN_MAX, GIVEN_MAX)
            given[1], given[2] = self.normal[k], LOGARITHMS.take(abs(residual))
        self._residuals.append(residual)
        self.colour += 1


def tops_of(stripes: list[Array]) -> list[int]:
    """The row where each begins."""
    return [0, *itertools.accumulate(stripe.shape[2] for stripe in stripes)]


def halved(x: Array, times: int) -> Array:
    """Integers divided by 2**times, rounded half to even."""
    half: Array = x + ((1 << times - 1) - 1) + (x >> times & 1) >> times
    return half


def local_mean(x: NDArray[np.int16]) -> NDArray[np.int16]:
    """16 times the binomial 3x3 mean of x [3, h, w]; the border is repeated."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), "edge")
    x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    mean: NDArray[np.int16] = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return mean


def nearest(phase: str, known: list[Bytes]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """See ``lossless.nearest``: int16 [3, h, w] both, the first in halves. known: uint8 with MARGIN."""

    def apart(pixels_8: Bytes) -> NDArray[np.int16]:
        pixels = pixels_8.astype(np.int16)
        pixels[::2] -= pixels[1]
        return pixels

    def at(pixels: NDArray[np.int16], row: int, column: int) -> NDArray[np.int16]:
        rows, columns = (size - 2 * MARGIN for size in pixels.shape[1:])
        return pixels[:, MARGIN + row : MARGIN + row + rows, MARGIN + column : MARGIN + column + columns]

    a = apart(known[0])
    d = a if phase == "D" else apart(known[1])
    places = {
        "D": ((a, 0, 0), (a, 1, 1), (a, 0, 1), (a, 1, 0)),
        "B": ((a, 0, 0), (a, 0, 1), (d, -1, 0), (d, 0, 0)),
        "C": ((a, 0, 0), (a, 1, 0), (d, 0, -1), (d, 0, 0)),
    }
    first, second, third, fourth = (at(*place) for place in places[phase])
    lows = np.minimum(first, second), np.minimum(third, fourth)
    highs = np.maximum(first, second), np.maximum(third, fourth)
    middle = np.maximum(*lows) + np.minimum(*highs)
    return middle, np.maximum(*highs) - np.minimum(*lows)


def padded(x: Bytes) -> Bytes:
    return np.pad(x, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), "edge")


def with_rows(x: Array) -> Array:
    """float32 [1, C, h + 2, w] of x [C, h, w], with zeros above and below."""
    padded = np.zeros((1, x.shape[0], x.shape[1] + 2, x.shape[2]), np.float32)
    padded[0, :, 1:-1] = x
    return padded


class LevelState:
    """The phases D, B and C of a level and of each phase green, red and blue, one after the other: ``predict``, then
    ``see``; after the last, ``features``."""

    def __init__(self, networks: LosslessNetworks, name: str, a: Bytes, features: Floats | None) -> None:
        self._networks, self._name = networks, name
        self._known = [padded(a)]
        steps = a.astype(np.int16)
        self._mean = halved(local_mean(steps), 2)  # quarters
        coarse = 2 * (self._mean - halved(local_mean(self._mean), 4))
        bands = np.concatenate([4 * steps - self._mean, self._mean - 4 * CENTRE, coarse])
        whole = {"bands": with_rows(bands.clip(-GIVEN_MAX, GIVEN_MAX))}
        if features is not None:
            whole["features"] = with_rows(features)
        height = max(1, STRIPE // a.shape[2])

        def enter(stripe: int) -> Array:
            rows = slice(stripe * height, min((stripe + 1) * height, a.shape[1]) + 2)
            inputs = {key: np.ascontiguousarray(part[:, :, rows]) for key, part in whole.items()}
            return networks.run(f"{name}.entry", inputs)[0]

        self._stripes = networks.each(enter, -(-a.shape[1] // height))
        self._tops = tops_of(self._stripes)
        block = 0
        while f"{name}.blocks.{block}" in networks.initializers:
            self._layer(f"{name}.blocks.{block}")
            block += 1
        self._begin()

    def _layer(self, graph: str, more: Array | None = None) -> None:
        """A residual layer over the state. more [1, C, h + 2, w]: channels that it sees beside."""
        before, top = self._stripes, self._tops
        zeros = np.zeros_like(before[0][:, :, :1])

        def layer(stripe: int) -> Array:
            h = before[stripe]
            above = before[stripe - 1][:, :, -1:] if stripe else zeros
            below = before[stripe + 1][:, :, :1] if stripe + 1 < len(before) else zeros
            inputs = {"h": h, "around": np.concatenate([above, h, below], 2)}
            if more is not None:
                inputs["more"] = np.ascontiguousarray(more[:, :, top[stripe] : top[stripe] + h.shape[2] + 2])
            return self._networks.run(graph, inputs)[0]

        self._stripes = self._networks.each(layer, len(before))

    def _begin(self) -> None:
        if len(self._known) > len(PHASES):
            return
        phase = PHASES[len(self._known) - 1]
        centre, spread = nearest(phase, self._known)
        self._colours = Colours(
            self._networks,
            f"{self._name}.{phase}",
            self._stripes,
            centre,
            8 * 8,
            LOGARITHMS.take(8 * spread)[None],
            np.concatenate(self._known)[None],
        )

    def predict(self) -> Integers:
        """int32 [3, h, w] for the next colour: mean in eighths, scale index, shape."""
        return self._colours.predict()

    def see(self, x: Bytes) -> None:
        """The colour's samples [h, w]."""
        done = self._colours
        done.see(x)
        if done.colour < 3:
            return
        picture = done.x[[CHANNEL_ORDER.index(c) for c in range(3)]]
        graph = f"{self._name}.{PHASES[len(self._known) - 1]}.update"
        if graph in self._networks.initializers:
            coarse = (4 * picture.astype(np.int16) - self._mean).clip(-GIVEN_MAX, GIVEN_MAX)
            self._layer(graph, with_rows(np.concatenate([coarse, done.normal])))
        self._known.append(padded(picture))
        self._begin()

    def features(self) -> Floats:
        """What the next finer level takes, [F, 2 h, 2 w]."""
        graph = f"{self._name}.features"
        parts = self._networks.each(lambda k: self._networks.run(graph, {"h": self._stripes[k]})[0], len(self._stripes))
        features: Floats = np.concatenate(parts, 2)[0]
        return features
