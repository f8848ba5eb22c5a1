"""Layers of the encoder in 8 bits: near those that they come from, in files, and back to what training goes on from."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import python
from PIL import Image

from bitstream import gaussian_tables
from vaecodec import kinds
from vaecodec.exact import ExactConv
from vaecodec.lossy.engine import KERNELS, LossyNetworks
from vaecodec.lossy.layers import SCALES, Block, CentredBlock, Config, ExactBlock, scale_of
from vaecodec.lossy.model import LossyModel
from vaecodec.lossy.weights import LossyWeights, save_lossy
from vaecodec.training import checkpoints
from vaecodec.training.calibrate import round_encoder
from vaecodec.training.export import add_graphs

TABLES = gaussian_tables(scale_of(torch.arange(SCALES).double()).numpy(), escape=True)
QUALITY = torch.tensor([0, 10000])


@pytest.fixture(scope="module")
def models() -> tuple[LossyModel, LossyModel, torch.Tensor]:
    """A random model, the same with g_a rounded, and what it was rounded by."""
    torch.manual_seed(0)
    model = LossyModel(Config(16, 32, 16, (1, 2), 8, 4, 3)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    rounded, x = copy.deepcopy(model), torch.rand(2, 3, 64, 64) * 255
    round_encoder(rounded, [(x, QUALITY), (255 - x, QUALITY)])
    return model, rounded, x


@pytest.fixture(scope="module")
def path(models: tuple[LossyModel, LossyModel, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("rounded") / "small.safetensors", copy.deepcopy(models[1])
    model.exact(True)
    save_lossy(path, model, TABLES)
    add_graphs(path)
    return path


def test_near_to_what_they_come_from(models: tuple[LossyModel, LossyModel, torch.Tensor], path: Path) -> None:
    model, rounded, x = models
    kinds_of = [type(block) for block in (*rounded.g_a.fine, *rounded.g_a.coarse)]
    assert kinds_of == [CentredBlock, CentredBlock, ExactBlock]
    assert {"h_a.conv_a", "h_a.conv_c"} < rounded.encoder_convs().keys()
    loaded = kinds.load(path, torch.device("cpu"))
    assert isinstance(loaded, LossyWeights)
    y = model.g_a(x, QUALITY)
    error = loaded.model.g_a(x, QUALITY) - y
    assert 0 < error.square().mean() < 1e-3 * y.square().mean()
    z = model.h_a(y, QUALITY)
    error = loaded.model.h_a(y, QUALITY) - z
    assert 0 < error.square().mean() < 1e-3 * z.square().mean()


def test_engines_agree(models: tuple[LossyModel, LossyModel, torch.Tensor], path: Path) -> None:
    x, loaded, networks = models[2][0].numpy(), kinds.load(path, torch.device("cpu")), LossyNetworks(path)
    exact = networks.kernel
    for quality in (0, 3333, 10000):
        reference = loaded.analyse(x, quality)
        z = loaded.hyper_analyse(reference, quality)
        for networks.kernel in reversed(KERNELS):
            for seen in (None, np.ones((4, 4), np.float32)):
                difference = networks.analyse(x, quality, seen) - reference
                assert np.square(difference).mean() < 1e-3 * np.square(reference).mean()
        for networks.kernel in (exact, "float32"):
            difference = networks.hyper_analyse(reference, quality) - z
            assert np.square(difference).mean() < 1e-3 * np.square(z).mean()


def test_training_goes_on_in_floating_point(models: tuple[LossyModel, LossyModel, torch.Tensor], path: Path) -> None:
    state = checkpoints.thawed(kinds.load(path, torch.device("cpu")).model, "lossy")
    objective, thawed = checkpoints.model_of(state, path)
    assert objective.name == "lossy" and all(isinstance(b, Block) for b in (*thawed.g_a.fine, *thawed.g_a.coarse))
    x, model = models[2], models[0]
    y = model.g_a(x, QUALITY)
    assert (thawed.g_a(x, QUALITY) - y).square().mean() < 1e-3 * y.square().mean()
    assert not any(isinstance(layer, ExactConv) for layer in thawed.h_a.modules())
    z = model.h_a(y, QUALITY)
    assert (thawed.h_a(y, QUALITY) - z).square().mean() < 1e-3 * z.square().mean()


def test_the_identity_is_the_decoders(models: tuple[LossyModel, LossyModel, torch.Tensor], path: Path) -> None:
    model = copy.deepcopy(models[0])
    model.exact(True)
    plain = path.with_name("plain.safetensors")
    save_lossy(plain, model, TABLES)
    assert kinds.load(plain, torch.device("cpu")).identity == kinds.load(path, torch.device("cpu")).identity


@pytest.mark.slow
def test_all_engines_decode_alike(photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import exactness

    threads = torch.get_num_threads()
    photo.crop((0, 0, 131, 97)).save(tmp_path / "photo.png")
    try:
        exactness.run([tmp_path / "photo.png"])
    finally:
        torch.set_num_threads(threads)
    assert " 0 with other samples" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_does_not_creep() -> None:
    """Of pictures of changing size, after the largest of them."""
    code = """
import numpy as np
from PIL import Image
from vaecodec import Codec
codec, rng = Codec("cpu", engine="onnx"), np.random.default_rng(0)
large = np.asarray(Image.fromarray(rng.integers(0, 255, (30, 30, 3), np.uint8)).resize((400, 400)))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
sizes = [(400, 400), *rng.integers(100, 400, (200, 2))]
for number, (height, width) in enumerate(sizes):
    codec.decode_array(codec.compress(np.ascontiguousarray(large[:height, :width]), 50))
    if number == 10:
        before = resident()
print(resident() - before)
"""
    done = python(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and int(done.stdout) < 16 * 2**20, done
