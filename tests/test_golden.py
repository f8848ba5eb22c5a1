"""Files of every earlier version decode to the samples they had."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import TINY, TINY_FINER, TINY_LOSSLESS, in_bytes, moving, refined

from bitstream import Kind, Mode, unpack
from vaecodec import Codec
from vaecodec.training.export import add_graphs

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*/*.vae"))


@pytest.fixture(scope="module", params=["onnx", "torch"])
def codecs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Codec]:
    engine = request.param
    of_bytes = in_bytes(tmp_path_factory.mktemp("bytes") / "bytes.safetensors")
    if engine == "onnx":
        add_graphs(of_bytes)
    return {
        "lossy": Codec("cpu", TINY, engine=engine),
        "lossy-finer": Codec("cpu", TINY_FINER, engine=engine),
        "lossless": Codec("cpu", TINY_LOSSLESS, engine=engine),
        "pca": Codec("cpu"),
        "lossless-moving": moving(Codec("cpu", TINY_LOSSLESS, engine=engine)),
        "lossless-refined": refined(Codec("cpu", TINY_LOSSLESS, engine=engine)),
        "lossless-bytes": Codec("cpu", of_bytes, engine=engine),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files(path: Path, codecs: dict[str, Codec], backend: str) -> None:
    kind = path.stem.split("-")[0]
    data, expected = path.read_bytes(), json.loads((path.parent / "hashes.json").read_text())[path.stem]
    samples = (codecs.get(path.stem) or codecs[kind]).decode_array(data)
    assert hashlib.sha256(samples.astype(samples.dtype.newbyteorder("<")).tobytes()).hexdigest() == expected


def test_golden_files_cover_every_kind_mode_and_method() -> None:
    containers = [unpack(path.read_bytes()) for path in FILES]
    held = {(c.header.kind, c.header.mode) for c in containers}
    assert held >= {(kind, mode) for kind in (Kind.LOSSY, Kind.LOSSLESS) for mode in Mode}
    assert {tile.method for c in containers if c.header.kind == Kind.LOSSLESS for tile in c.tiles} == {0, 1, 2, 3}
    assert {tile.method for c in containers if c.header.kind == Kind.LOSSY for tile in c.tiles} == {0, 1, 2, 3}
    assert {c.header.mode.name for c in containers if c.header.colour} == {"RGB", "RGBA", "RGB;16"}
    assert any(len(c.tiles) > 1 for c in containers) and any(c.sections for c in containers)
    names = {folder: set(json.loads((folder / "hashes.json").read_text())) for folder in {p.parent for p in FILES}}
    assert {p.stem for p in FILES} == set().union(*names.values())
