"""The kinds of model: which wing of the house codes which kind of file, and where its weights are found."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from bitstream import Container, Header, Kind, Record, Tile

from . import linear, lossless, lossy
from .engines import installed, threads, torch_for
from .image import Pixels
from .plain_tiles import Samples
from .tiles import Box, Progress, Region
from .weights import FIRST, Stored, Weights, WeightsError, about, read, read_of

SEARCH_PATH = "VAECODEC_WEIGHTS"
"""The environment variable that names more weights: files, or folders of them, separated as in PATH."""


class Coder(Protocol):
    """Codes the tiles of one kind of file, with one set of weights."""

    def encode(
        self, pixels: Pixels, header: Header, effort: int, progress: Progress, progressive: bool = False
    ) -> list[Tile]:
        """The tiles of a picture, in raster order, of the header's size. progressive: those that can have parts do."""

    def decode(
        self,
        container: Container,
        wanted: Box,
        progress: Progress,
        damaged: list[Region] | None,
        record: Record | None = None,
    ) -> Iterator[tuple[Box, Samples]]:
        """The boxes of tiles, as far as they are wanted, and their samples [h, w, C], each when it is decoded.

        Of tiles that are cut off, see ``Tile.held``, what is there is drawn.

        damaged: see ``tiles.forgiving``. record: is told where the bits went. Raises CorruptError, VersionError.
        """


@dataclass(frozen=True)
class Wing:
    """What is known of a kind. name: of its weights. load: by architecture, of a file's content, for a device and
    an engine. needs_weights: whether some part of a file
    can be decoded with nothing else; a coder without weights does for the others."""

    name: str
    load: Mapping[str, Callable[[Stored, str, str], Weights]]
    coder: Callable[[Any], Coder]
    needs_weights: Callable[[Container, Box], bool]


def load_linear(stored: Stored, device: str, engine: str) -> Weights:
    return linear.weights.load(stored)


def load_lossy(stored: Stored, device: str, engine: str) -> Weights:
    if engine == "onnx":
        from .lossy.engine import LossyNetworks

        return LossyNetworks(stored, threads())
    torch = torch_for(f"{stored.name} on {device}")
    from .lossy.weights import load

    return load(stored, torch.device(device))


def load_lossless(stored: Stored, device: str, engine: str) -> Weights:
    if engine == "onnx":
        from .lossless.engine import LosslessNetworks

        return LosslessNetworks(stored, threads())
    torch = torch_for(f"{stored.name} on {device}")
    from .lossless.weights import load

    return load(stored, torch.device(device))


WINGS = {
    Kind.PCA: Wing("linear", {FIRST: load_linear}, linear.coder.LinearCoder, linear.coder.needs_weights),
    Kind.LOSSY: Wing("lossy", {FIRST: load_lossy}, lossy.coder.LossyCoder, lossy.coder.needs_weights),
    Kind.LOSSLESS: Wing("lossless", {FIRST: load_lossless}, lossless.coder.LosslessCoder, lossless.coder.needs_weights),
}


def packaged(name: str) -> Path:
    """The weights of a wing that ship with the package."""
    return Path(str(resources.files("vaecodec"))) / "weights" / f"{name}.safetensors"


def load(path: Path, device: Any, engine: str = "torch") -> Any:
    """A weights file of any kind, ready to run: where it has a known answer, it is computed.

    device: torch's or its name. engine: "onnx", "torch", or "auto": of the two the first that is there and exact, if
    the device is the CPU. Raises WeightsError if the file is missing or damaged, of an unknown kind or architecture, or
    no arithmetic of the device gives the known answer, MissingError.
    """
    return loaded(path, read(path), str(device), engine)


def loaded(path: Path, stored: Stored, device: str, engine: str) -> Any:
    said = stored.about
    for wing in WINGS.values():
        if wing.name == said.kind and said.architecture in wing.load:
            *others, last = engines_for(stored, device, engine)
            for each in others:
                try:
                    with read_of(path):
                        return wing.load[said.architecture](stored, device, each)
                except WeightsError as error:
                    warnings.warn(f"{error}; {last} runs them", RuntimeWarning, stacklevel=2)
            with read_of(path):
                return wing.load[said.architecture](stored, device, last)
    known = f"{said.kind!r}, architecture {said.architecture!r}"
    raise WeightsError(f"{path.name}: this version knows no weights of kind {known}, such as {stored.identity.hex()}")


def arithmetic(weights: Any) -> str:
    """Of loaded weights: the engine and its kernel, which is "float64" in torch where float32 was not exact."""
    if hasattr(weights, "kernel"):
        return f"{weights.kernel} (onnx)"
    if hasattr(weights, "model"):
        return str(next(weights.model.parameters()).dtype).removeprefix("torch.") + " (torch)"
    return "integers (numpy)"


def engines_for(stored: Stored, device: str, engine: str) -> list[str]:
    """Those to try, one after the other."""
    if engine != "auto":
        return [engine]
    if device != "cpu" or "graphs" not in stored.tensors or not installed("onnxruntime"):
        return ["torch"]
    return ["onnx", "torch"] if installed("torch") else ["onnx"]


class Shelf:
    """Weights, loaded when they are first needed: those that are given, then those of the search path, then the
    packaged ones. Several of a kind may stand side by side. May be used from several threads."""

    def __init__(self, given: Sequence[Path], device: str, engine: str) -> None:
        self.given, self.device, self.engine = given, device, engine
        self._loading = threading.Lock()
        self._loaded: dict[Path, tuple[str, Any]] = {}
        for path in given:
            self._load(path)

    def first(self, kind: Kind) -> Any:
        """Those that new files are made with: the first of their kind."""
        with self._loading:
            return self._load(next(self._files(WINGS[kind].name)))

    def named(self, kind: Kind, identity: bytes) -> Any:
        """Those that a file was made with. Raises WeightsError."""
        others = dict[bytes, None]()
        with self._loading:
            for path in self._files(WINGS[kind].name):
                found = self._loaded[path][1].identity if path in self._loaded else about(path).identity
                stored = None
                if found is None:  # it takes all of the file to know
                    stored = read(path)
                    found = stored.identity
                if found == identity:
                    return self._load(path, stored)
                others[found] = None
        raise WeightsError(
            f"made with weights {identity.hex()}, these are {', '.join(other.hex() for other in others)}; "
            f"{SEARCH_PATH} may name others"
        )

    def _load(self, path: Path, stored: Stored | None = None) -> Any:
        if path not in self._loaded:
            stored = stored or read(path)
            self._loaded[path] = stored.about.kind, loaded(path, stored, self.device, self.engine)
        return self._loaded[path][1]

    def _files(self, name: str) -> Iterator[Path]:
        """The files that hold weights of a kind, the packaged one among them, there or not."""
        for path in (*self.given, *searched()):
            kind = self._loaded[path][0] if path in self._loaded else about(path).kind
            if kind == name:
                yield path
        yield packaged(name)


def searched() -> Iterator[Path]:
    """The files of the search path; what is not there is passed over, as in PATH."""
    for name in filter(None, os.environ.get(SEARCH_PATH, "").split(os.pathsep)):
        path = Path(name).absolute()
        if path.is_dir():
            yield from sorted(path.glob("*.safetensors"))
        elif path.exists():
            yield path
