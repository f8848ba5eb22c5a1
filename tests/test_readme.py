"""What the README shows works as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PHOTO, python

ROOT = Path(__file__).parent.parent
if not (ROOT / "README.md").exists():
    pytest.skip("an installed wheel is tested", allow_module_level=True)
README = (ROOT / "README.md").read_text("utf-8")


def blocks(section: str, language: str) -> list[str]:
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_commands_run(shipped: Path, tmp_path: Path) -> None:
    (shell,) = blocks("Use", "sh")
    shutil.copy(PHOTO, tmp_path / "photo.png")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euo", "pipefail", "-c", shell], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    assert {"photo.vae", "small.vae", "copy.png"} <= {file.name for file in tmp_path.iterdir()}


def test_the_library_examples_run(shipped: Path, shipped_lossless: Path, tmp_path: Path) -> None:
    photo = tmp_path / PHOTO.relative_to(ROOT)
    photo.parent.mkdir(parents=True)
    shutil.copy(PHOTO, photo)
    code = "\n".join(blocks("Use", "python"))
    result = python(f"import os; os.chdir({str(tmp_path)!r})\n{code}\nprint(picture.size)")
    assert result.stdout.split() == [b"(512,", b"512)"], result.stderr.decode()


def test_there_are_two_commands_to_set_up() -> None:
    lines = [line for block in blocks("Set up", "sh") for line in block.splitlines()]
    assert len(lines) == 2 and all(line.startswith("python3 -m venv .venv && ") for line in lines)


def test_files_and_figures_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
