"""The packaged weights decode a file to the same pixels on every path through the libraries.

Each variant writes a lossy and a lossless file in a process of its own; then each variant, in another, decodes all
lossy files. The lossless ones must be the same bytes, so that it decodes one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import python
from PIL import Image

from bitstream import BITS_BACK, unpack

WORKER = """
import hashlib, json, sys
from pathlib import Path
import torch
from PIL import Image
from vaecodec import Codec
from vaecodec.exact import exact_arithmetic
from vaecodec.exact import Conv
from vaecodec.lossless.tile import TileCoder

task, variant = json.loads(sys.argv[1]), json.loads(sys.argv[2])
folder, *paths = map(Path, sys.argv[3:])
torch.set_num_threads(variant.get("threads", 1))
torch.backends.mkldnn.set_flags(variant.get("onednn", True))
engine = variant.get("engine", "torch")
lossy, lossless = (Codec(variant.get("device", "cpu"), path, engine=engine) for path in paths)
if "kernel" in variant:
    lossy.lossy.kernel = variant["kernel"]
if variant.get("double"):
    device = torch.device(lossy.device)
    with exact_arithmetic(device):
        lossy.lossy.to(device, torch.float64)
        lossless.lossless.to(device, torch.float64)
if layout := variant.get("layout"):
    def relayout(_module, arguments):
        return arguments[0].contiguous(memory_format=getattr(torch, layout)), *arguments[1:]
    for module in [*lossy.lossy.model.modules(), *lossless.lossless.model.modules()]:
        if isinstance(module, Conv):
            module.register_forward_pre_hook(relayout)
if task == "encode":
    photo = Image.open(folder / "photo.png")
    (folder / (variant["name"] + ".vae")).write_bytes(lossy.compress(photo, variant.get("quality", 75)))
    # By the networks, even if another way should be shorter.
    TileCoder.push = lambda coder, samples: coder._push_network(coder.weights, samples)
    data = lossless.compress(photo.crop((0, 0, 128, 96)), lossless=True)
    (folder / (variant["name"] + ".lossless")).write_bytes(data)
else:
    decoded = {p.stem: lossy.decompress(p.read_bytes()) for p in sorted(folder.glob("*.vae"))}
    decoded["lossless"] = lossless.decompress(next(folder.glob("*.lossless")).read_bytes())
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
    {"name": "numpy coder", "env": {"VAECODEC_CODER": "numpy"}, "quality": 0},
    {"name": "float64", "double": True, "quality": 80},
    {"name": "ONNX Runtime", "engine": "onnx", "quality": 70},
    {"name": "ONNX Runtime, two threads", "engine": "onnx", "threads": 2, "quality": 40},
    {"name": "ONNX Runtime, no saturation", "engine": "onnx", "kernel": "8-bit integers, without saturation"},
    {"name": "ONNX Runtime, float32", "engine": "onnx", "kernel": "float32", "quality": 20},
]
CUDA = {"name": "CUDA", "device": "cuda"}


def worker(task: str, variant: dict[str, Any], weights: list[Path], folder: Path) -> bytes:
    environment = variant.get("env", {})
    result = python(WORKER, json.dumps(task), json.dumps(variant), folder, *weights, **environment)
    assert result.returncode == 0, f"{variant['name']}: {result.stderr.decode()}"
    return result.stdout


def check(variants: list[dict[str, Any]], weights: list[Path], folder: Path, photo: Image.Image) -> None:
    photo.save(folder / "photo.png")
    for variant in variants:
        worker("encode", variant, weights, folder)
    lossless = {variant["name"]: (folder / f"{variant['name']}.lossless").read_bytes() for variant in variants}
    reference = lossless[variants[0]["name"]]
    assert [tile.method for tile in unpack(reference).tiles] == [BITS_BACK]
    assert [name for name, data in lossless.items() if data != reference] == []
    decoded = {v["name"]: json.loads(worker("decode", v, weights, folder)) for v in variants}
    first = decoded[variants[0]["name"]]
    assert set(first) == {*lossless, "lossless"} and len(set(first.values())) > 2
    assert first["lossless"] == hashlib.sha256(photo.crop((0, 0, 128, 96)).tobytes()).hexdigest()
    different = [
        f"{file!r} decoded by {name!r}"
        for name, hashes in decoded.items()
        for file, digest in hashes.items()
        if digest != first[file]
    ]
    assert different == []


def test_three_sets_of_kernels_decode_alike(
    shipped: Path, shipped_lossless: Path, photo: Image.Image, tmp_path: Path
) -> None:
    three = [variant for variant in VARIANTS if variant["name"] in ("one thread", "without oneDNN", "ONNX Runtime")]
    check(three, [shipped, shipped_lossless], tmp_path, photo)


@pytest.mark.slow
def test_files_of_every_variant_decode_alike_under_every_other(
    shipped: Path, shipped_lossless: Path, photo: Image.Image, tmp_path: Path
) -> None:
    check(VARIANTS, [shipped, shipped_lossless], tmp_path, photo)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device at hand")
def test_cuda_and_cpu_decode_alike(shipped: Path, shipped_lossless: Path, photo: Image.Image, tmp_path: Path) -> None:
    check([{"name": "CPU"}, {**CUDA, "quality": 90}], [shipped, shipped_lossless], tmp_path, photo)
