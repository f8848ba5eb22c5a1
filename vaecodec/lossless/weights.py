"""The lossless codec's weights, integers all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstream import Tables

from ..exact import exact_arithmetic, reach_of
from ..networks import (
    Answer,
    OnDevice,
    arrays_of,
    freeze,
    integers_of,
    nothing_drawn,
    ready,
    scrambled,
    tensors_in,
    write,
)
from ..together import Gathering
from ..weights import Stored, tables_of
from .heads import Head, Start
from .layers import (
    BYTE_UNIT,
    CHANNEL_ORDER,
    LATENT_FRACTIONS,
    LATENT_UNIT,
    MEAN_UNIT,
    PHASES,
    UNIT,
    Config,
    normalised,
    on_grids,
)
from .model import Above, Level, LosslessModel
from .refine import STATE_MAX, Layers, layers_of
from .stripes import in_stripes
from .tile import Bytes, Values


@dataclass
class LosslessWeights(OnDevice):
    """The lossless codec's networks and tables, ready to run.

    pixel_tables: for (index * SHAPES + shape) * 8 + fraction of the mean, in eighths. prior_tables and
    posterior_tables: for index * 4 + fraction, in quarters; the latter without escape. refiners: see ``refine``.
    identity: 16 bytes. gathering: see ``OnDevice``.
    """

    model: LosslessModel
    pixel_tables: Tables
    prior_tables: Tables
    posterior_tables: Tables
    refiners: dict[str, Layers]
    identity: bytes
    gathering: Gathering = field(default_factory=Gathering, repr=False, compare=False)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything to a device. float64 is the slow fallback where float32 fails the self-test."""
        to_device: Any = self.model.to  # not all versions of torch declare memory_format
        to_device(device, dtype, memory_format=torch.channels_last)

    def __post_init__(self) -> None:
        self.config: Config = self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.vae.top_mean.device

    # What coders ask for, see ``tile.Networks``: arrays in and out, whatever the device, but tensors where it codes.
    # The order is the decoder's, see ``batched``.

    def inference(self, x: Bytes) -> list[Tensor]:
        with exact_arithmetic(self.device):
            return list(self.batched(0, self.model.vae.inference, 0, self.tensor(x)))

    def prior(self, g: int, above: Above | None, rows: int, columns: int) -> tuple[Values, Values]:
        with exact_arithmetic(self.device):
            if above is None:
                like = self.model.vae.top_mean.new_empty(1, 1, rows, columns)
                return self.in_steps(*self.model.vae.prior_of(g, None, like))
            return self.in_steps(*self.batched(self.order(g) + 1, self.model.vae.prior[g], 0, *above))

    def posterior(self, g: int, above: Above | None, features: Tensor, x: Bytes) -> tuple[Values, Values]:
        def posterior(features: Tensor, x: Tensor, *above: Tensor) -> tuple[Tensor, Tensor]:
            return self.model.vae.posterior_of(g, Above(*above) if above else None, features, x)

        with exact_arithmetic(self.device):
            return self.in_steps(*self.batched(self.order(g) + 2, posterior, 0, features, self.tensor(x), *above or ()))

    def descend(self, g: int, above: Above | None, z: Values) -> Above:
        def descend(z: Tensor, *above: Tensor) -> Above:
            return self.model.vae.descend(g, Above(*above) if above else None, z)

        with exact_arithmetic(self.device):
            return Above(*self.batched(self.order(g) + 3, descend, 0, self.tensor(z) * LATENT_UNIT, *above or ()))

    def likelihood(self, above: Above, rows: int, columns: int) -> Colours:
        vae, order = self.model.vae, itertools.count(self.order(-1))

        def begin(h: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
            return vae.last(h), vae.centre(Above(h, linear))

        with exact_arithmetic(self.device):
            h, centre = self.batched(next(order), begin, 0, *above)
            return Colours(self, order, vae.head, h[..., :rows, :columns], Start(centre[..., :rows, :columns]))

    def level(self, depth: int, a: Bytes, features: Tensor | None) -> LevelState:
        level, order = self.model.levels[depth], itertools.count(1000 * (1 + depth))
        assert isinstance(level, Level)
        with exact_arithmetic(self.device):
            return LevelState(self, order, level, self.tensor(a), features)

    def order(self, g: int) -> int:
        """Of the first network of a group of latents, or, -1, of the likelihood."""
        return 4 * (len(self.config.latents) - g)

    def in_steps(self, mean: Tensor, index: Tensor) -> tuple[Values, Values]:
        """Of latents, as coders take them: means in quarters of a step."""
        return self.symbols(mean[0] * (LATENT_FRACTIONS / LATENT_UNIT)), self.symbols(index[0])

    def tensor(self, x: NDArray[Any] | Tensor) -> Tensor:
        """[1, C, H, W] as the layers take it."""
        parameter = self.model.vae.top_mean
        x = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
        tensor = x[None].to(parameter.device, parameter.dtype)
        return tensor.contiguous(memory_format=torch.channels_last)

    def known_answer(self) -> int:
        """CRC-32 of what the exact networks answer to fixed inputs: an ordinary tile, and one at every limit."""
        model, answer = self.model, Answer()
        parameter = model.vae.top_mean
        groups = len(model.config.latents)
        with torch.inference_mode():
            for spread in (24, 2**20):
                side = 2 ** (model.config.levels + groups)
                x = (scrambled(3, 2 * side, 3 * side, spread, parameter.device) + 128).clamp(0, 255).to(parameter.dtype)
                step = 2**model.config.levels
                features, above = model.vae.inference(x[..., ::step, ::step]), None
                for g in range(groups - 1, -1, -1):
                    prior = model.vae.prior_of(g, above, features[g])
                    posterior = model.vae.posterior_of(g, above, features[g], x[..., ::step, ::step])
                    for mean, index in (prior, posterior):
                        answer.add(mean, LATENT_UNIT / LATENT_FRACTIONS)
                        answer.add(index, 1)
                    channels, height, width = posterior[0].shape[1:]
                    z = scrambled(channels, height, width, spread, parameter.device).to(parameter.dtype)
                    above = model.vae.descend(g, above, posterior[0] + z * (LATENT_UNIT / LATENT_FRACTIONS))
                assert above is not None
                for phases in ([model.vae.likelihood(x[..., ::step, ::step], above)], *model.phases(x)):
                    for part in phases:
                        for tensor in part:
                            answer.add(tensor, MEAN_UNIT)
        return answer.crc


class Colours:
    """See ``tile.Colours``. order: of what is asked next; h [1, width, h, w]: state; start: what means start from."""

    def __init__(self, weights: LosslessWeights, order: Iterator[int], head: Head, h: Tensor, start: Start) -> None:
        self.weights, self.order, self.head, self.h, self.start = weights, order, head, h, start
        self.x = torch.empty_like(start.centre)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def predict(self) -> Values:
        k, start = len(self.seen), self.start
        c = CHANNEL_ORDER[k]
        with exact_arithmetic(self.weights.device):
            centre = start.centre[:, c] + self.x[:, 1] if k and start.linear is not None else start.centre[:, c]
            network = partial(in_stripes, partial(colour, self.head, k), self.head.reach_of_colour)
            inputs = (self.h, start.linear, start.spread, centre, *itertools.chain(*self.seen))
            self.mean, self.index, shape = self.weights.batched(next(self.order), network, 0, *inputs)
            prediction: Values = self.weights.symbols(torch.cat([self.mean / MEAN_UNIT, self.index, shape]))
            return prediction

    def see(self, x: Bytes) -> None:
        c = CHANNEL_ORDER[len(self.seen)]
        with exact_arithmetic(self.weights.device):
            self.x[:, c] = self.weights.tensor(x[None])[:, 0]
            residual = self.x[:, c] - self.mean
            self.seen.append((residual, normalised(residual, self.index, True)))

    def normal(self) -> Tensor:
        """Residuals of all colours in scales [1, 3, h, w]."""
        return torch.stack([e for _, e in self.seen], 1)


def colour(
    head: Head, k: int, h: Tensor, linear: Tensor | None, spread: Tensor | None, centre: Tensor, *seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``Head.colour`` from the state on, so that nothing between the two is kept for more than a stripe."""
    return head.colour(k, head.enter(h, spread, k)[0], linear, centre, list(zip(seen[::2], seen[1::2], strict=True)))


class LevelState:
    """See ``tile.State``. order: of what is asked next."""

    def __init__(
        self, weights: LosslessWeights, order: Iterator[int], level: Level, a: Tensor, features: Tensor | None
    ) -> None:
        self.weights, self.order, self.level, self.known = weights, order, level, [a]
        inputs = (a,) if features is None else (a, features[None])
        self.h, self.mean = self._asked(level.enter, level.reach, *inputs)
        self._begin()

    def _asked(self, network: Callable[..., Any], margin: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What a network gives, stripe by stripe and maybe in a batch. margin: how many rows it looks beyond each."""
        asked: tuple[Tensor, ...] = self.weights.batched(
            next(self.order), partial(in_stripes, network, margin), 0, *inputs
        )
        return asked

    def _begin(self) -> None:
        if len(self.known) <= len(PHASES):
            self.phase = PHASES[len(self.known) - 1]
            head = self.level.head(self.phase)
            start = Start(*self._asked(partial(self.level.prepare, self.phase), head.reach, *self.known))
            self.colours = Colours(self.weights, self.order, head, self.h, start)

    def activations(self) -> Any:
        unit = BYTE_UNIT if self.weights.config.in_bytes else UNIT
        h = (self.h[0] / unit).clamp(max=STATE_MAX).to(torch.uint8).permute(1, 2, 0)
        return h if self.weights.codes else self.weights.get(h)

    def predict(self) -> Values:
        return self.colours.predict()

    def see(self, x: Bytes) -> None:
        self.colours.see(x)
        if len(self.colours.seen) < len(CHANNEL_ORDER):
            return
        with exact_arithmetic(self.weights.device):
            pixels = self.colours.x
            if self.phase in self.level.updates:
                margin, update = reach_of(self.level.updates[self.phase]), partial(self.level.update, self.phase)
                (self.h,) = self._asked(update, margin, self.h, pixels - self.mean, self.colours.normal())
            self.known.append(pixels)
            self._begin()

    def features(self) -> Tensor:
        assert self.level.up is not None
        with exact_arithmetic(self.weights.device):
            return self._asked(self.level.features, reach_of(self.level.up), self.h)[0][0]


def save_lossless(path: Path, trained: LosslessModel, pixels: Tables, prior: Tables, posterior: Tables) -> None:
    """As ``save_lossy``; a lossless decoder needs every network."""
    decoder = integers_of(dict(trained.convs()))
    mean, index = on_grids(trained.vae.top_mean.detach(), trained.vae.top_index.detach(), True)
    decoder["top_mean"] = (mean / LATENT_UNIT * LATENT_FRACTIONS).round().to(torch.int32)
    decoder["top_index"] = index.round().to(torch.int32)
    decoder |= arrays_of("pixels", pixels) | arrays_of("prior", prior) | arrays_of("posterior", posterior)
    write(path, "lossless", trained.config, decoder, {}, assembled)


def load(stored: Stored, device: torch.device) -> LosslessWeights:
    """Raises ValueError and the like for tensors that do not fit, WeightsError where arithmetic is not exact."""
    with exact_arithmetic(device):
        return ready(assembled(stored), stored, device)


def assembled(stored: Stored) -> LosslessWeights:
    decoder = tensors_in(stored, "decoder")
    with nothing_drawn():
        model = LosslessModel(Config(**stored.config)).eval().requires_grad_(False).float()
    freeze(dict(model.convs()), decoder)
    model.vae.top_mean.copy_(decoder["top_mean"] * (LATENT_UNIT / LATENT_FRACTIONS))
    model.vae.top_index.copy_(decoder["top_index"])
    pixels, prior, posterior = (tables_of(name, stored.part("decoder")) for name in ("pixels", "prior", "posterior"))
    refiners = layers_of(stored.part("decoder"), model.config)
    return LosslessWeights(model, pixels, prior, posterior, refiners, stored.identity)
