"""Ways out: nothing is lost, cut or replaced, whatever the target is and whatever becomes of it meanwhile."""

import contextlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import CPU, TINY, TINY_CPU, TINY_LOSSLESS, cli, names, picture, python, same, saved
from PIL import Image

from vaecodec import Codec
from vaecodec.cli import batch, files, inout
from vaecodec.cli.files import Job, Request, planned
from vaecodec.cli.inout import written
from vaecodec.folders import PICTURES, shown

posix = pytest.mark.skipif(os.name == "nt", reason="files of POSIX")
pytestmark = [posix, pytest.mark.usefixtures("threads")]
COMPRESS = ("compress", "--quiet", *TINY_CPU)
DECOMPRESS = ("decompress", "--quiet", *TINY_CPU)


@pytest.fixture
def folder(tmp_path: Path, tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture, and its .vae file."""
    picture(40, 30).save(tmp_path / "in.png")
    (tmp_path / "x.vae").write_bytes(tiny.compress(picture(40, 30)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(tiny: Codec) -> bytes:
    return tiny.compress(picture(40, 30))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Reader(threading.Thread):
    """Reads a FIFO to its end, or only its first bytes."""

    def __init__(self, path: Path, count: int = -1) -> None:
        super().__init__()
        self.path, self.count, self.data = path, count, b""
        self.start()

    def run(self) -> None:
        with self.path.open("rb", buffering=0) as file:
            self.data = file.readall() if self.count < 0 else file.read(self.count)

    def result(self) -> bytes:
        self.join(30)
        assert not self.is_alive()
        return self.data


# What is no regular file


def test_a_fifo_is_written_through(folder: Path, data: bytes, tiny: Codec) -> None:
    os.mkfifo("pipe")
    reader = Reader(folder / "pipe")
    assert cli(*COMPRESS, "in.png", "-o", "pipe").exit_code == 0
    assert reader.result() == data and stat.S_ISFIFO(os.stat("pipe").st_mode)
    os.symlink("pipe", "link")
    reader = Reader(folder / "pipe")
    assert cli(*DECOMPRESS, "x.vae", "-o", "link").exit_code == 0
    assert same(Image.open(io.BytesIO(reader.result())), tiny.decompress(data))
    assert os.readlink("link") == "pipe" and names(folder) == ["in.png", "link", "pipe", "x.vae"]


def test_a_fifo_whose_reader_goes(folder: Path) -> None:
    os.mkfifo("pipe")
    Image.effect_noise((300, 300), 90).save("noise.png")
    machine = ("--weights", TINY_LOSSLESS, *CPU)
    assert cli("compress", "noise.png", "--lossless", "--no-verify", "--quiet", *machine).exit_code == 0
    reader = Reader(folder / "pipe", 10)
    result = cli("decompress", "noise.vae", "-o", "pipe", *machine)
    assert len(reader.result()) == 10 and result.exit_code == 1
    assert result.stderr == "vaecodec: noise.vae: pipe: Broken pipe\n"


def test_a_device_is_written_through(folder: Path) -> None:
    """Devices of our own, never the system's."""
    try:
        os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod("full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        Path("null").write_bytes(b"")
    except PermissionError:
        pytest.skip("no device can be made here")
    assert cli(*COMPRESS, "in.png", "-o", "null").exit_code == 0
    assert cli(*DECOMPRESS, "x.vae", "-o", "null", "--format", "jpg").exit_code == 0
    for command in ((*COMPRESS, "in.png"), (*DECOMPRESS, "x.vae")):
        result = cli(*command, "-o", "full")
        assert result.exit_code == 1 and "full: No space left on device" in result.stderr
    assert stat.S_ISCHR(os.stat("null").st_mode) and stat.S_ISCHR(os.stat("full").st_mode)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors have names in /proc")
def test_a_descriptor_is_written_where_it_stands(folder: Path, data: bytes) -> None:
    """As /dev/stdout is, if it leads to a file to which others write as well."""
    with open("log", "wb") as file:
        file.write(b"before ")
        file.flush()
        assert cli(*COMPRESS, "in.png", "-o", f"/dev/fd/{file.fileno()}").exit_code == 0
        file.write(b" after")
    assert Path("log").read_bytes() == b"before " + data + b" after"
    end, start = os.pipe()
    os.symlink(f"/proc/self/fd/{start}", "link")
    assert cli(*COMPRESS, "in.png", "-o", "link").exit_code == 0
    assert os.read(end, 9999) == data


# What is replaced, and what is not


def test_a_link_stays_and_what_it_leads_to_is_replaced(folder: Path, data: bytes) -> None:
    os.makedirs("elsewhere")
    Path("elsewhere/real").write_bytes(b"old")
    os.symlink("elsewhere/real", "inner")
    os.symlink("inner", "link")
    os.symlink("elsewhere/new", "dangling")
    for link in ("link", "dangling"):
        assert cli(*COMPRESS, "in.png", "-o", link).exit_code == 0
        assert os.path.islink(link) and Path(link).read_bytes() == data
    assert names(folder / "elsewhere") == ["new", "real"]
    os.symlink("loop", "loop")
    result = cli(*COMPRESS, "in.png", "-o", "loop")
    assert result.exit_code == 1 and "symbolic links" in result.stderr


def test_modes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        for mode in (0o600, 0o664, 0o755):
            Path("out.vae").write_bytes(b"x")
            os.chmod("out.vae", mode)
            assert cli(*COMPRESS, "in.png", "-o", "out.vae").exit_code == 0
            assert stat.S_IMODE(os.stat("out.vae").st_mode) == mode
        assert cli(*COMPRESS, "in.png").exit_code == 0
        assert stat.S_IMODE(os.stat("in.vae").st_mode) == 0o640
    finally:
        os.umask(before)


def test_what_is_replaced_by_a_private_file_is_private_all_the_time(folder: Path) -> None:
    Path("out.vae").write_bytes(b"x")
    os.chmod("out.vae", 0o600)
    with written(Job(Path("in.png"), Path("out.vae"), replace=True), b"secret") as temporary:
        assert temporary and stat.S_IMODE(temporary.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["family.jpg", "new.PNG", "scan.tiff", "drawing.svg", "raw.nef"])
def test_no_vae_file_has_a_picture_s_name(folder: Path, name: str) -> None:
    before = contents(folder)
    result = cli(*COMPRESS, "in.png", "-o", name)
    assert result.exit_code == 2 and name in result.stderr and contents(folder) == before
    assert cli(*COMPRESS, "in.png", "-o", name, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo", saved(picture(8, 8), "JPEG")),
        ("photo.vae", saved(picture(8, 8), "PNG")),
        ("scan", saved(picture(8, 8), "TIFF")),
        ("w", saved(picture(8, 8), "WEBP")),
        ("notes.txt", b"what I wrote"),
    ],
)
def test_what_is_no_vae_file_is_not_replaced(folder: Path, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    result = cli(*COMPRESS, "in.png", "-o", name)
    assert result.exit_code == 1 and "is no .vae file" in result.stderr and Path(name).read_bytes() == content
    assert cli(*COMPRESS, "in.png", "-o", name, "--overwrite").exit_code == 0


def test_a_picture_that_is_named_is_replaced(folder: Path) -> None:
    for content in (saved(picture(8, 8)), b"old"):
        Path("out.png").write_bytes(content)
        assert cli(*DECOMPRESS, "x.vae", "-o", "out.png").exit_code == 0
        with Image.open("out.png") as image:
            assert image.size == (40, 30)


@pytest.mark.parametrize("content", [b"", b"old"])
def test_what_may_have_been_meant_is_replaced(folder: Path, data: bytes, content: bytes) -> None:
    for name in ("out.vae", "out"):
        Path(name).write_bytes(content)
        assert cli(*COMPRESS, "in.png", "-o", name).exit_code == 0 and Path(name).read_bytes() == data


def test_a_pattern_that_the_shell_has_filled_in(folder: Path) -> None:
    """``-o *.png``: the first picture is named as the output."""
    picture(8, 8).save("a.png")
    before = contents(folder)
    assert cli(*COMPRESS, "-o", "a.png", "in.png").exit_code == 2
    assert cli(*DECOMPRESS, "-o", "a.png", "in.png").exit_code == 3
    assert contents(folder) == before


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("options", [(), ("-o", "out/"), ("--skip-existing",)], ids=str)
def test_a_target_that_comes_meanwhile_is_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], links: bool
) -> None:
    """As when two batches run on the same pictures."""
    target, decode = Path("out/in.vae" if "-o" in options else "in.vae"), Codec.decode_tiles

    def late(*arguments: Any) -> Any:
        target.write_bytes(b"somebody else's")
        return decode(*arguments)

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Codec, "decode_tiles", late)
    if not links:  # FAT, and some network file systems
        monkeypatch.setattr(os, "link", no_links)
    result = cli(*COMPRESS, "in.png", *options)
    assert result.exit_code == 1 and f"{target}: " in result.stderr and result.stderr.count("\n") == 1
    assert target.read_bytes() == b"somebody else's" and len(names(target.parent)) == (1 if "-o" in options else 3)


def test_without_links_files_are_written_all_the_same(
    folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert cli(*COMPRESS, "in.png").exit_code == 0
    assert Path("in.vae").read_bytes() == data and names(folder) == ["in.png", "in.vae", "x.vae"]


def test_a_dangling_link_that_was_not_named_stays(folder: Path) -> None:
    os.symlink("nowhere", "in.vae")
    for option in ((), ("--skip-existing",)):
        assert cli(*COMPRESS, "in.png", *option).exit_code == 1 and os.readlink("in.vae") == "nowhere"
    assert names(folder) == ["in.png", "in.vae", "x.vae"]


def test_two_pictures_of_one_name(folder: Path) -> None:
    picture(8, 8, seed=1).save("in.jpg")
    assert cli(*COMPRESS, ".", "-o", "out/").exit_code == 0
    assert names(folder / "out") == ["in.jpg.vae", "in.png.vae"]


# What is passed over


def test_what_is_done_is_passed_over_and_what_is_not_is_said(folder: Path, data: bytes) -> None:
    arguments = ("compress", "in.png", "--skip-existing", *TINY_CPU)
    assert cli(*arguments).exit_code == 0
    assert cli(*arguments).stderr == "0 files, 1 skipped\n"
    for content, words in ((data[:-1], "no whole .vae file"), (b"", "no whole"), (data, "older than its source")):
        Path("in.vae").write_bytes(content)
        if content == data:
            os.utime("in.vae", (1, 1))
        result = cli(*arguments)
        assert result.exit_code == 1 and words in result.stderr and "--overwrite" in result.stderr
        assert Path("in.vae").read_bytes() == content
    Path("x.png").write_bytes(b"")
    assert "is empty" in cli(*DECOMPRESS, "x.vae", "--skip-existing").stderr


def test_times_that_are_kept_are_no_reason_to_do_it_again(folder: Path) -> None:
    os.utime("in.png", (1e9, 1e9))
    assert cli(*COMPRESS, "in.png", "--preserve-times").exit_code == 0
    assert os.stat("in.vae").st_mtime == 1e9
    assert cli(*COMPRESS, "in.png", "--skip-existing").exit_code == 0


def test_what_is_no_regular_file_is_left_out_with_a_word(folder: Path) -> None:
    os.mkfifo("pipe.png")
    os.makedirs("real")
    os.symlink("real", "link")
    picture(8, 8).save("real/b.png")
    for source in (("-r", "."), ("*.png",)):
        result = cli("compress", *source, "-o", "out/", "--overwrite", *TINY_CPU)
        assert result.exit_code == 0 and "pipe.png: no regular file: left out\n" in result.stderr
        assert ("link: a symbolic link to a folder: left out" in result.stderr) == (source[0] == "-r")
    assert sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.vae")) == ["in.vae", "real/b.vae"]


def test_a_fifo_that_is_named_is_read(folder: Path, data: bytes) -> None:
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(saved(picture(40, 30))))
    writer.start()
    assert cli(*COMPRESS, "pipe", "-o", "out.vae").exit_code == 0
    writer.join()
    assert Path("out.vae").read_bytes() == data


# What is noticed before anything is computed


def test_what_is_known_at_once_is_said_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaecodec.cli.options.Machine.codec", lambda *_: pytest.fail("too late"))
    Path("text.png").write_bytes(b"hello")
    Path("file").touch()
    before = names(folder)
    for arguments, code, words in (
        (("compress", "x.vae"), 1, "already a .vae file"),
        (("decompress", "in.png"), 3, "not a .vae file"),
        (("verify", "in.png"), 3, "not a .vae file"),
        (("info", "in.png"), 3, "not a .vae file"),
        (("compress", "text.png"), 1, "not a picture"),
        (("compress", "in.png", "-o", "no/out.vae"), 1, "no such folder"),
        (("compress", "in.png", "-o", "file/out.vae"), 1, "file/out.vae"),
        (("compress", "in.png", "-o", "file/below/"), 1, "Not a directory"),
        (("compress", "in.png", "-o", "a.jpg"), 2, "suffix of pictures"),
        (("decompress", "x.vae", "-o", "no/out.png"), 1, "no such folder"),
        (("decompress", "x.vae", "-o", "out.xyz"), 1, ".xyz"),
        (("decompress", "x.vae", "-o", "x.vae"), 1, ".vae"),
        (("decompress", "x.vae", "--format", "a/b"), 2, "'a/b'"),
        (("decompress", "x.vae", "--format", "."), 2, "'.'"),
        (("decompress", "x.vae", "--format", "png/"), 2, "'png/'"),
        (("decompress", "x.vae", "--format", "xyz"), 2, "xyz"),
        (("decompress", "x.vae", "--format", "psd"), 2, "psd"),
    ):
        result = cli(*arguments)
        assert (result.exit_code, result.stdout) == (code, "") and words in result.stderr, arguments
        assert names(folder) == before


def test_standard_input_that_is_a_vae_file(folder: Path, data: bytes) -> None:
    result = cli("compress", "-", *TINY_CPU, data=data)
    assert result.exit_code == 1 and "already a .vae file" in result.stderr


# Bytes that do not arrive


class Slow(io.RawIOBase):
    """Takes a few bytes at a time, and now and then none, as a raw pipe does."""

    def __init__(self) -> None:
        self.taken, self.calls = b"", 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return ready

    def write(self, data: Any) -> int | None:
        self.calls += 1
        if self.calls % 3 == 0:
            return None
        self.taken += bytes(data[:1000])
        return min(len(data), 1000)


ready = os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize("buffered", [False, True])
def test_all_bytes_are_written(buffered: bool) -> None:
    raw = Slow()
    files.write_all(io.BufferedWriter(raw) if buffered else raw, bytes(range(256)) * 100)  # type: ignore[type-var]
    assert raw.taken == bytes(range(256)) * 100


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files end at so many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_full_disk(folder: Path, data: bytes, command: str, existing: bool) -> None:
    source, target = ("in.png", "out.vae") if command == "compress" else ("x.vae", "out.png")
    if existing:
        Path(target).write_bytes(data)
    before = contents(folder)
    with full_disk(50):
        result = cli(command, source, "-o", target, *TINY_CPU)
    assert result.exit_code == 1 and f"{target}: File too large" in result.stderr
    assert contents(folder) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full(folder: Path, unbuffered: str) -> None:
    """Of all that writes there: one line and 1, also where the error comes from the last flush."""
    for arguments in (["info", "x.vae"], ["info", "--json", "x.vae"], ["--help"], ["--version"]):
        with open("/dev/full", "wb") as full:
            result = subprocess.run(
                [sys.executable, "-m", "vaecodec", *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                check=False,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            )
        assert result.returncode == 1 and result.stderr == b"vaecodec: standard output: No space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_text_that_is_cut_is_an_error_too(folder: Path, unbuffered: str) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); import vaecodec.__main__ as m; m.run()"
    )
    with open("out.txt", "wb") as out:
        command = [sys.executable, "-c", code, "info", "--json", "x.vae", *(f"./{'./' * i}x.vae" for i in range(3))]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run([*command, "--help"], stdout=out, stderr=subprocess.PIPE, check=False, env=environment)
    assert result.returncode == 1 and result.stderr == b"vaecodec: standard output: File too large\n"


def test_a_reader_that_has_gone(folder: Path) -> None:
    """``info x.vae | head`` says nothing of pipes."""
    end, start = os.pipe()
    os.close(end)
    for arguments in (["info", "x.vae"], ["--help"]):
        command = [sys.executable, "-m", "vaecodec", *arguments]
        result = subprocess.run(command, stdout=start, stderr=subprocess.PIPE, check=False)
        assert result.returncode == 1 and result.stderr == b""
    os.close(start)


def test_one_process_for_all_that_needs_one(folder: Path, data: bytes) -> None:
    """No standard error, a closed standard output, a gone reader, unreadable and read-only folders."""
    for name in ("tree/seen", "tree/locked", "closed"):
        os.makedirs(name)
        picture(8, 8).save(f"{name}/a.png")
    Path("kept.vae").write_bytes(data)
    Path("kept.vae").chmod(0o444)
    code = f"""
import json, os, sys
from click.testing import CliRunner
from vaecodec.cli import main
machine = {list(TINY_CPU)!r}
os.chmod("tree/locked", 0)
os.chmod("closed", 0o555)
def run(*arguments):
    result = CliRunner().invoke(main, [*arguments, *machine])
    said.append([result.exit_code, result.stderr])
said = []
run("compress", "-r", "tree", "-o", "out/")
run("compress", "tree/**/*.png", "-o", "out/", "--overwrite")
run("verify", "-r", "tree")
run("compress", "in.png", "-o", "closed/x.vae")
run("compress", "closed/a.png")
run("decompress", "x.vae", "-o", "closed/x.png")
run("decompress", "x.vae", "-o", "closed/new/")
run("compress", "in.png", "-o", "kept.vae")
os.chmod("in.png", 0)
run("compress", "in.png")
os.chmod("tree/locked", 0o755), os.chmod("closed", 0o755), os.chmod("in.png", 0o644)
print(json.dumps(said))
out = os.dup(1)
os.close(0), os.close(1), os.close(2)
for name in ("stdin", "stdout", "stderr"):
    setattr(sys, name, None)
class Full:  # standard output as it is under PYTHONUNBUFFERED, on a full disk
    buffer = open("/dev/full", "wb", buffering=0) if os.path.exists("/dev/full") else None
    flush = staticmethod(lambda: None)
codes = []
if Full.buffer:
    sys.stdout = Full
    try:
        main(["decompress", "x.vae", "-o", "-", *machine])
    except SystemExit as error:
        assert error.code == 1
    sys.stdout = None
for arguments in (["compress", "in.png"], ["decompress", "x.vae", "-o", "-"], ["decompress", "-"], ["info", "x.vae"]):
    try:
        main([*arguments, *(machine if arguments[0] != "info" else [])])
    except SystemExit as error:
        codes.append(error.code)
os.write(out, json.dumps(codes).encode())
"""
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        drop = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", "--", *command]
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("setpriv takes root's rights, and is not there")
    if result.stderr.startswith(b"setpriv: "):
        pytest.skip("root's rights cannot be given up here")
    assert result.returncode == 0, result.stderr.decode()
    said, codes = map(json.loads, result.stdout.decode().splitlines())
    assert [code for code, _ in said] == [1] * len(said)
    tree, glob, verified, *rest = (text for _, text in said)
    for text in (tree, glob, verified):
        assert "vaecodec: tree/locked: Permission denied\n" in text
    assert "1 file, 1 failed" in tree and Path("out/seen/a.vae").exists()
    assert all("Permission denied" in text for text in rest) and len(names(folder / "closed")) == 1
    assert codes == [0, 1, 1, 0] and (folder / "in.vae").read_bytes() == data
    assert Path("kept.vae").read_bytes() == data


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.3])
def test_an_interrupt_while_things_are_imported(folder: Path, delay: float) -> None:
    command = [
        sys.executable,
        "-c",
        "from vaecodec.__main__ import run; print(flush=True); run()",
        "compress",
        "in.png",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout and running.stderr
        running.stdout.readline()  # what Python does before is none of ours
        time.sleep(delay)
        running.send_signal(signal.SIGINT)
        assert running.stderr.read() == b"" and running.wait() == 130
    assert names(folder) == ["in.png", "x.vae"]


# Temporary files


def test_those_of_living_processes_are_not_swept(folder: Path) -> None:
    """However old: a picture may be verified for hours."""
    job = Job(Path("in.png"), Path("out.vae"), replace=True)
    with written(job, b"data") as temporary:
        assert temporary
        os.utime(temporary, (1, 1))
        inout.sweep(folder)
        assert temporary.exists()
    assert Path("out.vae").read_bytes() == b"data"
    for name, age in ((".vaecodec-01234567.tmp", 2 * inout.STALE), (".vaecodec-89abcdef.tmp", 0.0)):
        Path(name).touch()
        os.utime(name, (time.time() - age,) * 2)
    os.mkfifo(".vaecodec-00000000.tmp")
    os.utime(".vaecodec-00000000.tmp", (1, 1))
    inout.sweep(folder)
    assert [name for name in names(folder) if name.startswith(".")] == [
        ".vaecodec-00000000.tmp",
        ".vaecodec-89abcdef.tmp",
    ]


# What is said


def test_control_characters_are_shown() -> None:
    assert shown("a b\x1b[31mé\n\u202e\udcff") == "a b\\x1b[31mé\\n\\u202e\\udcff"


def test_names_that_would_steer_the_terminal(folder: Path) -> None:
    name = "a\x1b[2J\n.png"
    Path(name).write_bytes(b"no picture")
    for arguments in ((*COMPRESS, name), (*COMPRESS, "in.png", "-o", f"no{name}/x.vae"), ("info", name)):
        result = cli(*arguments)
        assert result.exit_code in (1, 3) and "\\x1b[2J\\n" in result.stderr
        assert "\x1b" not in result.output and result.output.count("\n") == 1
    assert "\x1b" not in cli(*COMPRESS, "in.png", "-o", name).output


def test_several_files_and_folders(folder: Path, data: bytes) -> None:
    os.makedirs("more/below")
    for name in ("more/b.vae", "more/below/c.vae"):
        Path(name).write_bytes(data)
    Path("broken.vae").write_bytes(data[:20])
    lines = cli("info", "--json", "x.vae", "more", "broken.vae").stdout.splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["more/b.vae", "x.vae"]
    result = cli("info", "-r", ".")
    assert result.exit_code == 1 and result.stderr.startswith("vaecodec: broken.vae: ")
    assert [line for line in result.stdout.splitlines() if line.endswith(":")] == [
        "more/b.vae:",
        "more/below/c.vae:",
        "x.vae:",
    ]
    assert "file" not in json.loads(cli("info", "--json", "x.vae").stdout)
    result = cli("verify", "-r", "more", "*x.vae", *TINY_CPU)
    assert result.exit_code == 0 and result.stderr.startswith("3 files; ")
    assert cli("verify", "more", "broken.vae", *TINY_CPU).exit_code == 1
    assert cli("verify", "-r", "x.vae").exit_code == cli("info", "-r", "x.vae").exit_code == 2


def test_speed_is_that_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of whoever feeds a pipe."""
    tally = batch.Tally(files.Plan([Job(Path("a"), files.STANDARD)]))
    with tally.bar(False):
        with inout.waiting():
            time.sleep(0.2)
        tally.add(Job(Path("a"), files.STANDARD), batch.Done(10**6, 1, 1, 1, "a"), inout.waiting.seconds)
        time.sleep(0.01)
    assert float(tally.speed(10**6).split()[0]) > 10


def test_all_tiles_damaged_is_an_error(folder: Path, data: bytes) -> None:
    Path("broken.vae").write_bytes(data[:-1])
    result = cli(*DECOMPRESS, "broken.vae", "--allow-partial")
    assert result.exit_code == 3 and "all tiles are damaged" in result.stderr and not Path("broken.png").exists()


def test_weights_are_not_needed_to_say_no() -> None:
    with pytest.raises(click.UsageError, match="suffix of pictures"):
        planned(Request(["a.png"], "b.jpg", existing="named"), PICTURES, ".vae")
    assert TINY.exists()


def test_help_needs_no_numpy(folder: Path) -> None:
    code = "import sys; from vaecodec.cli import main; main(sys.argv[1:], standalone_mode=False)"
    code += "; print('numpy' in sys.modules)"
    for arguments in (("--help",), ("info", "x.vae"), ("compress", "--help")):
        assert python(code, *arguments).stdout.split()[-1] == b"False"
