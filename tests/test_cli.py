"""The command line: what it reads and writes, what it says, and how it fails."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import CPU, TINY, TINY_CPU, cli, names, picture, process, python, same, saved
from PIL import Image

import vaecodec.codec
from bitstream import CorruptError
from vaecodec import Codec, __version__, read_info

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture in it."""
    picture(40, 30).save(tmp_path / "in.png")
    return tmp_path


@pytest.fixture
def packed(folder: Path, tiny: Codec) -> Path:
    """A .vae file beside its picture."""
    path = folder / "file.vae"
    path.write_bytes(tiny.compress(picture(40, 30)))
    return path


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def check_failure(result: object, code: int, *words: str) -> None:
    """One line on standard error, nothing on standard output."""
    out, err = result.stdout, result.stderr  # type: ignore[attr-defined]
    assert result.exit_code == code, err  # type: ignore[attr-defined]
    assert out == "" and err.startswith("vaecodec: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


# What works


def test_compress_and_decompress_by_default_names(folder: Path, tiny: Codec) -> None:
    assert cli("compress", folder / "in.png", *TINY_CPU).exit_code == 0
    data = (folder / "in.vae").read_bytes()
    assert data == tiny.compress(picture(40, 30))
    (folder / "in.png").unlink()
    assert cli("decompress", folder / "in.vae", *TINY_CPU).exit_code == 0
    assert names(folder) == ["in.png", "in.vae"]
    assert same(opened(folder / "in.png"), tiny.decompress(data))


@pytest.mark.parametrize("option", [[], ["-o"], ["--output"]])
def test_the_output_is_named_as_argument_or_option(folder: Path, option: list[str]) -> None:
    assert cli("compress", folder / "in.png", *option, folder / "x.vae", *TINY_CPU).exit_code == 0
    assert cli("decompress", folder / "x.vae", *option, folder / "y.png", *TINY_CPU).exit_code == 0
    assert names(folder) == ["in.png", "x.vae", "y.png"]


def test_quality_and_threads(folder: Path, tiny: Codec) -> None:
    assert cli("compress", folder / "in.png", "-q", "12.34", "--threads", "1", *TINY_CPU).exit_code == 0
    assert (folder / "in.vae").read_bytes() == tiny.compress(picture(40, 30), 12.34)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_modes(tmp_path: Path, mode: str) -> None:
    picture(21, 13).convert(mode).save(tmp_path / "in.png")
    assert cli("compress", tmp_path / "in.png", *TINY_CPU).exit_code == 0
    assert cli("decompress", tmp_path / "in.vae", tmp_path / "out.png", *TINY_CPU).exit_code == 0
    assert opened(tmp_path / "out.png").mode == {"1": "L", "P": "RGB"}.get(mode, mode)


@pytest.mark.parametrize(("suffix", "format"), [("jpg", "JPEG"), ("webp", "WEBP"), ("TIF", "TIFF"), ("ppm", "PPM")])
def test_the_suffix_chooses_the_format(packed: Path, suffix: str, format: str) -> None:
    target = packed.with_suffix(f".{suffix}")
    assert cli("decompress", packed, target, *TINY_CPU).exit_code == 0
    assert opened(target).format == format


def test_pipes_in_a_process_of_its_own(tiny: Codec) -> None:
    data = tiny.compress(picture(40, 30))
    decompressed = process("decompress", "-", "-", "--quiet", *TINY_CPU, data=data)
    assert decompressed.returncode == 0 and decompressed.stderr == b""
    assert same(Image.open(io.BytesIO(decompressed.stdout)), tiny.decompress(data))


def test_pipes_in_this_process(packed: Path) -> None:
    result = cli("compress", "-", *TINY_CPU, data=saved(picture(40, 30)))
    assert result.exit_code == 0 and result.stdout_bytes == packed.read_bytes()
    result = cli("decompress", "-", "--quiet", *TINY_CPU, data=packed.read_bytes())
    assert result.exit_code == 0 and Image.open(io.BytesIO(result.stdout_bytes)).format == "PNG"
    assert cli("verify", "-", *TINY_CPU, data=packed.read_bytes()).exit_code == 0
    result = cli("info", "-", data=packed.read_bytes())
    assert result.exit_code == 0 and "40" in result.stdout


def test_summaries_go_to_standard_error_unless_quiet(folder: Path) -> None:
    for arguments, words in (
        (("compress", folder / "in.png", "--overwrite"), ("in.vae: ", "bytes", "bpp", "dB", "MP/s")),
        (("compress", folder / "in.png", "--overwrite", "--no-verify"), ("bytes", "bpp")),
        (("decompress", folder / "in.vae", "-o", folder / "out.png", "--overwrite"), ("out.png: 40 x 30",)),
        (("verify", folder / "in.vae"), ("good",)),
    ):
        loud, quiet = cli(*arguments, *TINY_CPU), cli(*arguments, "--quiet", *TINY_CPU)
        assert loud.exit_code == quiet.exit_code == 0
        assert loud.stdout == "" and all(word in loud.stderr for word in words)
        assert quiet.stdout == quiet.stderr == ""


def test_only_what_is_named_or_overwrite_replaces_a_file(folder: Path, packed: Path, tiny: Codec) -> None:
    (folder / "in.vae").write_bytes(b"as it was")
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    check_failure(cli("compress", folder / "in.png", *TINY_CPU), 1, "in.vae exists", "--overwrite")
    check_failure(cli("compress", folder / "in.png", folder / "in.vae", *TINY_CPU), 1, "in.vae exists")
    check_failure(cli("compress", folder / "in.png", "--skip-existing", *TINY_CPU), 1, "no whole .vae file")
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    for options in (["--overwrite"], ["-o", folder / "in.vae"]):
        (folder / "in.vae").write_bytes(b"as it was")
        assert cli("compress", folder / "in.png", *options, *TINY_CPU).exit_code == 0
        assert (folder / "in.vae").read_bytes() == tiny.compress(picture(40, 30))


def test_an_input_is_never_replaced(folder: Path, packed: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    check_failure(cli("compress", folder / "in.png", "-o", folder / "in.png", "--overwrite", *CPU), 1, "replace it")
    assert cli("decompress", packed, "-o", packed, "--overwrite", *TINY_CPU).exit_code == 1
    result = cli("decompress", packed, folder / "in.png", "--overwrite", *TINY_CPU)  # what * may stand for
    assert result.exit_code == 2 and "-o" in result.stderr
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_info(packed: Path, tiny: Codec) -> None:
    result = cli("info", "--json", packed)
    facts = json.loads(result.stdout)
    assert facts["model"] == tiny.lossy.identity.hex() and facts["bytes"] == packed.stat().st_size
    expected = {"kind": "lossy", "width": 40, "height": 30, "mode": "RGB", "depth": 8, "quality": 75, "tiles": 1}
    assert expected.items() <= facts.items() and facts["metadata"] == {}
    text = cli("info", packed).stdout
    assert all(str(value) in text for value in facts.values())


def test_info_of_a_file_without_networks(folder: Path) -> None:
    assert cli("compress", folder / "in.png", "--lossless", "--fast").exit_code == 0
    assert "model     no weights are needed\n" in cli("info", folder / "in.vae").stdout
    assert json.loads(cli("info", "--json", folder / "in.vae").stdout)["model"] is None


def test_metadata_survives_both_commands(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(40, 30).save(tmp_path / "in.jpg", exif=exif, icc_profile=b"profile" * 9, xmp=b"<x/>")
    assert cli("compress", tmp_path / "in.jpg", *TINY_CPU).exit_code == 0
    assert set(json.loads(cli("info", "--json", tmp_path / "in.vae").stdout)["metadata"]) == {"exif", "iccp", "xmp"}
    assert cli("decompress", tmp_path / "in.vae", tmp_path / "out.png", *TINY_CPU).exit_code == 0
    out = opened(tmp_path / "out.png")
    assert out.getexif()[0x0112] == 6 and out.info["icc_profile"] == b"profile" * 9 and out.info["xmp"] == b"<x/>"
    assert out.size == (40, 30)


def test_verify_changes_nothing_and_no_verify_writes_the_same(folder: Path) -> None:
    assert cli("compress", folder / "in.png", folder / "a.vae", *TINY_CPU).exit_code == 0
    assert cli("compress", folder / "in.png", folder / "b.vae", "--no-verify", *TINY_CPU).exit_code == 0
    assert (folder / "a.vae").read_bytes() == (folder / "b.vae").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_get_ordinary_permissions(folder: Path) -> None:
    assert cli("compress", folder / "in.png", *TINY_CPU).exit_code == 0
    (folder / "plain").touch()
    assert (folder / "in.vae").stat().st_mode == (folder / "plain").stat().st_mode


def test_version_and_help() -> None:
    assert __version__ in cli("--version").stdout
    project = Path(__file__).parent.parent / "pyproject.toml"  # not there, where an installed wheel is tested
    assert not project.is_file() or f'\nversion = "{__version__}"\n' in project.read_text("utf-8")
    assert cli("-h").exit_code == 0
    for command in ("compress", "decompress", "info", "verify", "compare", "train", "export"):
        assert command in cli("--help").stdout and cli(command, "--help").exit_code == 0


def test_info_and_help_do_without_torch_and_pillow(packed: Path) -> None:
    code = """
import sys
from vaecodec.cli import main
main(sys.argv[1:], standalone_mode=False)
print(sorted({"torch", "PIL", "safetensors", "tqdm", "vaecodec.codec"} & sys.modules.keys()))
"""
    for arguments in (("info", packed), ("info", "--json", packed), ("--help",), ("compress", "--help")):
        result = python(code, *arguments)
        assert result.returncode == 0 and result.stdout.splitlines()[-1] == b"[]", result


# Wrong usage: 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["-q", "-1"],
        ["-q", "100.5"],
        ["-q", "high"],
        ["-q", "nan"],
        ["--threads", "0"],
        ["--device", "abacus"],
        ["--no-such-option"],
        ["out"],
        ["other.png", "-o", "out.vae"],
        ["other.png", "--overwrite", "--skip-existing"],
        ["-", "other.png"],
        ["--recursive"],
        ["--jobs", "0"],
        ["--shard", "0/2"],
        ["--shard", "3/2"],
        ["--metadata", "exif,thumbnail"],
        ["--target-size", "0k"],
        ["--target-size", "10G"],
        ["--target-bpp", "0"],
        ["--target-psnr", "nan"],
        ["--target-ssimulacra2", "nan"],
        ["--target-ssimulacra2", "101"],
        ["--target-ssimulacra2", "70", "--visually-lossless"],
        ["--lossless", "--visually-lossless"],
        ["--target-psnr", "inf"],
        ["--target-bpp", "1", "--target-size", "1k"],
        ["--target-bpp", "1", "-q", "75"],
        ["--lossless", "-q", "75"],
        ["--fast"],
        ["--lossless", "--fast", "--progressive"],
        ["--lossless", "--fast", "--effort", "1"],
        ["--lossless", "--target-psnr", "40"],
        ["-o", "-", "--overwrite"],
        ["-o", "-", "--preserve-times"],
    ],
    ids=" ".join,
)
def test_wrong_usage_of_compress(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = cli("compress", "in.png", "--weights", TINY, *arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Usage:" in result.stderr
    assert names(folder) == ["in.png"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(folder: Path) -> None:
    result = cli("compress", folder / "in.png", "--weights", TINY, "--device", "cuda")
    assert result.exit_code == 2 and "cuda" in result.stderr and names(folder) == ["in.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--region", "1,2,3"],
        ["--region", "0,0,0,5"],
        ["--region", "-1,0,5,5"],
        ["--downsample", "3"],
        ["--format", "jpg", "-o", "out.png"],
        ["in.xyz"],
    ],
    ids=" ".join,
)
def test_wrong_usage_of_decompress(packed: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(packed.parent)
    before = names(packed.parent)
    result = cli("decompress", "file.vae", *arguments, *TINY_CPU)
    assert result.exit_code == 2 and result.stdout == "" and "Usage:" in result.stderr
    assert names(packed.parent) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "file.vae", "--weights", TINY),
        ("info", "file.vae", "--device", "cpu"),
        ("compress", "in.png", "--lossless", "--fast", "--engine", "torch"),
        ("compress", "in.png", "--lossless", "--fast", "--weights", TINY),
        ("compare", "in.png", "in.png", *CPU),
    ],
)
def test_options_without_an_effect(packed: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(packed.parent)
    result = cli(*arguments)
    assert result.exit_code == 2 and "has no effect" in result.stderr


def test_where_to_run_what_needs_no_networks(folder: Path) -> None:
    """Scripts say it for all pictures alike, and how deep those of more than 8 bits are."""
    options = ("--lossless", "--fast", *CPU, "--threads", "1", "--engine", "auto", "--depth", "12")
    assert cli("compress", folder / "in.png", *options).exit_code == 0
    assert read_info(folder / "in.vae").depth == 8


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "in.png"),
        ("decompress", "file.vae", "-o", "out.png"),
        ("verify", "file.vae", "file.vae"),
        ("info", "file.vae", "--bits"),
        ("compare", "in.png", "file.vae"),
    ],
)
def test_a_coder_that_is_not_there(packed: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(packed.parent)
    monkeypatch.setenv("VAECODEC_CODER", "quick")
    result = cli(*arguments)
    check_failure(result, 2, "vaecodec: VAECODEC_CODER is 'quick'; constriction or numpy expected")
    assert names(packed.parent) == ["file.vae", "in.png"]


def test_no_arguments() -> None:
    assert cli("compress").exit_code == 2 and cli("frobnicate").exit_code == 2


# Input that fails: 1


def test_what_is_no_picture(folder: Path) -> None:
    (folder / "text.png").write_bytes(b"hello")
    check_failure(cli("compress", folder / "text.png", *TINY_CPU), 1, "not a picture")
    (folder / "cut.png").write_bytes((folder / "in.png").read_bytes()[:200])
    check_failure(cli("compress", folder / "cut.png", *TINY_CPU), 1)
    check_failure(cli("compress", "-", *TINY_CPU, data=b""), 1, "not a picture")
    check_failure(cli("compress", folder / "missing.png", *TINY_CPU), 1, "missing.png: no such file")
    (folder / "empty").mkdir()
    check_failure(cli("compress", folder / "empty", *TINY_CPU), 1, "empty: nothing to work on")
    (folder / "empty").rmdir()
    assert names(folder) == ["cut.png", "in.png", "text.png"]


@pytest.mark.parametrize(("name", "format"), [("in.gif", "GIF"), ("in.png", "PNG"), ("in.tif", "TIFF")])
def test_several_frames(tmp_path: Path, name: str, format: str) -> None:
    frames = [picture(8, 8, seed=seed) for seed in range(2)]
    (tmp_path / name).write_bytes(saved(frames[0], format, save_all=True, append_images=frames[1:]))
    check_failure(cli("compress", tmp_path / name, *TINY_CPU), 1, "2 frames")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("mode", ["CMYK", "F"])
def test_modes_that_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "in.tif")
    check_failure(cli("compress", tmp_path / "in.tif", *TINY_CPU), 1, f"mode {mode} ")
    assert names(tmp_path) == ["in.tif"]


def test_an_unwritable_target(folder: Path, packed: Path) -> None:
    before = names(folder)
    for target in (folder / "missing" / "x", folder / ("x" * 300)):
        check_failure(cli("compress", folder / "in.png", "-o", target, *TINY_CPU), 1, "in.png:", f"{target}:")
    check_failure(cli("decompress", packed, "-o", folder / "missing" / "x.png", *TINY_CPU), 1, "file.vae:", "x.png:")
    assert names(folder) == before


def test_a_suffix_without_a_format(packed: Path) -> None:
    before = names(packed.parent)
    check_failure(cli("decompress", packed, "-o", packed.with_suffix(".xyz"), *TINY_CPU), 1, ".xyz")
    result = cli("decompress", packed, "--format", "xyz", *TINY_CPU)
    assert result.exit_code == 2 and ".xyz" in result.stderr
    assert names(packed.parent) == before


# Weights: 4; limits: 5; damaged files are in test_corrupt.py


def test_weights_of_the_other_kind(folder: Path, packed: Path, lossless_weights: Path) -> None:
    for arguments, weights in (
        (("compress", folder / "in.png", "--lossless"), TINY),
        (("compress", folder / "in.png"), lossless_weights),
    ):
        check_failure(cli(*arguments, "--weights", weights, *CPU), 4, f"{weights.name} holds loss")


def test_missing_and_damaged_weights(folder: Path, packed: Path) -> None:
    before = names(folder)
    check_failure(cli("compress", folder / "in.png", "--weights", folder / "none", *CPU), 4, "none")
    check_failure(cli("decompress", packed, "--weights", folder / "in.png", *CPU), 4, "damaged")
    assert names(folder) == before


def test_pictures_beyond_the_limits(tmp_path: Path) -> None:
    Image.new("L", (2**17 + 1, 1)).save(tmp_path / "in.png")
    check_failure(cli("compress", tmp_path / "in.png", *TINY_CPU), 5, "exceeds the limits")
    assert names(tmp_path) == ["in.png"]


# Targets are all or nothing


def test_verification_reads_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that do not decode never get the target's name, unless --no-verify says so."""
    target = folder / "out.vae"
    target.write_bytes(b"as it was")
    pack = vaecodec.codec.pack
    monkeypatch.setattr(vaecodec.codec, "pack", lambda *parts: pack(*parts)[:-4] + b"\1\2\3\4")
    check_failure(cli("compress", folder / "in.png", "-o", target, "--overwrite", *TINY_CPU), 3)
    assert target.read_bytes() == b"as it was" and names(folder) == ["in.png", "out.vae"]
    result = cli("compress", folder / "in.png", "-", *TINY_CPU)
    assert result.exit_code == 3 and result.stdout_bytes == b""
    arguments = ("--no-verify", "--overwrite", *TINY_CPU)
    assert cli("compress", folder / "in.png", "-o", target, *arguments).exit_code == 0
    assert target.read_bytes().endswith(b"\1\2\3\4") and names(folder) == ["in.png", "out.vae"]


@pytest.mark.parametrize("error", [CorruptError("broken"), MemoryError(), OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_target_and_no_temporary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    target = folder / "out.vae"
    target.write_bytes(b"as it was")
    monkeypatch.setattr(Codec, "decode_tiles", fail)
    result = cli("compress", folder / "in.png", "-o", target, "--overwrite", *TINY_CPU)
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    assert result.exit_code == code and result.stdout == ""
    assert target.read_bytes() == b"as it was" and names(folder) == ["in.png", "out.vae"]


def test_damaged_files_leave_the_target(packed: Path) -> None:
    target = packed.with_name("out.png")
    target.write_bytes(b"as it was")
    packed.write_bytes(packed.read_bytes()[:-3])
    check_failure(cli("decompress", packed, "-o", target, "--overwrite", *TINY_CPU), 3)
    assert target.read_bytes() == b"as it was" and names(packed.parent) == ["file.vae", "in.png", "out.png"]


def test_a_failing_process_says_one_line(packed: Path) -> None:
    packed.write_bytes(packed.read_bytes()[:-3])
    result = process("info", packed)
    assert result.returncode == 3 and result.stderr.startswith(b"vaecodec: ") and result.stderr.count(b"\n") == 1
