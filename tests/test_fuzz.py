"""The fuzzers' targets on some thousand mutants of small files; tests/fuzz/README.md tells of longer runs."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "fuzz"))

import seeds
import targets
from mutate import mutated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    seeds.write(folder)
    return folder


@pytest.mark.parametrize(("name", "runs"), [("container", 10_000), ("coder", 200), ("decode", 300)])
@pytest.mark.usefixtures("threads")
def test_targets(folder: Path, name: str, runs: int) -> None:
    target = getattr(targets, name)
    files = [path.read_bytes() for path in sorted((folder / name).iterdir())]
    assert all(target(file) for file in files) or name == "coder"
    past = sum(target(mutated(files[run % len(files)], run)) for run in range(runs))
    assert past > 0.3 * runs
