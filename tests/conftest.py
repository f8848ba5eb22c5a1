"""Pictures, weights and ways to run the command line, shared by all tests."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import vaecodec.codec
from bitstream import Kind
from vaecodec import Codec, export, lossless, weights
from vaecodec.cli import main
from vaecodec.crops import Crops
from vaecodec.lossless import LosslessModel
from vaecodec.model import Config, LossyModel
from vaecodec.objectives import Lossless

try:
    import hypothesis
except ImportError:
    import no_hypothesis as hypothesis  # type: ignore[no-redef]

    sys.modules |= {"hypothesis": hypothesis, "hypothesis.strategies": hypothesis.strategies}

HERE = Path(__file__).parent
TINY = HERE / "golden" / "tiny.safetensors"
TINY_LOSSLESS = HERE / "golden" / "tiny_lossless.safetensors"
TINY_CONFIG = HERE / "golden" / "tiny.toml"
TINY_LOSSLESS_CONFIG = HERE / "golden" / "tiny_lossless.toml"
PHOTO = HERE / "data" / "astronaut.png"
CPU = ("--device", "cpu")
TINY_CPU = ("--weights", str(TINY), *CPU)

LOSSLESS = lossless.Config(
    levels=2, width=8, features=4, blocks=1, hidden=4, filters=1, vae_width=8, vae_blocks=1, latents=(3, 2)
)

# A busy machine is no fault of the code.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile("tests")


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Slopes, an edge and some texture: something that a codec has to work on."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phase, slope = rng.uniform(0, 6, (2, 3)), rng.uniform(-2, 2, (2, 3))
    planes = 128 + 50 * np.sin(x[..., None] / 9 + phase[0]) + 40 * np.cos(y[..., None] / 7 + phase[1])
    planes += x[..., None] * slope[0] + y[..., None] * slope[1] + 60 * (x + 2 * y > width)[..., None]
    planes += rng.normal(0, 12, planes.shape)
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8)).convert(mode)


def same(a: Image.Image, b: Image.Image) -> bool:
    """The same mode, size and pixels."""
    return (a.mode, a.size, a.tobytes()) == (b.mode, b.size, b.tobytes())


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def cli(*arguments: object, data: bytes | None = None) -> Result:
    """The command line in this process."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=data, prog_name="vaecodec")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def python(code: str, *arguments: object, data: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Python code in a fresh process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=False, env=os.environ | env)


def process(*arguments: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own."""
    return python("from vaecodec.cli import main; main()", *arguments, data=data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def small_model(seed: int = 0) -> LossyModel:
    """A random model whose every layer does something, unlike an untrained one's."""
    torch.manual_seed(seed)
    model = LossyModel(Config(8, 16, 8, (1, 1), 8, 4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def small_lossless_model(seed: int = 0) -> LosslessModel:
    """The same for lossless pictures."""
    torch.manual_seed(seed)
    model = LosslessModel(LOSSLESS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_words(rng: np.random.Generator, n: int) -> bytes:
    return rng.integers(1, 2**32, n, np.uint32).astype("<u4").tobytes()


@pytest.fixture(scope="session")
def tiny() -> Codec:
    """The codec with the small frozen model."""
    return Codec("cpu", TINY)


def packaged(kind: str) -> Path:
    """What is tested with the packaged weights must not be skipped where they are missing."""
    path = weights.packaged(kind)
    if not path.exists():
        pytest.fail(f"no packaged weights at {path}")
    return path


@pytest.fixture
def shipped() -> Path:
    """The packaged lossy weights."""
    return packaged("lossy")


@pytest.fixture
def shipped_lossless() -> Path:
    """The packaged lossless weights."""
    return packaged("lossless")


def write_lossless_weights(path: Path) -> None:
    """A small lossless model, trained for a few steps and exported."""
    torch.manual_seed(0)
    objective, device = Lossless(LOSSLESS, coarse_crop=16), torch.device("cpu")
    model = objective.build()
    images = [torch.from_numpy(np.array(picture(96, 96, seed=seed))).permute(2, 0, 1) for seed in range(4)]
    crops = Crops(images, 64, device, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless, "LINEAR_CROPS", 8)
        patch.setattr(export, "FIT_BATCHES", 2)
        objective.start(model, crops)
        optim = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            optim.zero_grad()
            objective.loss(model, crops, 2, device).backward()  # type: ignore[no-untyped-call]
            optim.step()
        model.exact(True)
        tables = export.fit_pixel_tables(model, crops), export.latent_tables(True), export.latent_tables(False)
    weights.save_lossless(path, model, *tables)


@pytest.fixture(scope="session")
def lossless_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the small lossless model."""
    path = tmp_path_factory.mktemp("weights") / "lossless.safetensors"
    write_lossless_weights(path)
    return path


@pytest.fixture(scope="session")
def lossless_codec(lossless_weights: Path) -> Codec:
    """The codec with the small lossless model."""
    return Codec("cpu", lossless_weights)


@pytest.fixture(scope="session")
def codec(tiny: Codec, lossless_codec: Codec) -> Codec:
    """The codec with both small models."""
    codec = Codec("cpu")
    codec._loaded = {Kind.LOSSY: tiny.lossy, Kind.LOSSLESS: lossless_codec.lossless}
    return codec


@pytest.fixture
def small_weights(lossless_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models in place of the packaged ones, for what loads these on its own."""
    paths = {"lossy": TINY, "lossless": lossless_weights}
    monkeypatch.setattr(vaecodec.codec, "packaged", paths.__getitem__)
    monkeypatch.setattr(vaecodec.codec, "_shared", {})


@pytest.fixture(params=["constriction", "python"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two coders in turn."""
    if request.param == "constriction":
        pytest.importorskip("constriction")
    monkeypatch.setenv("VAECODEC_CODER", request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """256 x 192 pixels of a photograph."""
    if not PHOTO.exists():
        return picture(256, 192)
    with Image.open(PHOTO) as image:
        left, top = (image.width - 256) // 2, (image.height - 192) // 2
        return image.convert("RGB").crop((left, top, left + 256, top + 192))


@pytest.fixture
def threads() -> Any:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
