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
from hypothesis import HealthCheck, settings
from PIL import Image

from vaecodec import Codec, weights
from vaecodec.cli import main
from vaecodec.model import Config, LossyModel

HERE = Path(__file__).parent
TINY = HERE / "golden" / "tiny.safetensors"
TINY_CONFIG = HERE / "golden" / "tiny.toml"
PHOTO = HERE / "data" / "astronaut.png"
CPU = ("--device", "cpu")
TINY_CPU = ("--weights", str(TINY), *CPU)

# A busy machine is no fault of the code.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


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


@pytest.fixture(scope="session")
def tiny() -> Codec:
    """The codec with the small frozen model."""
    return Codec("cpu", TINY)


@pytest.fixture
def shipped() -> Path:
    """The packaged weights. What is tested with them must not be skipped where they are missing."""
    path = weights.packaged()
    if not path.exists():
        pytest.fail(f"no packaged weights at {path}")
    return path


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
