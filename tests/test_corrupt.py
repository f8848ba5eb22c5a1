"""Damaged files: an error or the right picture, never a wrong one, and nothing left behind."""

import contextlib
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY_CPU, cli, names, picture, python, same
from hypothesis import given, settings, strategies as st
from PIL import Image

from bitstream import HEADER_SIZE, LimitError, Tile, VaeError, pack, unpack
from vaecodec import Codec


@pytest.fixture(scope="session")
def small(tiny: Codec) -> bytes:
    return tiny.compress(picture(33, 30), 90)


@pytest.fixture(scope="session")
def right(tiny: Codec, small: bytes) -> Image.Image:
    return tiny.decompress(small)


def check(codec: Codec, data: bytes, right: Image.Image) -> None:
    """An error of ours or the right picture."""
    with contextlib.suppress(VaeError):
        assert same(codec.decompress(data), right)


def headed(header: bytes, rest: bytes) -> bytes:
    return header + struct.pack("<I", zlib.crc32(header)) + rest


def test_every_flipped_byte(tiny: Codec, small: bytes, right: Image.Image) -> None:
    for at in range(len(small)):
        for mask in (1 << at % 8, 255):
            check(tiny, small[:at] + bytes([small[at] ^ mask]) + small[at + 1 :], right)


def test_every_prefix(tiny: Codec, small: bytes) -> None:
    for length in range(len(small)):
        with pytest.raises(VaeError):
            tiny.decompress(small[:length])


def test_bytes_left_out_and_put_in(tiny: Codec, small: bytes, right: Image.Image) -> None:
    for at in range(0, len(small), 3):
        check(tiny, small[:at] + small[at + 1 :], right)
        check(tiny, small[:at] + b"\0" + small[at:], right)
        check(tiny, small[:at] + small[at + 4 :], right)
    with pytest.raises(VaeError):
        tiny.decompress(small + b"\0" * 4)


@settings(max_examples=40)
@given(st.binary(max_size=64), st.integers(0, 2**32 - 1))
def test_any_words_in_a_tile(tiny: Codec, small: bytes, words: bytes, crc: int) -> None:
    with pytest.raises(VaeError):
        tiny.decompress(pack(unpack(small).header, [Tile(0, crc, words)]))


def test_header_fields_changed_under_a_right_checksum(tiny: Codec, small: bytes) -> None:
    """Nothing tells such a file from an honest one but the picture's own checksums: no crash, no other size."""
    head, rest = small[: HEADER_SIZE - 4], small[HEADER_SIZE:]
    for at in range(len(head)):
        for mask in (1, 255):
            data = headed(head[:at] + bytes([head[at] ^ mask]) + head[at + 1 :], rest)
            with contextlib.suppress(VaeError):
                decoded, header = tiny.decompress(data), unpack(data).header
                assert (decoded.size, decoded.mode) == ((header.width, header.height), header.mode.name)


def test_another_quality_is_noticed(tiny: Codec, small: bytes) -> None:
    file = unpack(small)
    with pytest.raises(VaeError):
        tiny.decompress(pack(replace(file.header, quality=1000), file.tiles))


# The command line


@pytest.mark.parametrize(
    ("name", "code"),
    [("empty", 3), ("text", 3), ("magic", 3), ("cut", 3), ("flipped", 3), ("long", 3), ("newer", 3), ("weights", 4)],
)
@pytest.mark.parametrize("command", ["decompress", "verify"])
def test_exit_codes(small: bytes, tmp_path: Path, command: str, name: str, code: int) -> None:
    file = unpack(small)
    data = {
        "empty": b"",
        "text": b"hello, this is no picture",
        "magic": small[:8],
        "cut": small[:-5],
        "flipped": small[:-9] + bytes([small[-9] ^ 16]) + small[-8:],
        "long": small + b"\0",
        "newer": small[:9] + bytes([small[9] + 1]) + small[10:],
        "weights": pack(replace(file.header, model=b"other weights !!"), file.tiles),
    }[name]
    source = tmp_path / "in.vae"
    source.write_bytes(data)
    result = cli(command, source, *TINY_CPU)
    assert result.exit_code == code
    assert result.stderr.startswith("vaecodec: ") and result.stderr.count("\n") == 1
    assert names(tmp_path) == ["in.vae"]


def resized(data: bytes, width: int, height: int) -> bytes:
    head = bytearray(data[: HEADER_SIZE - 4])
    struct.pack_into("<II", head, 18, width, height)
    return headed(bytes(head), data[HEADER_SIZE:])


@pytest.mark.parametrize(("width", "height"), [(2**32 - 1, 2**32 - 1), (2**31, 1), (13_378, 13_378)])
def test_absurd_sizes_are_refused_at_once(tiny: Codec, small: bytes, width: int, height: int) -> None:
    with pytest.raises(LimitError) as error:
        tiny.decompress(resized(small, width, height))
    assert error.value.exit_code == 5


def test_absurd_sizes_cost_the_command_line_no_memory(small: bytes, tmp_path: Path) -> None:
    source = tmp_path / "in.vae"
    source.write_bytes(resized(small, 2**32 - 1, 2**32 - 1))
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from vaecodec.cli import main
try:
    main()
finally:
    # Not ru_maxrss, which a process inherits from the one that started it.
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    result = python(code, "decompress", source, *TINY_CPU)
    assert result.returncode == 5, result.stderr
    assert int(result.stdout) < 1_000_000_000 / 1024
    assert names(tmp_path) == ["in.vae"]
