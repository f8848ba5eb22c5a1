"""Exported weights: a safetensors file for each model, integers for the decoder, half floats for the encoder.

    decoder.*   int8 or int16 weights, int32 biases and float32 scales of each exact layer, and int8 exponents of its
                units where each channel has its own; entropy tables; of a lossy model its gains and the prior of z,
                of a lossless one the prior of its coarsest latents
    encoder.*   of a lossy model float16 weights of g_a and h_a and the encoder's gains; of layers in 8 bits what the
                decoder has of its own, with the logarithms of units in floating point
    graph.*     the networks as ONNX models, and "graphs", which of the tensors each wants; see ``graphs``
    metadata    "kind", "architecture", "config" (JSON), "identity", "self_test" (CRC-32 of the known answer), "digest"
                (SHA-256 of all tensors)

The identity of a model is the SHA-256 of what the decoder needs: files stay valid when only the encoder improves. What
the tensors mean is each kind's own affair, and in its folder; ``kinds`` finds the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitstream import Tables, VaeError

Array = NDArray[Any]

QUALITY_MAX = 10000
"""Quality is counted in hundredths: 0..10000."""
FIRST = "1"
"""The architecture of files that name none. Each kind counts its own."""


class WeightsError(VaeError):
    """Weights are missing, damaged, or not those that a file was made with."""

    exit_code = 4


class Weights(Protocol):
    """What a file of any kind becomes. identity: 16 bytes."""

    @property
    def identity(self) -> bytes: ...


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

    path: Path
    about: About
    config: dict[str, Any]
    answer: str
    tensors: dict[str, Array]
    identity: bytes

    @property
    def name(self) -> str:
        return self.path.name

    def part(self, name: str) -> dict[str, Array]:
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
    with read_of(path), safe_open(path, "np") as file:
        return about_of(file.metadata())


def about_of(metadata: dict[str, str] | None) -> About:
    if metadata is None:  # the parameters of the linear codec, which are older than metadata
        return About("linear", FIRST, None)
    said = bytes.fromhex(metadata["identity"]) if "identity" in metadata else None
    return About(metadata.get("kind", ""), metadata.get("architecture", FIRST), said)


def read(path: Path) -> Stored:
    """A whole file. Raises WeightsError if it is missing or damaged."""
    with read_of(path):
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            # Copies: what is mapped would change, or be gone, with the file.
            tensors = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        said = about_of(metadata)
        if metadata is None:
            return Stored(path, said, {}, "", tensors, hashlib.sha256(path.read_bytes()).digest()[:16])
        stored = stored_of(path, said, metadata, tensors)
        if digest_of(tensors, metadata["config"]).hex() != metadata["digest"]:
            raise ValueError("it fails its checksum")
        if said.identity not in (None, stored.identity):
            raise ValueError("its identity is not that of its tensors")
        return stored


def stored_of(path: Path, said: About, metadata: dict[str, str], tensors: dict[str, Array]) -> Stored:
    stored: dict[str, Any] = json.loads(metadata["config"])
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    decoder = {k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.")}
    identity = digest_of(decoder, metadata["config"])[:16]
    return Stored(path, said, config, metadata["self_test"], tensors, identity)


def tables_of(name: str, decoder: dict[str, Array]) -> Tables:
    return Tables.from_arrays({part: decoder[f"{name}.{part}"] for part in ("lows", "sizes", "counts", "escape")})


def scrambled_array(channels: int, height: int, width: int, spread: int) -> NDArray[np.int64]:
    """Fixed int64 [C, H, W] in -spread..spread from a linear congruential generator: the same for ever."""
    count = channels * height * width
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(6364136223846793005)) >> np.uint64(33)
    return (state.astype(np.int64) % (2 * spread + 1) - spread).reshape(channels, height, width)


def digest_of(tensors: dict[str, Array], config: str) -> bytes:
    """SHA-256 of a configuration and of tensors by name, type, shape and little-endian content."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    return digest.digest()
