"""Both engines code alike, and on a CPU nothing imports torch."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOUBTFUL, PHOTO, TINY, TINY_LOSSLESS, cli, packaged, picture, python, saved

import vaecodec.engines
import vaecodec.kinds
from bitstream import SPARSE, unpack
from vaecodec import Codec, WeightsError
from vaecodec.engines import MissingError
from vaecodec.lossy import misfits

CODE = """
import io, sys
from pathlib import Path
import numpy as np
from PIL import Image
import vaecodec
from vaecodec import Codec, compress_to, register_vae_opener
import vaecodec.kinds
paths = {"lossy": Path(sys.argv[1]), "lossless": Path(sys.argv[2])}
vaecodec.kinds.packaged = lambda name: paths[name]
image, folder = Image.open(sys.argv[3]), Path(sys.argv[4])
image = image.crop((0, 0, 70, 50))
for lossless in (False, True):
    data = vaecodec.compress(image, lossless=lossless, effort=2 * lossless)
    vaecodec.decompress(data), vaecodec.decompress(data, region=(3, 4, 20, 30))
    Codec().account(data), Codec().decode_array(data), list(Codec().decode_tiles(data))
register_vae_opener()
image.save(folder / "a.vae", lossless=True)
assert Image.open(folder / "a.vae").convert("RGB").tobytes() == image.tobytes()
compress_to(Codec(), image, psnr=20)
from vaecodec.array_codec import VaeCodec
VaeCodec().decode(VaeCodec().encode(np.array(image)))
from click.testing import CliRunner
from vaecodec.cli import main
image.save(folder / "a.png")
for arguments in (["compress", "--target-bpp", "9", "--best-effort"], ["compress", "--lossless", "--overwrite"]):
    result = CliRunner().invoke(main, [*arguments, str(folder / "a.png"), "-o", str(folder / "b.vae")])
    assert result.exit_code == 0, result.output
for arguments in (["decompress", "b.vae", "-o", "b.png"], ["verify", "b.vae"], ["compare", "a.png", "b.vae"]):
    arguments = [str(folder / part) if "." in part else part for part in arguments]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
print(*sorted({"torch", "onnx"} & set(sys.modules)))
"""


def test_torch_is_not_imported(tmp_path: Path) -> None:
    done = python(CODE, TINY, TINY_LOSSLESS, PHOTO, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr.decode()


@pytest.mark.parametrize(("size", "mode"), [((75, 53), "RGB"), ((130, 140), "RGBA"), ((1, 1), "L"), ((64, 17), "LA")])
def test_engines_code_alike(size: tuple[int, int], mode: str) -> None:
    codecs = [Codec("cpu", [TINY, TINY_LOSSLESS], tile=64, engine=engine) for engine in ("onnx", "torch")]
    image = picture(*size, mode)
    for options in ({"quality": 20}, {"quality": 99.99}, {"lossless": True}, {"lossless": True, "effort": 1}):
        files = [codec.compress(image, **options) for codec in codecs]  # type: ignore[arg-type]
        assert files[0] == files[1] or "lossless" not in options
        assert abs(len(files[0]) - len(files[1])) <= 8
        for data in files:
            region = (0, 0, size[0] // 2 + 1, size[1] // 2 + 1)
            for part in (None, region):
                first, second = (codec.decode_array(data, region=part) for codec in codecs)
                assert np.array_equal(first, second)


@pytest.mark.parametrize("name", ["lossy", "lossless"])
def test_packaged_weights_decode_alike(name: str, photo: Any) -> None:
    codecs = [Codec("cpu", packaged(name), engine=engine) for engine in ("onnx", "torch")]
    image = photo.convert("RGB").crop((100, 40, 260, 170))
    data = codecs[0].compress(image, 70, lossless=name == "lossless")
    assert np.array_equal(*(codec.decode_array(data) for codec in codecs))


def test_tiles_without_networks_are_masked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    codecs = [Codec("cpu", TINY, tile=64, engine=engine) for engine in ("onnx", "torch")]
    image = picture(200, 140)
    image.paste((255, 0, 255), (64, 64, 128, 128))
    monkeypatch.setattr(misfits.Signs, "doubtful", DOUBTFUL)
    monkeypatch.setattr(
        misfits, "signs", lambda samples, _: misfits.Signs(0 if len(np.unique(samples)) == 2 else np.inf, 0)
    )
    files = [codec.compress(image, 90) for codec in codecs]
    for data in files:
        assert len({tile.method == SPARSE for tile in unpack(data).tiles}) == 2
        assert np.array_equal(*(codec.decode_array(data) for codec in codecs))


def test_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(codec: Codec) -> str:
        return "onnx" if hasattr(codec.lossy, "kernel") else "torch"

    assert kind(Codec("cpu", TINY)) == kind(Codec("cpu", TINY, engine="onnx")) == "onnx"
    assert kind(Codec("cpu", TINY, engine="torch")) == "torch"
    with pytest.raises(ValueError, match="engine 'tpu'"):
        Codec("cpu", engine="tpu")
    with monkeypatch.context() as patch:
        patch.setattr(vaecodec.kinds, "installed", lambda name: name != "onnxruntime")
        assert kind(Codec("cpu", TINY)) == "torch"


def test_an_engine_that_is_not_exact_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from vaecodec.lossy.engine import LossyNetworks

    monkeypatch.setattr(LossyNetworks, "known_answer", lambda _: 1)
    with pytest.warns(RuntimeWarning, match="self-test.*torch"):
        assert not hasattr(Codec("cpu", TINY).lossy, "kernel")
    with pytest.raises(WeightsError, match="self-test"):
        Codec("cpu", TINY, engine="onnx")


def test_what_needs_torch_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, image = Codec("cpu", [TINY, TINY_LOSSLESS]), picture(40, 30)
    refined = len(codec.compress(image, effort=1))
    assert refined == len(Codec("cpu", TINY, engine="torch").compress(image, effort=1))
    monkeypatch.setattr(vaecodec.engines, "installed", lambda name: name != "torch")
    with pytest.raises(MissingError, match=r"effort above 0 needs torch: pip install 'vaecodec\[torch\]'"):
        codec.compress(image, effort=1)
    with pytest.raises(MissingError, match="device cuda needs torch"):
        Codec("cuda")
    (tmp_path / "a.png").write_bytes(saved(image))
    for arguments in (("--effort", 1), ("--device", "cuda"), ("--engine", "torch")):
        result = cli("compress", tmp_path / "a.png", "--weights", TINY, *arguments)
        assert result.exit_code and "pip install 'vaecodec[torch]'" in result.stderr, result.output
        assert len(result.stderr.splitlines()) <= 2 and "torch" in sys.modules
    (tmp_path / "b.png").write_bytes(saved(image))
    result = cli("compress", tmp_path / "a.png", tmp_path / "b.png", "--weights", TINY, "--effort", 1)
    assert result.stderr.count("needs torch") == 1, "once, and not for each file"
