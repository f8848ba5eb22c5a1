"""Exported weights: a safetensors file for each kind of model, integers for the decoder, half floats for the encoder.

    decoder.*   int8 or int16 weights, int32 biases and float32 scales of each exact layer, and int8 exponents of its
                units where each channel has its own; entropy tables; of a lossy model its gains and the prior of z,
                of a lossless one the prior of its coarsest latents
    encoder.*   of a lossy model float16 weights of g_a and h_a and the encoder's gains
    metadata    "kind", "config" (JSON), "self_test" (CRC-32 of the known answer), "digest" (SHA-256 of all tensors)

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
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitstream import Tables, VaeError

from . import lossless
from .exact import QUALITY_MAX, STREAM_MAX, STREAM_UNIT, UNIT, ExactConv, interpolate, per_channel
from .lossless import LosslessModel
from .model import GAIN_BITS, SCALES, Config, LossyModel

KNOWN_INPUTS = ((0, 64), (6180, 64), (QUALITY_MAX, 2**20))
"""Quality and largest latent, in its steps, of the self-test's tiles; the last drives every sum to its limits."""


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

    @property
    def margin(self) -> int:
        """How many latents around a tile analysis and synthesis see. Each 3x3 reaches one sample further; two samples
        at 1/8 are one latent."""
        blocks = self.model.config.blocks
        return blocks[1] + -(-blocks[0] // 2)

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


@dataclass
class Lossless:
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
                        answer.add(mean, lossless.LATENT_UNIT / 4)
                        answer.add(index, 1)
                    channels, height, width = posterior[0].shape[1:]
                    z = scrambled(channels, height, width, spread, parameter.device).to(parameter.dtype)
                    above = model.vae.descend(g, above, posterior[0] + z * (lossless.LATENT_UNIT / 4))
                assert above is not None
                for phases in ([model.vae.likelihood(x[..., ::step, ::step], above)], *model.phases(x)):
                    for part in phases:
                        for tensor in part:
                            answer.add(tensor, lossless.MEAN_UNIT)
        return answer.crc


class Answer:
    """CRC-32 over tensors, each in integer steps of its unit."""

    def __init__(self) -> None:
        self.crc = 0

    def add(self, x: Tensor, unit: float) -> None:
        integers = (x / unit).round().to(torch.int32).cpu().contiguous().numpy().astype("<i4")
        self.crc = zlib.crc32(integers.tobytes(), self.crc)


def scrambled(channels: int, height: int, width: int, spread: int, device: torch.device) -> Tensor:
    """Fixed int64 [1, C, H, W] in -spread..spread from a linear congruential generator: the same for ever."""
    count = channels * height * width
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(6364136223846793005)) >> np.uint64(33)
    values = state.astype(np.int64) % (2 * spread + 1) - spread
    return torch.from_numpy(values).view(1, channels, height, width).to(device)


def save_lossy(path: Path, trained: LossyModel, tables: Tables) -> None:
    """Round a trained model's decoder to integers and write it with its encoder, tables and known answer.

    Raises ValueError where a layer breaks the accumulator bound.
    """
    decoder = integers_of(trained.decoder_convs())
    decoder["inverse"] = (trained.log_inverse.detach().double().exp() * 2**GAIN_BITS).round().to(torch.int32)
    decoder["z_mean"] = (trained.z_mean.detach() / UNIT).round().to(torch.int32)
    decoder["z_index"] = trained.z_index.detach().round().clamp(0, SCALES - 1).to(torch.int32)
    decoder |= arrays_of("tables", tables)
    encoder = {
        name: tensor.half()
        for name, tensor in trained.state_dict().items()
        if name.startswith(("g_a.", "h_a.")) or name == "log_ratio"
    }
    _write(path, "lossy", trained.config, decoder, encoder)


def save_lossless(path: Path, trained: LosslessModel, pixels: Tables, prior: Tables, posterior: Tables) -> None:
    """As ``save_lossy``; a lossless decoder needs every network."""
    decoder = integers_of(dict(trained.convs()))
    mean, index = lossless.on_grids(trained.vae.top_mean.detach(), trained.vae.top_index.detach(), True)
    decoder["top_mean"] = (mean / lossless.LATENT_UNIT * 4).round().to(torch.int32)
    decoder["top_index"] = index.round().to(torch.int32)
    decoder |= arrays_of("pixels", pixels) | arrays_of("prior", prior) | arrays_of("posterior", posterior)
    _write(path, "lossless", trained.config, decoder, {})


def integers_of(convs: dict[str, ExactConv]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for name, conv in convs.items() for part, tensor in conv.integers().items()}


def arrays_of(name: str, tables: Tables) -> dict[str, Tensor]:
    return {f"{name}.{part}": torch.from_numpy(array.astype(np.int32)) for part, array in tables.to_arrays().items()}


def tables_of(name: str, decoder: dict[str, Tensor]) -> Tables:
    return Tables.from_arrays(
        {part: decoder[f"{name}.{part}"].numpy() for part in ("lows", "sizes", "counts", "escape")}
    )


def load(path: Path, device: torch.device) -> Lossy | Lossless:
    """Read exported weights and check that they compute the known answer on ``device``.

    Where float32 is not exact there (a library's Winograd or FFT kernels, say), float64 takes over. Raises
    WeightsError if the file is missing or damaged, or no arithmetic gives the known answer.
    """
    try:
        with torch.device("cpu"), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies, for the file may be replaced while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        weights = _assemble(tensors, metadata)
        answer = metadata["self_test"]
        if _digest(tensors, metadata["config"]).hex() != metadata["digest"]:
            raise ValueError("it fails its checksum")
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}") from None
    except (SafetensorError, OSError, AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path.name} is damaged: {error}") from None
    for dtype in (torch.float32, torch.float64):
        weights.to(device, dtype)
        if f"{weights.known_answer():08x}" == answer:
            return weights
    raise WeightsError(f"{path.name} fails its self-test on {device}")


def kind_of(path: Path) -> str:
    """ "lossy" or "lossless", of a file that ``load`` has read."""
    with safe_open(path, "pt") as file:
        return "lossless" if file.metadata().get("kind") == "lossless" else "lossy"


def packaged(kind: str) -> Path:
    """The weights of a kind, "lossy" or "lossless", that ship with the package."""
    return Path(str(resources.files("vaecodec"))) / "weights" / f"{kind}.safetensors"


def _write(path: Path, kind: str, config: Any, decoder: dict[str, Tensor], encoder: dict[str, Tensor]) -> None:
    tensors = {f"decoder.{k}": v.cpu().contiguous() for k, v in decoder.items()}
    tensors |= {f"encoder.{k}": v.cpu().contiguous() for k, v in encoder.items()}
    metadata = {"kind": kind, "config": json.dumps(asdict(config))}
    weights = _assemble(tensors, metadata)
    # The reference answer is float64's: there the sums are far from any limit.
    weights.to(torch.device("cpu"), torch.float64)
    metadata["self_test"] = f"{weights.known_answer():08x}"
    metadata["digest"] = _digest(tensors, metadata["config"]).hex()
    path.write_bytes(save(tensors, metadata))  # save_file would hide it from other users


class _NothingDrawn(TorchFunctionMode):
    """New layers begin at zero. Their weights come from a file, and the caller's random numbers stay as they were."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.zeros if func is torch.randn else func)(*args, **(kwargs or {}))


def _assemble(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Lossy | Lossless:
    """The model of a file, on the CPU whatever the caller's default device is."""
    with torch.device("cpu"), _NothingDrawn():
        return _assembled(tensors, metadata)


def _assembled(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Lossy | Lossless:
    stored: dict[str, Any] = json.loads(metadata["config"])
    config: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    decoder = {k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.")}
    identity = _digest(decoder, metadata["config"])[:16]
    if metadata.get("kind") == "lossless":
        trained = LosslessModel(lossless.Config(**config)).eval().requires_grad_(False).float()
        freeze(dict(trained.convs()), decoder)
        trained.vae.top_mean.copy_(decoder["top_mean"] * (lossless.LATENT_UNIT / 4))
        trained.vae.top_index.copy_(decoder["top_index"])
        pixels, prior, posterior = (tables_of(name, decoder) for name in ("pixels", "prior", "posterior"))
        return Lossless(trained, pixels, prior, posterior, identity)
    encoder = {k.removeprefix("encoder."): v.float() for k, v in tensors.items() if k.startswith("encoder.")}
    model = LossyModel(Config(**config)).eval().requires_grad_(False).float()
    missing, unknown = model.load_state_dict(encoder, strict=False)
    if unknown or any(name.startswith(("g_a.", "h_a.")) for name in missing):
        raise ValueError("the encoder's tensors do not fit the configuration")
    freeze(model.decoder_convs(), decoder)
    # What is not a layer is used as integers; the parameters are there to train on.
    model.log_inverse.copy_((decoder["inverse"].double() * 2.0**-GAIN_BITS).log())
    model.z_mean.copy_(decoder["z_mean"] * UNIT)
    model.z_index.copy_(decoder["z_index"])
    return Lossy(
        model=model,
        tables=tables_of("tables", decoder),
        identity=identity,
        inverse=decoder["inverse"].long(),
        z_mean=decoder["z_mean"].long(),
        z_index=decoder["z_index"].long(),
    )


def freeze(convs: dict[str, ExactConv], decoder: dict[str, Tensor]) -> None:
    for name, conv in convs.items():
        prefix = f"{name}."
        conv.freeze({key.removeprefix(prefix): part for key, part in decoder.items() if key.startswith(prefix)})


def _digest(tensors: dict[str, Tensor], config: str) -> bytes:
    """SHA-256 of a configuration and of tensors by name, type, shape and little-endian content."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.digest()
