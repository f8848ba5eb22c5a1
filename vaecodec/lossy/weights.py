"""The lossy codec's weights: integers for the decoder, half floats for the encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitstream import Tables

from ..exact import exact_arithmetic, interpolate, per_channel
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
from .layers import GAIN_BITS, SCALES, STREAM_MAX, STREAM_UNIT, UNIT, Config, centred, in_8_bits
from .model import LossyModel
from .numbers import KNOWN_INPUTS, STEPS, Steps
from .tile import RATE_WEIGHT, Floats, Symbols, quantised


@dataclass
class LossyWeights(OnDevice):
    """The lossy codec's networks and numbers, ready to run.

    model: frozen networks. tables: entropy tables, one for each scale index. identity: 16 bytes.
    inverse: int64 [knots, M], gains of g_s's input in steps of 2**-GAIN_BITS; z_mean: int64 [knots, C_z] in steps of
    1/16; z_index: int64 [knots, C_z], table numbers. gathering: see ``OnDevice``.
    """

    model: LossyModel
    tables: Tables
    identity: bytes
    inverse: Tensor
    z_mean: Tensor
    z_index: Tensor
    gathering: Gathering = field(default_factory=Gathering, repr=False, compare=False)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything to a device. float64 is the slow fallback where float32 fails the self-test."""
        to_device: Any = self.model.to  # not all versions of torch declare memory_format
        to_device(device, dtype, memory_format=torch.channels_last)
        self.inverse, self.z_mean, self.z_index = (x.to(device) for x in (self.inverse, self.z_mean, self.z_index))

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def margin(self) -> int:
        """How many latents around a tile analysis and synthesis see; two samples at 1/8 are one latent."""
        return self.model.config.margin

    # What coders ask for, see ``tile.Networks``: arrays in and out, whatever the device.

    def gains(self, quality: int) -> NDArray[np.int64]:
        gains: NDArray[np.int64] = interpolate(self.inverse, self.at(quality))[0].cpu().numpy()
        return gains

    def prior(self, quality: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        mean, index = (interpolate(part, self.at(quality))[0].cpu().numpy() for part in (self.z_mean, self.z_index))
        return mean, index

    def quantised(self, residual: Any, ids: Any) -> Any:
        if not self.codes:
            return quantised(self.tables, residual, ids)
        from ..device_coder import bits

        values = residual.ravel().double()
        near = values.round()
        lower = near - near.sign()
        saved = bits(self.tables, ids, near.long()) - bits(self.tables, ids, lower.long())
        worse = (values - lower) ** 2 - (values - near) ** 2
        return torch.where((near != 0) & (worse < RATE_WEIGHT * saved), lower, near).int()

    def analyse(self, x: Floats, quality: int, seen: Floats | None = None) -> Floats:
        with exact_arithmetic(self.device):
            q = self.at(quality)
            y = self.model.g_a(self.tensor(x), q, self.mask(seen))
            return array(self.quantiser_units(y, q))

    def hyper_analyse(self, y: Floats, quality: int) -> Floats:
        with exact_arithmetic(self.device):
            return array(self.model.h_a(self.tensor(y), self.at(quality)))

    def features(self, z: Symbols, quality: int) -> Tensor:
        with exact_arithmetic(self.device):
            h_s, q = self.model.h_s, self.at(quality)
            features: Tensor = self.batched(0, lambda z: h_s(z, q), quality, self.tensor(z) * UNIT)
            return features.squeeze(0)

    def context(self, step: int, features: Tensor, y_hat: Symbols, quality: int) -> tuple[Symbols, Symbols]:
        unit = self.model.config.unit
        with exact_arithmetic(self.device):
            context, q = self.model.context[step], self.at(quality)
            inputs = features[None], self.tensor(y_hat) * unit
            mean, index = self.batched(1 + step, lambda *x: context(*x, q), quality, *inputs)
            return self.symbols(mean[0] / unit), self.symbols(index[0])

    def synthesise(self, stream: Steps, quality: int, seen: Floats | None = None) -> Symbols:
        with exact_arithmetic(self.device):
            g_s, q = self.model.g_s, self.at(quality)
            inputs = self.tensor(stream) * STREAM_UNIT, self.mask(seen)
            x_hat = self.batched(1 + STEPS, lambda h, *seen: g_s(h, q, *seen), quality, *inputs)
            return integers(x_hat * 16)

    def refined(
        self,
        x: Floats,
        y: Floats,
        inside: tuple[slice, slice],
        quality: int,
        effort: int,
        seen: Floats | None,
        stepped: Callable[[], None],
    ) -> Floats:
        """The latents of a tile, see ``refine``."""
        from .refine import refined

        with exact_arithmetic(self.device):
            arrays, q = (self.tensor(x), self.tensor(y)), self.at(quality)
            return array(refined(self, *arrays, inside, q, effort, self.mask(seen), stepped))

    @property
    def device(self) -> torch.device:
        return self.inverse.device

    def at(self, quality: int) -> Tensor:
        return torch.tensor([quality], device=self.device)

    def tensor(self, x: NDArray[Any] | Tensor) -> Tensor:
        """[1, C, H, W] as the layers take it."""
        x = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
        tensor = x[None].to(self.device, self.model.log_ratio.dtype)
        return tensor.contiguous(memory_format=torch.channels_last)

    def mask(self, seen: Floats | None) -> Tensor | None:
        return None if seen is None else self.tensor(seen[None])

    def quantiser_units(self, y: Tensor, quality: Tensor) -> Tensor:
        """g_a's output [1, M, h, w] in steps of the quantiser."""
        inverse = per_channel(interpolate(self.inverse, quality)).to(y.dtype) * 2**-GAIN_BITS
        return self.model.scaled(y, inverse, quality)

    def stream(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        """g_s's input for decoded latents: int64 [1, M, h, w] in the steps of means to the stream's grid."""
        gain = per_channel(interpolate(self.inverse, quality))
        steps = round(STREAM_UNIT / self.model.config.unit * 2**GAIN_BITS)
        stream: Tensor = (y_hat * gain + steps // 2).div(steps, rounding_mode="floor")
        dtype = self.model.g_s.head.weight.dtype
        return stream.clamp(-STREAM_MAX, STREAM_MAX).to(dtype) * STREAM_UNIT

    def known_answer(self) -> int:
        """CRC-32 of what the exact networks answer to fixed inputs: an ordinary tile, and one at every limit."""
        model, c, answer = self.model, self.model.config, Answer()
        device, dtype = self.inverse.device, model.g_s.head.weight.dtype
        with torch.inference_mode():
            for hundredths, spread in KNOWN_INPUTS:
                quality = torch.tensor([hundredths], device=device)
                z = scrambled(c.hyper_latent, 4, 6, spread, device)
                features = model.h_s(z.to(dtype) * UNIT, quality)
                y_hat = scrambled(c.latent, 16, 24, spread, device)
                answer.add(features, c.unit)
                for context in model.context:
                    mean, index = context(features, y_hat.to(dtype) * c.unit, quality)
                    answer.add(mean, c.unit)
                    answer.add(index, 1)
                answer.add(model.g_s(self.stream(y_hat, quality), quality), 1 / 16)
        return answer.crc


def array(x: Tensor) -> Floats:
    """float32 [C, H, W] of [1, C, H, W]."""
    values: Floats = x[0].detach().float().cpu().contiguous().numpy()
    return values


def integers(x: Tensor) -> Symbols:
    values: Symbols = x[0].to(torch.int32).cpu().contiguous().numpy()
    return values


def save_lossy(path: Path, trained: LossyModel, tables: Tables) -> None:
    """Round a trained model's decoder to integers and write it with its encoder, tables and known answer.

    Raises ValueError where a layer breaks the accumulator bound.
    """
    decoder = integers_of(trained.decoder_convs())
    decoder["inverse"] = (trained.log_inverse.detach().double().exp() * 2**GAIN_BITS).round().to(torch.int32)
    decoder["z_mean"] = (trained.z_mean.detach() / UNIT).round().to(torch.int32)
    decoder["z_index"] = trained.z_index.detach().round().clamp(0, SCALES - 1).to(torch.int32)
    decoder |= arrays_of("tables", tables)
    encoder = encoder_of(trained)
    write(path, "lossy", trained.config, decoder, encoder, assembled)


def encoder_of(model: LossyModel) -> dict[str, Tensor]:
    """Half floats, and the integers of layers in 8 bits, whose units need be no powers of two."""
    rounded = model.encoder_convs()
    encoder = {
        name: tensor.half()
        for name, tensor in model.state_dict().items()
        if (name.startswith(("g_a.", "h_a.")) or name == "log_ratio") and name.rpartition(".")[0] not in rounded
    }
    encoder |= integers_of(rounded)
    for name, conv in rounded.items():
        encoder |= {f"{name}.in_units": conv.in_units.log2(), f"{name}.out_units": conv.out_units.log2()}
    return encoder


def load(stored: Stored, device: torch.device) -> LossyWeights:
    """Raises ValueError and the like for tensors that do not fit, WeightsError where arithmetic is not exact."""
    with exact_arithmetic(device):
        return ready(assembled(stored), stored, device)


def assembled(stored: Stored) -> LossyWeights:
    decoder, encoder = tensors_in(stored, "decoder"), tensors_in(stored, "encoder")
    with nothing_drawn():
        model = LossyModel(Config(**stored.config)).eval().requires_grad_(False).float()
    for part in ("fine", "coarse"):
        blocks = getattr(model.g_a, part)
        for k, block in enumerate(blocks):
            if f"g_a.{part}.{k}.around.weight" in encoder:
                blocks[k] = centred(block)
            elif encoder[f"g_a.{part}.{k}.conv_3.weight"].dtype == torch.int8:
                blocks[k] = in_8_bits(block)
    if encoder["h_a.conv_a.weight"].dtype == torch.int8:
        model.h_a.in_8_bits()
    floats = {name: part.float() for name, part in encoder.items() if not name.endswith(".scale")}
    missing, unknown = model.load_state_dict(floats, strict=False)
    if unknown or any(name.startswith(("g_a.", "h_a.")) for name in missing):
        raise ValueError("the encoder's tensors do not fit the configuration")
    freeze(model.decoder_convs(), decoder)
    freeze(model.encoder_convs(), encoder)
    # What is not a layer is used as integers; the parameters are there to train on.
    model.log_inverse.copy_((decoder["inverse"].double() * 2.0**-GAIN_BITS).log())
    model.z_mean.copy_(decoder["z_mean"] * UNIT)
    model.z_index.copy_(decoder["z_index"])
    return LossyWeights(
        model=model,
        tables=tables_of("tables", stored.part("decoder")),
        identity=stored.identity,
        inverse=decoder["inverse"].long(),
        z_mean=decoder["z_mean"].long(),
        z_index=decoder["z_index"].long(),
    )
