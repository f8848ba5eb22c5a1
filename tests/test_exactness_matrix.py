"""The packaged weights decode a file to the same pixels on every path through the libraries.

Each variant writes a file in a process of its own; then each variant, in another, decodes all files.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import python
from PIL import Image

WORKER = """
import hashlib, json, sys
from pathlib import Path
import torch
from PIL import Image
from vaecodec import Codec
from vaecodec.codec import exact_arithmetic
from vaecodec.exact import Conv

task, variant, weights, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
torch.set_num_threads(variant.get("threads", 1))
torch.backends.mkldnn.set_flags(variant.get("onednn", True))
codec = Codec(variant.get("device", "cpu"), Path(weights))
if variant.get("double"):
    with exact_arithmetic(codec.device):
        codec.lossy.to(codec.device, torch.float64)
if layout := variant.get("layout"):
    def relayout(_module, arguments):
        return arguments[0].contiguous(memory_format=getattr(torch, layout)), *arguments[1:]
    for module in codec.lossy.model.modules():
        if isinstance(module, Conv):
            module.register_forward_pre_hook(relayout)
if task == "encode":
    data = codec.compress(Image.open(folder / "photo.png"), variant.get("quality", 75))
    (folder / (variant["name"] + ".vae")).write_bytes(data)
else:
    decoded = {p.stem: codec.decompress(p.read_bytes()) for p in sorted(folder.glob("*.vae"))}
    print(json.dumps({name: hashlib.sha256(image.tobytes()).hexdigest() for name, image in decoded.items()}))
"""

# Qualities differ so that all biases and gains are used.
VARIANTS: list[dict[str, Any]] = [
    {"name": "one thread"},
    {"name": "two threads", "threads": 2, "quality": 100},
    {"name": "without oneDNN", "onednn": False, "quality": 33.33},
    {"name": "oneDNN AVX2", "env": {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "quality": 50},
    {"name": "ATen default", "env": {"ATEN_CPU_CAPABILITY": "default"}, "quality": 90},
    {"name": "contiguous", "layout": "contiguous_format", "quality": 60},
    {"name": "channels_last", "layout": "channels_last", "quality": 10},
    {"name": "Python coder", "env": {"VAECODEC_CODER": "python"}, "quality": 0},
    {"name": "float64", "double": True, "quality": 80},
]
CUDA = {"name": "CUDA", "device": "cuda"}


def worker(task: str, variant: dict[str, Any], weights: Path, folder: Path) -> bytes:
    environment = variant.get("env", {})
    result = python(WORKER, json.dumps(task), json.dumps(variant), weights, folder, **environment)
    assert result.returncode == 0, f"{variant['name']}: {result.stderr.decode()}"
    return result.stdout


def check(variants: list[dict[str, Any]], weights: Path, folder: Path, photo: Image.Image) -> None:
    photo.save(folder / "photo.png")
    for variant in variants:
        worker("encode", variant, weights, folder)
    decoded = {v["name"]: json.loads(worker("decode", v, weights, folder)) for v in variants}
    reference = decoded[variants[0]["name"]]
    assert set(reference) == {variant["name"] for variant in variants}
    assert len(set(reference.values())) > 1
    different = [
        f"{file!r} decoded by {name!r}"
        for name, hashes in decoded.items()
        for file, digest in hashes.items()
        if digest != reference[file]
    ]
    assert different == []


def test_files_of_every_variant_decode_alike_under_every_other(
    shipped: Path, photo: Image.Image, tmp_path: Path
) -> None:
    check(VARIANTS, shipped, tmp_path, photo)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device at hand")
def test_cuda_and_cpu_decode_alike(shipped: Path, photo: Image.Image, tmp_path: Path) -> None:
    check([{"name": "CPU"}, {**CUDA, "quality": 90}], shipped, tmp_path, photo)
