"""Pictures, weights and ways to run the command line, shared by all tests."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import vaecodec  # before torch: it sets how threads wait

# isort: split
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from training_process import SECONDS

import vaecodec.codec
import vaecodec.kinds
from vaecodec import Codec, kinds
from vaecodec.cli import main
from vaecodec.lossless import layers as lossless, refine
from vaecodec.lossless.model import LosslessModel
from vaecodec.lossless.tile import TileCoder
from vaecodec.lossless.weights import assembled
from vaecodec.lossy import misfits
from vaecodec.lossy.layers import Config
from vaecodec.lossy.model import LossyModel
from vaecodec.networks import tensors_in, write
from vaecodec.together import at_once
from vaecodec.training import loop as train, lossless as lossless_training, lossy as lossy_training
from vaecodec.weights import read, scrambled_array

HERE = Path(__file__).parent
TINY = HERE / "golden" / "tiny.safetensors"
TINY_FINER = HERE / "golden" / "tiny_finer.safetensors"
TINY_LOSSLESS = HERE / "golden" / "tiny_lossless.safetensors"
TINY_BYTES = HERE / "golden" / "tiny_bytes.safetensors"
TINY_CONFIG = HERE / "golden" / "tiny.toml"
TINY_LOSSLESS_CONFIG = HERE / "golden" / "tiny_lossless.toml"
PHOTO = HERE / "data" / "astronaut.png"
CPU = ("--device", "cpu")
TINY_CPU = ("--weights", str(TINY), *CPU)

LOSSLESS = lossless.Config(
    levels=2, width=8, features=4, blocks=1, hidden=4, filters=1, vae_width=8, vae_blocks=1, latents=(3, 2)
)

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


def in_bytes(path: Path) -> Path:
    """Write the small lossless model with levels of bytes, whose tensors are those of TINY_BYTES."""
    stored = read(TINY_LOSSLESS)
    held = tensors_in(stored, "decoder").items()
    kept = {name: tensor for name, tensor in held if not name.startswith("levels.") or ".base." in name}
    config = lossless.Config(**{**stored.config, "activation_bits": 8})
    write(path, "lossless", config, kept | load_file(TINY_BYTES), {}, assembled)
    return path


def moving(lossless: Codec) -> Codec:
    """The codec, whose tiles now move their scales."""
    weights = lossless.lossless
    weights.config = replace(weights.config, groups=20)
    return lossless


def refiners(width: int, config: lossless.Config) -> dict[str, NDArray[Any]]:
    """Tensors of refiners that move everything, the same for ever."""
    tensors: dict[str, NDArray[Any]] = {}
    for seed, place in enumerate(refine.all_of(config.refined)):
        inputs = refine.input_count(*place[1:]) + config.width
        sizes = {
            "w_1": (width, inputs, 1000),
            "b_1": (width, 1, 30_000),
            "w_2": (width, width, 1000),
            "b_2": (width, 1, 30_000),
            "w_3": (3, width, 500),
            "b_3": (3, 1, 9000),
        }
        for part, (rows, columns, spread) in sizes.items():
            values = scrambled_array(1, 100 + seed, rows * columns, spread)[0, -1]
            kind = np.int16 if part[0] == "w" else np.int32
            tensors[f"{refine.name_of(*place)}.{part}"] = values.reshape(rows, columns).astype(kind)
    return tensors


def refined(lossless: Codec) -> Codec:
    """The codec, whose tiles now move their scales and are refined."""
    weights = moving(lossless).lossless
    weights.config = replace(weights.config, refined=2)
    weights.refiners = refine.layers_of(refiners(4, weights.config), weights.config)
    return lossless


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


def few_batches(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Entropy tables are fitted on so few batches."""
    for module in (lossy_training, lossless_training):
        monkeypatch.setattr(module, "FIT_BATCHES", count)


def random_words(rng: np.random.Generator, n: int) -> bytes:
    return rng.integers(1, 2**32, n, np.uint32).astype("<u4").tobytes()


DOUBTFUL = misfits.Signs.doubtful


@pytest.fixture(autouse=True, scope="session")
def without_doubt() -> Iterator[None]:
    """The small lossy model was never trained, so that hardly a tile of its files would be worth its networks. They are
    used all the same, but in tests of that choice, which take ``doubts``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(misfits.Signs, "doubtful", lambda *_: False)
        yield


@pytest.fixture
def networks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lossless tiles are coded by the networks, even if another way should be shorter."""
    monkeypatch.setattr(TileCoder, "push", lambda coder, samples: coder._push_network(coder.weights, samples))


@pytest.fixture
def doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice as users have it."""
    monkeypatch.setattr(misfits.Signs, "doubtful", DOUBTFUL)


@pytest.fixture(scope="session")
def tiny() -> Codec:
    """The codec with the small frozen model."""
    return Codec("cpu", TINY)


@pytest.fixture(scope="session")
def torch_tiny() -> Codec:
    """The same, run by torch."""
    return Codec("cpu", TINY, engine="torch")


@pytest.fixture(scope="session")
def torch_lossless_codec() -> Codec:
    """The codec with the small lossless model, run by torch."""
    return Codec("cpu", TINY_LOSSLESS, engine="torch")


def gathering_codec() -> Codec:
    """What a codec with small tiles is on a GPU, but on the CPU: tiles, and pictures, are coded at once."""
    codec = Codec("cpu", [TINY, TINY_LOSSLESS], engine="torch", tile=64)
    codec.lossy.gathers = codec.lossless.gathers = True
    codec._each = at_once
    return codec


def packaged(kind: str) -> Path:
    """What is tested with the packaged weights must not be skipped where they are missing."""
    path = kinds.packaged(kind)
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


@pytest.fixture
def lossless_weights() -> Path:
    """The weights of the small lossless model."""
    return TINY_LOSSLESS


@pytest.fixture(scope="session")
def lossless_codec() -> Codec:
    """The codec with the small lossless model."""
    return Codec("cpu", TINY_LOSSLESS)


@pytest.fixture(scope="session")
def codec() -> Codec:
    """The codec with both small models."""
    return Codec("cpu", [TINY, TINY_LOSSLESS])


@pytest.fixture
def small_tiles(tiny: Codec, lossless_codec: Codec, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are made of tiles of 64 pixels a side."""
    for each in (tiny, lossless_codec, codec):
        monkeypatch.setattr(each, "tile", 64)


@pytest.fixture(scope="session")
def tiled_codec() -> Codec:
    """The codec with both small models, whose tiles have 64 pixels a side."""
    return Codec("cpu", [TINY, TINY_LOSSLESS], tile=64)


@pytest.fixture
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models in place of the packaged ones, for what loads these on its own."""
    paths = {"lossy": TINY, "lossless": TINY_LOSSLESS}
    monkeypatch.setattr(vaecodec.kinds, "packaged", paths.__getitem__)
    monkeypatch.setattr(vaecodec.codec, "_shared", {})


@pytest.fixture(params=["constriction", "numpy"])
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


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures to train on."""
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
