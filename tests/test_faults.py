"""When the machine fails: an error that says so, and nothing lost. Killed processes are in test_batch.py, damaged
weights in test_codec.py."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, TINY, TINY_CPU, cli, names, picture, python, same, small_model
from PIL import Image

from bitstream import gaussian_tables
from vaecodec import Codec, WeightsError
from vaecodec.lossy.layers import SCALES, scale_of
from vaecodec.lossy.weights import save_lossy

pytestmark = pytest.mark.usefixtures("threads")
MAIN = "from vaecodec.cli import main; main()"


@pytest.fixture
def folder(tmp_path: Path, tiny: Codec) -> Path:
    """A small picture, a large one, a file, and what an earlier run has left."""
    picture(8, 8).save(tmp_path / "a.png")
    picture(200, 200).save(tmp_path / "b.png")
    (tmp_path / "c.vae").write_bytes(tiny.compress(picture(200, 200)))
    for name in ("b.vae", "c.png"):
        (tmp_path / name).write_bytes(b"as it was")
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize(("command", "kept"), [("compress", "b.vae"), ("decompress", "c.png")])
def test_a_full_disk(folder: Path, command: str, kept: str) -> None:
    """No file may grow beyond 600 bytes: what does not fit fails, the others are written."""
    before = names(folder)
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
{MAIN}
"""
    sources = [path for path in folder.iterdir() if path.suffix == (".png" if command == "compress" else ".vae")]
    sources = [path for path in sources if path.read_bytes() != b"as it was"]
    result = python(code, command, *sources, "--overwrite", *TINY_CPU, PYTHONDONTWRITEBYTECODE="1")
    assert result.returncode == 1 and b": File too large\n" in result.stderr, result.stderr
    assert (folder / kept).read_bytes() == b"as it was"
    assert names(folder) == (sorted([*before, "a.vae"]) if command == "compress" else before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [("decompress", "c.vae", "-"), ("info", "c.vae")])
def test_a_full_disk_behind_standard_output(folder: Path, arguments: tuple[str, ...]) -> None:
    options = () if arguments[0] == "info" else TINY_CPU
    command = [sys.executable, "-c", MAIN, *arguments, *options]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=folder, check=False)
    assert result.returncode == 1, result
    assert b"No space left on device" in result.stderr and b"Traceback" not in result.stderr


@pytest.mark.skipif(not os.path.ismount("/sys"), reason="no /sys, where nobody creates files")
def test_an_output_that_cannot_be_written(folder: Path) -> None:
    result = cli("compress", folder / "a.png", "-o", "/sys/x.vae", *TINY_CPU)
    assert result.exit_code == 1 and result.stderr.startswith(f"vaecodec: {folder / 'a.png'}: /sys/x.vae: ")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA error: device lost\nmore"), OSError(5, "I/O error")]
)
@pytest.mark.parametrize("jobs", [1, 3])
def test_one_worker_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, error: Exception) -> None:
    """It is named, in one line; the others go on."""
    compress = Codec.compress

    def failing(self: Codec, image: Image.Image, *arguments: object, **options: object) -> bytes:
        if image.width == 200:
            raise error
        return compress(self, image, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Codec, "compress", failing)
    pictures = (folder / "a.png", folder / "b.png")
    result = cli("compress", *pictures, "--overwrite", "-j", jobs, "--threads", 1, *TINY_CPU)
    assert result.exit_code == 1 and (folder / "b.vae").read_bytes() == b"as it was"
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"vaecodec: {folder / 'b.png'}: ") and "1 failed" in lines[1]
    assert cli("verify", folder / "a.vae", *TINY_CPU).exit_code == 0


def test_weights_that_change_while_they_are_in_use(folder: Path, tiny: Codec) -> None:
    """A codec keeps what it has loaded and checked; whoever loads them anew is told."""
    path = folder / "w.safetensors"
    path.write_bytes(TINY.read_bytes())
    codec, data = Codec("cpu", path), (folder / "c.vae").read_bytes()
    clone = pickle.dumps(codec)
    with path.open("r+b") as file:
        file.truncate(1000)
    assert same(codec.decompress(io.BytesIO(data)), tiny.decompress(data))
    assert codec.compress(picture(8, 8)) == tiny.compress(picture(8, 8))
    for load in (lambda: pickle.loads(clone), lambda: Codec("cpu", path)):
        with pytest.raises(WeightsError, match="damaged"):
            load()
    result = cli("decompress", folder / "c.vae", "--overwrite", "--weights", path, *CPU)
    assert result.exit_code == 4 and (folder / "c.png").read_bytes() == b"as it was"


def test_weights_swapped_for_others(folder: Path) -> None:
    """They are good and they are not those that the file names."""
    path = folder / "w.safetensors"
    save_lossy(path, small_model(), gaussian_tables(scale_of(torch.arange(SCALES).double()).numpy(), escape=True))
    options = ("--weights", path, *CPU)
    result = cli("decompress", folder / "c.vae", "--overwrite", *options)
    assert result.exit_code == 4 and "made with weights" in result.stderr
    assert (folder / "c.png").read_bytes() == b"as it was"
    assert cli("compress", folder / "a.png", *options).exit_code == 0
    assert cli("verify", folder / "a.vae", *TINY_CPU).exit_code == 4
