"""Exported weights: one safetensors file that holds integers for the decoder and half floats for the encoder.

    decoder.*   int16 weights, int32 biases, int8 shifts of each exact layer; gains; prior of z; entropy tables
    encoder.*   float16 weights of g_a and h_a and the encoder's gains
    metadata    "config" (JSON), "self_test" (CRC-32 of the known answer), "digest" (SHA-256 of all tensors)

The identity of a model is the SHA-256 of what the decoder needs: files stay valid when only the encoder improves.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitstream import Tables, VaeError

from .exact import QUALITY_MAX, STREAM_MAX, STREAM_UNIT, UNIT, interpolate
from .model import GAIN_BITS, SCALES, Config, LossyModel, per_channel

KNOWN_INPUTS = ((0, 64), (6180, 64), (QUALITY_MAX, 2**20))
"""Quality and largest latent, in steps of 1/16, of the self-test's tiles; the last drives every sum to its limits."""


class WeightsError(VaeError):
    """Weights are missing, damaged, or not those that a file was made with."""

    exit_code = 4


@dataclass
class Lossy:
    """The lossy codec's networks and numbers, ready to run.

    model: frozen networks. tables: entropy tables, one for each scale index. identity: 16 bytes.
    inverse: int64 [knots, M], gains of g_s's input in steps of 2**-GAIN_BITS; z_mean: int64 [knots, C_z] in steps of
    1/16; z_index: int64 [knots, C_z], table numbers.
    """

    model: LossyModel
    tables: Tables
    identity: bytes
    inverse: Tensor
    z_mean: Tensor
    z_index: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything to a device. float64 is the slow fallback where float32 fails the self-test."""
        to_device: Any = self.model.to  # not all versions of torch declare memory_format
        to_device(device, dtype, memory_format=torch.channels_last)
        self.inverse, self.z_mean, self.z_index = (x.to(device) for x in (self.inverse, self.z_mean, self.z_index))

    def quantiser_units(self, y: Tensor, quality: Tensor) -> Tensor:
        """g_a's output [1, M, h, w] in steps of the quantiser."""
        inverse = per_channel(interpolate(self.inverse, quality)).to(y.dtype) * 2**-GAIN_BITS
        return self.model.scaled(y, inverse, quality)

    def stream(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        """g_s's input for decoded latents: int64 [1, M, h, w] in steps of 1/16 to the stream's grid."""
        gain = per_channel(interpolate(self.inverse, quality))
        steps = round(STREAM_UNIT / UNIT * 2**GAIN_BITS)
        stream: Tensor = (y_hat * gain + steps // 2).div(steps, rounding_mode="floor")
        dtype = self.model.g_s.head.weight.dtype
        return stream.clamp(-STREAM_MAX, STREAM_MAX).to(dtype) * STREAM_UNIT


def known_answer(weights: Lossy) -> int:
    """CRC-32 of what the exact networks answer to fixed inputs: an ordinary tile, and one at every limit."""
    model, c = weights.model, weights.model.config
    device, dtype = weights.inverse.device, model.g_s.head.weight.dtype
    crc = 0

    def digest(x: Tensor, unit: float) -> None:
        nonlocal crc
        integers = (x / unit).round().to(torch.int32).cpu().contiguous().numpy().astype("<i4")
        crc = zlib.crc32(integers.tobytes(), crc)

    with torch.inference_mode():
        for hundredths, spread in KNOWN_INPUTS:
            quality = torch.tensor([hundredths], device=device)
            z = scrambled(c.hyper_latent, 4, 6, spread, device)
            features = model.h_s(z.to(dtype) * UNIT, quality)
            y_hat = scrambled(c.latent, 16, 24, spread, device)
            digest(features, UNIT)
            for context in model.context:
                mean, index = context(features, y_hat.to(dtype) * UNIT, quality)
                digest(mean, UNIT)
                digest(index, 1)
            digest(model.g_s(weights.stream(y_hat, quality), quality), 1 / 16)
    return crc


def scrambled(channels: int, height: int, width: int, spread: int, device: torch.device) -> Tensor:
    """Fixed int64 [1, C, H, W] in -spread..spread from a linear congruential generator: the same for ever."""
    count = channels * height * width
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(6364136223846793005)) >> np.uint64(33)
    values = state.astype(np.int64) % (2 * spread + 1) - spread
    return torch.from_numpy(values).view(1, channels, height, width).to(device)


def save(path: Path, trained: LossyModel, tables: Tables) -> None:
    """Round a trained model's decoder to integers and write it with its encoder, tables and known answer.

    Raises ValueError where a layer breaks the accumulator bound.
    """
    decoder: dict[str, Tensor] = {}
    for name, conv in trained.decoder_convs().items():
        for part, tensor in zip(("weight", "bias", "shift"), conv.integers(), strict=True):
            decoder[f"{name}.{part}"] = tensor
    decoder["inverse"] = (trained.log_inverse.detach().double().exp() * 2**GAIN_BITS).round().to(torch.int32)
    decoder["z_mean"] = (trained.z_mean.detach() / UNIT).round().to(torch.int32)
    decoder["z_index"] = trained.z_index.detach().round().clamp(0, SCALES - 1).to(torch.int32)
    for name, array in tables.to_arrays().items():
        decoder[f"tables.{name}"] = torch.from_numpy(array.astype(np.int32))
    encoder = {
        name: tensor.half()
        for name, tensor in trained.state_dict().items()
        if name.startswith(("g_a.", "h_a.")) or name == "log_ratio"
    }
    tensors = {f"decoder.{k}": v.cpu().contiguous() for k, v in decoder.items()}
    tensors |= {f"encoder.{k}": v.cpu().contiguous() for k, v in encoder.items()}
    metadata = {"config": json.dumps(asdict(trained.config))}
    lossy = _assemble(tensors, metadata)
    # The reference answer is float64's: there the sums are far from any limit.
    lossy.to(torch.device("cpu"), torch.float64)
    metadata["self_test"] = f"{known_answer(lossy):08x}"
    metadata["digest"] = _digest(tensors, metadata["config"]).hex()
    save_file(tensors, path, metadata)


def load(path: Path, device: torch.device) -> Lossy:
    """Read exported weights and check that they compute the known answer on ``device``.

    Where float32 is not exact there (a library's Winograd or FFT kernels, say), float64 takes over. Raises
    WeightsError if the file is missing or damaged, or no arithmetic gives the known answer.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        lossy = _assemble(tensors, metadata)
        answer = metadata["self_test"]
        if _digest(tensors, metadata["config"]).hex() != metadata["digest"]:
            raise ValueError("it fails its checksum")
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path.name} is damaged: {error}") from None
    for dtype in (torch.float32, torch.float64):
        lossy.to(device, dtype)
        if f"{known_answer(lossy):08x}" == answer:
            return lossy
    raise WeightsError(f"{path.name} fails its self-test on {device}")


def packaged() -> Path:
    """The weights that ship with the package."""
    return Path(str(resources.files("vaecodec"))) / "weights" / "lossy.safetensors"


def _assemble(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Lossy:
    config = json.loads(metadata["config"])
    config["blocks"] = tuple(config["blocks"])
    decoder = {k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.")}
    encoder = {k.removeprefix("encoder."): v.float() for k, v in tensors.items() if k.startswith("encoder.")}
    model = LossyModel(Config(**config)).eval().requires_grad_(False)
    missing, unknown = model.load_state_dict(encoder, strict=False)
    if unknown or any(name.startswith(("g_a.", "h_a.")) for name in missing):
        raise ValueError("the encoder's tensors do not fit the configuration")
    for name, conv in model.decoder_convs().items():
        conv.freeze(*(decoder[f"{name}.{part}"] for part in ("weight", "bias", "shift")))
    stored = ("lows", "sizes", "counts", "escape")
    tables = Tables.from_arrays({name: decoder[f"tables.{name}"].numpy() for name in stored})
    return Lossy(
        model=model,
        tables=tables,
        identity=_digest(decoder, metadata["config"])[:16],
        inverse=decoder["inverse"].long(),
        z_mean=decoder["z_mean"].long(),
        z_index=decoder["z_index"].long(),
    )


def _digest(tensors: dict[str, Tensor], config: str) -> bytes:
    """SHA-256 of a configuration and of tensors by name, type, shape and little-endian content."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.digest()
