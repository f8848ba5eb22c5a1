"""Many files at once: what is found, what it is named, what becomes of those that fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import numpy as np
import pytest
from conftest import CPU, TINY_CPU, TINY_LOSSLESS, cli, names, picture, python, same, saved
from PIL import Image

import vaecodec.image
from vaecodec import Codec
from vaecodec.cli import batch, files, inout
from vaecodec.cli.files import Request, planned
from vaecodec.folders import PICTURES
from vaecodec.metrics import psnr

pytestmark = pytest.mark.usefixtures("threads")
COMPRESS = ("compress", "--quiet", "--threads", "1", *TINY_CPU)
DECOMPRESS = ("decompress", "--quiet", *TINY_CPU)


def tree(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Pictures in a folder and one below it, beside other files."""
    album = tmp_path / "album"
    (album / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.JPG", "more/a.png")):
        picture(16 + number, 12, seed=number).save(album / name)
    for name in ("notes.txt", ".hidden.png"):
        (album / name).write_bytes(b"no picture")
    return album


# Which files, and where to


def targets(plan: files.Plan) -> dict[str, str]:
    assert not any(job.problem for job in plan.jobs)
    return {job.source.as_posix(): job.target.as_posix() for job in plan.jobs}


def problems(plan: files.Plan) -> list[str]:
    return [f"{job.source}: {job.problem}" for job in plan.jobs if job.problem]


def plan(
    *sources: str, output: str | None = None, recursive: bool = False, shard: tuple[int, int] = (1, 1)
) -> files.Plan:
    return planned(Request(sources, output, recursive, shard=shard), PICTURES, ".vae")


def test_files_folders_and_patterns(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album.parent)
    beside = {"album/a.png": "album/a.vae", "album/b.JPG": "album/b.vae"}
    assert targets(plan("album")) == targets(plan("album/?.*")) == targets(plan("album/a.png", "album")) == beside
    assert plan("album").left_out == 1
    mirrored = {name: name.replace("album", "out")[:-4] + ".vae" for name in (*beside, "album/more/a.png")}
    assert targets(plan("album", output="out/", recursive=True)) == mirrored
    assert targets(plan("album/**/*.[jJp]*", output="out/")) == mirrored
    assert mirrored.items() <= targets(plan("album/*", output="out/", recursive=True)).items()
    os.mkdir("there")
    assert targets(plan("album/a.png", output="there")) == {"album/a.png": "there/a.vae"}
    assert targets(plan("album/a.png", output="a file")) == {"album/a.png": "a file"}
    assert targets(plan("-")) == {"-": "-"} and targets(plan("-", output="x.vae")) == {"-": "x.vae"}


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a[1].png"
    path.touch()
    assert targets(plan(str(path))) == {path.as_posix(): path.with_suffix(".vae").as_posix()}


def test_shards_share_the_files_out(album: Path) -> None:
    whole = plan(str(album), recursive=True).jobs
    shards = [plan(str(album), recursive=True, shard=(i, 2)).jobs for i in (1, 2)]
    assert shards == [whole[0::2], whole[1::2]] and whole == sorted(whole, key=lambda job: str(job.source))
    assert plan(str(album), shard=(9, 9)).jobs == []


def test_what_cannot_be_planned_is_said_for_each(album: Path) -> None:
    said = problems(plan(str(album), str(album / "*.bmp"), str(album / "lost.png")))
    assert [line.split(": ", 1)[1] for line in said] == ["no such file", "no such file"]
    (album.parent / "other").mkdir()
    picture(8, 8).save(album.parent / "other" / "a.png")
    said = problems(plan(str(album), str(album.parent / "other"), output="out/"))
    assert said == [
        f"{album.parent}/other/a.png: out/a.png.vae is what {album}/a.png is written to: give them folders of their own"
    ]
    (album.parent / "empty" / "below").mkdir(parents=True)
    assert "--recursive" in problems(plan(str(album.parent / "empty")))[0]


@pytest.mark.parametrize(
    ("sources", "options"),
    [
        (["album"], {"output": "file.vae"}),
        (["album/*.png"], {"output": "file.vae"}),
        (["album/a.png", "album/b.JPG"], {"output": "file.vae"}),
        (["album/a.png", "album/b.JPG"], {"output": "-"}),
        (["-", "album"], {}),
        (["-"], {"output": "out/"}),
        (["album/a.png"], {"recursive": True}),
    ],
)
def test_inputs_and_outputs_that_do_not_fit(
    album: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], options: dict[str, str]
) -> None:
    monkeypatch.chdir(album.parent)
    with pytest.raises(click.UsageError):
        plan(*sources, **options)  # type: ignore[arg-type]


# What becomes of them


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_rest_goes_on_when_some_fail(tmp_path: Path, tiny: Codec, jobs: int) -> None:
    """Pictures of all kinds, every fourth of them broken."""
    folder, out, good, broken = tmp_path / "in", tmp_path / "out", list[Path](), list[Path]()
    folder.mkdir()
    for number in range(20):
        image = picture(17 + 3 * number, 40 - number, "L" if number % 3 else "RGB", seed=number)
        format = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")[number % 5]
        path, data = folder / f"{number:02}.{format.lower()}", saved(image, format)
        if number % 4 == 3:
            data = (data[: len(data) // 2], b"", b"hello", saved(image.convert("CMYK"), "TIFF"), saved(image)[:20])[
                number // 4
            ]
        (broken if number % 4 == 3 else good).append(path)
        path.write_bytes(data)
    result = cli("compress", folder, "-o", f"{out}/", "-j", jobs, "--threads", 1, *TINY_CPU)
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and result.stdout == "" and names(out) == [f"{path.stem}.vae" for path in good]
    assert sorted(line.split(": ")[1] for line in lines[:-1]) == [str(path) for path in broken]
    assert lines[-1].startswith("15 files, 5 failed; ") and "MP/s" in lines[-1] and "bpp" in lines[-1]
    for path in good:
        with Image.open(path) as image:
            assert (out / f"{path.stem}.vae").read_bytes() == tiny.compress(image)
    result = cli("decompress", out, "-o", f"{tmp_path}/back/", "--format", "ppm", "-j", jobs, *TINY_CPU)
    assert result.exit_code == 0 and result.stderr.startswith("15 files; ")
    for path in good:
        with Image.open(tmp_path / "back" / f"{path.stem}.ppm") as copy:
            assert same(copy, tiny.decompress((out / f"{path.stem}.vae").read_bytes()))


def test_a_tree_there_and_back(album: Path) -> None:
    out, back = album.parent / "out", album.parent / "back"
    assert cli(*COMPRESS, "-r", album, "-o", f"{out}/", "--preserve-times").exit_code == 0
    assert tree(out) == ["a.vae", "b.vae", "more/a.vae"]
    assert (out / "a.vae").stat().st_mtime_ns == (album / "a.png").stat().st_mtime_ns
    assert cli(*DECOMPRESS, "-r", out, "-o", f"{back}/", "--format", "webp").exit_code == 0
    assert tree(back) == ["a.webp", "b.webp", "more/a.webp"]


def test_errors_that_nobody_foresaw_have_a_line_too(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise IndexError("off the end\nof something")

    monkeypatch.setattr(vaecodec.image, "refuse_deep", fail)
    result = cli(*COMPRESS, album)
    assert result.exit_code == 1 and result.stderr.count("IndexError: off the end\n") == 2


def test_one_input_has_its_own_exit_code(tmp_path: Path) -> None:
    for name in ("a.vae", "b.vae"):
        (tmp_path / name).write_bytes(b"garbage")
    assert cli(*DECOMPRESS, tmp_path / "a.vae").exit_code == 3
    assert cli("verify", tmp_path / "a.vae", *TINY_CPU).exit_code == 3
    assert cli(*DECOMPRESS, tmp_path).exit_code == cli("verify", *tmp_path.iterdir(), *TINY_CPU).exit_code == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_and_run_again(album: Path, tiny: Codec) -> None:
    """The process dies while a temporary file is there; the next one skips what is done and does the rest."""
    for name in ("c.png", "d.png"):
        picture(24, 16).save(album / name)
    code = """
import os, signal
from vaecodec import Codec, cli
calls, decode = [], Codec.decode_tiles
def dying(*arguments, **named):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*arguments, **named)
Codec.decode_tiles = dying
cli.main()
"""
    out = album.parent / "out"
    arguments = ("--threads", "1", *TINY_CPU, album, "-o", f"{out}/")
    assert python(code, "compress", *arguments).returncode == -signal.SIGKILL
    (left,) = (path for path in out.iterdir() if path.suffix != ".vae")
    assert inout.TEMPORARY.fullmatch(left.name) and len(names(out)) == 3
    assert all(tiny.decompress(path.read_bytes()) for path in out.glob("*.vae"))
    assert cli("compress", "--skip-existing", *arguments).stderr.startswith("2 files, 2 skipped, ")
    assert cli("verify", *out.glob("*.vae"), *TINY_CPU).exit_code == 0
    assert cli(*DECOMPRESS, out, "-o", f"{album.parent}/back/").exit_code == 0
    assert len(names(album.parent / "back")) == 4 and left.exists()
    os.utime(left, (time.time() - 2 * inout.STALE,) * 2)
    assert cli(*COMPRESS, album, "-o", out, "--overwrite").exit_code == 0
    assert not left.exists() and len(names(out)) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
@pytest.mark.usefixtures("shipped", "shipped_lossless")
def test_a_job_s_thread_keeps_to_the_number_of_threads() -> None:
    """The number decides how sums are rounded. OpenMP has one for each thread, and torch sets that of a new thread only
    with the first operation that it parallelises itself, which a convolution is not."""
    code = """
import os, sys, threading
import numpy as np, torch
from vaecodec import Codec
torch.set_num_threads(1)
codec, array = Codec("cpu"), np.arange(128 * 128 * 3, dtype=np.uint8).reshape(128, 128, 3)
codec.lossy, codec.lossless
def work():
    before = len(os.listdir("/proc/self/task"))
    getattr(codec, call)(argument, **options)
    print(len(os.listdir("/proc/self/task")) - before)
files = [codec.compress(array, lossless=lossless) for lossless in (False, True)]
calls = [("compress", array, {"lossless": False}), ("compress", array, {"lossless": True})]
for call, argument, options in [*calls, *(("decompress", file, {}) for file in files)]:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    result = python(code, OMP_NUM_THREADS="4")
    assert len(result.stdout.split()) == 4, result.stderr.decode()
    assert all(int(started) <= 0 for started in result.stdout.split())


def test_an_interrupt_ends_all_threads() -> None:
    entered = threading.Barrier(2)
    jobs = [files.Job(Path(name), files.STANDARD) for name in "abcd"]
    seen, ended = [], []

    def work(job: files.Job, follow: batch.Follow) -> batch.Done:
        step = follow(100, 1)
        seen.append(job)
        entered.wait()
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        try:
            while True:
                step(1)
        finally:
            ended.append(job)

    with pytest.raises(KeyboardInterrupt):
        batch.run(files.Plan(jobs, 0, 0), lambda: work, workers=2)
    assert len(seen) == 2 and len(ended) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_the_bar_is_for_terminals(album: Path) -> None:
    import pty
    import termios

    (album / "c.png").write_bytes(b"no picture")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    code = "from vaecodec.cli import main; main()"
    command = [sys.executable, "-c", code, "compress", str(album), *TINY_CPU]
    with subprocess.Popen(command, stderr=slave, env=os.environ | {"TQDM_MININTERVAL": "0"}) as running:
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while part := os.read(master, 4096):
                text += part
    os.close(master)
    assert running.returncode == 1
    for words in (b"100%", b":1", b"MP/s", b"c.png: not a picture", b"2 files, 1 failed, 1 other"):
        assert words in text, text
    assert "%" not in cli("compress", album, "--overwrite", *TINY_CPU).stderr


# Options of single files


def test_metadata_is_kept_as_asked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(40, 30).save(tmp_path / "in.jpg", exif=exif, icc_profile=b"profile" * 9, xmp=b"<x/>")
    for asked, kept in (
        ("all", {"exif", "iccp", "xmp"}),
        ("none", set()),
        ("icc", {"iccp"}),
        ("xmp,exif", {"exif", "xmp"}),
    ):
        for mode in ((), ("--lossless", "--no-verify", "--weights", TINY_LOSSLESS, *CPU)):
            weights = mode or TINY_CPU
            assert cli("compress", tmp_path / "in.jpg", "--overwrite", "--metadata", asked, *weights).exit_code == 0
            assert set(json.loads(cli("info", "--json", tmp_path / "in.vae").stdout)["metadata"]) == kept


@pytest.fixture
def packed(tmp_path: Path, tiny: Codec) -> Path:
    path = tmp_path / "file.vae"
    path.write_bytes(tiny.compress(picture(70, 50)))
    return path


def test_a_region_reduced(packed: Path, tiny: Codec) -> None:
    whole = tiny.decompress(packed.read_bytes())
    for arguments, expected in (
        (("--region", "3,5,40,20"), whole.crop((3, 5, 43, 25))),
        (("--downsample", "4"), whole.reduce(4)),
        (("--region", "3,5,40,20", "--downsample", "8"), whole.crop((3, 5, 43, 25)).reduce(8)),
    ):
        assert cli(*DECOMPRESS, packed, *arguments, "--overwrite").exit_code == 0
        with Image.open(packed.with_suffix(".png")) as image:
            assert same(image, expected)
    result = cli(*DECOMPRESS, packed, "-o", packed.with_name("x.png"), "--region", "31,0,40,1")
    assert result.exit_code == 1 and "not inside its 70 x 50 pixels" in result.stderr
    assert names(packed.parent) == ["file.png", "file.vae"]


def test_16_bit_grey_is_reduced(tmp_path: Path) -> None:
    samples = (np.arange(40 * 30, dtype=np.uint16) * 50).reshape(30, 40)
    Image.fromarray(samples).save(tmp_path / "in.png")
    machine = ("--weights", TINY_LOSSLESS, *CPU)
    assert cli("compress", "--lossless", tmp_path / "in.png", *machine).exit_code == 0
    assert cli("decompress", tmp_path / "in.vae", tmp_path / "out.png", "--downsample", "2", *machine).exit_code == 0
    with Image.open(tmp_path / "out.png") as image:
        means = samples.reshape(15, 2, 20, 2).mean((1, 3))
        assert image.mode == "I;16" and np.abs(np.asarray(image) - means).max() <= 0.5


def test_formats_that_need_not_lose_much_do_not(packed: Path, tiny: Codec) -> None:
    whole = tiny.decompress(packed.read_bytes())
    for suffix in ("webp", "tiff", "jpg"):
        assert cli(*DECOMPRESS, packed, "--format", suffix).exit_code == 0
        with Image.open(packed.with_suffix(f".{suffix}")) as image:
            error = np.abs(np.asarray(image, np.int16) - np.asarray(whole, np.int16))
            assert error.max() == 0 if suffix != "jpg" else error.mean() < 2


def test_a_format_for_standard_output(packed: Path) -> None:
    result = cli(*DECOMPRESS, "-", "--format", ".jpg", data=packed.read_bytes())
    assert result.exit_code == 0 and result.stdout_bytes.startswith(b"\xff\xd8")


def test_of_a_phone_s_jpeg_the_first_picture_is_taken(tmp_path: Path, tiny: Codec) -> None:
    first, preview = picture(40, 30), picture(20, 15, seed=1)
    first.save(tmp_path / "in.jpg", "MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "in.jpg") as image:
        assert image.n_frames == 2  # type: ignore[attr-defined]
        data = tiny.compress(image)
    assert cli(*COMPRESS, tmp_path / "in.jpg").exit_code == 0
    assert (tmp_path / "in.vae").read_bytes() == data and tiny.decompress(data).size == (40, 30)


def test_compare(packed: Path, tiny: Codec) -> None:
    picture(70, 50).save(packed.with_name("in.png"))
    decoded = tiny.decompress(packed.read_bytes())
    facts = json.loads(cli("compare", packed.with_name("in.png"), packed, "--json", *TINY_CPU).stdout)
    assert facts["bpp"] == 8 * packed.stat().st_size / 3500 and facts["ms_ssim"] is None
    assert facts["psnr"] == pytest.approx(psnr(picture(70, 50), decoded))
    text = cli("compare", packed, packed.with_name("in.png"), *TINY_CPU).stdout
    assert f"{facts['psnr']:.3f} dB" in text and f"{facts['bpp']:.4f}" in text
    same_file = json.loads(cli("compare", packed.with_name("in.png"), packed.with_name("in.png"), "--json").stdout)
    assert same_file.pop("ssimulacra2", 100.0) == 100.0  # where it is installed
    assert same_file == {"psnr": None, "ms_ssim": None, "bpp": None}
    picture(50, 70).save(packed.with_name("other.png"))
    result = cli("compare", packed.with_name("in.png"), packed.with_name("other.png"))
    assert result.exit_code == 1 and "70 x 50 and 50 x 70" in result.stderr


def test_compare_names_the_file_that_fails(packed: Path) -> None:
    whole, text, missing = (packed.with_name(name) for name in ("in.png", "text.png", "missing.png"))
    cut = packed.with_name("cut.vae")
    picture(40, 30).save(whole)
    text.write_bytes(b"hello")
    cut.write_bytes(packed.read_bytes()[:-1])
    for failing, code, words in (
        (text, 1, "not a picture that Pillow reads"),
        (cut, 3, "file ends within the tiles"),
        (missing, 1, "No such file or directory"),
    ):
        for pair in ((whole, failing), (failing, packed)):
            result = cli("compare", *pair, *(TINY_CPU if packed in pair else ()))
            assert (result.exit_code, result.stdout) == (code, "")
            assert result.stderr == f"vaecodec: {failing}: {words}\n"


def test_targets(tmp_path: Path) -> None:
    picture(96, 64).save(tmp_path / "in.png")
    compress = ("compress", tmp_path / "in.png", "--overwrite", *TINY_CPU)
    result = cli(*compress, "--target-size", "0.3k")
    assert result.exit_code == 0 and abs((tmp_path / "in.vae").stat().st_size - 300) <= 3
    assert "quality " in result.stderr and result.stderr.count("\n") == 1
    assert json.loads(cli("info", "--json", tmp_path / "in.vae").stdout)["quality"] not in (0, 100)

    def psnr() -> float:
        report = cli("compare", tmp_path / "in.png", tmp_path / "in.vae", "--json", *TINY_CPU)
        return float(json.loads(report.stdout)["psnr"])

    cli(*compress, "--quality", "60")
    target = psnr()
    arguments = ("--target-psnr", str(target), "--best-effort")  # its curve has steps
    assert cli(*compress, *arguments).exit_code == 0 and abs(psnr() - target) <= 0.1
    cli(*compress, "--quality", "60")
    before = (tmp_path / "in.vae").read_bytes()
    result = cli(*compress, "--target-bpp", "24", "--quiet")
    assert result.exit_code == 1 and result.stderr.startswith("vaecodec: ") and "at quality 100" in result.stderr
    assert (tmp_path / "in.vae").read_bytes() == before and names(tmp_path) == ["in.png", "in.vae"]
    result = cli(*compress, "--target-bpp", "24", "--quiet", "--best-effort")
    assert result.exit_code == 0 and "at quality 100" in result.stderr
    assert (tmp_path / "in.vae").read_bytes() != before
    assert cli(*compress, "--best-effort").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    code = "from vaecodec.cli import main; main(prog_name='vaecodec')"
    script = python(code, _VAECODEC_COMPLETE=f"{shell}_source")
    assert script.returncode == 0 and b"_VAECODEC_COMPLETE" in script.stdout
    if shell == "bash":
        asked = python(code, _VAECODEC_COMPLETE="bash_complete", COMP_WORDS="vaecodec com", COMP_CWORD="1")
        assert asked.stdout.split() == [b"plain,compare", b"plain,compress"]
        assert "bash_source" in cli("--help").stdout


def test_bits_are_shown_with_other_weights(tmp_path: Path, lossless_weights: Path) -> None:
    picture(40, 30).save(tmp_path / "in.png")
    machine = ("--weights", lossless_weights, *CPU)
    assert cli("compress", "--lossless", tmp_path / "in.png", *machine).exit_code == 0
    facts = json.loads(cli("info", tmp_path / "in.vae", "--bits", "--json", *machine).stdout)
    assert sum(facts["bits"].values()) == pytest.approx(8 * facts["bytes"])
