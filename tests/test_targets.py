"""Rate targets: how near they are met, and with how many encodes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, cli, picture
from PIL import Image

from vaecodec import Codec, read_info, targets
from vaecodec.image import DeepPicture
from vaecodec.metrics import psnr, ssimulacra2
from vaecodec.targets import ENCODES, SEEN_TOLERANCE, compress_to, following, search


class Fake:
    """Compresses to a size that is a function of the quality; counts."""

    def __init__(self, size: Any) -> None:
        self.size, self.encodes = size, 0

    def compress(self, picture: Image.Image, quality: float, *_: Any, **__: Any) -> bytes:
        self.encodes += 1
        return bytes(self.size(quality))


class FakeDecoder:
    """Whose files are their qualities, and whose pictures too."""

    def compress(self, _: Image.Image, quality: float, *__: Any, **___: Any) -> bytes:
        return str(quality).encode()

    def decode_array(self, data: bytes, *_: Any) -> float:
        return float(data)


@pytest.mark.parametrize("scale", [0.2, 1, 5])
@pytest.mark.parametrize("curve", ["root", "exponential", "linear"])
def test_a_few_encodes_are_enough(scale: float, curve: str) -> None:
    """Curves as photographs have them, and others."""
    sizes: dict[str, Callable[[float], int]] = {
        "root": lambda q: round(scale * 20_000 * (0.5 + q / 100) ** 3),
        "exponential": lambda q: round(scale * 20_000 * math.exp(q / 38)),
        "linear": lambda q: round(scale * (20_000 + 2_500 * q)),
    }
    for share in (0.03, 0.3, 0.6, 0.97):
        size = sizes[curve](100 * share)
        codec: Any = Fake(sizes[curve])
        found = search(codec, Image.new("RGB", (1000, 1000)), size=size)
        assert found.near and abs(len(found.data) - size) <= 0.01 * size
        assert found.encodes == codec.encodes <= 6 and found.reached == len(found.data)


def test_what_is_out_of_reach_costs_no_long_search() -> None:
    codec: Any = Fake(lambda q: round(100_000 * math.exp(q / 40)))
    for size, quality in ((10, 0), (10**7, 100)):
        found = search(codec, Image.new("L", (1000, 1000)), size=size)
        assert (found.quality, found.near) == (quality, False) and found.encodes <= 3


@pytest.mark.parametrize(
    "size",
    [
        lambda q: 40_000 if q < 33.33 else 90_000,
        lambda q: round(90_000 - 300 * q),
        lambda q: 50_000 + round(20_000 * math.sin(q)),
        lambda q: 77_000,
    ],
    ids=["step", "falling", "waves", "flat"],
)
def test_the_search_ends_on_any_curve(size: Any) -> None:
    codec: Any = Fake(size)
    found = search(codec, Image.new("L", (1000, 1000)), size=65_000)
    assert found.encodes <= ENCODES and abs(len(found.data) - 65_000) <= 25_000


@pytest.mark.parametrize(
    "size",
    [
        lambda q: round(90_000 - 300 * q),
        lambda q: round(90_000 - 20 * (q - 40) ** 2),
        lambda q: round(30_000 + 20 * (q - 30) ** 2),
        lambda q: round(min(20_000 * (0.5 + q / 100) ** 3, 45_000) - max(0, q - 80) * 50),
    ],
    ids=["falling", "hump", "dip", "saturating"],
)
def test_curves_that_are_not_monotone(size: Any) -> None:
    sizes = [size(q / 10) for q in range(1001)]
    for share in (0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        goal = min(sizes) + share * (max(sizes) - min(sizes))
        assert search(Fake(size), Image.new("L", (1000, 1000)), size=goal).near, share  # type: ignore[arg-type]


def test_the_next_quality_is_new_or_ends_the_search() -> None:
    assert following({5000: 1.0}, 1.1, 1e-4) == 6000 and following({5000: 1.0}, 9.0, 1e-4) == 10_000
    assert following({2000: 1.0, 6000: 2.0}, 1.5, 1.0) == 4000
    assert following({2000: 1.0, 2001: 2.0}, 1.5, 1.0) in (2000, 2001)
    assert following({2000: 1.0, 3000: 0.9}, 1.5, 1e-4) == 10_000


def test_the_tiny_codec_meets_its_targets(tiny: Codec) -> None:
    image = picture(96, 64)
    size = (len(tiny.compress(image, 0)) + len(tiny.compress(image, 100))) / 2
    assert abs(len(compress_to(tiny, image, size=size)) - size) <= 0.01 * size
    assert abs(8 * len(compress_to(tiny, image, bpp=0.4)) / (96 * 64) - 0.4) <= 0.004
    assert abs(psnr(image, tiny.decompress(compress_to(tiny, image, psnr=21.95))) - 21.95) <= 0.1  # its curve has steps


def test_the_size_is_that_of_the_file_with_its_metadata(tiny: Codec) -> None:
    image = picture(96, 64)
    image.info["icc_profile"] = b"profile" * 1000
    found = search(tiny, image, size=7300)
    assert found.near and abs(len(found.data) - 7300) <= 73


def test_a_miss_is_a_warning(tiny: Codec) -> None:
    with pytest.warns(UserWarning, match=r"nearest is \d+ bytes, at quality 100$"):
        assert compress_to(tiny, picture(40, 30), bpp=50) == tiny.compress(picture(40, 30), 100)
    with pytest.warns(UserWarning, match=r"nearest is [\d.]+ dB, at quality 0$"):
        assert compress_to(tiny, picture(40, 30), psnr=1) == tiny.compress(picture(40, 30), 0)


def test_a_target_the_eye_agrees_with(tiny: Codec) -> None:
    pytest.importorskip("ssimulacra2")
    image = picture(96, 64)
    low, high = (ssimulacra2(image, tiny.decompress(tiny.compress(image, quality))) for quality in (0, 100))
    found = search(tiny, image, ssimulacra2=(low + high) / 2)
    assert found.near and found.encodes <= 6 and abs(found.reached - (low + high) / 2) <= SEEN_TOLERANCE
    assert found.reached == ssimulacra2(image, tiny.decompress(found.data))
    deep = np.asarray(image).astype(np.uint16) * 257
    assert search(tiny, DeepPicture(deep, 16, {}), ssimulacra2=(low + high) / 2).near
    with pytest.warns(UserWarning, match=r"nearest is an SSIMULACRA2 of -?[\d.]+, at quality 100$"):
        compress_to(tiny, image, ssimulacra2=100)
    with pytest.warns(UserWarning, match=r"nearest is an SSIMULACRA2 of -?[\d.]+, at quality 0$"):
        compress_to(tiny, image, ssimulacra2=low - 20)


@pytest.mark.parametrize("reach", [0.3, 1.0])
def test_its_search_takes_few_encodes(reach: float) -> None:
    """On curves as photographs have them, near the top as well."""
    for offset in (-0.6, 0, 0.4):
        for goal in (20, 50, 70, 85):

            def score(quality: float, offset: float = offset) -> float:
                return 100 - math.exp(4.65 + offset - reach * 1.98 * quality / 100)

            if not score(0) < goal < score(100):
                continue
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(targets, "need", lambda *_: None)
                patch.setattr(targets, "seen", lambda _, decoded: score(decoded))
                codec: Any = FakeDecoder()
                found = search(codec, Image.new("RGB", (64, 64)), ssimulacra2=goal)
            assert found.near and found.encodes <= 5


def test_visually_lossless(tmp_path: Path, shipped_lossless: Path) -> None:
    """What a tiny model does not reach is kept without loss, or as near as it comes, and is said."""
    pytest.importorskip("ssimulacra2")
    path, out = tmp_path / "a.png", tmp_path / "a.vae"
    picture(64, 48).save(path)
    weights = ("--weights", TINY, "--device", "cpu", "-o", out)
    result = cli("compress", path, "--visually-lossless", *weights)
    assert result.exit_code == 0 and "every pixel equal" in result.stderr and "kept without loss" in result.stderr
    assert read_info(out).kind == "lossless"
    result = cli("compress", path, "--visually-lossless", "--best-effort", *weights)
    assert result.exit_code == 0 and read_info(out).quality == 100 and ", SSIMULACRA2 " in result.stderr
    result = cli("compress", path, "--target-ssimulacra2", "99", *weights)
    assert result.exit_code == 1 and "nothing was written" in result.stderr
    Image.new("RGB", (64, 48), (90, 120, 60)).save(path)  # more than 90 at any quality, which is no miss
    result = cli("compress", path, "--visually-lossless", *weights)
    assert result.exit_code == 0 and "meets the target" not in result.stderr


@pytest.mark.parametrize("aims", [{}, {"bpp": 1, "size": 2}, {"size": 1000, "psnr": 30}, {"bpp": 1, "ssimulacra2": 70}])
def test_there_is_one_target(tiny: Codec, aims: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="one of"):
        compress_to(tiny, picture(8, 8), **aims)


def test_a_photograph(shipped: Path, photo: Image.Image) -> None:
    codec = Codec("cpu", shipped)
    for aims in ({"bpp": 1.2}, {"size": 9000}, {"psnr": 33}, {"ssimulacra2": 60}):
        if "ssimulacra2" in aims:
            pytest.importorskip("ssimulacra2")
        found = search(codec, photo, **aims)
        assert found.near and found.encodes <= 5
