"""The decoder in JavaScript gives the library's pixels and verdicts, in Node and, marked slow, in Chromium.

``npm install`` brings what it needs, as `.ci/run` does; what is missing is named, and its tests are skipped.
"""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TINY_FINER, TINY_LOSSLESS, cli

import vaecodec
from bitstream import CorruptError, LimitError, TruncatedError, VaeError, VersionError, read_header, unpack
from vaecodec import Codec
from vaecodec.weights import read

sys.path.append(str(Path(__file__).parent / "fuzz"))

from mutate import mutated

HERE = Path(__file__).parent
WEB = Path(vaecodec.__file__).parent / "web"
MODULES = Path(os.environ.get("VAECODEC_NODE_MODULES", HERE.parent / "node_modules"))
RUNTIME = MODULES / "onnxruntime-web" / "dist"
GOLDEN = [path for path in sorted((HERE / "golden").glob("*/*.vae")) if not path.stem.startswith("pca")]
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
def test_golden_files() -> None:
    answers = decoded([job_of(path) for path in GOLDEN])
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


def verdict(data: bytes) -> str:
    try:
        unpack(data)
    except VaeError as error:
        return NAMES[type(error)]
    return ""


@in_node
def test_damaged_files(tmp_path: Path) -> None:
    """Only its own error, in time, and of the container the one that the library has; no wrong pixels."""
    jobs, files = [], []
    few = [path for path in GOLDEN if path.stat().st_size < 3000 and path.stem != "lossless-moving"]
    for run in range(600):
        source = few[run % len(few)]
        data = mutated(source.read_bytes(), run)
        path = tmp_path / f"{run}.vae"
        path.write_bytes(data)
        large = not verdict(data) and read_header(data).width * read_header(data).height > 2**16
        if not large:
            jobs.append({"file": str(path), "weights": str(weights_of(source))})
            files.append(data)
    codec, shown = Codec("cpu", (TINY, TINY_FINER, TINY_LOSSLESS)), 0
    for data, answer in zip(files, decoded(jobs), strict=True):
        assert "crash" not in answer, answer
        container = verdict(data)
        if container:
            assert answer["kind"] == container
        elif "hash" in answer and answer["hash"] and unpack(data).header.kind < 3:
            shown += 1
            assert answer["hash"] == digest(codec.decode_array(data))
        else:
            with pytest.raises(VaeError):
                codec.decode_array(data)
    assert shown > 20


def test_size() -> None:
    scripts = sorted(WEB.glob("*.js"))
    assert scripts and sum(path.stat().st_size for path in scripts) < 60_000


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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with the weights of the golden files, and a runtime that is none where there is none."""
    folder, runtime = tmp_path_factory.mktemp("web"), RUNTIME
    if not runtime.is_dir():
        runtime = folder / "runtime"
        runtime.mkdir()
        for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
            (runtime / name).write_bytes(b"")
    options = [part for path in (TINY, TINY_FINER, TINY_LOSSLESS) for part in ("--weights", path)]
    result = cli("page", folder / "page", "--runtime", runtime, *options)
    assert result.exit_code == 0, result.output
    again = cli("page", folder / "page", "--runtime", runtime)
    assert again.exit_code == 1 and "--overwrite" in again.stderr
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
