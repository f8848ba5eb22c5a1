"""Tiles made by networks decode alike in an implementation that knows FORMAT.md and not the library."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import second_decoder as second
import second_networks as networks
from conftest import TINY, TINY_FINER, TINY_LOSSLESS, in_bytes, picture, refined, refiners

from vaecodec import Codec
from vaecodec.lossless.numbers import Config
from vaecodec.lossless.tile import TileCoder

GOLDEN = Path(__file__).parent / "golden"
FILES = [p for p in sorted(GOLDEN.glob("*/*.vae")) if not p.stem.startswith("pca")]


def refine(weights: networks.Weights) -> None:
    weights.config["groups"], weights.config["refined"] = 20, 2
    weights.tensors |= refiners(4, Config(**weights.config))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 6), (83, 70)])
def test_refined_tiles(size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TileCoder, "push", lambda coder, samples: coder._push_network(coder.weights, samples))
    image = picture(*size, mode)
    header, _, tiles = second.read(refined(Codec("cpu", TINY_LOSSLESS)).compress(image, lossless=True))
    weights = networks.Weights(TINY_LOSSLESS, 0)
    refine(weights)
    channels = second.CHANNELS[header.mode]
    samples = networks.decode_lossless_tile(weights, tiles[0], header.height, header.width, channels)
    assert np.array_equal(np.array(samples).squeeze(), np.asarray(image).squeeze())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files(path: Path, tmp_path: Path) -> None:
    header, _, tiles = second.read(path.read_bytes())
    methods, digest = {tile.method for tile in tiles}, json.loads((path.parent / "hashes.json").read_text())[path.stem]
    if header.kind == 1 and 0 in methods:
        weights = networks.Weights(TINY_FINER if path.stem == "lossy-finer" else TINY, header.quality)
        picture = networks.decode_lossy(header, tiles, weights)
    elif header.kind == 2 and methods <= {0, 1} and len(tiles) == 1:
        tiny = in_bytes(tmp_path / "bytes.safetensors") if path.stem == "lossless-bytes" else TINY_LOSSLESS
        weights = networks.Weights(tiny, 0)
        weights.config["groups"] = 20 if path.stem in ("lossless-moving", "lossless-refined") else 0
        if path.stem == "lossless-refined":
            refine(weights)
        channels = second.CHANNELS[header.mode]
        picture = networks.decode_lossless_tile(weights, tiles[0], header.height, header.width, channels)
    else:
        return  # tested beside the second decoder of what needs no networks
    assert header.model == weights.identity or path.stem in ("lossless-moving", "lossless-refined")
    samples = np.array(picture, "<u1" if header.depth == 8 else "<u2")
    assert hashlib.sha256(samples.tobytes()).hexdigest() == digest


def test_golden_files_have_each_kind_of_network_tile() -> None:
    methods = set[tuple[int, int]]()
    for path in FILES:
        header, _, tiles = second.read(path.read_bytes())
        methods |= {(header.kind, tile.method) for tile in tiles}
    assert methods >= {(1, 0), (2, 0), (2, 1)}
