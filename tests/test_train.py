"""Training: what it writes, that it resumes where it stopped, and that several processes stay together."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HERE, TINY_CONFIG, TINY_LOSSLESS_CONFIG, cli, picture, same
from training_process import SECONDS, losses_of, minutes

from vaecodec import Codec, export, lossless, ranks, train
from vaecodec.crops import Crops, load_images
from vaecodec.objectives import Lossy, rate_distortion_loss
from vaecodec.train import read_config
from vaecodec.weights import load


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        picture(288, 272, seed=seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A clock that counts steps; ``stop`` is how many there are before the process is interrupted."""
    state = {"stop": 10**6}

    def clocked(budget: float, spent: float, *_: object) -> Iterator[tuple[float, float]]:
        for _step in range(state["stop"]):
            spent += SECONDS
            if spent >= budget:
                return
            yield spent / budget, spent
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "clocked", clocked)
    return state


def run(data: Path, out: Path, steps: int, config: Path = TINY_CONFIG, **options: Any) -> dict[str, Any]:
    train.train(config, data, minutes(steps), out, device_name="cpu", **options)
    return state_of(out / "last.pt")


def state_of(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def equal(a: dict[str, Any], b: dict[str, Any], *parts: str) -> bool:
    return all(torch.equal(a[part][name], b[part][name]) for part in parts for name in a[part])


def test_the_command_writes_checkpoints_curve_and_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "FIT_BATCHES", 3)
    result = cli(
        "train", TINY_CONFIG, "--data", data, "--minutes", 0.03, "--out", tmp_path, "--val", data, "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    assert {"last.pt", "stable.pt", "curve.csv", "tiny.safetensors"} <= set(os.listdir(tmp_path))
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == state_of(tmp_path / "last.pt")["step"]
    assert all(float(rows[-1][f"bpp_{q}"]) > 0 < float(rows[-1][f"psnr_{q}"]) for q in (0, 25, 50, 75, 100))
    codec = Codec("cpu", tmp_path / "tiny.safetensors")
    image = picture(70, 50)
    assert codec.decompress(codec.compress(image)).size == image.size
    target = tmp_path / "again.safetensors"
    assert cli("export", tmp_path / "last.pt", "--data", data, "-o", target).exit_code == 0
    assert Codec("cpu", target).lossy.identity == codec.lossy.identity


@pytest.mark.usefixtures("stepping")
def test_the_command_trains_lossless_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "FIT_BATCHES", 2)
    monkeypatch.setattr(lossless, "LINEAR_CROPS", 8)
    val, out = tmp_path / "val", tmp_path / "out"
    val.mkdir()
    picture(72, 65).save(val / "a.png")
    options = ("--data", data, "--minutes", minutes(5), "--out", out, "--val", val, "--device", "cpu")
    result = cli("train", TINY_LOSSLESS_CONFIG, *options)
    assert result.exit_code == 0, result.stderr
    assert {"last.pt", "stable.pt", "curve.csv", "tiny_lossless.safetensors"} <= set(os.listdir(out))
    last = state_of(out / "last.pt")
    assert (last["step"], last["kind"], last["config"]["latents"]) == (5, "lossless", (3, 2))
    with (out / "curve.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    parts = [row for row in rows[-1] if row[-1].isdigit() or row == "x_given_z"]
    assert len(parts) == 2 * 3 + 1 + 2
    assert 0 < rows[-1]["bpsp"] == pytest.approx(sum(rows[-1][part] for part in parts), rel=1e-4)
    codec, image = Codec("cpu", out / "tiny_lossless.safetensors"), picture(70, 50)
    assert same(codec.decompress(codec.compress(image, lossless=True)), image)
    target = tmp_path / "again.safetensors"
    assert cli("export", out / "last.pt", "--data", data, "-o", target).exit_code == 0
    assert Codec("cpu", target).lossless.identity == codec.lossless.identity


@pytest.mark.usefixtures("stepping")
def test_training_lowers_the_loss_and_keeps_the_stable_state(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective, _ = read_config(TINY_CONFIG)
    assert isinstance(objective, Lossy)
    last = run(data, tmp_path, 80)
    assert last["step"] == 80
    assert last["config"]["width"] == state_of(tmp_path / "stable.pt")["config"]["width"] == 8

    def loss(state: dict[str, Any] | None) -> float:
        model = objective.build()
        torch.manual_seed(9)
        crops = Crops(load_images(data), torch.device("cpu"))
        objective.start(model, crops, 64)
        if state:
            model.load_state_dict(state["model"])
        torch.manual_seed(1)
        with torch.no_grad():
            x, quality = crops.batch(16, 64), crops.qualities(16)
            return float(rate_distortion_loss(model, x, quality, objective.loss_power, objective.config.lambda_max))

    assert loss(last) < loss(None)


@pytest.mark.parametrize("config", [TINY_CONFIG, TINY_LOSSLESS_CONFIG], ids=["lossy", "lossless"])
def test_resuming_gives_what_an_uninterrupted_run_gives(
    data: Path, tmp_path: Path, stepping: dict[str, int], monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    monkeypatch.setattr(lossless, "LINEAR_CROPS", 8)
    whole = run(data, tmp_path / "whole", 12, config)
    out = tmp_path / "parts"
    for stop in (5, 5):  # the second time in the exact part
        stepping["stop"] = stop
        with pytest.raises(KeyboardInterrupt):
            run(data, out, 12, config, resume=out / "last.pt" if out.exists() else None)
    stepping["stop"] = 10**6
    assert state_of(out / "last.pt")["step"] == 10
    parts = run(data, out, 12, config, resume=out / "last.pt")
    assert parts["step"] == whole["step"] == 12
    assert equal(whole, parts, "model", "average")
    assert equal(state_of(tmp_path / "whole" / "stable.pt"), state_of(out / "stable.pt"), "model")


@pytest.mark.usefixtures("stepping")
def test_resuming_elsewhere_starts_a_new_run_from_the_weights(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "a", 3)
    second = run(data, tmp_path / "b", 0, resume=tmp_path / "a" / "last.pt")
    assert second["step"] == 0 and equal(first, second, "model", "average")
    export.export(tmp_path / "a" / "last.pt", data, tmp_path / "a.safetensors")
    third = run(data, tmp_path / "c", 0, resume=tmp_path / "a.safetensors")
    exact = load(tmp_path / "a.safetensors", torch.device("cpu")).model.state_dict()
    assert equal({"model": exact}, third, "model")


def test_the_seed_decides_the_run(data: Path, tmp_path: Path, stepping: dict[str, int]) -> None:
    runs = [run(data, tmp_path / str(i), 2, seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert equal(runs[0], runs[1], "model") and not equal(runs[0], runs[2], "model")


def test_the_clock_ends_on_time_and_forgives_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 5000.0, 5001.0, 5040.0])
    monkeypatch.setattr(train.time, "monotonic", lambda: next(times))
    seconds = [spent for _, spent in train.clocked(100.0, 10.0, torch.device("cpu"), 1)]
    assert seconds == [11.0, 12.0, 72.0, 73.0]


WORKER = """
import os, sys
from pathlib import Path
import torch
from vaecodec import objectives, train
torch.set_num_threads(1)
models = []
class Kept(objectives.LossyModel):
    def __init__(self, config):
        super().__init__(config)
        models.append(self)
objectives.LossyModel = Kept
config, data, out = map(Path, sys.argv[1:])
train.train(config, data, 0.04, out, device_name="cpu")
torch.save(models[0].state_dict(), out / f"rank{os.environ['RANK']}.pt")
"""


needs_distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def two_processes(*arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()


@needs_distributed
def test_two_processes_end_with_equal_weights(data: Path, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    two_processes(worker, TINY_CONFIG, data, tmp_path)
    states = [state_of(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    last = state_of(tmp_path / "last.pt")
    assert last["step"] > 0
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]) and torch.equal(tensor, last["model"][name]), name


@needs_distributed
@pytest.mark.parametrize("config", [TINY_CONFIG, TINY_LOSSLESS_CONFIG], ids=["lossy", "lossless"])
def test_two_processes_follow_the_losses_of_one(data: Path, tmp_path: Path, config: Path) -> None:
    one = losses_of(config, data, tmp_path / "one", 8)
    two_processes(HERE / "training_process.py", config, data, tmp_path, 8)
    two = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert len(one) == 8 and two[0] == two[1]
    assert two[0][0] == pytest.approx(one[0], rel=1e-6)  # the same weights, crops and noise
    assert two[0] == pytest.approx(one, rel=1e-3)  # gradients are summed in another order, in half precision


@needs_distributed
def test_two_processes_go_on_where_one_stopped(data: Path, tmp_path: Path, stepping: dict[str, int]) -> None:
    one = losses_of(TINY_CONFIG, data, tmp_path / "one", 8)
    stepping["stop"] = 4
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, 8)
    two_processes(HERE / "training_process.py", TINY_CONFIG, data, tmp_path, 8, tmp_path / "last.pt")
    two = json.loads((tmp_path / "rank0.json").read_text())
    assert len(two) == 4 and two == pytest.approx(one[4:], rel=1e-3)


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 3)
    with pytest.raises(ValueError, match=r"batch of 8 .* 3 processes"):
        ranks.share(torch.zeros(8, 1))


# Data and configurations


def test_configurations(tmp_path: Path) -> None:
    objective, options = read_config(TINY_CONFIG)
    assert objective.config.blocks == (1, 1) and options.batch == 4
    assert read_config(TINY_LOSSLESS_CONFIG)[0].config.latents == (3, 2)
    packaged = Path(train.__file__).parent / "configs"
    for kind in ("lossy", "lossless"):
        assert read_config(packaged / f"{kind}.toml")[0].name == kind
    for text in ("[train]\nepochs = 3\n", '[model]\nkind = "epochs"\n', '[model]\nkind = "lossless"\nepochs = 3\n'):
        (tmp_path / "wrong.toml").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.toml.*epochs"):
            read_config(tmp_path / "wrong.toml")


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
