"""Hostile files, one test for each way in which other image decoders were broken."""

import io
import pickle
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, picture, python
from safetensors import safe_open
from safetensors.torch import save_file

from bitstream import (
    BITS_BACK,
    EXIF,
    NETWORK,
    PLAIN,
    RAW,
    ROUNDED,
    SPARSE,
    AnsStack,
    Container,
    CorruptError,
    Header,
    Kind,
    LimitError,
    Limits,
    Mode,
    Section,
    Tables,
    Tile,
    VaeError,
    normalise,
    pack,
    unpack,
)
from vaecodec import Codec, WeightsError
from vaecodec.image import CHANNELS
from vaecodec.lossless.tile import TileCoder
from vaecodec.lossy.coder import LossyCoder
from vaecodec.weights import digest_of

LARGE = Limits(max_pixels=2**64, max_side=2**32, max_tiles=2**64)


@pytest.fixture(scope="module")
def lossy(codec: Codec) -> Container:
    return unpack(codec.compress(picture(33, 30)))


@pytest.fixture(scope="module")
def lossless(codec: Codec) -> dict[int, Container]:
    """A file of each tile method."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    drawn = np.asarray(picture(40, 30).quantize(3).convert("RGB"))
    files = [unpack(codec.compress(one, lossless=True)) for one in (picture(40, 30), drawn, noise)]
    assert [file.tiles[0].method for file in files] == [BITS_BACK, PLAIN, RAW]
    files.append(replace(files[0], tiles=(replace(files[0].tiles[0], method=ROUNDED),)))
    return {file.tiles[0].method: file for file in files}


def packed(file: Container, **changes: Any) -> bytes:
    """The file with other header fields, and one tile's bytes for all tiles."""
    header = replace(file.header, **changes)
    return pack(header, file.tiles[:1] * header.tile_count, file.sections)


def refused(codec: Codec, data: bytes, limits: Limits = LARGE) -> VaeError:
    with pytest.raises(VaeError) as caught:
        codec.decode_array(data, limits)
    return caught.value


# CVE-2023-4863 (libwebp) and CVE-2024-11403 (libjxl): a code table from the file is larger than the room for it


def test_tables_larger_than_they_say() -> None:
    """Tables come from the weights alone, and no count, size or sum of theirs is believed."""
    tables = Tables(np.array([0]), [normalise([1, 2, 3])], escape=False).to_arrays()
    for name, change in (("sizes", 1), ("sizes", -1), ("counts", 1), ("counts", -1), ("counts", 2**31)):
        wrong = tables[name].astype(np.int64)
        wrong[0] += change
        with pytest.raises(ValueError, match=r"table"):
            Tables.from_arrays({**tables, name: wrong})


def test_weights_with_such_tables(tmp_path: Path) -> None:
    with safe_open(TINY, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path = tmp_path / "x.safetensors"
    for name in ("counts", "sizes"):
        changed = tensors | {f"decoder.tables.{name}": tensors[f"decoder.tables.{name}"] + 1}
        for digest in (metadata["digest"], digest_of(changed, metadata["config"]).hex()):
            save_file(changed, path, metadata | {"digest": digest})
            with pytest.raises(WeightsError, match="damaged"):
                Codec("cpu", path)


@pytest.mark.usefixtures("backend")
def test_any_state_is_an_entry_of_its_table() -> None:
    """A symbol beyond the table is not expressible, whatever the words."""
    rng = np.random.default_rng(0)
    tables = Tables(np.zeros(3, int), [normalise(rng.random(n) ** 9 + 1e-9) for n in (2, 40, 3000)], escape=False)
    ids = rng.integers(0, 3, 5000)
    for word in (b"\xff", b"\x01", b"\x80"):
        popped = AnsStack(word * 8000).pop(tables, ids)
        assert popped.min() >= 0 and (popped < tables.sizes[ids]).all()


# CVE-2024-11498 and CVE-2025-12474 (libjxl): heights and tiles that do not belong together


@pytest.mark.parametrize("tile", [64, 128, 1024, 2048, 2112, 65_472])
def test_pictures_and_tiles_that_do_not_fit(
    codec: Codec, lossy: Container, lossless: dict[int, Container], tile: int
) -> None:
    """The tiles of a small picture under another size, as many as that takes: none is decoded for what it is not."""
    for file in (lossy, *lossless.values()):
        for width, height in ((1, 1), (65, 1), (1, 200), (49, 30), (40, 16), (130, 65)):
            assert isinstance(refused(codec, packed(file, tile=tile, width=width, height=height)), CorruptError)


def test_directories_of_other_lengths(codec: Codec, lossy: Container) -> None:
    entry = bytes([0, 0]) + bytes(4)
    head = pack(lossy.header, lossy.tiles)[:46]
    for directory in (b"", entry[:-1], entry + b"\0", entry * 2, entry * 100):
        body = b"TILE\x01" + bytes([len(directory) % 128 | 128, len(directory) // 128]) + directory
        body = body if len(directory) > 127 else b"TILE\x01" + bytes([len(directory)]) + directory
        refused(codec, head + body + struct.pack("<I", zlib.crc32(body)))


# CVE-2026-1837 (libjxl): more or fewer channels than the buffer was made for


def test_other_channel_counts_and_depths(codec: Codec, lossy: Container, lossless: dict[int, Container]) -> None:
    for mode in Mode:
        depth = 16 if mode.name.endswith(";16") else 8
        for file in lossless.values():
            if mode != file.header.mode:
                refused(codec, packed(file, mode=mode, depth=depth))
        # A lossy tile is the same for all of them; only alpha is not in it.
        data, channels = packed(lossy, mode=mode, depth=depth), CHANNELS[mode]
        if channels in (2, 4):
            refused(codec, data)
        else:
            assert codec.decode_array(data).shape == (30, 33, channels)


# CVE-2021-28676 (Pillow): a loop over the file that does not advance


def test_lengths_of_zero(codec: Codec, lossy: Container, lossless: dict[int, Container]) -> None:
    start = time.perf_counter()
    data = pack(lossy.header, lossy.tiles)
    empty = b"none\0\0" + struct.pack("<I", zlib.crc32(b"none\0\0"))
    refused(codec, data[:46] + empty * 10_000)
    many = [Section(b"%04d" % number, b"") for number in range(64)]
    assert len(unpack(pack(lossy.header, lossy.tiles, many)).sections) == 64
    assert isinstance(refused(codec, pack(lossy.header, lossy.tiles, [*many, Section(EXIF, b"")])), LimitError)
    for file in (lossy, *lossless.values()):
        refused(codec, pack(file.header, [replace(file.tiles[0], words=b"")]))
    assert time.perf_counter() - start < 20


# CVE-2022-45198 (Pillow) and CVE-2026-40192 (Pillow): a small file that becomes a large picture


def bomb(kind: Kind, method: int, model: bytes, words: bytes = b"", mode: str = "RGB", tile: int = 2048) -> bytes:
    """178 megapixels; without words, in a file of 351 bytes."""
    header = Header(kind, Mode[mode], 13_377, 13_377, 8, 0, 0, tile, model)
    return pack(header, [Tile(method, 0, words)] * header.tile_count)


def test_no_network_runs_on_nothing(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of an empty tile are known and so would be its checksum; the first large array is refused."""

    def fail(*_: object) -> None:
        raise AssertionError("a network runs")

    monkeypatch.setattr(type(codec.lossless), "descend", fail)
    monkeypatch.setattr(type(codec.lossy), "features", fail)
    for kind, method, model in (
        (Kind.LOSSY, NETWORK, codec.lossy.identity),
        (Kind.LOSSY, SPARSE, codec.lossy.identity),
        (Kind.LOSSLESS, BITS_BACK, codec.lossless.identity),
        (Kind.LOSSLESS, ROUNDED, codec.lossless.identity),
    ):
        data = bomb(kind, method, model)
        assert len(data) < 400 and isinstance(refused(codec, data), CorruptError)


def test_the_first_bad_tile_ends_the_work(
    codec: Codec, lossy: Container, lossless: dict[int, Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the header declares: of a lossy file not even its pixels are computed."""
    popped = list[object]()
    for owner, name in ((LossyCoder, "_pop"), (TileCoder, "pop")):
        pop = getattr(owner, name)

        def counted(*arguments: Any, pop: Any = pop) -> Any:
            popped.append(arguments)
            return pop(*arguments)

        monkeypatch.setattr(owner, name, counted)
    monkeypatch.setattr(LossyCoder, "synthesised", lambda *_: pytest.fail("a network runs"))
    for file in (lossy, *lossless.values()):
        popped.clear()
        assert isinstance(refused(codec, packed(file, tile=64, width=10_000, height=10_000)), CorruptError)
        assert len(popped) == 1


@pytest.mark.parametrize(("width", "height"), [(2**16, 2**16), (2**31, 2), (2**32 - 1, 2**32 - 1), (2**17, 2**15)])
def test_products_beyond_32_bits(codec: Codec, lossless: dict[int, Container], width: int, height: int) -> None:
    """Width times height times channels wraps to little or nothing in 32 bits, and limits are of no help."""
    file = lossless[RAW]
    for tile in (64, 2048, 65_472):
        head = bytearray(pack(file.header, file.tiles)[:42])
        struct.pack_into("<HII", head, 16, tile, width, height)
        data = bytes(head) + struct.pack("<I", zlib.crc32(head)) + pack(file.header, file.tiles)[46:]
        assert isinstance(refused(codec, data), CorruptError)
        assert isinstance(refused(codec, data, Limits()), LimitError)


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from bitstream import VaeError
from vaecodec import Codec
torch.set_num_threads(1)
codec, files = Codec("cpu", sys.argv[1:3]), [Path(name).read_bytes() for name in sys.argv[3:]]
size = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))
resource.setrlimit(resource.RLIMIT_AS, (size + (3 * 178_956_970) + (700 << 20),) * 2)
for file in files:
    try:
        codec.decode_array(file)
    except VaeError as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_the_picture_and_a_tile(
    codec: Codec, lossy: Container, lossless: dict[int, Container], lossless_weights: Path, tmp_path: Path
) -> None:
    """Words that keep the decoder busy to the end of a tile, in a process that may take no more."""
    words = np.random.default_rng(0).integers(1, 2**32, 50_000, np.uint32).tobytes()
    rows = [bomb(Kind.LOSSY, NETWORK, codec.lossy.identity, words, tile=1024)]
    for method, mode in ((BITS_BACK, "RGB"), (PLAIN, "RGB"), (RAW, "RGB")):
        rows.append(bomb(Kind.LOSSLESS, method, codec.lossless.identity, words, mode, 1024))
    paths = [tmp_path / str(number) for number in range(len(rows))]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(row)
    result = python(MEMORY, TINY, lossless_weights, *paths)
    assert result.stdout.split() == [b"CorruptError"] * len(rows), result.stderr


def test_metadata_is_not_unpacked(codec: Codec, lossy: Container) -> None:
    """A compressed profile stays as it is: 16 MiB of zeros in 16 kB are 16 kB."""
    payload = zlib.compress(bytes(2**24))
    data = pack(lossy.header, lossy.tiles, [Section(EXIF, payload)])
    assert unpack(data).sections[0].payload == payload and codec.decompress(data).info["exif"] == payload


# Files that are programs


class Program:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(codec: Codec, tmp_path: Path) -> None:
    """Neither of a picture nor of a weights file."""
    ran, program = tmp_path / "ran", tmp_path / "x.safetensors"
    program.write_bytes(pickle.dumps(Program(ran)))
    refused(codec, program.read_bytes())
    with pytest.raises(WeightsError):
        Codec("cpu", program)
    assert not ran.exists()
    pickle.load(io.BytesIO(program.read_bytes())).close()
    assert ran.exists()
