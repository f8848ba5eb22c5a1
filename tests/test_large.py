"""Large pictures: one copy of the pixels is held, and of the latents the rows that are needed."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_CPU, cli, names, picture, python, saved
from PIL import Image

from bitstream import LimitError, Limits
from vaecodec import Codec
from vaecodec.image import open_picture
from vaecodec.info import UNLIMITED
from vaecodec.lossy.grid import Band
from vaecodec.lossy.weights import LossyWeights

SMALL, LARGE = (1024, 1024), (3000, 2000)
COMMAND = """
import sys
from functools import partial
import vaecodec.codec
from vaecodec.cli import main
vaecodec.codec.Codec = partial(vaecodec.codec.Codec, tile=256)
main(sys.argv[1:], standalone_mode=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*arguments: object) -> int:
    """Bytes that a command in a fresh process held at most."""
    # What glibc's malloc keeps for itself would blur the figures.
    result = python(COMMAND, *arguments, "--threads", 1, "--quiet", *TINY_CPU, MALLOC_MMAP_THRESHOLD_="65536")
    assert result.returncode == 0, result.stderr
    return 1024 * int(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_one_copy_of_the_pixels_is_held(tmp_path: Path) -> None:
    """Pillow has 4 bytes for a pixel: with a second copy, even of 3 bytes, it would be 7. What lies between two
    sizes is what grows with the picture."""
    peaks = []
    for size in (SMALL, LARGE):
        source, packed = tmp_path / "a.png", tmp_path / "a.vae"
        ramp = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp)).save(source)
        peaks.append((peak("compress", source, "-o", packed), peak("decompress", packed, "-o", tmp_path / "b.png")))
    pixels = LARGE[0] * LARGE[1] - SMALL[0] * SMALL[1]
    for small, large in zip(*peaks, strict=True):
        assert (large - small) / pixels < 5.5


@pytest.mark.usefixtures("small_tiles")
def test_latents_are_held_for_two_rows_of_tiles(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    held, move = list[int](), Band.move

    def spy(self: Band, top: int, bottom: int) -> None:
        move(self, top, bottom)
        held.append(self.values.shape[1])

    monkeypatch.setattr(Band, "move", spy)
    tiny.decompress(tiny.compress(picture(70, 640)))
    assert len(held) == 10 and max(held) == 4 + tiny.lossy.margin + 4


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("margin", [3, 4, 5, 9, 100])
def test_pixels_do_not_depend_on_the_rows_that_are_held(
    tiny: Codec, monkeypatch: pytest.MonkeyPatch, margin: int
) -> None:
    """More than synthesis sees is of no use and does no harm, be it several rows of tiles or all of them."""
    image = picture(150, 330, "RGBA")
    image.putalpha(picture(150, 330, "L", seed=1))
    data, region = tiny.compress(image), (50, 70, 60, 200)
    expected, part = tiny.decode_array(data), tiny.decode_array(data, region=region)
    monkeypatch.setattr(LossyWeights, "margin", margin)
    assert np.array_equal(tiny.decode_array(data), expected)
    assert np.array_equal(tiny.decode_array(data, region=region), part)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lossless", [False, True])
def test_tiles_make_up_the_picture(codec: Codec, lossless: bool) -> None:
    data = codec.compress(picture(150, 100), lossless=lossless)
    whole, seen = codec.decode_array(data), np.zeros((100, 150), int)
    for (x, y, width, height), samples in codec.decode_tiles(data):
        seen[y : y + height, x : x + width] += 1
        assert np.array_equal(samples, whole[y : y + height, x : x + width])
    assert (seen == 1).all()


# The limit, which is Pillow's as well


@pytest.mark.parametrize("kind", [("--lossless",), ("--target-bpp", "2", "--best-effort"), ()])
def test_the_limit_is_raised_for_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, ...], small_weights: None
) -> None:
    """A picture of which neither Pillow nor we would take so many pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    (tmp_path / "a.png").write_bytes(saved(picture(20, 10)))
    raised = ("--max-pixels", 200, "--device", "cpu")
    assert cli("compress", tmp_path / "a.png", *kind, "--max-pixels", 199, "--device", "cpu").exit_code == 5
    assert names(tmp_path) == ["a.png"]
    assert cli("compress", tmp_path / "a.png", *kind, *raised).exit_code == 0
    assert cli("decompress", tmp_path / "a.vae", tmp_path / "b.png", *raised).exit_code == 0
    assert Image.MAX_IMAGE_PIXELS == 50
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "b.png")


def test_callers_raise_it_as_well(codec: Codec) -> None:
    limits = Limits(max_pixels=199)
    for lossless in (False, True):
        with pytest.raises(LimitError):
            codec.compress(picture(20, 10), lossless=lossless, limits=limits)
    wide = Image.new("L", (2**17 + 1, 1))
    with pytest.raises(LimitError):
        codec.compress(wide)
    assert codec.decompress(codec.compress(wide, limits=UNLIMITED), UNLIMITED).size == wide.size


def test_a_picture_beyond_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(picture(20, 10)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("read"))
    with pytest.raises(LimitError), (tmp_path / "a.png").open("rb") as file:
        open_picture(file, Limits(max_pixels=199))


@pytest.mark.parametrize("limit", [99, 150, 199])
def test_the_limit_is_said_in_our_words(tmp_path: Path, limit: int) -> None:
    """Pillow's own message names twice the number."""
    (tmp_path / "a.png").write_bytes(saved(picture(20, 10)))
    result = cli("compress", tmp_path / "a.png", "--max-pixels", limit, *TINY_CPU)
    assert result.exit_code == 5 and result.stderr.endswith(" pixels exceeds the limits\n")
    assert str(2 * limit) not in result.stderr
