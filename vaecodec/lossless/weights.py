"""The lossless codec's weights, integers all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitstream import Tables

from ..weights import Answer, Stored, arrays_of, freeze, integers_of, nothing_drawn, ready, scrambled, tables_of, write
from .layers import LATENT_FRACTIONS, LATENT_UNIT, MEAN_UNIT, Config, on_grids
from .model import LosslessModel


@dataclass
class LosslessWeights:
    """The lossless codec's networks and tables, ready to run.

    pixel_tables: for (index * SHAPES + shape) * 8 + fraction of the mean, in eighths. prior_tables and
    posterior_tables: for index * 4 + fraction, in quarters; the latter without escape. identity: 16 bytes.
    """

    model: LosslessModel
    pixel_tables: Tables
    prior_tables: Tables
    posterior_tables: Tables
    identity: bytes

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything to a device. float64 is the slow fallback where float32 fails the self-test."""
        to_device: Any = self.model.to  # not all versions of torch declare memory_format
        to_device(device, dtype, memory_format=torch.channels_last)

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
    return ready(assembled(stored), stored, device)


def assembled(stored: Stored) -> LosslessWeights:
    decoder = stored.part("decoder")
    with nothing_drawn():
        model = LosslessModel(Config(**stored.config)).eval().requires_grad_(False).float()
    freeze(dict(model.convs()), decoder)
    model.vae.top_mean.copy_(decoder["top_mean"] * (LATENT_UNIT / LATENT_FRACTIONS))
    model.vae.top_index.copy_(decoder["top_index"])
    pixels, prior, posterior = (tables_of(name, decoder) for name in ("pixels", "prior", "posterior"))
    return LosslessWeights(model, pixels, prior, posterior, stored.identity)
