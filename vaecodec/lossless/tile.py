"""Tiles of lossless files: samples -> phases and latents -> ANS words, and the way back.

Everything is written once, as generators that name the parts of a tile in the order in which they are decoded and are
sent their values; ``bitstream.chain`` runs them forwards to pop and backwards to push.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitstream import (
    BITS_BACK,
    PLAIN,
    RAW,
    ROUNDED,
    AnsStack,
    Codec,
    CorruptError,
    Depths,
    Parts,
    Record,
    Tables,
    Tile,
    VersionError,
    bits_back,
    chain,
    pop_plain,
    push_plain,
    table_codec,
)

from ..arrays import cast, edged, zeros
from ..image import Samples
from ..plain_tiles import check_empty, checked, crc_of, grey_samples, plain_tile, raw_tile, samples_in
from . import refine
from .numbers import CHANNEL_ORDER, LATENT_FRACTIONS, PHASES, Config
from .samples import PixelCodec, passes_parts

T = TypeVar("T")
R = TypeVar("R")

Values = NDArray[np.int32]
Bytes = NDArray[np.uint8]
COLOURS = {1: "green", 0: "red", 2: "blue"}


class Colours(Protocol):
    """The colours of a phase, or of the phases of a level, one after the other: ``predict``, then ``see``."""

    def predict(self) -> Values:
        """int32 [3, h, w] for the next colour, green, red or blue: mean in eighths, scale index, shape."""

    def see(self, x: Bytes) -> None:
        """The colour's samples [h, w]."""


class State(Colours, Protocol):
    """The phases D, B and C of a level."""

    def activations(self) -> Bytes:
        """uint8 [h, w, width]: those that the phase is predicted from, in their unit, at most 255."""

    def features(self) -> Any:
        """What the next finer level takes, [F, 2 h, 2 w]."""


class Networks(Protocol):
    """The lossless networks, whatever runs them: those of ``weights`` by torch, those of ``engine`` by ONNX Runtime.

    Arrays are [channels, rows, columns]. Means of latents are in quarters of a step of their grid. What says what is
    above, and features, are the engine's own. Where the coder runs on a GPU all others are tensors there, those that
    come from here and those that go here.
    """

    pixel_tables: Tables
    prior_tables: Tables
    posterior_tables: Tables
    refiners: dict[str, refine.Layers]
    identity: bytes

    @property
    def config(self) -> Config: ...

    def stack(self, data: bytes | memoryview | None = None, lanes: int | None = 1) -> AnsStack:
        """A stack for this engine's symbols."""

    def put(self, x: NDArray[Any]) -> Any:
        """An array where the coder runs."""

    def get(self, x: Any) -> NDArray[Any]:
        """The inverse of ``put``."""

    def side_by_side(
        self, function: Callable[[T], R], items: Iterable[T], size: Callable[[T], int]
    ) -> Iterator[Callable[[], R]]:
        """A function that codes tiles, for each of some: one by one or, on a GPU, at once; see ``together``."""

    def inference(self, x: Bytes) -> list[Any]:
        """Features of the coarsest picture x [3, 8 h, 8 w] (for three groups of latents), finest first."""

    def prior(self, g: int, above: Any, rows: int, columns: int) -> tuple[Values, Values]:
        """Mean and scale index of p(z_g | coarser latents), [C, rows, columns]."""

    def posterior(self, g: int, above: Any, features: Any, x: Bytes) -> tuple[Values, Values]:
        """Mean and scale index of q(z_g | coarser latents, x)."""

    def descend(self, g: int, above: Any, z: Values) -> Any:
        """What is known after z_g [C, h, w], at twice its resolution."""

    def likelihood(self, above: Any, rows: int, columns: int) -> Colours:
        """p(x | latents) of the coarsest picture."""

    def level(self, depth: int, a: Bytes, features: Any) -> State:
        """p(D, B, C | A) of a level, 0 for the coarsest. a [3, h, w]; features [F, h, w]: of the coarser level, None at
        the coarsest."""


SMALL, FLAT, FEW = 2**16, 0.1, 8
"""See ``may_be_drawn``: samples of a tile; part of pixels that equal the one on the left; pixels to a colour."""


class StarvedError(Exception):
    """There were not enough bits on the stack to pop the latents from."""


def may_be_drawn(samples: Samples) -> bool:
    """Whether samples [h, w, C] have flat places or few colours. On others the plain predictor does not win, and trying
    it would take a quarter of the encoder's time."""
    if samples.shape[2] < 3 or samples.size < SMALL:
        return True
    colours = samples[..., :3]
    flat = (colours[:, 1:] == colours[:, :-1]).all(2).mean()
    some = colours[::8].astype(np.int32) @ np.array([1, 2**8, 2**16], np.int32)
    return bool(flat > FLAT) or len(np.unique(some)) < some.size / FEW


def phase_views(picture: NDArray[np.int32], config: Config, colours: int) -> list[NDArray[np.int32]]:
    """Views into a picture [3, H, W]: what is coded at each level, coarsest first, by phase, colour and pass."""
    views = []
    for level in range(config.levels - 1, -1, -1):
        fine = picture[:, :: 2**level, :: 2**level]
        for row, column in ((1, 1), (0, 1), (1, 0)):  # D, B, C
            phases = [fine[c, row::2, column::2] for c in CHANNEL_ORDER[:colours]]
            if level < config.refined:
                phases = [phase[top::2, left::2] for phase in phases for top, left in refine.PASSES]
            views += phases
    return views


class TileCoder:
    """Codes tiles with one set of weights; ``depth`` bits a sample. thorough: try what is hardly worth it.
    progressive: tiles with networks have parts."""

    def __init__(self, weights: Networks | None, depth: int, thorough: bool = False, progressive: bool = False) -> None:
        self.weights, self.depth, self.thorough, self.progressive = weights, depth, thorough, progressive

    def push(self, samples: Samples) -> Tile:
        """The smallest of the ways to code a tile [h, w, C] that are worth a try."""
        candidates = [raw_tile(samples)]
        if self.weights is not None:
            candidates.append(self._push_network(self.weights, samples))
        if self.weights is None or self.thorough or may_be_drawn(samples):
            candidates.append(plain_tile(samples, self.depth))
        return min(candidates, key=lambda tile: len(tile.words))

    def pop(self, tile: Tile, shape: tuple[int, int, int], record: Record | None = None) -> Samples:
        """The samples of a tile. Raises CorruptError and VersionError.

        Of a tile that is cut off, samples that are missing are what the networks expect, alpha is opaque, and no
        checksum is compared; without any part it is grey.
        """
        if tile.held == 0:
            return grey_samples(shape, self.depth)
        if tile.method in (PLAIN, RAW):
            return samples_in(tile, shape, self.depth)
        if tile.method not in (BITS_BACK, ROUNDED):
            raise VersionError(f"unknown tile method {tile.method}")
        if self.weights is None:
            raise CorruptError("a tile of 16-bit samples asks for the networks")
        stack = self.weights.stack(tile.words, tile.lanes)
        samples = self._pop_network(self.weights, stack, shape, tile.method == ROUNDED, record, tile.held)
        if tile.held is not None:
            return samples
        check_empty(stack)
        return checked(samples, tile)

    def _push_network(self, weights: Networks, samples: Samples) -> Tile:
        height, width, channels = samples.shape
        colours = 3 if channels > 2 else 1
        picture = np.empty((3, height, width), np.int32)
        picture[:] = samples[..., :colours].transpose(2, 0, 1)
        here = weights.put(picture)
        for method in (BITS_BACK, ROUNDED):
            network = Network(weights, height, width, colours, method == ROUNDED)
            stack = weights.stack(lanes=1 if self.progressive else None)
            if channels in (2, 4):
                push_plain(stack, samples[..., -1:], self.depth)
            depths = Depths(stack) if self.progressive else None
            try:
                network.push(stack, here, depths)
            except StarvedError:
                continue
            break
        # The first part is what bits-back pops and pushes: latents, the coarsest picture, latents again.
        parts = depths.parts(2 * len(weights.config.latents) + colours) if depths else ()
        return Tile(method, crc_of(samples), stack.to_bytes(), stack.lanes, parts)

    def _pop_network(
        self,
        weights: Networks,
        stack: AnsStack,
        shape: tuple[int, int, int],
        rounded: bool,
        record: Record | None,
        held: int | None,
    ) -> NDArray[np.uint8]:
        height, width, channels = shape
        colours = 3 if channels > 2 else 1
        picture = Network(weights, height, width, colours, rounded).pop(stack, record, held)
        samples = np.full(shape, 255, np.uint8)
        samples[..., :colours] = weights.get(picture)[:colours].transpose(1, 2, 0)
        if channels in (2, 4) and held is None:
            before = stack.bits()
            samples[..., -1:] = pop_plain(stack, (height, width, 1), self.depth)
            if record:
                record("alpha", before - stack.bits())
        return samples


@dataclass
class Latents:
    """The latents of a tile, the coarsest group first, and what each group says of what is below it: the same whoever
    asks, prior, posterior or likelihood, so that it is computed once, by the first."""

    values: list[Values] = field(default_factory=list)
    above: dict[int, Any] = field(default_factory=dict)


def latent_codec(parts: Callable[[Latents], Parts], record: Record | None) -> Codec[Latents]:
    """Latents of which each group depends on those before it."""

    def push(stack: AnsStack, z: Latents) -> None:
        chain(lambda: parts(z), record).push(stack, z.values)

    def pop(stack: AnsStack) -> Latents:
        z = Latents()
        z.values = chain(lambda: parts(z), record).pop(stack)
        return z

    return Codec(push, pop)


class Network:
    """One tile under the networks. ``colours``: 3, or 1 for a grey picture, whose red and blue follow its green."""

    def __init__(self, weights: Networks, height: int, width: int, colours: int, rounded: bool) -> None:
        self.weights = weights
        self.height, self.width, self.colours, self.rounded = height, width, colours, rounded
        config = weights.config
        self.levels, step = config.levels, 2**config.levels
        self.rows, self.columns = -(-height // step), -(-width // step)  # of the coarsest picture
        block = 2 ** len(config.latents)
        self.padding = ((0, 0), (0, -self.rows % block), (0, -self.columns % block))

    def push(self, stack: AnsStack, picture: NDArray[np.int32], record: Record | None = None) -> None:
        """Push a picture [3, H, W]; the finest level first, so that the latents can be popped from its bits."""
        step = 2**self.levels
        coarsest = picture[:, ::step, ::step]
        views = phase_views(picture, self.weights.config, self.colours)
        values = [view.ravel() for view in views]
        chain(lambda: self._level_parts(coarsest), record).push(stack, values)
        self._coarsest(record).push(stack, [coarsest[c].ravel() for c in CHANNEL_ORDER[: self.colours]])

    def pop(self, stack: AnsStack, record: Record | None, held: int | None = None) -> Bytes:
        """The picture uint8 [3, H, W]. held: if so many parts are all that is on the stack, what follows is guessed."""
        coarsest = self._assembled(self._coarsest(record).pop(stack))
        picture = zeros((3, self.height, self.width), np.int32, coarsest)
        step = 2**self.levels
        picture[:, ::step, ::step] = coarsest
        held = held if held is None else held - 1
        values = chain(lambda: self._level_parts(coarsest), record, held).pop(stack)
        for view, value in zip(phase_views(picture, self.weights.config, self.colours), values, strict=True):
            view[:] = value.reshape(view.shape)
        if self.colours == 1:
            picture[0] = picture[2] = picture[CHANNEL_ORDER[0]]
        if picture.min() < 0 or picture.max() > 255:
            raise CorruptError("a tile fails its checksum")
        samples: Bytes = cast(picture, np.uint8)
        return samples

    def _assembled(self, values: list[Values]) -> NDArray[np.int32]:
        """The coarsest picture [3, h, w] from its colours."""
        picture: Values = zeros((3, self.rows, self.columns), np.int32, values[0])
        for k, c in enumerate(CHANNEL_ORDER):
            picture[c] = values[min(k, self.colours - 1)].reshape(self.rows, self.columns)
        return picture

    def _coarsest(self, record: Record | None) -> Codec[list[Values]]:
        """The coarsest picture and its latents, by bits-back."""

        def likelihood(z: Latents) -> Codec[list[Values]]:
            return chain(lambda: self._likelihood_parts(z), record)

        def posterior(values: list[Values]) -> Codec[Latents]:
            x = cast(self._assembled(values).clip(0, 255), np.uint8)
            return self._checked(latent_codec(lambda z: self._posterior_parts(z, x), record))

        return bits_back(latent_codec(self._prior_parts, record), likelihood, posterior)

    def _checked(self, codec: Codec[Latents]) -> Codec[Latents]:
        """Raises StarvedError where popping would come to the bottom of a lane."""
        if self.rounded:
            return codec

        def pop(stack: AnsStack) -> Latents:
            try:
                z = codec.pop(stack)
            except CorruptError:  # at the bottom already
                raise StarvedError from None
            if stack.least() < 64:
                raise StarvedError
            return z

        def push(stack: AnsStack, z: Latents) -> None:
            try:
                codec.push(stack, z)
            except ValueError:  # popped from a damaged file: the posterior's tables have no escape
                raise CorruptError("a tile fails its checksum") from None

        return Codec(push, pop)

    def _prior_parts(self, z: Latents) -> Parts:
        above = None
        (_, below), (_, right) = self.padding[1:]
        rows, columns = self.rows + below, self.columns + right
        for g in range(len(self.weights.config.latents) - 1, -1, -1):
            mean, index = self.weights.prior(g, above, rows >> g + 1, columns >> g + 1)
            values = yield f"z_{g + 1}", latents_under(mean, index, self.weights.prior_tables)
            above = self._descend(g, z, values, mean)

    def _posterior_parts(self, z: Latents, x: Bytes) -> Parts:
        x = edged(x, *self.padding)
        features, above = self.weights.inference(x), None
        for g in range(len(features) - 1, -1, -1):
            mean, index = self.weights.posterior(g, above, features[g], x)
            tables = None if self.rounded else self.weights.posterior_tables
            values = yield f"z_{g + 1} returned", latents_under(mean, index, tables)
            above = self._descend(g, z, values, mean)

    def _descend(self, g: int, z: Latents, values: Values, like: Values) -> Any:
        """What is known after z_g, where z knows it not yet."""
        if g not in z.above:
            z.above[g] = self.weights.descend(g, z.above.get(g + 1), values.reshape(like.shape))
        return z.above[g]

    def _likelihood_parts(self, z: Latents) -> Parts:
        outside = self.weights.put(np.zeros((3, self.rows, self.columns), np.uint8))
        state = self.weights.likelihood(z.above[0], self.rows, self.columns)
        yield from self._colours("x", state, outside, (self.rows, self.columns))

    def _level_parts(self, coarsest: NDArray[np.int32]) -> Parts:
        a, features = cast(coarsest.clip(0, 255), np.uint8), None
        for depth in range(self.levels):
            number = self.levels - depth
            step = 2 ** (number - 1)
            rows, columns = -(-self.height // step), -(-self.width // step)
            state = self.weights.level(depth, a, features)
            fine = zeros((3, 2 * a.shape[1], 2 * a.shape[2]), np.uint8, a)
            fine[:, ::2, ::2] = a
            known, begin = list[refine.Phase](), None
            for name, row, column in zip(PHASES, (1, 0, 1), (1, 1, 0), strict=True):
                size = (rows + 1 - row) // 2, (columns + 1 - column) // 2
                if number <= self.weights.config.refined:
                    phase, activations = refine.Phase(name, a.shape[1:]), state.activations()[: size[0], : size[1]]
                    begin = partial(refine.Passes, phase=phase, before=tuple(known), activations=activations)
                    known.append(phase)
                x = yield from self._colours(f"{name}_{number}", state, a, size, begin)
                fine[:, row::2, column::2] = x
            if number > 1:
                features = state.features()[:, :rows, :columns]
            a = fine[:, :rows, :columns]

    def _colours(
        self,
        name: str,
        state: Colours,
        outside: Bytes,
        size: tuple[int, int],
        begin: Callable[..., refine.Passes] | None = None,
    ) -> Generator[tuple[str, Codec[Values]], Values, Bytes]:
        """The colours of one phase, of which ``size``, rows and columns, lie inside the picture; samples that do not
        are taken from ``outside``. Returns samples [3, h, w]. begin: makes the passes of a colour, where there are
        any, of its prediction and usage."""
        x: Bytes = cast(outside + 0, np.uint8)
        rows, columns = size
        for k, c in enumerate(CHANNEL_ORDER):
            prediction = state.predict()[:, :rows, :columns]
            inside = x[c, :rows, :columns]
            if k >= self.colours:
                x[c] = x[CHANNEL_ORDER[0]]
            elif begin is None:
                values = yield f"{name} {COLOURS[c]}", PixelCodec(self.weights, prediction).codec()
                inside[:] = values.reshape(inside.shape).clip(0, 255)
            else:
                passes = begin(prediction, usage=refine.usage_of(outside[c]))
                yield from passes_parts(self.weights, f"{name} {COLOURS[c]}", int(name[2:]), passes, inside)
            state.see(x[c])
        return x


def latents_under(mean: Values, index: Values, tables: Tables | None) -> Codec[Values]:
    """Latents under tables; without any, their rounded means."""
    parts = LATENT_FRACTIONS
    if tables is None:
        rounded = ((mean + parts // 2) // parts).ravel()
        return Codec(lambda stack, values: None, lambda stack: rounded)
    locs = mean // parts
    return table_codec(tables, (index * parts + (mean - locs * parts)).ravel(), locs.ravel())
