"""Networks on a CPU through ONNX Runtime: arrays in, arrays out, and torch is never imported.

What each kind runs is in its wing, see ``lossy.engine`` and ``lossless.engine``. The graphs are in the weights file,
see ``graphs``. Arrays have no batch dimension: [channels, rows, columns]. A network may be used from several threads,
and pickled: whoever receives it opens the file anew.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import weakref
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bitstream import AnsStack

from .together import one_by_one
from .weights import QUALITY_MAX, Stored, WeightsError, read

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Array = NDArray[Any]

KEPT = 4
"""So many sessions of each graph are kept, for as many qualities."""


class Sessions:
    """A weights file and the sessions of its graphs, opened when they are first needed.

    source: the file, or what was read of it. threads: of a session, within an operator. Raises WeightsError if the file
    is missing or damaged, or has no graphs.
    """

    def __init__(self, source: str | os.PathLike[str] | Stored, threads: int = 1) -> None:
        stored = source if isinstance(source, Stored) else read(Path(source).absolute())
        self.path, self.threads, self.tensors, self.identity = stored.path, threads, stored.tensors, stored.identity
        self.answer, self.settings, self.part = stored.answer, stored.config, stored.part
        if "graphs" not in self.tensors:
            raise WeightsError(f"{stored.name} holds no graphs")
        self.initializers: dict[str, list[str]] = json.loads(self.tensors["graphs"].tobytes())
        self._intra_op = threads
        self._forget()
        _all.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.threads)

    # Arrays are where the coder runs, see ``lossy.tile.Networks``.

    def stack(self, data: bytes | memoryview | None = None, lanes: int | None = 1) -> AnsStack:
        return AnsStack(data, lanes)

    def put(self, x: Array) -> Array:
        return x

    get = put
    side_by_side = staticmethod(one_by_one)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, int | None, bool], Any] = OrderedDict()

    def run(
        self, graph: str, inputs: dict[str, Array], quality: int | None = None, careful: bool = False
    ) -> list[Array]:
        """The outputs of a graph. quality: of its biases, which are inputs or initializers; careful: whether x86
        kernels are to be those that do not add pairs of products in 16 bits."""
        session = self.session(graph, quality, careful)
        if quality is not None:
            names = [each.name for each in session.get_inputs() if each.name in self.tensors]
            inputs = inputs | {
                name: at(self.tensors[name], quality).astype(np.float32)[:, :, None, None] for name in names
            }
        outputs: list[Array] = session.run(None, inputs)
        return outputs

    def session(self, graph: str, quality: int | None = None, careful: bool = False) -> Any:
        if not any(has_knots(name, self.tensors[name]) for name in self.initializers[graph]):
            quality = None
        key = graph, quality, careful
        with self._lock:
            session = self._open.get(key)
            if session is None:
                session = self._open[key] = self._opened(graph, quality, careful)
                for other in [other for other in self._open if other[0] == graph][:-KEPT]:
                    del self._open[other]
            self._open.move_to_end(key)
            return session

    def _opened(self, graph: str, quality: int | None, careful: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._intra_op
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # it keeps a plan for each size of picture, and blocks that fit no other
        share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
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


@functools.cache
def share_arena() -> None:
    """One arena for all sessions, that grows by what is asked for. With one for each they would take several times the
    memory, and without any a sixth of the time would go to page faults."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    as_requested = onnxruntime.OrtArenaCfg(
        {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    )
    # Whoever else uses the library may have one already, which serves as well.
    with contextlib.suppress(RuntimeError):
        onnxruntime.create_and_register_allocator(memory, as_requested)


_all: weakref.WeakSet[Sessions] = weakref.WeakSet()
_abandoned: list[Any] = []


def _forget_all() -> None:
    """A child of fork has none of the threads that its sessions wait for, not even to close them. It works with one."""
    for each in list(_all):
        _abandoned.append(vars(each).copy())
        each.threads = each._intra_op = 1
        each._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def has_knots(name: str, tensor: Array) -> bool:
    return name.endswith(".bias") and len(tensor) > 1


def at(knots: Array, quality: int) -> Array:
    """Knots [K, C] at a quality: [1, C] of the same type, see ``exact.interpolate``. Floats come as float32."""
    position = quality * (len(knots) - 1)
    left = min(position // QUALITY_MAX, max(len(knots) - 2, 0))
    right, part = min(left + 1, len(knots) - 1), position - left * QUALITY_MAX
    if knots.dtype.kind == "i":
        total = knots[left].astype(np.int64) * (QUALITY_MAX - part) + knots[right].astype(np.int64) * part
        between: Array = ((total + QUALITY_MAX // 2) // QUALITY_MAX).astype(knots.dtype)
        return between[None]
    first, second = knots[left].astype(np.float32), knots[right].astype(np.float32)
    between = first + np.float32(part / QUALITY_MAX) * (second - first)
    return between[None]


class Answer:
    """CRC-32 over integers."""

    def __init__(self) -> None:
        self.crc = 0

    def add(self, x: Array) -> None:
        self.crc = zlib.crc32(np.ascontiguousarray(x, "<i4").data, self.crc)
