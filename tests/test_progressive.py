"""Progressive files: the order of their bytes, what any prefix of them shows, and how that is asked for."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import second_decoder as second
from conftest import CPU, TINY, TINY_LOSSLESS, cli, picture, same
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile
from test_container import HEADER, ONE, section

import vaecodec.codec
import vaecodec.pillow
from benchmarks import pca
from bitstream import (
    HEADER_SIZE,
    Container,
    CorruptError,
    Section,
    Tile,
    TruncatedError,
    VaeError,
    pack,
    read_header,
    unpack,
)
from vaecodec import Codec, read_info
from vaecodec.lossless.tile import TileCoder
from vaecodec.lossy.tile import pop_tile

BOTH = (*CPU, "--weights", str(TINY), "--weights", str(TINY_LOSSLESS))


def packed(container: Container) -> bytes:
    return pack(container.header, container.tiles, container.sections)


# The order of the bytes


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Tile, ...]:
    """Four of them, at least one of several parts."""

    def tile(cuts: list[int], rest: int, number: int) -> Tile:
        words = bytes(range(number, 4 * (sum(cuts) + rest) + number)) if cuts else bytes(rest)
        return Tile(number % 2, number, words, parts=tuple(cuts))

    sizes = draw(
        st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=6), st.integers(0, 5)), min_size=4, max_size=4)
    )
    sizes[draw(st.integers(0, 3))][0].append(2)
    return tuple(tile(cuts, rest, number) for number, (cuts, rest) in enumerate(sizes))


@settings(max_examples=60)
@given(tiles())
def test_round_trip(tiles: tuple[Tile, ...]) -> None:
    data = pack(HEADER, tiles, [Section(b"new ", b"?")])
    file = unpack(data)
    assert file.tiles == tiles and packed(file) == data
    _, sections, others = second.read(data)
    assert [*sections] == [b"new "] and [(t.method, t.crc, t.data, t.parts) for t in others] == [
        (t.method, t.crc, t.words, t.parts) for t in tiles
    ]
    assert file.ends[-1] == len(data) and len(file.ends) == max(len(tile.parts) for tile in tiles) + 1


@settings(max_examples=30)
@given(tiles())
def test_any_prefix_holds_the_upper_ends_of_its_stacks(whole: tuple[Tile, ...]) -> None:
    data = pack(HEADER, whole)
    file = unpack(data)
    start = len(data) - sum(len(tile.words) for tile in whole)
    for end in range(start, len(data) + 1):
        there = unpack(data[:end], preview=True)
        assert there.ends == file.ends
        for tile, other in zip(there.tiles, whole, strict=True):
            if tile.held is None:
                assert tile == other
            else:
                size = 4 * sum(other.parts[: tile.held])
                assert tile.words == bytes(other.words)[len(other.words) - size :] and tile.held <= len(other.parts)
        done = sum(end >= one for one in file.ends)
        assert all(tile.held is None or tile.held >= done for tile in there.tiles)
        if end < len(data):
            with pytest.raises(TruncatedError):
                unpack(data[:end])
            assert unpack(data[:end], partial=True).tiles != whole
    with pytest.raises(TruncatedError):
        unpack(data[: start - 1], preview=True)
    with pytest.raises(CorruptError):
        unpack(data + b"\0", preview=True)


TILE = section(b"TILE", b"\0\x08crcs", 1)


@pytest.mark.parametrize(
    ("rest", "error"),
    [
        (section(b"PART", b"\1\1", 1) + TILE + bytes(8), "good"),
        (section(b"PART", b"\3\0\2\0", 1) + TILE + bytes(8), "good"),
        (section(b"PART", b"\1\1", 1) + TILE + bytes(7), "truncated"),
        (section(b"PART", b"\1\1", 1) + TILE + bytes(9), "corrupt"),
        (section(b"PART", b"\1\1", 0) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\1\1", 2) + TILE + bytes(8), "version"),
        (section(b"PART", b"\1\3", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\2\1\2", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\1" + b"\xff" * 9 + b"\1", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\1" + b"\xff" * 9 + b"\2", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\2\1", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\1\1\0", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\0", 1) + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\x7f" + bytes(127), 1, b"\x80\1") + TILE + bytes(8), "good"),
        (section(b"PART", b"\x80\1" + bytes(128), 1, b"\x82\1") + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\1\1", 1) * 2 + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"\1\1", 1) + section(b"EXIF", b"") + TILE + bytes(8), "corrupt"),
        (section(b"PART", b"", 1, b"\x81\x80\x80\x08") + TILE + bytes(8), "limit"),
        (section(b"PART", b"\1\1", 1) + section(b"TILE", b"\0\x07crcs", 1) + bytes(7), "corrupt"),
        (section(b"PART", b"\1\1", 1) + section(b"TILE", b"\x10\x08crcs", 1) + bytes(8), "corrupt"),
    ],
)
def test_hostile_indices(rest: bytes, error: str) -> None:
    data = pack(ONE, [Tile(0, 0, b"")])[:HEADER_SIZE] + rest
    for preview in (False, True):
        try:
            unpack(data, preview=preview)
            verdict = "good"
        except VaeError as raised:
            verdict = type(raised).__name__.removesuffix("Error").lower()
        assert verdict == error or (preview and error == "truncated")
    try:
        second.read(data)
        verdict = "good"
    except second.RefusedError as raised:
        verdict = raised.args[0]
    assert verdict == error


def test_the_writer_refuses() -> None:
    for parts, match in (((3,), "longer"), ((1,) * 128, "more than 128")):
        with pytest.raises(ValueError, match=match):
            pack(ONE, [Tile(0, 0, bytes(8), parts=parts)])
    with pytest.raises(ValueError, match="reserved"):
        pack(ONE, [Tile(0, 0, b"")], [Section(b"PART", b"")])


# Pictures


@pytest.fixture(scope="module", autouse=True)
def by_networks() -> Iterator[None]:
    """As in the other tests lossy tiles do, lossless ones have networks, whatever these cost."""

    def push(coder: TileCoder, samples: np.ndarray) -> Tile:  # type: ignore[type-arg]
        return coder._push_network(coder.weights, samples) if coder.weights else original(coder, samples)

    original = TileCoder.push
    with mock.patch.object(TileCoder, "push", push):
        yield


KINDS = [(lossless, mode) for lossless in (False, True) for mode in ("L", "LA", "RGB", "RGBA")]
Files = dict[tuple[bool, str], tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def files(tiled_codec: Codec, by_networks: None) -> Files:
    """A file and a progressive one of each, of six tiles."""
    found = {}
    for lossless, mode in KINDS:
        image = picture(150, 100, mode)
        if mode.endswith("A"):
            image.putalpha(picture(150, 100, "L", seed=1))
        plain, other = (tiled_codec.compress(image, 80, lossless=lossless, progressive=p) for p in (False, True))
        found[lossless, mode] = plain, other
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_file_is_the_same_picture(codec: Codec, files: Files, kind: tuple[bool, str]) -> None:
    plain, progressive = files[kind]
    whole = codec.decode_array(plain)
    assert (codec.decode_array(progressive) == whole).all()
    assert (codec.decode_array(progressive, preview=True) == whole).all()
    assert (codec.decode_array(progressive, region=(60, 60, 50, 20)) == whole[60:80, 60:110]).all()
    alpha, (lossless, mode) = kind[1].endswith("A"), kind
    assert len(unpack(progressive).ends) == (19 if mode[0] == "R" else 7) + alpha if lossless else 17 + alpha
    assert sum(codec.account(progressive).values()) == pytest.approx(8 * len(progressive))
    assert unpack(plain).tiles[0].parts == () and unpack(plain).ends == (len(plain),)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_words_that_they_need(codec: Codec, files: Files, kind: tuple[bool, str], backend: str) -> None:
    """What is popped from the first parts is what is popped from all words; with one word fewer it is not."""
    file, starved = unpack(files[kind][1]), 0
    lossless, mode = kind
    shape = 64, 64, len(mode)

    def popped(tile: Tile) -> object:
        if lossless:
            return TileCoder(codec.lossless, 8).pop(tile, shape).tolist()
        y_hat, _ = pop_tile(codec.lossy, tile, 4, 4, 8000, (64, 64, int(mode.endswith("A"))), 8)
        return y_hat.tolist()

    tile = file.tiles[0]
    for held in range(1, len(tile.parts) + 1):
        size = 4 * sum(tile.parts[:held])
        expected = popped(replace(tile, held=held))
        assert popped(replace(tile, held=held, words=tile.words[-size:])) == expected
        try:
            starved += popped(replace(tile, held=held, words=tile.words[4 - size :])) != expected
        except CorruptError:
            starved += 1
    assert starved > len(tile.parts) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_decodes(codec: Codec, files: Files, kind: tuple[bool, str]) -> None:
    data = files[kind][1]
    file = unpack(data)
    start = len(data) - sum(len(tile.words) for tile in file.tiles)
    image = np.asarray(codec.decompress(data)).astype(int)
    errors = list[float]()
    for end in sorted({start, *file.ends[:: 1 + len(file.ends) // 8], file.ends[-2] + 1}):
        shown = codec.decompress(data[:end], preview=True)
        assert shown.mode == kind[1] and shown.size == (150, 100)
        errors.append(float(np.square(np.asarray(shown) - image).mean()))
        with pytest.raises(TruncatedError):
            codec.decompress(data[:end] if end < len(data) else data[:-1])
    assert errors[-1] < errors[0] / 2
    with pytest.raises(TruncatedError):
        codec.decompress(data[: start - 1], preview=True)


def test_a_preview_is_as_good_as_its_parts(codec: Codec, shipped: Path, shipped_lossless: Path) -> None:
    """With trained weights."""
    trained, photo = Codec("cpu", tile=64), picture(100, 60)
    for lossless in (False, True):
        data = trained.compress(photo, 85, lossless=lossless, progressive=True)
        psnr = list[float]()
        for end in unpack(data).ends[:-1]:
            shown = np.asarray(trained.decompress(data[:end], preview=True)).astype(int)
            psnr.append(10 * np.log10(255**2 / np.square(shown - np.asarray(photo)).mean()))
        assert (np.diff(psnr) > -0.1).all() and psnr[-1] > psnr[0] + 6


@pytest.mark.parametrize("lossless", [False, True])
def test_previews_and_regions_and_damage(codec: Codec, files: Files, lossless: bool) -> None:
    data = files[lossless, "RGB"][1]
    end = (unpack(data).ends[4] + unpack(data).ends[5]) // 2
    whole = codec.decode_array(data[:end], preview=True)
    assert (codec.decode_array(data[:end], preview=True, region=(60, 60, 50, 20)) == whole[60:80, 60:110]).all()
    damaged = list[tuple[int, int, int, int]]()
    assert (codec.decode_array(data[:end], preview=True, damaged=damaged) == whole).all() and not damaged
    assert not codec.decode_array(data[:end], damaged=damaged).any() and len(damaged) == 6  # none of them is whole
    file = unpack(data)
    broken = [replace(tile, crc=0) if number == 1 else tile for number, tile in enumerate(file.tiles)]
    with pytest.raises(CorruptError):
        codec.decode_array(pack(file.header, broken), preview=True)
    codec.decode_array(pack(file.header, broken), preview=True, damaged=(damaged := []))
    assert damaged == [(64, 0, 64, 64)]


@pytest.mark.parametrize("lossless", [False, True])
def test_previews_of_other_files(codec: Codec, files: Files, lossless: bool) -> None:
    """They have the tiles that are whole."""
    data = files[lossless, "RGBA"][0]
    whole, shown = codec.decode_array(data), codec.decode_array(data[:-1], preview=True)
    assert (shown[:64, :96] == whole[:64, :96]).all() and (shown[64:, 128:, 3] == 255).all()
    assert not (shown[64:, 128:] == whole[64:, 128:]).all()


def test_previews_without_networks(codec: Codec) -> None:
    """Tiles that need none are there or grey, in every kind."""
    deep = (np.arange(100 * 150).reshape(100, 150) * 3).astype(np.uint16)
    with mock.patch.object(codec, "tile", 64):
        data = codec.compress(deep, lossless=True, progressive=True)
    assert len(unpack(data).ends) == 1  # no tile has parts
    shown = codec.decode_array(data[:-1], preview=True)
    assert (shown[:64, :, 0] == deep[:64]).all() and (shown[64:, 128:] == 2 ** (read_header(data).depth - 1)).all()
    linear = pca.compress(picture(20, 20), 60)
    assert (Codec("cpu").decode_array(linear[:-1], preview=True) == 128).all()


def test_damage_in_parts_is_an_error_or_a_picture(codec: Codec, files: Files) -> None:
    rng = np.random.default_rng(0)
    for lossless in (False, True):
        data = files[lossless, "RGB"][1]
        start = len(data) - sum(len(tile.words) for tile in unpack(data).tiles)
        for _ in range(12):
            broken = bytearray(data[: rng.integers(start + 1, len(data))])
            broken[rng.integers(start, len(broken))] ^= 255
            with contextlib.suppress(CorruptError):
                assert codec.decode_array(broken, preview=True).shape == (100, 150, 3)


# How it is asked for


def test_the_command_line(tmp_path: Path) -> None:
    source, file, cut = tmp_path / "x.png", tmp_path / "x.vae", tmp_path / "cut.vae"
    picture(90, 70).save(source)
    assert cli("compress", source, "--progressive", *BOTH).exit_code == 0
    ends = read_info(file).previews
    assert len(ends) == 16 and f"previews  {ends}" in cli("info", file).stdout
    assert "previews" not in cli("compress", source, "-o", tmp_path / "y.vae", *BOTH).stderr
    assert read_info(tmp_path / "y.vae").previews == []
    cut.write_bytes(file.read_bytes()[: ends[2]])
    assert cli("decompress", cut, *BOTH).exit_code == 3
    result = cli("decompress", cut, "--preview", "--quiet", *BOTH)
    assert result.exit_code == 0
    assert result.stderr == f"vaecodec: {cut}: {ends[2]} of {file.stat().st_size} bytes, preview 3 of 16\n"
    with Image.open(tmp_path / "cut.png") as shown:
        assert shown.size == (90, 70)
    cut.write_bytes((tmp_path / "y.vae").read_bytes()[:-9])
    result = cli("decompress", cut, "-o", tmp_path / "y.png", "--preview", "--quiet", *BOTH)
    assert result.exit_code == 0 and result.stderr.endswith("bytes, nothing of the picture is there yet\n")
    cut.write_bytes(file.read_bytes()[: ends[2]])
    result = cli("decompress", file, "-o", tmp_path / "whole.png", "--preview", "--quiet", *BOTH)
    assert result.exit_code == 0 and result.stderr == ""
    result = cli("decompress", "-", "-o", tmp_path / "in.png", "--preview", *BOTH, data=cut.read_bytes())
    assert result.exit_code == 0 and (tmp_path / "in.png").read_bytes() == (tmp_path / "cut.png").read_bytes()
    cut.write_bytes(file.read_bytes()[:60])
    assert cli("decompress", cut, "-o", tmp_path / "no.png", "--preview", *BOTH).exit_code == 3
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("lossless", [False, True])
def test_a_preview_of_nothing(files: Files, tmp_path: Path, lossless: bool) -> None:
    cut, target = tmp_path / "cut.vae", tmp_path / "cut.png"
    for number, data in enumerate(files[lossless, "RGB"]):
        file = unpack(data)
        start = len(data) - sum(len(tile.words) for tile in file.tiles)
        first = 4 * file.tiles[0].parts[0] if number else len(file.tiles[0].words)
        for end, nothing in ((start, True), (start + first - 1, True), (start + first, False)):
            cut.write_bytes(data[:end])
            result = cli("decompress", cut, "-o", target, "--preview", "--quiet", *BOTH)
            assert result.exit_code == 0 and target.exists()
            assert result.stderr.startswith(f"vaecodec: {cut}: {end} of {len(data)} bytes, ")
            assert result.stderr.count("\n") == 1
            assert result.stderr.endswith(" nothing of the picture is there yet\n") == nothing


def test_info_of_what_is_cut_off(files: Files, tmp_path: Path) -> None:
    plain, progressive = files[False, "RGB"]
    path, (*ends, _) = tmp_path / "x.vae", unpack(progressive).ends
    count = sum(end <= ends[3] for end in ends)  # some parts are empty
    for data, size, parts in (
        (plain[:-1], len(plain), "5 of 6 tiles"),
        (progressive[: ends[3]], len(progressive), f"preview {count} of {len(ends)}"),
    ):
        path.write_bytes(data)
        for options in ((), ("--bits", *BOTH)):
            result = cli("info", path, *options)
            assert result.exit_code == 3 and "width     150\n" in result.stdout
            assert f"missing   {size - len(data)}\n" in result.stdout and "decoded" not in result.stdout
            assert result.stderr == f"vaecodec: {path}: cut off: {len(data)} of {size} bytes, {parts}\n"
        result = cli("info", path, "--json")
        assert result.exit_code == 3 and json.loads(result.stdout) == asdict(read_info(path, preview=True))
        with pytest.raises(TruncatedError):
            read_info(path)
    path.write_bytes(plain[:60])
    result = cli("info", path)
    assert result.exit_code == 3 and result.stdout == "" and "ends within section" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="waits for no pipe")
def test_a_pipe_that_is_still_being_filled(codec: Codec, tmp_path: Path) -> None:
    data, target = codec.compress(picture(90, 70), progressive=True), tmp_path / "x.png"
    end = unpack(data).ends[3]
    read, write = os.pipe()
    code = "from vaecodec.cli import main; main()"
    command = [sys.executable, "-c", code, "decompress", "-", "-o", str(target), "--preview", "--quiet", *BOTH]
    with subprocess.Popen(command, stdin=read, stderr=subprocess.PIPE) as process:
        os.close(read)
        threading.Timer(0.5, os.write, (write, data[:end])).start()
        try:
            assert process.stderr is not None
            said = process.stderr.read().decode()
        finally:
            os.close(write)  # not before it has ended
    assert process.returncode == 0 and said == f"vaecodec: -: {end} of {len(data)} bytes, preview 4 of 16\n"
    with Image.open(target) as shown:
        assert same(shown, codec.decompress(data[:end], preview=True))


@pytest.mark.usefixtures("small_weights")
def test_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, image = io.BytesIO(), picture(90, 70)
    image.save(stream, "VAE", quality=80, progressive=True)
    data = stream.getvalue()
    assert data == vaecodec.compress(image, quality=80, progressive=True)
    end = unpack(data).ends[2]
    with pytest.raises(OSError, match="ends within"):
        Image.open(io.BytesIO(data[:end])).load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    expected = vaecodec.decompress(data[:end], preview=True)
    assert same(Image.open(io.BytesIO(data[:end])).convert("RGB"), expected)
    parser = ImageFile.Parser()
    for start in range(0, end, 100):
        parser.feed(data[start : min(start + 100, end)])
    assert same(parser.close().convert("RGB"), expected)
