"""The PCA codec: round trips, determinism, damage, and the transform itself."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, cli, picture, same
from PIL import Image

pytest.importorskip("benchmarks")  # not in the wheel

from benchmarks import pca
from bitstream import CorruptError, Kind, Mode, TruncatedError, VersionError, pack, read_header, unpack
from vaecodec.codec import Region, shared
from vaecodec.image import ImageError
from vaecodec.kinds import load
from vaecodec.linear import walk
from vaecodec.linear.coder import pixels_from
from vaecodec.weights import WeightsError

SIZES = [(1, 1), (1, 9), (9, 1), (8, 8), (16, 8), (17, 33), (130, 65)]


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(10 * np.log10(255**2 / max(float(np.mean(error**2)), 0.01)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", SIZES)
def test_round_trip(size: tuple[int, int], mode: str) -> None:
    original = picture(*size, mode)
    decoded = pca.decompress(pca.compress(original, 100))
    assert (decoded.size, decoded.mode) == (size, mode)
    assert psnr(original, decoded) > 38


def test_header() -> None:
    header = read_header(pca.compress(picture(20, 10), 12.34))
    assert (header.kind, header.mode, header.width, header.height) == (Kind.PCA, Mode["RGB"], 20, 10)
    assert (header.quality, header.model) == (1234, pca.packaged_weights().identity)


def test_metadata_is_kept() -> None:
    original = picture(8, 8)
    original.info["icc_profile"] = b"profile"
    assert pca.decompress(pca.compress(original, 50)).info["icc_profile"] == b"profile"


def test_several_tiles(photo: Image.Image) -> None:
    data = pca.compress(photo, 60, tile=64)
    assert len(unpack(data).tiles) == 12
    decoded = pca.decompress(data)
    assert psnr(photo, decoded) > 33
    # What every kind of file can do.
    codec, region = shared("cpu"), (50, 30, 90, 101)
    assert same(codec.decompress(data, region=region), decoded.crop((50, 30, 140, 131)))
    assert list(codec.account(data)) == ["components", "metadata", "overhead"]
    damaged = list[Region]()
    codec.decompress(data[:-9], damaged=damaged)
    assert damaged == [(192, 128, 64, 64)]


def test_the_command_line_reads_it(tmp_path: Path) -> None:
    data = pca.compress(picture(40, 30), 60)
    (tmp_path / "a.vae").write_bytes(data)
    assert cli("decompress", tmp_path / "a.vae", *CPU).exit_code == 0
    with Image.open(tmp_path / "a.png") as decoded:
        assert same(decoded.convert("RGB"), pca.decompress(data))


def test_bytes_are_the_same_with_both_coders(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = picture(40, 30)
    data = pca.compress(original, 40)
    decoded = pca.decompress(data)
    monkeypatch.delenv("VAECODEC_CODER")
    assert data == pca.compress(original, 40)
    assert decoded.tobytes() == pca.decompress(data).tobytes()


def test_higher_quality_is_larger_and_better(photo: Image.Image) -> None:
    coded = [pca.compress(photo, quality) for quality in (0, 20, 37.5, 60, 80, 100)]
    quality = [psnr(photo, pca.decompress(data)) for data in coded]
    assert np.diff([len(data) for data in coded]).min() > 0
    assert np.diff(quality).min() > 0.5
    assert quality[0] > 24 and quality[-1] > 40


def test_fewer_bytes_than_jpeg_for_more_psnr(photo: Image.Image) -> None:
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=75, subsampling="4:4:4", optimize=True, progressive=True)
    data = pca.compress(photo, 60)
    assert len(data) < file.tell()
    assert psnr(photo, pca.decompress(data)) > psnr(photo, Image.open(file))


def test_basis_is_orthonormal() -> None:
    basis = pca.packaged_weights().basis.astype(np.float64)
    assert np.abs(basis.T @ basis - np.eye(192)).max() < 1e-5
    # The first three are flat: all pixels of a block are alike.
    assert np.ptp(basis[:, :3].reshape(64, 3, 3), axis=0).max() < 1e-6


def test_basis_by_hand() -> None:
    """Blocks that are a grey level plus one pattern have this pattern as the first component after the flat ones."""
    rng = np.random.default_rng(0)
    pattern = np.repeat(np.where(np.arange(64) % 8 < 4, 1.0, -1.0), 3) / np.sqrt(192)
    blocks = rng.normal(0, 50, (999, 1)) + rng.normal(0, 10, (999, 1)) * pattern
    basis = pca.principal_components(blocks)
    assert abs(pattern @ basis[:, 3]) == pytest.approx(1, abs=1e-5)
    assert np.abs(basis.T @ basis - np.eye(192)).max() < 1e-5


def test_blocks_there_and_back() -> None:
    pixels = np.asarray(picture(24, 16))
    blocks = pca.blocks_of(pixels)
    assert blocks.shape == (2, 3, 192)
    assert (blocks[1, 2].reshape(8, 8, 3) == pixels[8:, 16:]).all()
    assert (pixels_from(blocks) == pixels).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (2, 5, 4), (1, 9, 16)])
def test_passes_visit_all_blocks_and_look_back(shape: tuple[int, int, int]) -> None:
    seen: set[int] = set()
    for _, blocks, neighbours, inside in walk.passes(shape):
        assert set(neighbours[inside == 1].tolist()) <= seen
        assert not seen & set(blocks.tolist())
        seen |= set(blocks.tolist())
    assert seen == set(range(np.prod(shape)))


def test_truncated() -> None:
    data = pca.compress(picture(20, 12), 30)
    for end in range(len(data)):
        with pytest.raises(TruncatedError):
            pca.decompress(data[:end])


def test_flipped_bytes() -> None:
    data = pca.compress(picture(20, 12), 30)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        with pytest.raises((CorruptError, VersionError)):
            pca.decompress(bytes(damaged))


def test_extreme_words_are_corrupt() -> None:
    file = unpack(pca.compress(picture(64, 64), 30))
    for words in (b"", b"\xff" * 4, b"\xff" * 4000, np.random.default_rng(0).bytes(3999) + b"\x01"):
        with pytest.raises(CorruptError):
            pca.decompress(pack(file.header, [replace(file.tiles[0], words=words)]))


def test_refusals(tmp_path: Path) -> None:
    file = unpack(pca.compress(picture(9, 9), 30))
    with pytest.raises(WeightsError):
        pca.decompress(pack(replace(file.header, model=bytes(16)), file.tiles))
    with pytest.raises(VersionError):
        pca.decompress(pack(replace(file.header, mode=Mode.RGBA), file.tiles))
    with pytest.raises(CorruptError):
        pca.decompress(pack(file.header, [replace(file.tiles[0], method=1)]))
    with pytest.raises(ValueError, match="quality"):
        pca.compress(picture(9, 9), 101)
    with pytest.raises(ImageError):
        pca.compress(picture(9, 9, "RGBA"), 50)
    with pytest.raises(WeightsError):
        load(tmp_path / "missing", pca.CPU)
    (tmp_path / "damaged").write_bytes(b"damaged")
    with pytest.raises(WeightsError):
        load(tmp_path / "damaged", pca.CPU)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        picture(40, 40, seed=seed).save(tmp_path / f"{seed}.png")
    for name, value in (("CROP", 32), ("ROUNDS", (1, 1)), ("GROUPS", [(3, 8), (8, 192)])):
        monkeypatch.setattr(pca, name, value)
    monkeypatch.setattr(walk, "GROUPS", pca.GROUPS)
    pca.train(tmp_path, tmp_path / "pca.safetensors")
    parameters = load(tmp_path / "pca.safetensors", pca.CPU)
    original = picture(40, 40, seed=9)
    assert (
        psnr(original, pca.decompress(pca.compress(original, 100, parameters), tmp_path / "pca.safetensors")) > 34
    )  # of 64 blocks of training
    pca.train(tmp_path, tmp_path / "again.safetensors")
    assert load(tmp_path / "again.safetensors", pca.CPU).identity == parameters.identity
