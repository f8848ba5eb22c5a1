"""The decoder in JavaScript gives the library's pixels and verdicts, in Node and, marked slow, in Chromium.

``npm install`` brings what it needs, as `.ci/run` does; what is missing is named, and its tests are skipped.
"""

import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TINY_FINER, TINY_LOSSLESS, cli, in_bytes, picture
from PIL import Image, ImageCms, ImageOps

import vaecodec
from bitstream import (
    EXIF,
    ICC,
    PNG,
    SPARSE,
    CorruptError,
    LimitError,
    Section,
    TruncatedError,
    VaeError,
    VersionError,
    pack,
    read_header,
    unpack,
)
from vaecodec import Codec
from vaecodec.kinds import packaged
from vaecodec.page import RUNTIME as RUNTIME_FILES
from vaecodec.training.export import add_graphs
from vaecodec.weights import read

sys.path.append(str(Path(__file__).parent / "fuzz"))

from mutate import mutated

HERE = Path(__file__).parent
WEB = Path(vaecodec.__file__).parent / "web"
MODULES = Path(os.environ.get("VAECODEC_NODE_MODULES", HERE.parent / "node_modules"))
RUNTIME = MODULES / "onnxruntime-web" / "dist"
OTHERS = ("pca", "lossless-refined")
"""What the page does not show, and a file whose weights another test puts together."""
GOLDEN = [path for path in sorted((HERE / "golden").glob("*/*.vae")) if not path.stem.startswith(OTHERS)]
NODE, CHROMIUM = shutil.which("node"), shutil.which("chromium") or shutil.which("chromium-browser")
NAMES = {CorruptError: "corrupt", TruncatedError: "truncated", VersionError: "version", LimitError: "limit"}
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
    "style-src 'self'; base-uri 'none'; form-action 'none'"
)


def needs(package: str) -> Any:
    missing = NODE is None or not (MODULES / package).is_dir()
    return pytest.mark.skipif(missing, reason=f"needs node, and npm's {package} in {MODULES}")


in_node = needs("onnxruntime-web")
in_chromium = [
    pytest.mark.slow,
    needs("playwright-core"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


def node(script: str, *arguments: object, given: object = None) -> str:
    command = [str(NODE), str(HERE / "web" / script), *map(str, arguments)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def decoded(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = node("node.mjs", RUNTIME / "ort.wasm.bundle.min.mjs", given=jobs).splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose levels are bytes."""
    path = in_bytes(tmp_path_factory.mktemp("bytes") / "bytes.safetensors")
    add_graphs(path)
    return path


def weights_of(path: Path) -> Path:
    if path.stem.startswith("lossless"):
        return TINY_LOSSLESS
    return TINY_FINER if path.stem == "lossy-finer" else TINY


def job_of(path: Path) -> dict[str, Any]:
    moving = {"groups": 20} if path.stem == "lossless-moving" and path.parent.name != "0.1" else {}
    return {"file": str(path), "weights": str(weights_of(path))} | moving


def hash_of(path: Path) -> str:
    return str(json.loads((path.parent / "hashes.json").read_text())[path.stem])


def digest(samples: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(samples, samples.dtype.newbyteorder("<")).tobytes()).hexdigest()


@in_node
def test_golden_files(bytewise: Path) -> None:
    own = {"lossless-bytes": {"weights": str(bytewise)}}
    answers = decoded([job_of(path) | own.get(path.stem, {}) for path in GOLDEN])
    assert [answer.get("hash", answer) for answer in answers] == [hash_of(path) for path in GOLDEN]


@in_node
def test_regions(tmp_path: Path) -> None:
    codec, jobs, wanted = Codec("cpu", (TINY, TINY_LOSSLESS)), [], []
    for name, tiny in (("lossy-mixed", TINY), ("lossy-tiles", TINY), ("lossless-tiles", TINY_LOSSLESS)):
        path = HERE / "golden" / "0.2" / f"{name}.vae"
        for x, y, width, height in ((0, 0, 1, 1), (70, 50, 60, 30), (17, 3, 111, 87)):
            region = {"x": x, "y": y, "width": width, "height": height}
            jobs.append({"file": str(path), "weights": str(tiny), "region": region})
            wanted.append(digest(codec.decode_array(path.read_bytes(), region=(x, y, width, height))))
    assert [answer.get("hash", answer) for answer in decoded(jobs)] == wanted


@in_node
def test_certain_latents(shipped: Path, photo: Image.Image, tmp_path: Path) -> None:
    """Tables that are all but certain, which the small weights do not use, in one array and in parts."""
    codec, jobs, hashes = Codec("cpu", shipped), [], []
    for progressive in (False, True):
        path = tmp_path / f"{progressive}.vae"
        data = codec.compress(photo.crop((0, 0, 128, 96)), 10, progressive=progressive)
        path.write_bytes(data)
        jobs.append({"file": str(path), "weights": str(shipped)})
        hashes.append(digest(codec.decode_array(data)))
        assert [tile.method for tile in unpack(data).tiles] == [SPARSE]
    assert [answer.get("hash", answer) for answer in decoded(jobs)] == hashes


@in_node
def test_shipped_lossless_weights(shipped_lossless: Path, photo: Image.Image, tmp_path: Path) -> None:
    """What people have; and refiners, of which the golden files of the page have none."""
    codec, jobs, hashes = Codec("cpu", shipped_lossless), [], []
    for progressive in (False, True):
        path = tmp_path / f"{progressive}.vae"
        data = codec.compress(photo.crop((0, 0, 128, 96)), lossless=True, progressive=progressive)
        path.write_bytes(data)
        jobs.append({"file": str(path), "weights": str(shipped_lossless)})
        hashes.append(digest(codec.decode_array(data)))
    assert [answer.get("hash", answer) for answer in decoded(jobs)] == hashes


def verdict(data: bytes) -> str:
    try:
        unpack(data)
    except VaeError as error:
        return NAMES[type(error)]
    return ""


@in_node
@pytest.mark.parametrize("runs", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path: Path, runs: int) -> None:
    """Only its own error, in time, and of the container nearly always the one that the library has; no wrong pixels."""
    jobs, files = [], []
    few = [path for path in GOLDEN if path.stat().st_size < 3000]
    for run in range(runs):
        source = few[run % len(few)]
        data = mutated(source.read_bytes(), run)
        path = tmp_path / f"{run}.vae"
        path.write_bytes(data)
        large = not verdict(data) and read_header(data).width * read_header(data).height > 2**16
        if not large:
            jobs.append({"file": str(path), "weights": str(weights_of(source))})
            files.append(data)
    codec, shown, alike, refused = Codec("cpu", (TINY, TINY_FINER, TINY_LOSSLESS)), 0, 0, 0
    for data, answer in zip(files, decoded(jobs), strict=True):
        assert "crash" not in answer, answer
        container = verdict(data)
        if container:
            refused += 1
            alike += answer["kind"] == container
        elif "hash" in answer and answer["hash"] and unpack(data).header.kind < 3:
            shown += 1
            assert answer["hash"] == digest(codec.decode_array(data))
        else:
            with pytest.raises(VaeError):
                codec.decode_array(data)
    assert shown > 0.02 * runs and alike > 0.95 * refused > 0.2 * runs


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


def profile(primaries: tuple[float, ...], gamma: float | None = None) -> bytes:
    """An ICC profile of a red and a green primary, with sRGB's curve or a power."""
    curve = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    if gamma is not None:
        curve = b"curv\0\0\0\0\0\0\0\1" + int(gamma * 256).to_bytes(2)
    xyz = [b"XYZ \0\0\0\0" + fixed(*primaries[3 * i : 3 * i + 3]) for i in range(3)]
    tags = [
        *zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz, strict=True),
        *((name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")),
    ]
    head, body = len(tags).to_bytes(4), b""
    for name, data in tags:
        head += name + (128 + 4 + 12 * len(tags) + len(body)).to_bytes(4) + len(data).to_bytes(4)
        body += data
    return bytes(128) + head + body


def fixed(*values: float) -> bytes:
    return b"".join(round(value * 65536).to_bytes(4, signed=True) for value in values)


SRGB = (0.4361, 0.2225, 0.0139, 0.3851, 0.7169, 0.0971, 0.1431, 0.0606, 0.7141)
P3 = (0.5151, 0.2412, -0.0011, 0.2919, 0.6922, 0.0419, 0.1572, 0.0666, 0.7841)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data


def shown(tmp_path: Path, files: list[bytes]) -> list[dict[str, Any]]:
    paths = [tmp_path / f"{number}.vae" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return decoded([{"file": str(path), "weights": str(TINY_LOSSLESS), "display": True} for path in paths])


def tagged(data: bytes, *sections: Section) -> bytes:
    file = unpack(data)
    return pack(file.header, file.tiles, sections)


@in_node
@pytest.mark.usefixtures("small_tiles")
def test_orientation(tmp_path: Path, codec: Codec) -> None:
    image = picture(150, 90, "RGBA").quantize(8).convert("RGBA")
    data = codec.compress(image, lossless=True)
    answers = shown(tmp_path, [tagged(data, Section(EXIF, exif(orientation))) for orientation in range(1, 9)])
    for orientation, answer in enumerate(answers, 1):
        image.getexif()[274] = orientation
        upright = ImageOps.exif_transpose(image)
        assert (answer["width"], answer["height"]) == upright.size
        assert answer["hash"] == digest(np.asarray(upright)) and answer["notes"] == []


@in_node
def test_colour_spaces(tmp_path: Path, codec: Codec) -> None:
    data = codec.compress(Image.new("RGB", (4, 4), (200, 100, 50)), lossless=True)
    real = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = [
        real,
        profile(SRGB),
        profile(P3),
        profile(SRGB, 1.8),
        profile((0.6, *P3[1:])),
        b"",
        b"profile",
        real[:200],
    ]
    files = [tagged(data, Section(ICC, each)) for each in profiles]
    codes = [(1, 13), (12, 13), (1, 8), (9, 16), (9, 18), (12, 16)]
    files += [tagged(data, Section(PNG, chunk(b"cICP", bytes([*code, 0, 1])))) for code in codes]
    answers = shown(tmp_path, files)
    spaces, notes = [answer["colorSpace"] for answer in answers], [len(answer["notes"]) for answer in answers]
    assert [number for number, space in enumerate(spaces) if space != "srgb"] == [2, 9]
    assert notes == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert all(answer["first"] == [200, 100, 50, 255] for answer in answers[:11])
    assert "tone-mapped" in answers[11]["notes"][0]


@in_node
def test_high_dynamic_range(tmp_path: Path, codec: Codec) -> None:
    """Paper white is bright, what is brighter is brighter still, and 10,000 candelas are white."""
    pq = [0.0, 0.3, 0.5807, 0.7518, 1.0]  # black, 10 cd/m^2, paper white, 1,000 and 10,000
    files = []
    for level in pq:
        data = codec.compress(np.full((2, 2, 3), round(level * 1023), np.uint16), lossless=True, depth=10)
        chunks = chunk(b"cICP", bytes([9, 16, 0, 1])) + chunk(b"sBIT", bytes([10]))
        files.append(tagged(data, Section(PNG, chunks + chunk(b"cLLI", (100_000_000).to_bytes(4) * 2))))
    levels = [answer["first"] for answer in shown(tmp_path, files)]
    assert all(max(level[:3]) - min(level[:3]) <= 1 for level in levels)
    greens = [level[1] for level in levels]
    assert greens[0] == 0 and 40 < greens[1] < 80 and 215 < greens[2] < 235 and greens[2] < greens[3] < greens[4] == 255


@in_node
def test_deep_samples(tmp_path: Path, codec: Codec) -> None:
    """White is 65535 unless the file says that it is that of its depth."""
    data = codec.compress(np.full((2, 2), 1023, np.uint16), lossless=True, depth=10)
    plain = Section(PNG, b"")
    full = Section(PNG, chunk(b"sBIT", bytes([10])))
    answers = shown(tmp_path, [tagged(data, plain), tagged(data, full)])
    assert [answer["first"] for answer in answers] == [[4, 4, 4, 255], [255, 255, 255, 255]]


def test_size() -> None:
    """Of the code; types and comments make it a quarter longer."""
    code = "".join(path.read_text() for path in sorted(WEB.glob("*.js")))
    code = re.sub(r"/\*\*.*?\*/|\s//\s.*?$", "", code, flags=re.DOTALL | re.MULTILINE)
    assert 50_000 < sum(len(line) + 1 for line in code.splitlines() if line.strip()) < 86_000


@needs("typescript")
def test_types() -> None:
    options = "--allowJs --checkJs --strict --noEmit --skipLibCheck --target es2022 --module esnext"
    options += " --moduleResolution bundler --lib es2023,dom,dom.iterable,dom.asynciterable"
    command = [str(MODULES / ".bin" / "tsc"), *options.split(), *map(str, sorted(WEB.glob("*.js")))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_page_needs_the_runtime(tmp_path: Path) -> None:
    result = cli("page", tmp_path / "page", "--runtime", tmp_path)
    assert result.exit_code == 1 and "npm install onnxruntime-web" in result.stderr
    assert not (tmp_path / "page").exists()


def test_no_half_of_a_page(tmp_path: Path) -> None:
    for name in RUNTIME_FILES:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    result = cli("page", tmp_path / "page", "--runtime", tmp_path, "--weights", tmp_path / "a.safetensors")
    assert result.exit_code == 4 and "a.safetensors is damaged" in result.stderr
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, bytewise: Path) -> Path:
    """A page with the weights of the golden files, and a runtime that is none where there is none."""
    folder, runtime = tmp_path_factory.mktemp("web"), RUNTIME
    if not runtime.is_dir():
        runtime = folder / "runtime"
        runtime.mkdir()
        for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
            (runtime / name).write_bytes(b"")
    options = [part for path in (TINY, TINY_FINER, TINY_LOSSLESS, TINY, bytewise) for part in ("--weights", path)]
    result = cli("page", folder / "page", "--runtime", runtime, *options)
    assert result.exit_code == 0, result.output
    again = cli("page", folder / "page", "--runtime", runtime)
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    linear = cli("page", folder / "other", "--runtime", runtime, "--weights", packaged("linear"))
    assert linear.exit_code == 4 and "linear" in linear.stderr
    return folder / "page"


def test_page(page: Path) -> None:
    assert {path.name for path in WEB.iterdir() if path.is_file() and path.suffixes != [".d", ".ts"]} <= {
        path.name for path in page.iterdir()
    }
    for original in (TINY, TINY_FINER, TINY_LOSSLESS):
        identity = read(original).identity
        kept = read(page / "weights" / f"{identity.hex()}.safetensors")
        assert kept.identity == identity and not kept.part("encoder")
        assert Codec("cpu", original).lossy if original != TINY_LOSSLESS else True
    assert POLICY in (page / "index.html").read_text()


class Server(http.server.ThreadingHTTPServer):
    """The page, under the policy that its HTML states, which workers only obey as a header."""

    def __init__(self, folder: Path) -> None:
        class Handler(http.server.SimpleHTTPRequestHandler):
            extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

            def end_headers(self) -> None:
                self.send_header("Content-Security-Policy", POLICY)
                super().end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def site(page: Path) -> Iterator[str]:
    server = Server(page)
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


class TestChromium:
    pytestmark = in_chromium

    def decoded(self, tmp_path: Path, site: str, jobs: list[str], **others: object) -> list[dict[str, Any]]:
        given = {"url": site, "jobs": jobs} | others
        return [
            json.loads(line)
            for line in node("chromium.mjs", MODULES, CHROMIUM, tmp_path / "profile", given=given).splitlines()
        ]

    def test_golden_files(self, tmp_path: Path, page: Path, site: str) -> None:
        files = [path for path in GOLDEN if path.stem != "lossless-moving"]
        for path in files:
            (page / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
        *answers, end = self.decoded(tmp_path, site, [f"{path.parent.name}-{path.name}" for path in files])
        assert [answer.get("hash", answer) for answer in answers] == [hash_of(path) for path in files]
        assert end["complaints"] == []

    def test_damage_is_told(self, tmp_path: Path, page: Path, site: str) -> None:
        data = bytearray((HERE / "golden" / "0.2" / "lossy-tiles.vae").read_bytes())
        data[-9] ^= 1
        (page / "damaged.vae").write_bytes(data)
        answer, end = self.decoded(tmp_path, site, ["damaged.vae"], source="damaged.vae")
        assert answer["kind"] == "corrupt" and "checksum" in answer["message"]
        assert end["says"].startswith("corrupt: ")
