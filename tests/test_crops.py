"""Training pictures: which files are taken, and that gathered crops are parts of them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, saved
from PIL import Image
from torch import Tensor

from vaecodec.training.crops import Crops, FolderError, half_colour, keep_large, load_images, read_picture, wear

CPU = torch.device("cpu")


def located(width: int, height: int, number: int) -> Tensor:
    """A picture whose samples say where they are: row, column and number."""
    y, x = np.mgrid[:height, :width]
    return torch.from_numpy(np.stack([y, x, np.full_like(y, number)]).astype(np.uint8))


PICTURES = [located(50, 40, 0), located(30, 60, 1), located(20, 21, 2)]


@pytest.mark.parametrize(("side", "step"), [(16, 1), (20, 1), (8, 4)])
def test_crops_are_squares_of_the_pictures_turned(side: int, step: int) -> None:
    torch.manual_seed(0)
    batch = Crops(PICTURES, CPU).batch(600, side, step)
    assert batch.shape == (600, 3, side, side) and batch.dtype == torch.float32
    seen, span = set(), step * (side - 1) + 1
    for rows, columns, number in batch.long():
        source = PICTURES[int(number[0, 0])]
        assert (number == number[0, 0]).all() and min(source.shape[1:]) >= span
        top, left = int(rows.min()), int(columns.min())
        part = source[:, top : top + span : step, left : left + span : step].long()
        crop = torch.stack([rows, columns, number])
        turns = [
            t for k in range(4) for t in (torch.rot90(part, k, (1, 2)), torch.rot90(part, k, (1, 2)).transpose(1, 2))
        ]
        (turn,) = [i for i, turned in enumerate(turns) if torch.equal(crop, turned)]
        seen.add((int(number[0, 0]), turn))
    assert len(seen) == 8 * sum(min(p.shape[1:]) >= span for p in PICTURES)


def test_every_place_of_a_picture_is_cut_and_large_pictures_oftener() -> None:
    torch.manual_seed(0)
    batch = Crops(PICTURES, CPU).batch(4000, 16)
    numbers = batch[:, 2, 0, 0].long()
    expected = torch.tensor([2000.0, 1800.0, 420.0]) / 4220
    assert torch.allclose(numbers.bincount() / 4000, expected, atol=0.03)
    first = batch[numbers == 0]
    assert set(first[:, 0].amin((1, 2)).tolist()) == set(range(25))
    assert set(first[:, 1].amin((1, 2)).tolist()) == set(range(35))


def test_crops_larger_than_every_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="41 pixels on both sides"):
        Crops(PICTURES, CPU).batch(1, 41)


def test_qualities_are_one_of_each_part_of_the_range() -> None:
    for _ in range(20):
        quality = Crops(PICTURES, CPU).qualities(8)
        assert quality.dtype == torch.int64 and int(quality.min()) >= 0 and int(quality.max()) <= 10000
        assert sorted((quality * 8 // 10001).tolist()) == list(range(8))


def test_the_seed_decides_the_crops() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Crops(PICTURES, CPU).resized(16, 16)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_resized_crops_are_pictures_still() -> None:
    batch = Crops(PICTURES, CPU).resized(16, 20)
    assert batch.shape == (16, 3, 20, 20) and torch.equal(batch, batch.round())
    whole = Crops(PICTURES, CPU).resized(16, 40)  # no picture has room for 50 pixels
    assert whole.shape == (16, 3, 40, 40) and 0 <= batch.min() < batch.max() <= 255


def photographs(count: int = 24) -> Tensor:
    images = [torch.from_numpy(np.array(picture(48, 48, seed=seed))).permute(2, 0, 1) for seed in range(count)]
    return torch.stack(images).float()


def test_worn_crops_are_pictures_still() -> None:
    torch.manual_seed(0)
    x = photographs()
    worn = wear(x)
    assert worn.shape == x.shape and torch.equal(worn, worn.round()) and 0 <= worn.min() < worn.max() <= 255
    same = (worn == x).flatten(1).all(1)
    assert same.any() and not same.all()  # one in eight is as it was: to enlarge by 1 is to do nothing


def test_none_or_all_crops_are_worn() -> None:
    crops = Crops([image.byte() for image in photographs(3)], CPU)

    def drawn(part: float) -> Tensor:
        torch.manual_seed(3)
        return crops.worn(8, 32, part)

    torch.manual_seed(3)
    plain = crops.batch(8, 32)
    assert torch.equal(drawn(0.0), plain)
    changed = (drawn(1.0) != plain).flatten(1).any(1)
    assert changed.any()


def test_half_colour_keeps_luma() -> None:
    x = torch.rand(2, 3, 31, 40) * 255
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    half = half_colour(x)
    assert torch.allclose((half * luma).sum(1), (x * luma).sum(1), atol=1e-3) and not torch.allclose(half, x, atol=9)
    grey = x[:, :1].expand(2, 3, 31, 40)
    assert torch.allclose(half_colour(grey), grey, atol=1e-3)


# Files


def test_what_is_no_picture_is_named_and_counted_and_hidden_files_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / ".hidden").mkdir()
    picture(20, 30).save(tmp_path / "below" / "a.png")
    picture(20, 30).save(tmp_path / ".hidden" / "b.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7" + bytes(4000))
    (tmp_path / "cut.jpg").write_bytes(saved(picture(64, 64), "JPEG")[:-900])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "huge.ppm").write_bytes(b"P6 65535 65535 255\n" + bytes(99))
    (image,) = load_images(tmp_path)
    assert image.shape == (3, 30, 20)
    said = capsys.readouterr().err
    assert all(f"{tmp_path / name}: left out: " in said for name in ("cut.jpg", "empty.png", "huge.ppm"))
    assert "._a" not in said and ".hidden" not in said and "1 pictures, 3 files left out" in said
    assert load_images(tmp_path, quiet=True) and not capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "below").mkdir()
    picture(20, 30).save(tmp_path / "a.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "below":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)  # root may read every folder
    with pytest.raises(FolderError, match="1 folder cannot be read"):
        load_images(tmp_path)
    assert f"{tmp_path / 'below'}: Permission denied" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(20, 30).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c").symlink_to(tmp_path, target_is_directory=True)
    assert len(load_images(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "b.png: no regular file: left out" in said and "c: a symbolic link to a folder: left out" in said


def test_deep_pictures_are_scaled_and_other_modes_become_colours(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    ten = (np.arange(256, dtype=np.uint32).reshape(16, 16) * 1023 + 127) // 255
    (tmp_path / "ten.pgm").write_bytes(b"P5 16 16 1023\n" + ten.astype(">u2").tobytes())
    grey = Image.fromarray(levels)
    grey.save(tmp_path / "grey.png")
    Image.merge("LA", (grey, grey)).save(tmp_path / "alpha.png")
    Image.merge("RGBA", (grey, grey, grey, grey)).save(tmp_path / "rgba.png")
    grey.convert("P").save(tmp_path / "palette.png")
    expected = torch.from_numpy(levels).expand(3, 16, 16)
    for path in sorted(tmp_path.iterdir()):
        assert torch.equal(read_picture(path), expected), path.name


def test_small_pictures_are_left_out_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(keep_large(PICTURES, 30, "validation")) == 2
    assert "1 of 3 validation pictures are smaller than 30 pixels: left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of 3 validation pictures has 64"):
        keep_large(PICTURES, 64, "validation")


def test_pictures_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        Image.new("RGB", (16, 16), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    assert [chr(int(image[0, 0, 0])) for image in load_images(tmp_path)] == ["a", "b", "c"]
