"""The seams between the kinds of model: weights by identity, tiles of a network that keeps nothing, stripes."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, TINY_FINER, TINY_LOSSLESS, cli, picture, same, small_lossless_model, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import vaecodec.codec
import vaecodec.kinds
from bitstream import AnsStack, Kind, gaussian_tables, pack, unpack
from vaecodec import Codec, WeightsError
from vaecodec.exact import exact_arithmetic, reach_of
from vaecodec.kinds import SEARCH_PATH, WINGS, load
from vaecodec.lossless import stripes
from vaecodec.lossless.model import Level
from vaecodec.lossless.stripes import in_stripes
from vaecodec.lossless.tile import Network
from vaecodec.lossy.layers import SCALES, scale_of
from vaecodec.lossy.refine import ANNEALING
from vaecodec.lossy.weights import save_lossy
from vaecodec.weights import about, read

DEVICE = torch.device("cpu")


def exported(path: Path, seed: int = 0) -> Path:
    """Weights of a random lossy model."""
    save_lossy(path, small_model(seed), gaussian_tables(scale_of(torch.arange(SCALES).double()).numpy(), escape=True))
    return path


def described(path: Path, **changes: str) -> Path:
    """The small lossy weights with other metadata."""
    with safe_open(TINY, "pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(TINY), path, metadata)
    return path


# Weights by identity


def test_several_weights_of_a_kind_stand_side_by_side(tmp_path: Path, tiny: Codec) -> None:
    other = exported(tmp_path / "other.safetensors")
    image = picture(40, 30)
    both, swapped = Codec("cpu", [TINY, other, TINY_LOSSLESS]), Codec("cpu", [TINY_LOSSLESS, other, TINY])
    data, others = both.compress(image), swapped.compress(image)
    assert data == tiny.compress(image) and others == Codec("cpu", other).compress(image)
    for codec in (both, swapped):
        assert same(codec.decompress(data), tiny.decompress(data))
        assert same(codec.decompress(others), Codec("cpu", other).decompress(others))
        assert same(codec.decompress(codec.compress(image, lossless=True)), image)
    with pytest.raises(WeightsError, match=f"made with weights {unpack(others).header.model.hex()}, these are "):
        tiny.decompress(others)


def test_the_search_path(tmp_path: Path, tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    other = exported(folder / "other.safetensors")
    shutil.copy(TINY_FINER, folder / "finer.safetensors")
    save_file({"weight": torch.zeros(3)}, folder / "another program.safetensors", {"format": "pt"})
    image = picture(40, 30)
    files = [Codec("cpu", path).compress(image) for path in (other, TINY_FINER, TINY)]
    (tmp_path / "a.vae").write_bytes(files[0])
    monkeypatch.setattr(vaecodec.kinds, "packaged", lambda kind: Path(f"no {kind} weights"))
    places = [tmp_path / "nowhere", folder, TINY]
    monkeypatch.setenv(SEARCH_PATH, os.pathsep.join(map(str, places)))
    codec = Codec("cpu")
    for data, path in zip(files, (other, TINY_FINER, TINY), strict=True):
        assert same(codec.decompress(data), Codec("cpu", path).decompress(data))
    # New files are made with the first that there is, but for those that are given.
    assert codec.compress(image) == files[1] and Codec("cpu", TINY).compress(image) == files[2]
    assert cli("decompress", tmp_path / "a.vae", *CPU).exit_code == 0
    monkeypatch.setenv(SEARCH_PATH, str(TINY))
    with pytest.raises(WeightsError, match="no weights at no lossy weights"):
        Codec("cpu").decompress(files[0])
    assert cli("verify", tmp_path / "a.vae", *CPU).exit_code == 4
    assert cli("verify", tmp_path / "a.vae", "--weights", TINY, "--weights", other, *CPU).exit_code == 0


def test_files_that_name_their_identity_are_not_read_in_vain(
    tmp_path: Path, tiny: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [exported(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
    assert [about(path).identity for path in paths] == [read(path).identity for path in paths]
    data = Codec("cpu", paths[2]).compress(picture(20, 10))
    seen = list[Path]()

    def counted(path: Path) -> Any:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(vaecodec.kinds, "read", counted)
    monkeypatch.setenv(SEARCH_PATH, str(tmp_path))
    Codec("cpu").decompress(data)
    assert seen == [paths[2]]


def test_an_architecture_that_nobody_knows_is_named_with_its_identity(tmp_path: Path, tiny: Codec) -> None:
    identity = tiny.lossy.identity.hex()
    assert about(TINY).architecture == "1" == about(exported(tmp_path / "new.safetensors")).architecture
    for changes in ({"architecture": "7"}, {"kind": "progressive"}):
        path = described(tmp_path / "other.safetensors", **changes)
        for refused in (lambda path=path: load(path, DEVICE), lambda path=path: Codec("cpu", path)):
            with pytest.raises(WeightsError, match=f"{next(iter(changes.values()))}.*{identity}"):
                refused()
    assert load(described(tmp_path / "same.safetensors", architecture="1"), DEVICE).identity == tiny.lossy.identity


def test_an_identity_that_is_not_that_of_the_tensors_is_damage(tmp_path: Path, tiny: Codec) -> None:
    assert load(described(tmp_path / "a.safetensors", identity=tiny.lossy.identity.hex()), DEVICE)
    for said in (bytes(16).hex(), "no hexadecimal"):
        with pytest.raises(WeightsError, match="damaged"):
            load(described(tmp_path / "a.safetensors", identity=said), DEVICE)


def test_a_file_of_one_kind_is_not_decoded_with_weights_of_another(codec: Codec) -> None:
    file = unpack(codec.compress(picture(20, 10)))
    for model in (codec.lossless.identity, bytes(16)):
        with pytest.raises(WeightsError, match="made with"):
            codec.decompress(pack(replace(file.header, model=model), file.tiles))


def test_every_kind_has_a_wing_with_packaged_weights() -> None:
    assert set(WINGS) == set(Kind)
    for wing in WINGS.values():
        assert about(vaecodec.kinds.packaged(wing.name)).kind == wing.name


def test_there_is_a_refinement_for_every_effort() -> None:
    assert len(ANNEALING) == len(vaecodec.codec.EFFORTS)


# Networks


def test_a_network_keeps_nothing_between_pictures(lossless_codec: Codec) -> None:
    pictures = [np.asarray(picture(48, 40, seed=seed), np.int32).transpose(2, 0, 1).copy() for seed in range(2)]
    network = Network(lossless_codec.lossless, 40, 48, 3, False)

    def pushed(network: Network, picture: Any) -> bytes:
        stack = AnsStack()
        network.push(stack, picture)
        return stack.to_bytes()

    with exact_arithmetic(DEVICE):
        words = [pushed(network, each) for each in pictures]
        assert words == [pushed(Network(lossless_codec.lossless, 40, 48, 3, False), each) for each in pictures]
        for packed, expected in zip(reversed(words), reversed(pictures), strict=True):
            assert np.array_equal(network.pop(AnsStack(packed), None), expected)


def steps_of(level: Level) -> dict[str, tuple[Callable[..., Any], int, list[Tensor]]]:
    """What is computed in stripes, how far it looks, and its inputs: noise, of which every row matters."""
    torch.manual_seed(0)
    a, b, c = (torch.randint(0, 256, (1, 3, 40, 20)).float() for _ in range(3))
    features = [torch.randint(0, 16, (1, level.entry.shape[1] - 9, 40, 20)) / 32] if level.entry.shape[1] > 9 else []
    h = torch.randint(0, 512, (1, level.entry.shape[0], 40, 20)) / 32
    return {
        "enter": (level.enter, level.reach, [a, *features]),
        **{
            f"prepare {name}": (partial(level.prepare, name), level.head(name).reach, [a, b, c][: known + 1])
            for known, name in enumerate("DBC")
        },
        "update": (partial(level.update, "D"), reach_of(level.updates["D"]), [h, a - b, (b - c) / 32]),
    }


@pytest.mark.parametrize("number", [0, 1])
def test_stripes_look_as_far_as_they_must_and_no_further(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed stripe by stripe, every step gives what it gives of the whole; with a row less around it does not."""
    monkeypatch.setattr(stripes, "STRIPE", 8)
    model = small_lossless_model().requires_grad_(False)
    model.exact(True)
    level = model.levels[number]
    assert isinstance(level, Level)
    with exact_arithmetic(DEVICE):
        for name, (f, margin, inputs) in steps_of(level).items():
            whole = f(*inputs)
            whole = (whole,) if isinstance(whole, Tensor) else whole
            assert margin > 0, name
            for rows, equal in ((margin, True), (margin - 1, False)):
                parts = in_stripes(f, rows, *inputs)
                assert all(torch.equal(x, y) for x, y in zip(parts, whole, strict=True)) == equal, (name, rows)


def test_files_do_not_depend_on_the_stripes(lossless_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """On noise beside a photograph, of which the rows have nothing to do with each other."""
    image = picture(60, 70)
    image.paste(picture(60, 30, seed=5), (0, 20))
    files = []
    for rows in (5, 64, 1000):
        monkeypatch.setattr(stripes, "STRIPE", rows)
        files.append(lossless_codec.compress(image, lossless=True))
    assert files[0] == files[1] == files[2]


def test_the_margin_of_lossy_tiles_is_that_of_the_layers(tiny: Codec) -> None:
    """Each 3x3 reaches one sample further; two samples at 1/8 are one latent."""
    blocks = tiny.lossy.model.config.blocks
    assert tiny.lossy.margin == blocks[1] + -(-blocks[0] // 2) == 2
