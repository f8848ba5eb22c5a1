"""Workers of Ray Data write the files that the command line writes. Needs the extra "cluster"."""

import re
from pathlib import Path

import pytest
from conftest import picture, process, python

pytest.importorskip("ray.data")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "benchmarks" / "CLUSTER.md"

SCRIPT = """
import os, sys
import ray
os.chdir(sys.argv[1])
ray.init(num_cpus=2)
exec(open("page.py").read())
from benchmarks.ray_folder import main
open("photographs/broken.png", "wb").close()
print(main(sys.argv[2:], standalone_mode=False))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("shipped")
def test_workers_write_the_files_of_the_command(tmp_path: Path) -> None:
    """Those of the code on the page, and those of the script, which passes over what is there and names what fails."""
    photographs = tmp_path / "photographs"
    (photographs / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b #1.webp", "more/a.jpg")):
        picture(96 + 16 * seed, 80, seed=seed).save(photographs / name)
    process("compress", "-r", photographs, "-o", f"{tmp_path}/expected/", "--device", "cpu", "--threads", 1)
    expected = contents(tmp_path / "expected")
    assert sorted(expected) == ["a.vae", "b #1.vae", "more/a.vae"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.vae").write_bytes(b"done before")
    (tmp_path / "page.py").write_text(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[0])
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    arguments = (tmp_path, photographs, tmp_path / "out", "--workers", 2)
    result = python(SCRIPT, *arguments, **environment)
    assert result.returncode == 0 and result.stdout.split()[-1:] == [b"1"], result.stderr.decode()
    assert b"broken.png: not a picture" in result.stderr and b"2 files, 1 failed" in result.stderr
    assert contents(tmp_path / "out") == expected | {"a.vae": b"done before"}
    rows = parquet.read_table(tmp_path / "packed").to_pylist()
    assert {
        str(Path(row["path"]).relative_to("photographs").with_suffix(".vae")): row["vae"] for row in rows
    } == expected
