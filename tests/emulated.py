"""Whole decodes on another machine, emulated or not, that has neither torch nor pytest; ``.ci/emulated`` runs it.

    python tests/emulated.py make FOLDER     writes files of the packaged weights, and their samples' hashes
    python tests/emulated.py check [FOLDER]  decodes the golden files, and those of the folder, and compares
"""

import hashlib
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from bitstream import unpack
from vaecodec import Codec
from vaecodec.selftest import arithmetic

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
QUALITIES = (0, 61.8, 100)


def digest(codec: Codec, data: bytes) -> str:
    samples = codec.decode_array(data)
    return hashlib.sha256(samples.astype(samples.dtype.newbyteorder("<")).tobytes()).hexdigest()


def make(folder: Path) -> None:
    codec, photo = Codec("cpu"), Image.open(HERE / "data" / "astronaut.png").convert("RGB").crop((150, 50, 246, 130))
    files = {f"lossy-{quality:g}": codec.compress(photo, quality) for quality in QUALITIES}
    files["lossless"] = codec.compress(photo, lossless=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.vae").write_bytes(data)
        print(name, len(data), "bytes, tiles by method", *(tile.method for tile in unpack(data).tiles))
    hashes = {name: digest(codec, data) for name, data in files.items()}
    assert hashes["lossless"] == hashlib.sha256(np.asarray(photo).tobytes()).hexdigest()
    (folder / "hashes.json").write_text(json.dumps(hashes))


def check(folder: Path | None) -> int:
    """How many files decode to other samples."""
    shipped, moving = Codec("cpu"), Codec("cpu", GOLDEN / "tiny_lossless.safetensors")
    moving.lossless.config = replace(moving.lossless.config, groups=20)
    codecs = {
        "lossy": Codec("cpu", GOLDEN / "tiny.safetensors"),
        "lossy-finer": Codec("cpu", GOLDEN / "tiny_finer.safetensors"),
        "lossless": Codec("cpu", GOLDEN / "tiny_lossless.safetensors"),
        "lossless-moving": moving,
        "pca": shipped,
    }
    for name in ("lossy", "lossless"):
        for whose, codec in (("small", codecs[name]), *([("packaged", shipped)] if folder else [])):
            print(f"{platform.machine()}, {whose} {name} weights: {arithmetic(getattr(codec, name))}", flush=True)
    wrong = count = 0
    for place in (*sorted(p.parent for p in GOLDEN.glob("*/hashes.json")), *([folder] if folder else [])):
        for name, expected in json.loads((place / "hashes.json").read_text()).items():
            if name == "lossless-bytes":  # its weights are put together by torch, see ``conftest.in_bytes``
                continue
            codec = shipped if place == folder else codecs.get(name) or codecs[name.split("-")[0]]
            count += 1
            if digest(codec, (place / f"{name}.vae").read_bytes()) != expected:
                wrong += 1
                print(f"{place.name}/{name}: other samples", flush=True)
    print(f"{count} files, {wrong} with other samples")
    return wrong


if __name__ == "__main__":
    task, *places = sys.argv[1:]
    sys.exit(make(Path(*places)) if task == "make" else min(check(Path(*places) if places else None), 1))
