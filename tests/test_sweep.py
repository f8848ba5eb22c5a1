"""The sweep over pictures of every kind: what it says of each."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import picture
from PIL import Image

sweep = pytest.importorskip("benchmarks.sweep")  # not there, where an installed wheel is tested


@pytest.mark.usefixtures("small_weights", "threads")
def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture(9, 5, "RGBA").save(folder / "a.png")
    picture(9, 5).quantize(5).save(folder / "b.tif")
    tifffile.imwrite(folder / "c.tif", np.arange(45 * 3, dtype=np.uint16).reshape(5, 9, 3) * 480, photometric="rgb")
    picture(9, 5).save(folder / "d.tga")
    picture(90, 5).save(folder / "e.png")
    picture(9, 5).convert("CMYK").save(folder / "f.tif")
    (folder / "g.png").write_bytes(b"hello")
    Image.new("1", (9, 5)).save(folder / "h.ppm")
    monkeypatch.setitem(sweep.READERS, b"P4", ("a wrong one", lambda _file: np.ones((5, 9), np.uint8)))
    sweep.run(folder, 200, tmp_path / "out.json")
    found = {Path(result["file"]).name: result["verdict"] for result in json.loads((tmp_path / "out.json").read_text())}
    assert found == {
        "a.png": "equal",
        "b.tif": "equal",
        "c.tif": "equal",
        "d.tga": "no other reader",
        "e.png": "too large",
        "f.tif": "refused",
        "h.ppm": "different",
    }
    said = capsys.readouterr().out
    assert "     3 equal\n" in said and "h.ppm: a wrong one: uint8 against uint8, by up to 1, at 100.0%" in said
    assert "f.tif: mode CMYK" in said
