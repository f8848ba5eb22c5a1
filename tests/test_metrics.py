"""PSNR and MS-SSIM against their definitions, and against pytorch-msssim where it is installed."""

import math

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image, ImageFilter

from vaecodec import ImageError
from vaecodec.metrics import SIDE_MIN, compare, ms_ssim_of, psnr


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
