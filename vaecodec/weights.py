"""Exported weights: a safetensors file for each model, integers for the decoder, half floats for the encoder.

    decoder.*   int8 or int16 weights, int32 biases and float32 scales of each exact layer, and int8 exponents of its
                units where each channel has its own; entropy tables; of a lossy model its gains and the prior of z,
                of a lossless one the prior of its coarsest latents
    encoder.*   of a lossy model float16 weights of g_a and h_a and the encoder's gains
    metadata    "kind", "architecture", "config" (JSON), "identity", "self_test" (CRC-32 of the known answer), "digest"
                (SHA-256 of all tensors)

The identity of a model is the SHA-256 of what the decoder needs: files stay valid when only the encoder improves. What
the tensors mean is each kind's own affair, and in its folder; ``kinds`` finds the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitstream import Tables, VaeError

from .exact import ExactConv

FIRST = "1"
"""The architecture of files that name none. Each kind counts its own."""


class WeightsError(VaeError):
    """Weights are missing, damaged, or not those that a file was made with."""

    exit_code = 4


class Weights(Protocol):
    """What a file of any kind becomes. identity: 16 bytes."""

    @property
    def identity(self) -> bytes: ...


class Networks(Weights, Protocol):
    """Weights that compute a known answer where arithmetic is exact."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything to a device. float64 is the slow fallback where float32 fails the self-test."""

    def known_answer(self) -> int:
        """CRC-32 of what the exact networks answer to fixed inputs."""


AnyNetworks = TypeVar("AnyNetworks", bound=Networks)


@dataclass(frozen=True)
class About:
    """What the metadata of a file say. identity: None where they do not; it takes all tensors to know it then."""

    kind: str
    architecture: str
    identity: bytes | None


@dataclass(frozen=True)
class Stored:
    """A file's content. config: the settings of a model. answer: the known one, in hexadecimal, "" where there is none.
    identity: of the tensors, 16 bytes."""

    name: str
    about: About
    config: dict[str, Any]
    answer: str
    tensors: dict[str, Tensor]
    identity: bytes

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of the "decoder" or the "encoder", by the rest of their names."""
        return {k.removeprefix(f"{name}."): v for k, v in self.tensors.items() if k.startswith(f"{name}.")}


@contextlib.contextmanager
def read_of(path: Path) -> Iterator[None]:
    """What goes wrong with a file in the body becomes a WeightsError."""
    try:
        yield
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}") from None
    except (SafetensorError, OSError, AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path.name} is damaged: {error}") from None


def about(path: Path) -> About:
    """What a file says of itself, without its tensors. Raises WeightsError."""
    with read_of(path), safe_open(path, "pt") as file:
        return about_of(file.metadata())


def about_of(metadata: dict[str, str] | None) -> About:
    if metadata is None:  # the parameters of the linear codec, which are older than metadata
        return About("linear", FIRST, None)
    said = bytes.fromhex(metadata["identity"]) if "identity" in metadata else None
    return About(metadata.get("kind", ""), metadata.get("architecture", FIRST), said)


def read(path: Path) -> Stored:
    """A whole file. Raises WeightsError if it is missing or damaged."""
    with read_of(path):
        with torch.device("cpu"), torch.inference_mode(False), safe_open(path, "pt") as file:
            metadata = file.metadata()
            # Copies: what is mapped would change, or be gone, with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        said = about_of(metadata)
        if metadata is None:
            return Stored(path.name, said, {}, "", tensors, hashlib.sha256(path.read_bytes()).digest()[:16])
        stored = stored_of(path.name, said, metadata, tensors)
        if digest_of(tensors, metadata["config"]).hex() != metadata["digest"]:
            raise ValueError("it fails its checksum")
        if said.identity not in (None, stored.identity):
            raise ValueError("its identity is not that of its tensors")
        return stored


def stored_of(name: str, said: About, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Stored:
    stored: dict[str, Any] = json.loads(metadata["config"])
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    decoder = {k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.")}
    identity = digest_of(decoder, metadata["config"])[:16]
    return Stored(name, said, config, metadata["self_test"], tensors, identity)


def write(
    path: Path,
    kind: str,
    config: Any,
    decoder: dict[str, Tensor],
    encoder: dict[str, Tensor],
    assemble: Callable[[Stored], Networks],
    architecture: str = FIRST,
) -> None:
    """Write a file, with the answer of the networks that ``assemble`` makes of it."""
    tensors = {f"decoder.{k}": v.cpu().contiguous() for k, v in decoder.items()}
    tensors |= {f"encoder.{k}": v.cpu().contiguous() for k, v in encoder.items()}
    metadata = {"kind": kind, "architecture": architecture, "config": json.dumps(asdict(config)), "self_test": ""}
    stored = stored_of(path.name, about_of(metadata), metadata, tensors)
    networks = assemble(stored)
    # The reference answer is float64's: there the sums are far from any limit.
    networks.to(torch.device("cpu"), torch.float64)
    metadata["self_test"] = f"{networks.known_answer():08x}"
    metadata["identity"] = stored.identity.hex()
    metadata["digest"] = digest_of(tensors, metadata["config"]).hex()
    path.write_bytes(save(tensors, metadata))  # save_file would hide it from other users


def ready(networks: AnyNetworks, stored: Stored, device: torch.device) -> AnyNetworks:
    """Networks on a device, where they compute the known answer.

    Where float32 is not exact there (a library's Winograd or FFT kernels, say), float64 takes over. Raises
    WeightsError if no arithmetic gives the known answer.
    """
    for dtype in (torch.float32, torch.float64):
        networks.to(device, dtype)
        if f"{networks.known_answer():08x}" == stored.answer:
            return networks
    raise WeightsError(f"{stored.name} fails its self-test on {device}")


class _NothingDrawn(TorchFunctionMode):
    """New layers begin at zero. Their weights come from a file, and the caller's random numbers stay as they were."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.zeros if func is torch.randn else func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """Models are made on the CPU, whatever the caller's default device is, and without random numbers."""
    with torch.device("cpu"), _NothingDrawn():
        yield


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


def integers_of(convs: dict[str, ExactConv]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for name, conv in convs.items() for part, tensor in conv.integers().items()}


def arrays_of(name: str, tables: Tables) -> dict[str, Tensor]:
    return {f"{name}.{part}": torch.from_numpy(array.astype(np.int32)) for part, array in tables.to_arrays().items()}


def tables_of(name: str, decoder: dict[str, Tensor]) -> Tables:
    return Tables.from_arrays(
        {part: decoder[f"{name}.{part}"].numpy() for part in ("lows", "sizes", "counts", "escape")}
    )


def freeze(convs: dict[str, ExactConv], decoder: dict[str, Tensor]) -> None:
    for name, conv in convs.items():
        prefix = f"{name}."
        conv.freeze({key.removeprefix(prefix): part for key, part in decoder.items() if key.startswith(prefix)})


def digest_of(tensors: dict[str, Tensor], config: str) -> bytes:
    """SHA-256 of a configuration and of tensors by name, type, shape and little-endian content."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.digest()
