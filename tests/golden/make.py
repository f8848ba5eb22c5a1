"""Makes the golden files of this format version: `python tests/golden/make.py`.

What exists is never replaced: every later version of the library has to decode these files to the same samples.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from conftest import LOSSLESS, TINY, TINY_BYTES, TINY_FINER, TINY_LOSSLESS, in_bytes, moving, picture, refined  # noqa: E402

from benchmarks import pca  # noqa: E402
from bitstream import coder  # noqa: E402
from vaecodec import Codec  # noqa: E402
from vaecodec.lossless.tile import TileCoder  # noqa: E402
from vaecodec.lossy import misfits  # noqa: E402
from vaecodec.lossy.layers import GAIN_BITS, UNIT  # noqa: E402
from vaecodec.lossy.model import LossyModel  # noqa: E402
from vaecodec.lossy.weights import save_lossy  # noqa: E402
from vaecodec.training import lossless as training  # noqa: E402
from vaecodec.training.crops import Crops  # noqa: E402
from vaecodec.training.lossless import LosslessObjective  # noqa: E402
from vaecodec.training.objective import Phase  # noqa: E402
from vaecodec.training.quantise import quantise  # noqa: E402

FOLDER = HERE / "0.4"
HASHES = FOLDER / "hashes.json"


def digest(samples: NDArray[Any]) -> str:
    """SHA-256 of samples [H, W, C], u8 or u16, row by row, little-endian."""
    return hashlib.sha256(samples.astype(samples.dtype.newbyteorder("<")).tobytes()).hexdigest()


def deep(channels: int, depth: int) -> NDArray[np.uint16]:
    y, x, c = np.mgrid[:31, :45, :channels]
    return ((y * 37 + x * 91 + c * 1009 + x * y) % 2**depth).astype(np.uint16)


def write_weights(path: Path) -> None:
    """A small lossless model, trained for a few steps and exported."""
    torch.manual_seed(0)
    objective, phase = LosslessObjective(LOSSLESS, coarse_crop=16), Phase(batch=2, crop=64)
    model = objective.build()
    images = [torch.from_numpy(np.array(picture(96, 96, seed=seed))).permute(2, 0, 1) for seed in range(4)]
    crops = Crops(images, torch.device("cpu"))
    with mock.patch.object(training, "LINEAR_CROPS", 8), mock.patch.object(training, "FIT_BATCHES", 2):
        objective.start(model, crops, 64)
        optim = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            optim.zero_grad()
            objective.loss(model, crops, phase).backward()  # type: ignore[no-untyped-call]
            optim.step()
        objective.export(path, model, crops, 64)


def write_finer(path: Path) -> None:
    """The small lossy model on finer grids."""
    coarse = Codec("cpu", TINY).lossy
    model = LossyModel(replace(coarse.model.config, bits=6))
    state = coarse.model.state_dict()
    state["log_inverse"] = (coarse.inverse.double() * 2.0**-GAIN_BITS).log().float()
    state |= {"z_mean": coarse.z_mean * UNIT, "z_index": coarse.z_index}
    model.load_state_dict(state)
    save_lossy(path, model, coarse.tables)


def write_bytes(path: Path) -> None:
    """What differs in the small lossless model where its levels are bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(4):
            picture(96, 96, seed=seed).save(Path(folder) / f"{seed}.png")
        whole = Path(folder) / "whole.safetensors"
        quantise(TINY_LOSSLESS, Path(folder), whole)
        tensors = {name.removeprefix("decoder."): tensor for name, tensor in load_file(whole).items()}
    save_file({k: v for k, v in tensors.items() if k.startswith("levels.") and ".base." not in k}, path)


def made() -> Iterator[tuple[str, bytes]]:
    """Every kind, mode and tile method; several tiles; metadata."""
    lossy, lossless = Codec("cpu", TINY), Codec("cpu", TINY_LOSSLESS)
    yield "lossy finer", Codec("cpu", TINY_FINER).compress(picture(90, 70), 70)
    modes = {mode: picture(45, 31, mode) for mode in ("L", "LA", "RGB", "RGBA")}
    modes["RGBA"].putalpha(picture(45, 31, "L", seed=1))
    modes["LA"].putalpha(picture(45, 31, "L", seed=2))
    arrays = {"I;16": (deep(1, 16), 16), "RGB;16": (deep(3, 10), 10), "RGBA;16": (deep(4, 12), 12)}
    for mode, image in modes.items():
        yield f"lossy {mode}", lossy.compress(image, 70)
        yield f"lossless {mode}", lossless.compress(image, lossless=True)
    for mode, (samples, depth) in arrays.items():
        yield f"lossy {mode}", lossy.compress(samples, 70, depth=depth)
        yield f"lossless {mode}", lossless.compress(samples, lossless=True, depth=depth)
    for quality in (0, 33.33, 100):
        yield f"lossy quality {quality}", lossy.compress(picture(70, 50), quality)
    tagged = picture(20, 10)
    tagged.info |= {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0", "icc_profile": b"profile", "xmp": b"<x:xmpmeta/>"}
    yield "lossy metadata", lossy.compress(tagged)
    with mock.patch.object(lossy, "tile", 64), mock.patch.object(lossless, "tile", 64):
        yield "lossy tiles", lossy.compress(picture(150, 90), 50)
        yield "lossless tiles", lossless.compress(picture(150, 90), lossless=True)

    def by_networks(coder: TileCoder, samples: Any) -> Any:
        return coder._push_network(coder.weights, samples)

    with mock.patch.object(TileCoder, "push", by_networks):
        for name, image in (("bits-back", picture(90, 70)), ("rounded", picture(1, 1)), ("grey", picture(90, 70, "L"))):
            yield f"lossless networks {name}", lossless.compress(image, lossless=True)
        yield "lossless moving", moving(Codec("cpu", TINY_LOSSLESS)).compress(picture(90, 70), lossless=True)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    drawing = Image.fromarray(rng.integers(0, 2, (40, 60), np.uint8) * 255)
    for name, image in (("noise", noise), ("flat", Image.new("RGB", (200, 100), (1, 2, 3))), ("drawing", drawing)):
        yield f"lossless {name}", lossless.compress(image, lossless=True)
    for mode, image in (("RGB", modes["L"].convert("RGB")), ("RGBA", modes["LA"].convert("RGBA"))):
        yield f"lossless grey {mode}", lossless.compress(image, lossless=True)
        yield f"lossy grey {mode}", lossy.compress(image, 70)
    yield "lossless grey RGB16", lossless.compress(arrays["I;16"][0].repeat(3, 2), lossless=True)
    for name, image in (("raw", noise), ("plain", drawing.convert("RGB")), ("plain LA", drawing.convert("LA"))):
        yield f"lossy {name}", lossy.compress(image, 100)
    # Tiles without networks among others, for which the picture ends there.
    mixed = picture(230, 170)
    mixed.paste(drawing.resize((64, 64), Image.Resampling.NEAREST), (64, 64))
    mixed.paste((0, 255, 0), (192, 0, 230, 64))

    def signs(samples: Any, _depth: int) -> misfits.Signs:
        return misfits.Signs(0 if len(np.unique(samples)) == 2 else np.inf, 0)

    with mock.patch.object(lossy, "tile", 64), mock.patch.object(misfits, "signs", signs):
        yield "lossy mixed", lossy.compress(mixed, 100)
    yield "lossless fitted", lossless.compress(picture(256, 128), lossless=True, fast=True)
    with mock.patch.object(TileCoder, "push", by_networks):
        yield "lossless refined", refined(Codec("cpu", TINY_LOSSLESS)).compress(picture(90, 70), lossless=True)
    for mode in ("L", "RGB"):
        yield f"pca {mode}", pca.compress(modes[mode], 60)
    with mock.patch.object(coder, "_LANES_SHARE", 8):  # lanes, which tiles of this size do not have otherwise
        yield "lossy lanes", lossy.compress(modes["LA"], 100)
        yield "lossless lanes", lossless.compress(drawing, lossless=True)
        yield "pca lanes", pca.compress(modes["RGB"], 60)
    with mock.patch.object(coder, "_LANES_SHARE", 100), mock.patch.object(TileCoder, "push", by_networks):
        yield "lossless networks lanes", lossless.compress(picture(90, 70), lossless=True)
    # Progressive files: one tile, several with one that needs no networks among them, alpha, equal colours.
    yield "lossy progressive", lossy.compress(picture(90, 70), 60, progressive=True)
    yield "lossy progressive grey LA", lossy.compress(modes["LA"].convert("RGBA"), 70, progressive=True)
    with mock.patch.object(lossy, "tile", 64), mock.patch.object(misfits, "signs", signs):
        yield "lossy progressive tiles", lossy.compress(mixed, 90, progressive=True)
    with mock.patch.object(TileCoder, "push", by_networks):
        yield "lossless progressive", lossless.compress(picture(90, 70), lossless=True, progressive=True)
        yield "lossless progressive RGBA", lossless.compress(modes["RGBA"], lossless=True, progressive=True)
        with mock.patch.object(lossless, "tile", 64):
            tiles = lossless.compress(picture(150, 90), lossless=True, progressive=True)
        yield "lossless progressive tiles", tiles
    with mock.patch.object(TileCoder, "push", by_networks):
        yield "lossless bytes", codec_in_bytes().compress(picture(90, 70), lossless=True)
    yield "lossy sparse", lossy.compress(modes["RGB"], 60)


def codec_in_bytes() -> Codec:
    with tempfile.TemporaryDirectory() as folder:
        codec = Codec("cpu", in_bytes(Path(folder) / "bytes.safetensors"), engine="torch")
        assert codec.lossless is not None
    return codec


def decoded(name: str, data: bytes) -> NDArray[Any]:
    """The samples of a golden file, by the decoder that its name asks for."""
    if name.startswith("pca"):
        return Codec("cpu").decode_array(data)
    if name == "lossless-moving":
        return moving(Codec("cpu", TINY_LOSSLESS)).decode_array(data)
    if name == "lossless-refined":
        return refined(Codec("cpu", TINY_LOSSLESS)).decode_array(data)
    if name == "lossless-bytes":
        return codec_in_bytes().decode_array(data)
    tiny = TINY_LOSSLESS if name.startswith("lossless") else TINY_FINER if name == "lossy-finer" else TINY
    return Codec("cpu", tiny).decode_array(data)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    if not TINY_LOSSLESS.exists():
        write_weights(TINY_LOSSLESS)
    if not TINY_FINER.exists():
        write_finer(TINY_FINER)
    if not TINY_BYTES.exists():
        write_bytes(TINY_BYTES)
    held = {path.parent: json.loads(path.read_text()) for path in HERE.glob("*/hashes.json")}
    hashes, known = held.get(FOLDER, {}), set().union(*held.values())
    for title, data in made():
        name = title.replace(" ", "-").replace(";", "")
        if name not in known:
            (FOLDER / f"{name}.vae").write_bytes(data)
            hashes[name] = digest(decoded(name, data))
    HASHES.write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main()
