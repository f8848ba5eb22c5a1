"""Training: what it writes, that it resumes where it stopped, and that several processes stay together."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import HERE, TINY, TINY_CONFIG, TINY_LOSSLESS, TINY_LOSSLESS_CONFIG, cli, few_batches, picture, same
from training_process import equal, losses_of, minutes, run, state_of

import vaecodec
from benchmarks.__main__ import main
from vaecodec import Codec
from vaecodec.kinds import load
from vaecodec.training import checkpoints, loop as train, lossless, ranks, steps
from vaecodec.training.crops import Crops, load_images
from vaecodec.training.loop import read_config
from vaecodec.training.lossy import LossyObjective, rate_distortion_loss
from vaecodec.training.objective import Phase


def test_the_command_writes_checkpoints_curve_and_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_batches(monkeypatch, 3)
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
    few_batches(monkeypatch, 2)
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
    assert isinstance(objective, LossyObjective)
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


PHASES = """
[[train.phases]]
until = 0.3
[[train.phases]]
until = 0.6
batch = 2
crop = 96
exact = true
[[train.phases]]
batch = 2
exact = true
hard = true
"""


@pytest.fixture
def phased(tmp_path: Path) -> Path:
    """The small lossy model in three phases: of larger crops, rounded, the encoder left as it is."""
    path = tmp_path / "phased.toml"
    path.write_text(TINY_CONFIG.read_text() + PHASES)
    return path


@pytest.mark.parametrize("kind", ["lossy", "lossless"])
def test_resuming_gives_what_an_uninterrupted_run_gives(
    data: Path, tmp_path: Path, stepping: dict[str, int], monkeypatch: pytest.MonkeyPatch, kind: str, phased: Path
) -> None:
    monkeypatch.setattr(lossless, "LINEAR_CROPS", 8)
    monkeypatch.setattr(train, "JUDGE_EVERY", 3)
    monkeypatch.setattr(steps, "JUMP", 0.99)  # so that the guard goes back, too
    config = phased if kind == "lossy" else TINY_LOSSLESS_CONFIG
    whole = run(data, tmp_path / "whole", 12, config)
    assert whole["slowed"] < 1
    out = tmp_path / "parts"
    for stop in (5, 5):  # in the second phase and in the third
        stepping["stop"] = stop
        with pytest.raises(KeyboardInterrupt):
            run(data, out, 12, config, resume=out / "last.pt" if out.exists() else None)
    stepping["stop"] = 10**6
    assert state_of(out / "last.pt")["step"] == 10
    parts = run(data, out, 12, config, resume=out / "last.pt")
    assert parts["step"] == whole["step"] == 12 and parts["slowed"] == whole["slowed"]
    assert equal(whole, parts, "model", "average")
    assert torch.equal(whole["norm"], parts["norm"])
    assert equal(state_of(tmp_path / "whole" / "stable.pt"), state_of(out / "stable.pt"), "model")


def parameters(state: dict[str, Any]) -> dict[str, Any]:
    """Without the units, which the end of a run sets."""
    return {name: tensor for name, tensor in state["model"].items() if not name.endswith("units")}


@pytest.mark.usefixtures("stepping")
def test_resuming_elsewhere_starts_a_new_run_from_the_weights(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "a", 3)
    second = run(data, tmp_path / "b", 0, resume=tmp_path / "a" / "last.pt")
    assert second["step"] == 0 and equal({"": parameters(first)}, {"": parameters(second)}, "")


@pytest.mark.parametrize("kind", ["lossy", "lossless"])
@pytest.mark.usefixtures("stepping")
def test_exported_weights_are_trained_on_as_good_as_they_are(data: Path, tmp_path: Path, kind: str) -> None:
    config, weights = {
        "lossy": (TINY_CONFIG, TINY),
        "lossless": (TINY_LOSSLESS_CONFIG, TINY_LOSSLESS),
    }[kind]
    resumed = run(data, tmp_path, 0, config, resume=weights)
    model = checkpoints.model_of(resumed, tmp_path / "last.pt")[1].eval()
    model.exact(True)
    shipped = load(weights, torch.device("cpu")).model
    images = [image[:, :64, :64] for image in load_images(data)]
    objective = read_config(config)[0]
    torch.manual_seed(0)
    before = objective.validate(shipped, images, torch.device("cpu"))
    torch.manual_seed(0)
    after = objective.validate(model, images, torch.device("cpu"))
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=0.02, abs=0.05), name
    assert resumed["step"] == 0


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
from vaecodec.training import lossy
from vaecodec.training import loop as train
torch.set_num_threads(1)
models = []
class Kept(lossy.LossyModel):
    def __init__(self, config):
        super().__init__(config)
        models.append(self)
lossy.LossyModel = Kept
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
    assert two[0] == pytest.approx(one, rel=5e-3)  # gradients are summed in another order, in half precision


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


def test_configurations() -> None:
    objective, options = read_config(TINY_CONFIG)
    assert objective.config.blocks == (1, 1) and options.phases == (Phase(1.0, 4, 64),)
    assert read_config(TINY_LOSSLESS_CONFIG)[0].config.latents == (3, 2)


def test_phases_follow_one_another(phased: Path) -> None:
    config = read_config(phased)[1]
    assert config.phase(0.0) == config.phase(0.29) == Phase(0.3, 4, 64)
    assert config.phase(0.3) == Phase(0.6, 2, 96, exact=True)
    assert config.phase(0.6) == config.phase(1.0) == Phase(1.0, 2, 64, exact=True, hard=True)
    assert [config.rate(step, 0.2) for step in (0, 9, 99)] == [0.1, 1, 1] and config.rate(99, 0.825) == pytest.approx(
        0.5
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepochs = 3\n", "epochs"),
        ('[model]\nkind = "epochs"\n', "epochs"),
        ('[model]\nkind = "lossless"\nepochs = 3\n', "epochs"),
        ("[train]\nexact = 0.2\n", "exact"),  # a phase says that now
        ("[train\n", "line 1"),
        ('[model]\nwidth = "wide"\n', "width = 'wide'"),
        ("[train]\nbatch = 0\n", "batch = 0"),
        ("[train]\nlr = -1\n", "lr = -1"),
        ("[train]\nlr = nan\n", "lr = nan"),
        ("[train]\nphases = 3\n", "phases"),
        ("[[train.phases]]\nuntil = 0.5\n", "the last at 1"),
        ("[[train.phases]]\nuntil = 1.0\n[[train.phases]]\n", "one after the other"),
        ("[[train.phases]]\nuntil = 1.0\nepochs = 1\n", "epochs"),
        ("train = 3\n", ""),
    ],
)
def test_wrong_configurations_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"wrong\.toml.*{re.escape(message)}"):
        read_config(tmp_path / "wrong.toml")


def test_packaged_configurations_are_those_of_the_packaged_weights(shipped: Path, shipped_lossless: Path) -> None:
    for path in (shipped, shipped_lossless):
        weights = load(path, torch.device("cpu"))
        config = Path(vaecodec.__file__).parent / "configs" / f"{path.stem}.toml"
        shipped_config = weights.model.config
        if path == shipped_lossless:  # bytes and refiners come after training
            shipped_config = replace(shipped_config, activation_bits=16, refined=0)
        assert read_config(config)[0].config == shipped_config


def test_the_speed_of_training_is_measured_by_phase(phased: Path) -> None:
    result = CliRunner().invoke(main, ["training-speed", str(phased), "--device", "cpu", "--seconds", "0.01"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        "4 crops of 64 pixels",
        "2 crops of 96 pixels, exact",
        "2 crops of 64 pixels, exact, hard",
    ]
    assert all(line.endswith(" megapixels a second") for line in lines[1:])
