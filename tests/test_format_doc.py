"""The examples in FORMAT.md are what the code reads and writes."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest

import bitstream
from bitstream import MAGIC, VERSION, XMP, AnsStack, Tables, pack, unpack

TEXT = (Path(bitstream.__file__).parent / "FORMAT.md").read_text("utf-8")


def block(name: str) -> list[str]:
    found = re.search(rf"```{name}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found[1].splitlines()


@pytest.mark.parametrize("name", ["constriction", "numpy"])
def test_vector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "constriction":
        pytest.importorskip(name)
    monkeypatch.setenv("VAECODEC_CODER", name)
    found = re.search(r"low (\S+), counts ([\d ]+); low (\S+), counts ([\d ]+)\.", TEXT)
    assert found
    counts = [np.array(found[i].split(), int) for i in (2, 4)]
    tables = Tables(np.array([found[1], found[3]], int), counts, escape=True)
    lines = [re.sub(r"^(values|ids|words|on top of) +", "", line) for line in block("vector")]
    values, ids = (np.array(line.split(), int) for line in lines[:2])
    for prior, words in ((b"", lines[2]), (bytes.fromhex(lines[3]), lines[4])):
        stack = AnsStack(prior)
        stack.push(values, tables, ids)
        assert stack.to_bytes() == bytes.fromhex(words)
    stack = AnsStack(bytes.fromhex(" ".join(block("lanes"))), 2)
    assert (stack.pop(tables, np.tile(ids, 40)) == np.tile(values, 40)).all() and stack.is_empty()
    tile = unpack(dump()[0]).tiles[0]
    assert (AnsStack(tile.words).pop(tables, ids) == values).all()
    assert zlib.crc32(values.astype("<i4").tobytes()) == tile.crc


def dump() -> tuple[bytes, dict[str, str]]:
    """The annotated file's bytes, and the values that its annotations state."""
    data, stated = b"", {}
    for line in block("dump"):
        columns, _, note = line.partition("   ")
        data += bytes.fromhex(columns)
        if " = " in note:
            name, value = note.strip().split(" = ")
            stated[name] = value
    return data, stated


def test_dump() -> None:
    data, stated = dump()
    file = unpack(data)
    assert pack(file.header, file.tiles, file.sections) == data
    tile, (section,) = file.tiles[0], file.sections
    actual = {name: str(int(getattr(file.header, name))) for name in type(file.header).__slots__ if name != "model"}
    actual |= {"xmp": section.payload.decode(), "method": str(tile.method), "length": str(len(tile.words))}
    assert actual | {"crc": str(tile.crc)} == stated
    assert section.tag == XMP and file.header.model == bytes(range(16))


def test_header_table_has_the_magic_and_version() -> None:
    assert f"`{MAGIC.hex(' ')}`" in TEXT
    assert f"version {VERSION[0]}.{VERSION[1]}\n" in TEXT
