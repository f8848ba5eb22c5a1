"""`vaecodec train` and `export` on folders, pictures, checkpoints and numbers that are not what they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import CPU, TINY, TINY_CONFIG, TINY_LOSSLESS, TINY_LOSSLESS_CONFIG, cli, few_batches, picture
from training_process import equal, minutes, run, state_of

from vaecodec import Codec
from vaecodec.training import lossless


@pytest.mark.parametrize(
    ("kind", "phase", "message"),
    [
        ("lossy", {"crop": 70}, "16 must divide"),
        ("lossy", {"crop": 512}, "512 pixels"),
        ("lossless", {"crop": 66}, "4 must divide"),
        ("lossless", {"hard": True}, "lossy models"),
    ],
)
def test_impossible_phases_are_refused_before_the_first_step(
    data: Path, tmp_path: Path, kind: str, phase: dict[str, Any], message: str
) -> None:
    config, out = tmp_path / "c.toml", tmp_path / "run"
    source = TINY_CONFIG if kind == "lossy" else TINY_LOSSLESS_CONFIG
    lines = [f"{name} = {str(value).lower()}" for name, value in phase.items()]
    config.write_text(source.read_text() + "[[train.phases]]\n" + "\n".join(lines) + "\n")
    result = cli("train", config, "--data", data, "--minutes", 1, "--out", out, *CPU)
    assert result.exit_code == 2 and message in result.stderr and not out.exists()


def test_wrong_input_is_wrong_usage(data: Path, tmp_path: Path) -> None:
    empty, small = tmp_path / "empty", tmp_path / "small"
    for folder in (empty, small):
        folder.mkdir()
    picture(40, 40).save(small / "a.png")
    for folder in (empty, small):
        result = cli("train", TINY_CONFIG, "--data", folder, "--minutes", 1, "--out", tmp_path / "run")
        assert result.exit_code == 2 and "picture" in result.stderr
    for arguments in (("missing.toml", "--minutes", 1), (TINY_CONFIG, "--minutes", 0), ("missing", "--minutes", 1)):
        assert cli("train", *arguments, "--data", data, "--out", tmp_path / "run").exit_code in (1, 2)
    assert not (tmp_path / "run").exists()


def trained(data: Path, out: Path, *options: object, config: Path = TINY_CONFIG, steps: int = 3) -> Result:
    return cli("train", config, "--data", data, "--minutes", minutes(steps), "--out", out, *CPU, *options)


@pytest.fixture
def exporting(stepping: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    few_batches(monkeypatch, 1)
    return stepping


@pytest.mark.usefixtures("exporting")
def test_progress_is_printed_where_there_is_no_terminal(data: Path, tmp_path: Path) -> None:
    result = trained(data, tmp_path / "run")
    lines = result.stdout.splitlines()
    assert lines[0] == "lossy: 0.02 M weights, 3 pictures of 0.235 megapixels, on cpu"
    assert [" step 1  loss " in lines[1], " step 2 " in lines[2], " step 3 " in lines[3]] == [True] * 3
    assert lines[-1].endswith("step 3  done")


@pytest.mark.usefixtures("exporting")
def test_a_run_is_not_replaced_unless_that_is_said(data: Path, tmp_path: Path) -> None:
    out, curve = tmp_path / "run", tmp_path / "run" / "curve.csv"
    assert trained(data, out, "--val", data).exit_code == 0
    before, rows = state_of(out / "last.pt"), curve.read_text()
    for options in ((), ("--resume", TINY), ("--resume", out / "stable.pt")):
        result = trained(data, out, *options)
        assert result.exit_code == 2 and "holds a run" in result.stderr and "--overwrite" in result.stderr
        assert equal(before, state_of(out / "last.pt"), "model") and curve.read_text() == rows
    result = trained(data, out, "--overwrite", "--seed", 1, "--val", data)
    assert result.exit_code == 0 and not equal(before, state_of(out / "last.pt"), "model")
    assert len(curve.read_text().splitlines()) == len(rows.splitlines())  # begun anew
    assert trained(data, out, "--resume", out / "last.pt", steps=5).exit_code == 0
    assert state_of(out / "last.pt")["step"] == 4  # the clock stood at the end of the third


@pytest.mark.usefixtures("exporting")
def test_a_run_that_diverges_ends_with_sound_weights(data: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "diverging.toml", tmp_path / "run"
    config.write_text(TINY_CONFIG.read_text().replace("warmup = 10", "warmup = 1") + "lr = 1e6\n")
    result = trained(data, out, config=config, steps=30)
    assert result.exit_code == 1 and "the loss is " in result.stderr and "training stopped" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    for name in ("last.pt", "stable.pt"):
        state = state_of(out / name)
        assert all(t.isfinite().all() for part in ("model", "average") for t in state.get(part, {}).values()), name
    image = picture(70, 50)
    assert Codec("cpu", out / "diverging.safetensors").compress(image)
    again = trained(data, out, "--resume", out / "last.pt", config=config, steps=30)
    assert again.exit_code == 1  # a sound state to go on from, though not at this rate


def test_the_optimiser_of_a_checkpoint_is_that_of_the_configuration(
    data: Path, tmp_path: Path, stepping: dict[str, int]
) -> None:
    out, config = tmp_path / "run", tmp_path / "adam.toml"
    stepping["stop"] = 2
    with pytest.raises(KeyboardInterrupt):
        run(data, out, 5)
    config.write_text(TINY_CONFIG.read_text().replace("soap = 7e-4", "soap = 0.0"))
    result = trained(data, out, "--resume", out / "last.pt", config=config)
    assert result.exit_code == 2 and "optimisers" in result.stderr


@pytest.mark.usefixtures("exporting")
def test_pictures_too_small_to_validate_on_are_left_out_or_refused(data: Path, tmp_path: Path) -> None:
    val, out = tmp_path / "val", tmp_path / "run"
    val.mkdir()
    picture(60, 100).save(val / "small.png")
    result = trained(data, out, "--val", val)
    assert result.exit_code == 2 and "validation" in result.stderr and not out.exists()
    picture(64, 70).save(val / "large.png")
    result = trained(data, out, "--val", val)
    assert result.exit_code == 0 and "1 of 2 validation pictures" in result.stderr
    assert (out / "curve.csv").exists()


@pytest.mark.usefixtures("exporting")
@pytest.mark.parametrize("kind", ["lossy", "lossless"])
def test_pictures_good_enough_to_train_on_are_good_enough_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(lossless, "LINEAR_CROPS", 8)
    folder, config = tmp_path / "small", tmp_path / f"{kind}.toml"
    folder.mkdir()
    side = 50 if kind == "lossy" else 33
    for i in range(2):
        picture(side, side + i, seed=i).save(folder / f"{i}.png")
    source = TINY_CONFIG if kind == "lossy" else TINY_LOSSLESS_CONFIG
    config.write_text(
        source.read_text().replace("crop = 64", "crop = 32").replace("coarse_crop = 16", "coarse_crop = 8")
    )
    result = trained(folder, tmp_path / "run", config=config)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "run" / f"{kind}.safetensors").exists()


@pytest.mark.usefixtures("exporting")
def test_files_that_are_no_pictures_are_named_and_training_goes_on(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    picture(100, 90).save(folder / "a.png")
    picture(40, 90).save(folder / "narrow.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-999])
    result = trained(folder, tmp_path / "run")
    assert result.exit_code == 0 and f"{folder / 'cut.png'}: left out" in result.stderr
    assert "1 pictures are smaller than 64 pixels" in result.stdout


@pytest.mark.usefixtures("exporting")
def test_a_folder_that_cannot_be_read_ends_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refusing)
    result = trained(data, tmp_path / "run")
    assert result.exit_code == 1 and str(data) in result.stderr and "Permission denied" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("exporting")
def test_foreign_checkpoints_are_refused_in_one_line(data: Path, tmp_path: Path) -> None:
    foreign, junk, other = tmp_path / "foreign.pth", tmp_path / "junk.pt", tmp_path / "other.pt"
    torch.save({"state_dict": {}}, foreign)
    junk.write_bytes(b"junk" * 99)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 99)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "config": {"width": 8}}, tmp_path / "half.pt")
    torch.save({"model": {}, "config": {"wide": 8}}, tmp_path / "later.pt")
    for path in [*sorted(tmp_path.glob("*.p*")), tmp_path / "junk.safetensors"]:
        result = trained(data, tmp_path / "run", "--resume", path)
        assert result.exit_code == 4 and path.name in result.stderr and len(result.stderr.splitlines()) == 1
        if path.suffix != ".safetensors":
            result = cli("export", path, "--data", data, "-o", tmp_path / "x.safetensors")
            assert result.exit_code == 4 and path.name in result.stderr and len(result.stderr.splitlines()) == 1
    assert not other.exists() and not (tmp_path / "run").exists()


def test_checkpoints_of_other_models_are_refused(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "wider.toml"
    config.write_text(TINY_CONFIG.read_text().replace("inner = 8", "inner = 16"))
    result = trained(data, tmp_path / "run", "--resume", TINY, config=config)
    assert result.exit_code == 2 and "another configuration: inner 8 for 16" in result.stderr
    result = trained(data, tmp_path / "run", "--resume", TINY_LOSSLESS)
    assert result.exit_code == 2 and "lossless model" in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpu", "cuda:77", "meta", "cpu:x"])
def test_devices_that_are_not_there_are_refused(data: Path, tmp_path: Path, name: str) -> None:
    result = cli("train", TINY_CONFIG, "--data", data, "--minutes", 1, "--out", tmp_path / "run", "--device", name)
    assert result.exit_code == 2 and f"device {name}" in result.stderr and not (tmp_path / "run").exists()


def test_an_export_needs_its_folder(data: Path, tmp_path: Path) -> None:
    result = cli("export", TINY, "--data", data, "-o", tmp_path / "none" / "x.safetensors")
    assert result.exit_code == 2 and "no such folder" in result.stderr


@pytest.mark.usefixtures("exporting")
def test_checkpoints_from_before_there_were_units_get_some(data: Path, tmp_path: Path) -> None:
    state, old = run(data, tmp_path / "run", 2), tmp_path / "old.pt"
    model = {name: tensor for name, tensor in state["model"].items() if not name.endswith("_units")}
    torch.save({"model": model, "kind": "lossy", "config": state["config"]}, old)
    assert trained(data, tmp_path / "next", "--resume", old).exit_code == 0
    assert cli("export", old, "--data", data, "-o", tmp_path / "old.safetensors").exit_code == 0
    weights = Codec("cpu", tmp_path / "old.safetensors", engine="torch").lossy.model
    assert weights.g_s.fine[0].conv_3.in_units.unique().numel() > 1
