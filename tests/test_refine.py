"""``effort``: the same decoder, better latents."""

from pathlib import Path

import pytest
import torch
from conftest import PHOTO, TINY_CPU, cli, picture, same
from PIL import Image

from vaecodec import Codec
from vaecodec.lossy import refine
from vaecodec.lossy.layers import Config, lagrangian
from vaecodec.lossy.refine import DESCENT, by_chance
from vaecodec.metrics import psnr


def cost(codec: Codec, image: Image.Image, quality: float, effort: int) -> float:
    """Rate + lambda * distortion of the file, in bits a pixel."""
    data = codec.compress(image, quality, effort=effort)
    error = 255**2 / 10 ** (psnr(image, codec.decompress(data)) / 10)
    weight = float(lagrangian(torch.tensor(round(100 * quality)), Config.lambda_max))
    return 8 * len(data) / (image.width * image.height) + weight * error


def test_effort_lowers_the_cost() -> None:
    codec = Codec("cpu")
    with Image.open(PHOTO) as photo:
        image = photo.convert("RGB").crop((100, 0, 228, 128))
    before, after = (cost(codec, image, 75, effort) for effort in (0, 1))
    assert after < 0.994 * before


def test_progress_moves_within_a_tile(tiny: Codec) -> None:
    counts = list[int]()
    tiny.compress(picture(40, 30), 60, counts.append, effort=1)
    assert len(counts) == DESCENT + 1 and sum(counts) == 48 * 32 and max(counts) - min(counts) <= 1


def test_a_step_too_far_is_taken_back(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(60, 40)
    monkeypatch.setattr(refine, "LONG", 1e4)
    assert cost(tiny, image, 50, 1) < 1.02 * cost(tiny, image, 50, 0)


def test_equal_pictures_give_equal_files(tiny: Codec, small_tiles: None) -> None:
    image = picture(150, 70, "RGBA")
    data = tiny.compress(image, 60, effort=1)
    assert data == tiny.compress(image, 60, effort=1) != tiny.compress(image, 60)
    assert tiny.decompress(data).size == image.size


def test_lossless_effort_is_never_larger(lossless_codec: Codec) -> None:
    for image in (picture(90, 70), Image.new("RGB", (90, 70), (1, 2, 3)), picture(90, 70).quantize(9)):
        files = [lossless_codec.compress(image, lossless=True, effort=effort) for effort in (0, 9)]
        assert len(files[1]) <= len(files[0])
        assert same(lossless_codec.decompress(files[1]), lossless_codec.decompress(files[0]))


def test_samples_lie_between_two_integers_and_settle_on_the_nearer() -> None:
    generator, value = torch.Generator().manual_seed(0), torch.linspace(-2, 2, 401)
    for temperature in (0.5, 0.02):
        sample, _ = by_chance(value, temperature, generator)
        assert bool((sample >= value.floor() - 1e-4).all() and (sample <= value.floor() + 1 + 1e-4).all())
    clear = (value - value.round()).abs() < 0.4
    assert bool((sample - value.round())[clear].abs().max() < 1e-3)


def test_efforts_out_of_range(tiny: Codec) -> None:
    for effort in (-1, 10):
        with pytest.raises(ValueError, match="effort"):
            tiny.compress(picture(4, 4), effort=effort)
    assert cli("compress", "x.png", "--effort", 10, *TINY_CPU).exit_code == 2


def test_effort_on_the_command_line(tiny: Codec, tmp_path: Path) -> None:
    image = picture(40, 30)
    image.save(tmp_path / "in.png")
    assert cli("compress", tmp_path / "in.png", "--effort", 1, *TINY_CPU).exit_code == 0
    assert (tmp_path / "in.vae").read_bytes() == tiny.compress(image, effort=1)
