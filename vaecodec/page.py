"""A static page that decodes ``.vae`` files in the browser: our JavaScript, the weights, and ONNX Runtime Web."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from .kinds import packaged, searched
from .weights import Stored, WeightsError, digest_of, read

RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""What is taken of npm's package onnxruntime-web."""
KINDS = ("lossy", "lossless")


def files_of(runtime: Path, weights: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the page's files. weights: beside the packaged ones and those of the search path.

    runtime: a folder with ``RUNTIME`` in it. Raises FileNotFoundError if they are not there, WeightsError.
    """
    for name in RUNTIME:
        yield f"ort/{name}", (runtime / name).read_bytes()
    named = set[bytes]()
    for path in (*weights, *searched(), *map(packaged, KINDS)):
        stored = read(path)
        if stored.about.kind in KINDS and stored.identity not in named:
            named.add(stored.identity)
            yield f"weights/{stored.identity.hex()}.safetensors", decoder_of(stored)
        elif path in weights and stored.about.kind not in KINDS:
            raise WeightsError(f"{path.name}: the page shows no files of kind {stored.about.kind}")
    for part in sorted(resources.files("vaecodec").joinpath("web").iterdir(), key=lambda part: part.name):
        if part.is_file() and not part.name.endswith(".d.ts"):
            yield part.name, part.read_bytes()


def decoder_of(stored: Stored) -> bytes:
    """A weights file with nothing in it that only encoders need. Its identity stays. Raises WeightsError."""
    if "graphs" not in stored.tensors:
        raise WeightsError(f"{stored.name} holds no graphs")
    graphs: dict[str, list[str]] = json.loads(stored.tensors["graphs"].tobytes())
    kept = {name: used for name, used in graphs.items() if all(each.startswith("decoder.") for each in used)}
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name.startswith("decoder.")}
    tensors |= {f"graph.{name}": stored.tensors[f"graph.{name}"] for name in kept}
    tensors["graphs"] = np.frombuffer(json.dumps(kept).encode(), np.uint8)
    config = json.dumps(stored.config)
    metadata = {
        "kind": stored.about.kind,
        "architecture": stored.about.architecture,
        "config": config,
        "identity": stored.identity.hex(),
        "self_test": stored.answer,
        "digest": digest_of(tensors, config).hex(),
    }
    return save(tensors, metadata)
