"""PSNR, MS-SSIM and SSIMULACRA2 against their definitions, and the packages that have them where they are installed."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cli, picture, saved
from PIL import Image, ImageFilter

from vaecodec import ImageError, metrics
from vaecodec.engines import MissingError
from vaecodec.metrics import SIDE_MIN, compare, ms_ssim_of, psnr, ssimulacra2


@pytest.mark.parametrize("size", [(161, 163), (200, 176), (345, 251)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ms_ssim_is_that_of_pytorch_msssim(size: tuple[int, int], mode: str) -> None:
    reference = pytest.importorskip("pytorch_msssim")
    a = picture(*size, mode)
    b = a.filter(ImageFilter.GaussianBlur(1.5))
    x, y = (torch.from_numpy(np.array(i).reshape(size[1], size[0], -1)).permute(2, 0, 1)[None].double() for i in (a, b))
    assert compare(a, b).ms_ssim == pytest.approx(float(reference.ms_ssim(x, y, data_range=255.0)), abs=2e-5)


def test_ms_ssim_falls_with_distance() -> None:
    a = picture(176, 176)
    values = [compare(a, a.filter(ImageFilter.GaussianBlur(radius))).ms_ssim for radius in (0, 1, 2, 4)]
    assert values[0] == pytest.approx(1, abs=1e-6) and values == sorted(values, reverse=True)  # type: ignore[type-var]


def test_ms_ssim_of_opposites_is_a_number() -> None:
    x = np.indices((SIDE_MIN, SIDE_MIN)).sum(0)[..., None] % 2 * np.uint8(255)
    assert 0 <= ms_ssim_of(x, 255 - x) < 0.5
    assert compare(picture(SIDE_MIN - 1, 200), picture(SIDE_MIN - 1, 200)).ms_ssim is None


def test_psnr_is_its_definition() -> None:
    a, b = picture(50, 40), picture(50, 40, seed=1)
    mse = ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean()
    assert compare(a, b).psnr == psnr(a, b) == pytest.approx(10 * math.log10(255**2 / mse))
    assert compare(a, a).psnr == math.inf
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16)), Image.fromarray(np.array([[655, 65535]], np.uint16))
    assert compare(*deep).psnr == pytest.approx(20 * math.log10(65535 / 655) + 10 * math.log10(2))


def test_grey_is_colour_and_no_alpha_is_opaque() -> None:
    grey = picture(30, 20, "L")
    assert compare(grey, grey.convert("RGB")).psnr == compare(grey, grey.convert("LA")).psnr == math.inf
    assert compare(grey, grey.convert("RGBA")).psnr == math.inf
    clear = grey.convert("LA")
    clear.putalpha(0)
    assert compare(grey, clear).psnr == pytest.approx(10 * math.log10(2))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ImageError, match="30 x 20 and 20 x 30"):
        compare(picture(30, 20), picture(20, 30))
    with pytest.raises(ImageError, match="8 and 16 bits"):
        compare(Image.new("L", (4, 4)), Image.new("I;16", (4, 4)))


# SSIMULACRA2


def test_ssimulacra2_is_that_of_its_package() -> None:
    package = pytest.importorskip("ssimulacra2")
    a = picture(70, 50)
    b = a.filter(ImageFilter.GaussianBlur(1))
    expected = package.compute_ssimulacra2(io.BytesIO(saved(a)), io.BytesIO(saved(b)))
    assert ssimulacra2(a, b) == compare(a, b).ssimulacra2 == pytest.approx(expected)
    assert ssimulacra2(a, a) == 100 > ssimulacra2(a, b)
    grey = a.convert("L")
    assert ssimulacra2(grey, grey.convert("RGB")) == 100


def test_ssimulacra2_of_deep_samples_is_that_of_what_they_look_like() -> None:
    pytest.importorskip("ssimulacra2")
    a, b = picture(40, 30), picture(40, 30).filter(ImageFilter.GaussianBlur(1))
    x, y = (np.asarray(p).astype(np.uint16) for p in (a, b))
    x[0, 0], y[0, 0] = 255, 255  # so that all bits are in use
    shallow = ssimulacra2(x.astype(np.uint8), y.astype(np.uint8))
    assert ssimulacra2(x * 257, y * 257) == pytest.approx(shallow)
    assert ssimulacra2(x * 4 + x // 64, y * 4 + y // 64) == pytest.approx(shallow, abs=0.1)


def test_alpha_is_laid_over_two_greys() -> None:
    pytest.importorskip("ssimulacra2")
    a, b = picture(40, 30), picture(40, 30).filter(ImageFilter.GaussianBlur(1))
    flat = []
    for p in (a, b):
        p.putalpha(Image.linear_gradient("L").resize(p.size))
    for grey in metrics.BACKGROUNDS:
        pair = []
        for p in (a, b):
            under = Image.new("RGBA", p.size, (grey, grey, grey, 255))
            under.alpha_composite(p)
            pair.append(under.convert("RGB"))
        flat.append(ssimulacra2(*pair))
    assert ssimulacra2(a, b) == min(flat) < max(flat)


def test_large_pictures_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ssimulacra2")
    monkeypatch.setattr(metrics, "SEEN_MAX", 40)
    a, b = picture(70, 33), picture(70, 33).filter(ImageFilter.GaussianBlur(1))
    halves = [ssimulacra2(a.crop((x, 0, x + 35, 33)), b.crop((x, 0, x + 35, 33))) for x in (0, 35)]
    assert ssimulacra2(a, b) == pytest.approx(sum(halves) / 2)
    assert [part.stop - part.start for part in metrics.parts(81)] == [27, 27, 27]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vaecodec.engines.installed", lambda name: name != "ssimulacra2")
    monkeypatch.setattr(metrics, "installed", lambda name: name != "ssimulacra2")
    picture(30, 20).save(tmp_path / "a.png")
    with pytest.raises(MissingError, match=r"pip install 'vaecodec\[metrics\]'"):
        ssimulacra2(picture(30, 20), picture(30, 20))
    assert compare(picture(30, 20), picture(30, 20)).ssimulacra2 is None
    shown = cli("compare", tmp_path / "a.png", tmp_path / "a.png")
    assert "SSIMULACRA2 -  (pip install 'vaecodec[metrics]')" in shown.stdout
    for option in (["--visually-lossless"], ["--target-ssimulacra2", "70"]):
        result = cli("compress", tmp_path / "a.png", *option)
        assert result.exit_code == 1 and "pip install 'vaecodec[metrics]'" in result.stderr
        assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "a.vae").exists()


def test_pictures_too_small_for_it() -> None:
    pytest.importorskip("ssimulacra2")
    assert compare(picture(7, 20), picture(7, 20)).ssimulacra2 is None
    with pytest.raises(ImageError, match="8 pixels, not 7 x 20"):
        ssimulacra2(picture(7, 20), picture(7, 20))
