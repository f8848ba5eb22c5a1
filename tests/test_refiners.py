"""Passes of lossless tiles, and the networks that refine them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTO, TINY_LOSSLESS, picture, refined, refiners, same
from hypothesis import given, settings, strategies as st
from PIL import Image

from vaecodec import Codec
from vaecodec.lossless import refine
from vaecodec.lossless.engine import LosslessNetworks
from vaecodec.lossless.numbers import Config
from vaecodec.lossless.tile import TileCoder
from vaecodec.training import refiners as training

CONFIG = Config(width=16, refined=1)


def test_passes_hold_every_sample_once() -> None:
    plane = np.zeros((5, 8), int)
    for row, column in refine.PASSES:
        plane[row::2, column::2] += 1
    assert (plane == 1).all()


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_refined_tiles_come_back(height: int, width: int, seed: int, noise: int) -> None:
    codec = refined(Codec("cpu", TINY_LOSSLESS))
    samples = np.asarray(picture(width, height, seed=seed)).astype(int)
    samples += np.random.default_rng(noise).integers(-9, 10, samples.shape)
    tile = TileCoder(codec.lossless, 8)._push_network(codec.lossless, samples.clip(0, 255).astype(np.uint8))
    assert np.array_equal(TileCoder(codec.lossless, 8).pop(tile, samples.shape), samples.clip(0, 255))


@pytest.mark.parametrize("size", [(1, 2), (5, 6), (9, 4)])
@pytest.mark.parametrize("name", "DBC")
def test_what_a_pass_knows_does_not_change_with_those_after_it(name: str, size: tuple[int, int]) -> None:
    """Encoders ask for it when all passes are known."""
    random = np.random.default_rng(1)
    samples = random.integers(0, 256, size).astype(np.uint8)
    before = [
        refine.Phase(other, size, [np.ones((size[0] + 2, size[1] + 2), np.int16)])
        for other in "DB"[: "DBC".index(name)]
    ]
    prediction = random.integers(0, [[[2041]], [[40]], [[3]]], (3, *size)).astype(np.int32)
    activations = random.integers(0, 256, (*size, 3)).astype(np.uint8)
    passes = refine.Passes(prediction, refine.Phase(name, size), tuple(before), refine.usage_of(samples), activations)
    passes.move(np.arange(40, dtype=np.int32) // 2)
    known = []
    for index in range(4):
        inputs, states, around = passes.inputs(index)
        assert inputs.shape[1] == len(states) == around.shape[1] == passes.of(index, samples).size
        assert inputs.shape[0] == refine.input_count(name, 0, index)
        assert abs(inputs).max(initial=0) <= refine.INPUT_MAX
        known.append((inputs, states, around))
        passes.see(index, passes.of(index, samples))
    for index, then in enumerate(known):
        assert all(np.array_equal(*parts) for parts in zip(then, passes.inputs(index), strict=True))


def test_layers_are_exact_at_their_limits() -> None:
    tensors, name, random = refiners(4, CONFIG), refine.name_of(1, "D", 0, 3), np.random.default_rng(0)
    inputs = refine.input_count("D", 0, 3)
    for part, most in (("w_1", 80 * inputs + 255 * CONFIG.width), ("w_2", 4 * 255), ("w_3", 4 * 255)):
        size = tensors[f"{name}.{part}"].shape
        tensors[f"{name}.{part}"] = random.choice([-1, 1], size) * ((2**24 - 40_000) // most)
    layers = refine.layers_of(tensors, CONFIG)[name]
    signs = np.concatenate([np.sign(layers.w_1), random.choice([-1, 1], (700, inputs + CONFIG.width))])
    seen = (80 * signs[:, :inputs].T).astype(np.int16)
    states = np.where(signs[:, inputs:] > 0, 255, 0).astype(np.uint8)
    w_1, b_1, w_2, b_2, w_3, b_3 = (tensors[f"{name}.{part}"].astype(np.int64) for part in refine.Layers._fields)
    one = (w_1 @ np.concatenate([seen, states.T]) + b_1 >> 8).clip(0, 255)
    two = (w_2 @ one + b_2 >> 9).clip(0, 255)
    outputs = w_3 @ two + b_3
    assert np.array_equal(layers.outputs(seen, states), outputs) and abs(outputs).max() > 2**23


@pytest.mark.parametrize("part", refine.Layers._fields)
def test_refiners_whose_sums_are_not_exact_are_refused(part: str) -> None:
    tensors = refiners(8, CONFIG)
    name = f"{refine.name_of(1, 'C', 2, 2)}.{part}"
    tensors[name] = np.full_like(tensors[name].astype(np.int64), 2**15 if part[0] == "w" else -(2**24))
    with pytest.raises(ValueError, match="not exact"):
        refine.layers_of(tensors, CONFIG)
    tensors[name] = tensors[name][:, :0]
    with pytest.raises(ValueError, match=r"not exact|does not fit"):
        refine.layers_of(tensors, CONFIG)


def test_refiners_are_fitted_and_make_tiles_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEVELS": 1, "STEPS": 20, "BATCH": 256, "WIDE": (4, 4), "NARROW": (4, 4)}.items():
        monkeypatch.setattr(training, name, value)
    photo = np.array(Image.open(PHOTO).convert("RGB"))[60:156, 40:136]
    tensors = training.fit(LosslessNetworks(TINY_LOSSLESS), [torch.from_numpy(photo).permute(2, 0, 1)])
    training.attach(TINY_LOSSLESS, tensors, tmp_path / "refined.safetensors")
    tiles, identities = [], set[bytes]()
    for path in (TINY_LOSSLESS, tmp_path / "refined.safetensors"):
        weights = LosslessNetworks(path)
        tiles.append(TileCoder(weights, 8)._push_network(weights, photo))
        identities.add(weights.identity)
        assert np.array_equal(TileCoder(weights, 8).pop(tiles[-1], photo.shape), photo)
    assert len(tiles[1].words) < 0.99 * len(tiles[0].words) and len(identities) == 2


def test_refined_progressive_files_show_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TileCoder, "push", lambda coder, samples: coder._push_network(coder.weights, samples))
    codec, image = refined(Codec("cpu", TINY_LOSSLESS)), picture(90, 70)
    data, pixels = codec.compress(image, lossless=True, progressive=True), np.asarray(image).astype(int)
    assert same(codec.decompress(data), image)
    errors = []
    for part in (0.5, 0.8, 0.95):
        shown = np.asarray(codec.decompress(data[: int(part * len(data))], preview=True))
        errors.append(np.abs(shown - pixels).mean())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 5
