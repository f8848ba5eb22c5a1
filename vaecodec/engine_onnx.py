"""The networks on a CPU through ONNX Runtime: arrays in, arrays out, and torch is never imported.

The graphs are in the weights file, see ``graphs``. Arrays have no batch dimension: [channels, rows, columns]. A network
may be used from several threads, and pickled: whoever receives it opens the file anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitstream import VaeError

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Array = NDArray[Any]

QUALITY_MAX = 10000
STREAM_MAX = 2047
STREAM_BITS = 7
GAIN_BITS = 20
STEPS = 4
KNOWN_INPUTS = ((0, 64), (6180, 64), (QUALITY_MAX, 2**20))
"""These are the numbers of ``exact``, ``model`` and ``weights``, which import torch."""

KEPT = 4
"""So many sessions of each graph are kept, for as many qualities."""
KERNELS = {
    "8-bit integers": ("synthesis", False),
    "8-bit integers, without saturation": ("synthesis", True),
    "float32": ("synthesis.float", False),
}
"""Ways to run the synthesis transform, the fastest first: graph, and whether x86 kernels are to be those that do not
add pairs of products in 16 bits."""


class WeightsError(VaeError):
    """Weights are missing or damaged, or no kernel gives the known answer."""

    exit_code = 4


class Sessions:
    """A weights file and the sessions of its graphs, opened when they are first needed.

    threads: of a session, within an operator. Raises WeightsError if the file is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        self.path, self.threads = Path(path).absolute(), threads
        self.tensors, self.metadata = read(self.path)
        self.config: dict[str, Any] = json.loads(self.metadata["config"])
        self.initializers: dict[str, list[str]] = json.loads(self.tensors["graphs"].tobytes())
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._open: OrderedDict[tuple[str, int | None, bool], Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.threads)

    def run(
        self, graph: str, inputs: dict[str, Array], *, quality: int | None = None, careful: bool = False
    ) -> list[Array]:
        """The outputs of a graph. quality: of what is an initializer in it; careful: see ``KERNELS``."""
        outputs: list[Array] = self.session(graph, quality, careful).run(None, inputs)
        return outputs

    def session(self, graph: str, quality: int | None = None, careful: bool = False) -> Any:
        key = graph, quality, careful
        with self._lock:
            if self._process != os.getpid():
                # A child of fork has none of the threads that sessions wait for, not even to close them.
                _abandoned.append(self._open)
                self._open, self._process = OrderedDict(), os.getpid()
            session = self._open.get(key)
            if session is None:
                session = self._open[key] = self._opened(graph, quality, careful)
                mine = [other for other in self._open if other[0] == graph]
                for other in mine[:-KEPT]:
                    del self._open[other]
            self._open.move_to_end(key)
            return session

    def _opened(self, graph: str, quality: int | None, careful: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if careful:
            options.add_session_config_entry("session.x64quantprecision", "1")
        proto = self.tensors[f"graph.{graph}"].tobytes()
        names = self.initializers[graph]
        values = [self.tensors[name] for name in names]
        if quality is not None:
            values = [at(v, quality) if has_knots(name, v) else v for name, v in zip(names, values, strict=True)]
        options.add_external_initializers(names, [onnxruntime.OrtValue.ortvalue_from_numpy(v) for v in values])
        # It would fold the scale of a row into its weights, which are then no integers.
        return onnxruntime.InferenceSession(
            proto, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConvMulFusion"]
        )

    def knots(self, graph: str, quality: int) -> dict[str, Array]:
        """The inputs of a graph that depend on the quality: biases."""
        names = [each.name for each in self.session(graph).get_inputs() if each.name in self.tensors]
        return {name: at(self.tensors[name], quality).astype(np.float32)[:, :, None, None] for name in names}


_abandoned: list[Any] = []


def has_knots(name: str, tensor: Array) -> bool:
    return name.endswith(".bias") and len(tensor) > 1


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors and the metadata of a weights file. Raises WeightsError."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest_of(tensors, metadata["config"]) != metadata["digest"]:
            raise ValueError("it fails its checksum")
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}") from None
    except (SafetensorError, OSError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise WeightsError(f"{path.name} is damaged: {error}") from None
    if "graphs" not in tensors:
        raise WeightsError(f"{path.name} holds no graphs")
    return tensors, metadata


def digest_of(tensors: dict[str, Array], config: str) -> str:
    """SHA-256 of a configuration and of tensors by name, type, shape and little-endian content."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def at(knots: Array, quality: int) -> Array:
    """Knots [K, C] at a quality: [1, C] of the same type, see ``exact.interpolate``. Floats come as float32."""
    position = quality * (len(knots) - 1)
    left = min(position // QUALITY_MAX, max(len(knots) - 2, 0))
    right, part = min(left + 1, len(knots) - 1), position - left * QUALITY_MAX
    if knots.dtype.kind == "i":
        total = knots[left].astype(np.int64) * (QUALITY_MAX - part) + knots[right].astype(np.int64) * part
        return ((total + QUALITY_MAX // 2) // QUALITY_MAX).astype(knots.dtype)[None]
    first, second = knots[left].astype(np.float32), knots[right].astype(np.float32)
    return (first + np.float32(part / QUALITY_MAX) * (second - first))[None]


class Answer:
    """CRC-32 over integers."""

    def __init__(self) -> None:
        self.crc = 0

    def add(self, x: Array) -> None:
        self.crc = zlib.crc32(np.ascontiguousarray(x, "<i4").data, self.crc)


def scrambled(channels: int, height: int, width: int, spread: int) -> NDArray[np.int64]:
    """Fixed integers [C, H, W] in -spread..spread from a linear congruential generator."""
    count = channels * height * width
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(6364136223846793005)) >> np.uint64(33)
    return (state.astype(np.int64) % (2 * spread + 1) - spread).reshape(channels, height, width)


class LossyNetworks(Sessions):
    """The networks of the lossy codec. ``kernel``: of ``KERNELS``, the first that gives the known answer.

    quality: hundredths, 0..10000. Raises WeightsError also where no kernel gives the known answer.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        super().__init__(path, threads)
        self.unit_bits: int = self.config["bits"]  # means and y_hat are in steps of 2**-unit_bits
        self.kernel = ""
        for self.kernel in KERNELS:
            if f"{self.known_answer():08x}" == self.metadata["self_test"]:
                return
        raise WeightsError(f"{self.path.name} fails its self-test in ONNX Runtime {onnxruntime.__version__}")

    def analyse(self, x: Floats, quality: int) -> Floats:
        """g_a: x [3, H, W] in 0..255, H and W multiples of 16, to y [M, H / 16, W / 16] in steps of the quantiser."""
        inverse = at(self.tensors["decoder.inverse"], quality).astype(np.float32) * np.float32(2.0**-GAIN_BITS)
        gain = np.exp(at(self.tensors["encoder.log_ratio"], quality)) / inverse
        inputs = {"x": x[None], "gain": gain[:, :, None, None], **self.knots("analysis", quality)}
        return self.run("analysis", inputs)[0][0]

    def hyper_analyse(self, y: Floats, quality: int) -> Floats:
        """h_a: y [M, h, w] in steps of the quantiser, h and w multiples of 4, to z [C_z, h / 4, w / 4]."""
        return self.run("hyper_analysis", {"y": y[None], **self.knots("hyper_analysis", quality)})[0][0]

    def features(self, z: Integers, quality: int) -> Floats:
        """h_s: z_hat [C_z, h, w] in steps of 1/16 to the features [hyper, 4 h, 4 w] that ``context`` takes."""
        return self.run("hyper_synthesis", {"z": z[None], **self.knots("hyper_synthesis", quality)})[0][0]

    def context(self, step: int, features: Floats, y_hat: Integers, quality: int) -> tuple[Integers, Integers]:
        """One context step: features [hyper, h, w] and y_hat [M, h, w] in steps of 2**-unit_bits to means, in the same
        steps, and table indices, [M / 4, h, w] both."""
        graph = f"context.{step}"
        inputs = {"features": features[None], "y_hat": y_hat[None], **self.knots(graph, quality)}
        mean, index = self.run(graph, inputs)
        return mean[0], index[0]

    def synthesise(self, stream: NDArray[np.int16], quality: int) -> Integers:
        """g_s: stream [M, h, w] in steps of 1/128 to x_hat [3, 16 h, 16 w] in sixteenths of a grey level, not clamped
        to its range."""
        graph, careful = KERNELS[self.kernel]
        if graph != "synthesis":
            inputs = {"stream": stream[None], **self.knots(graph, quality)}
            return self.run(graph, inputs)[0][0]
        return self.run(graph, {"stream": stream[None]}, quality=quality, careful=careful)[0][0]

    def stream(self, y_hat: Array, quality: int) -> NDArray[np.int16]:
        """What ``synthesise`` takes for decoded latents [M, h, w] in steps of 2**-unit_bits."""
        gain = at(self.tensors["decoder.inverse"], quality)[0].astype(np.int64)[:, None, None]
        shift = GAIN_BITS + self.unit_bits - STREAM_BITS
        steps = (y_hat.astype(np.int64) * gain + (1 << shift - 1)) >> shift
        return steps.clip(-STREAM_MAX, STREAM_MAX).astype(np.int16)

    def known_answer(self) -> int:
        """CRC-32 of what the exact networks answer to fixed inputs, as ``weights.Lossy.known_answer``."""
        answer = Answer()
        for quality, spread in KNOWN_INPUTS:
            z = scrambled(self.config["hyper_latent"], 4, 6, spread).astype(np.int32)
            features = self.features(z, quality)
            y_hat = scrambled(self.config["latent"], 16, 24, spread).astype(np.int32)
            answer.add(features)
            for step in range(STEPS):
                for part in self.context(step, features, y_hat, quality):
                    answer.add(part)
            answer.add(self.synthesise(self.stream(y_hat, quality), quality))
        return answer.crc
