"""Weights in torch: from a file's tensors to networks that are exact where they run, and back into a file."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitstream import AnsStack, Tables

from .arrays import get, moved
from .engines import installed
from .exact import ExactConv
from .together import Gathering, at_once, one_by_one
from .weights import FIRST, Stored, Weights, WeightsError, about_of, digest_of, scrambled_array, stored_of


class Networks(Weights, Protocol):
    """Weights that compute a known answer where arithmetic is exact."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything to a device. float64 is the slow fallback where float32 fails the self-test."""

    def known_answer(self) -> int:
        """CRC-32 of what the exact networks answer to fixed inputs."""


class OnDevice:
    """Where the coder runs: on a GPU where Triton is installed, which torch's CUDA build brings, else on the host.

    gathering: of tiles that are coded at once.
    """

    gathering: Gathering

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @cached_property
    def gathers(self) -> bool:
        """Whether tiles are coded at once, and exact networks run as batches: on a GPU."""
        return self.device.type == "cuda"

    def side_by_side(
        self, function: Callable[[T], R], items: Iterable[T], size: Callable[[T], int]
    ) -> Iterator[Callable[[], R]]:
        if not self.gathers:
            return one_by_one(function, items, size)
        return at_once(self.gathering.member(function), items, size)

    def batched(self, order: int, network: Callable[..., Any], quality: int, *inputs: Tensor | None) -> Any:
        """What a network, of a quality, makes of inputs [1, C, H, W], maybe in a batch with those of other tiles. It
        must be exact: only integers are the same in any batch. order: of networks, as a tile needs them."""
        key = (order, quality, *(() if x is None else tuple(x.shape) for x in inputs))
        return self.gathering.ask(key, partial(in_batch, network), inputs)

    @cached_property
    def codes(self) -> bool:
        """Whether the coder runs on the device; symbols are tensors then."""
        return self.device.type == "cuda" and installed("triton")

    def stack(self, data: bytes | memoryview | None = None, lanes: int | None = 1) -> AnsStack:
        if not self.codes:
            return AnsStack(data, lanes)
        from .device_coder import DeviceStack

        return DeviceStack(self.device, data, lanes)

    def put(self, x: NDArray[Any]) -> Any:
        return moved(x, self.device) if self.codes else x

    get = staticmethod(get)

    def symbols(self, x: Tensor) -> Any:
        """Whole numbers [C, H, W] as coders take them."""
        whole = x.to(torch.int32).contiguous()
        return whole if self.codes else whole.cpu().numpy()


AnyNetworks = TypeVar("AnyNetworks", bound=Networks)
T = TypeVar("T")
R = TypeVar("R")


def tensors_in(stored: Stored, part: str) -> dict[str, Tensor]:
    """See ``Stored.part``."""
    return {name: torch.from_numpy(array) for name, array in stored.part(part).items()}


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
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    stored = stored_of(path, about_of(metadata), metadata, arrays)
    networks = assemble(stored)
    # The reference answer is float64's: there the sums are far from any limit.
    networks.to(torch.device("cpu"), torch.float64)
    metadata["self_test"] = f"{networks.known_answer():08x}"
    metadata["identity"] = stored.identity.hex()
    metadata["digest"] = digest_of(arrays, metadata["config"]).hex()
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


def in_batch(network: Callable[..., Any], asked: list[tuple[Tensor | None, ...]]) -> list[Any]:
    """What a network gives, a tensor or some, for the inputs of each tile, all of which have some and lack others."""
    inputs = (
        torch.cat(each) if len(each) > 1 and each[0] is not None else each[0] for each in zip(*asked, strict=True)
    )
    given = network(*inputs)
    if isinstance(given, Tensor):
        return [given[k : k + 1] for k in range(len(given))]
    return [tuple(part[k : k + 1] for part in given) for k in range(len(given[0]))]


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
    values = scrambled_array(channels, height, width, spread)
    return torch.from_numpy(values).view(1, channels, height, width).to(device)


def integers_of(convs: dict[str, ExactConv]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for name, conv in convs.items() for part, tensor in conv.integers().items()}


def arrays_of(name: str, tables: Tables) -> dict[str, Tensor]:
    return {f"{name}.{part}": torch.from_numpy(array.astype(np.int32)) for part, array in tables.to_arrays().items()}


def freeze(convs: dict[str, ExactConv], decoder: dict[str, Tensor]) -> None:
    for name, conv in convs.items():
        prefix = f"{name}."
        conv.freeze({key.removeprefix(prefix): part for key, part in decoder.items() if key.startswith(prefix)})
