"""Tiles and pictures that are coded at once: files and pixels are those of one by one, errors stay their own."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_LOSSLESS, gathering_codec, picture, refined, same
from hypothesis import given, settings, strategies as st
from PIL import Image

import vaecodec.networks
import vaecodec.together
from bitstream import CorruptError
from vaecodec import Codec
from vaecodec.together import Gathering, at_once, one_by_one

QUALITY = 80


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that networks are run for."""
    sizes, in_batch = list[int](), vaecodec.networks.in_batch

    def counted(network: Callable[..., Any], asked: list[list[torch.Tensor]]) -> list[Any]:
        sizes.append(len(asked))
        return in_batch(network, asked)

    monkeypatch.setattr(vaecodec.networks, "in_batch", counted)
    return sizes


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Of several sizes, some of them equal, with and without alpha."""
    sizes = [(200, 140, "RGB"), (200, 140, "RGB"), (64, 64, "L"), (70, 40, "RGBA"), (20, 10, "RGB"), (128, 128, "RGB")]
    return [picture(*size, seed=seed) for seed, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def usual() -> Codec:
    return Codec("cpu", TINY, engine="torch", tile=64)


@pytest.fixture(scope="module")
def files(usual: Codec, pictures: list[Image.Image]) -> list[bytes]:
    return [usual.compress(each, QUALITY) for each in pictures]


def test_tiles_of_one_picture(pictures: list[Image.Image], files: list[bytes], batches: list[int]) -> None:
    codec = gathering_codec()
    assert codec.compress(pictures[0], QUALITY) == files[0] and max(batches) > 1
    batches.clear()
    assert np.array_equal(codec.decompress(files[0]), Codec("cpu", TINY, engine="torch").decompress(files[0]))
    assert max(batches) > 1
    usual = Codec("cpu", TINY, tile=64)
    region = (50, 30, 100, 60)
    assert np.array_equal(codec.decode_array(files[0], region=region), usual.decode_array(files[0], region=region))
    assert dict(codec.account(files[0])) == pytest.approx(usual.account(files[0]))


@pytest.mark.parametrize("room", [2**24, 2**14, 0])
def test_pictures_of_a_batch(
    usual: Codec, pictures: list[Image.Image], files: list[bytes], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vaecodec.together, "ROOM", room)
    codec = gathering_codec()
    assert codec.compress_batch(pictures, QUALITY) == files
    for each, file in zip(codec.decompress_batch(files), files, strict=True):
        expected = usual.decompress(file)
        assert each.mode == expected.mode and np.array_equal(each, expected)


def test_pictures_that_go_together(pictures: list[Image.Image], files: list[bytes], batches: list[int]) -> None:
    codec = gathering_codec()
    equal = [pictures[2]] * 8
    assert codec.compress_batch(equal, QUALITY) == [files[2]] * 8 and max(batches) > 1
    assert codec.compress_batch(pictures[:2], progressive=True) == [
        codec.compress(each, progressive=True) for each in pictures[:2]
    ]
    small = codec.compress_batch(equal[:2], lossless=True, fast=True)
    assert codec.decompress_batch(small + files[2:3])[1].tobytes() == equal[0].tobytes()
    assert codec.decompress_batch([]) == codec.compress_batch([]) == []


@pytest.fixture(scope="module")
def lossless() -> Codec:
    return refined(Codec("cpu", TINY_LOSSLESS, engine="torch", tile=64))


@pytest.mark.usefixtures("networks_only")
def test_lossless_pictures(lossless: Codec, pictures: list[Image.Image], batches: list[int]) -> None:
    """Their tiles run the networks of all levels as batches, and so do those of several pictures."""
    several = [pictures[5], pictures[3]]
    files = [lossless.compress(each, lossless=True) for each in several]
    codec = refined(gathering_codec())
    batches.clear()
    assert codec.compress_batch(several, lossless=True) == files and max(batches) > 1
    batches.clear()
    assert all(map(same, codec.decompress_batch(files), several)) and max(batches) > 1
    assert codec.account(files[0]) == lossless.account(files[0])


@pytest.mark.usefixtures("networks_only")
def test_small_lossless_pictures_go_together(pictures: list[Image.Image], batches: list[int]) -> None:
    codec = gathering_codec()
    file = codec.compress(pictures[4], lossless=True)
    batches.clear()
    assert codec.compress_batch([pictures[4]] * 3, lossless=True) == [file] * 3 and max(batches) == 3


@pytest.mark.usefixtures("networks_only")
def test_damaged_lossless_tiles(lossless: Codec, pictures: list[Image.Image]) -> None:
    codec, data = refined(gathering_codec()), bytearray(lossless.compress(pictures[5], lossless=True))
    data[len(data) // 2] ^= 8
    lost: list[list[tuple[int, int, int, int]]] = [[], []]
    pixels = [
        each.decode_array(bytes(data), damaged=found) for each, found in zip((codec, lossless), lost, strict=True)
    ]
    assert lost[0] == lost[1] and lost[0] and np.array_equal(*pixels)


@pytest.mark.usefixtures("doubts")
def test_tiles_that_are_coded_without_networks(usual: Codec) -> None:
    """Their neighbours are masked and coded anew, and the masks go into the batch."""
    image = picture(192, 192, seed=3)
    image.paste(Image.new("RGB", (64, 64), "red"), (64, 64))
    data = usual.compress(image, QUALITY)
    codec = gathering_codec()
    assert codec.compress(image, QUALITY) == data
    assert np.array_equal(codec.decode_array(data), usual.decode_array(data))


def test_damaged_tiles(usual: Codec, files: list[bytes]) -> None:
    codec, data = gathering_codec(), bytearray(files[0])
    data[len(data) // 2] ^= 8
    lost: list[list[tuple[int, int, int, int]]] = [[], []]
    pixels = [each.decode_array(bytes(data), damaged=found) for each, found in zip((codec, usual), lost, strict=True)]
    assert lost[0] == lost[1] and lost[0] and np.array_equal(*pixels)
    for _ in range(2):
        with pytest.raises(CorruptError):
            codec.decompress_batch([files[1], bytes(data), files[2]])
    assert np.array_equal(codec.decompress(files[0]), usual.decompress(files[0]))  # nobody is waited for any more


def test_progress_and_cancelling(usual: Codec, pictures: list[Image.Image], files: list[bytes]) -> None:
    codec, counts = gathering_codec(), list[int]()
    codec.compress(pictures[0], QUALITY, counts.append)
    expected = list[int]()
    usual.compress(pictures[0], QUALITY, expected.append)
    assert counts == expected

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    for work in (codec.compress, codec.decompress):
        with pytest.raises(KeyboardInterrupt):
            work(pictures[0] if work == codec.compress else files[0], progress=stop)  # type: ignore[operator]
    assert codec.compress(pictures[0], QUALITY) == files[0]
    parts = codec.decode_tiles(files[0])
    next(parts)
    del parts


def test_a_batch_that_fails_is_tried_one_by_one(
    pictures: list[Image.Image], files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_batch = vaecodec.networks.in_batch

    def small(network: Callable[..., Any], asked: list[list[torch.Tensor]]) -> list[Any]:
        if len(asked) > 1:
            raise torch.OutOfMemoryError
        return in_batch(network, asked)

    monkeypatch.setattr(vaecodec.networks, "in_batch", small)
    assert gathering_codec().compress(pictures[0], QUALITY) == files[0]
    monkeypatch.setattr(vaecodec.networks, "in_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gathering_codec().decompress(files[0])


def test_exact_networks_are_the_same_in_any_batch(usual: Codec) -> None:
    lossy, rng = usual.lossy, np.random.default_rng(1)
    model, quality = lossy.model, lossy.at(3000)
    z = torch.from_numpy(rng.integers(-30, 30, (3, lossy.config.hyper_latent, 2, 3))).float()
    together = model.h_s(z, quality)
    assert torch.equal(together, torch.cat([model.h_s(each[None], quality) for each in z]))


# Gathering by itself


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=12), st.integers(0, 9))
def test_everyone_gets_what_they_ask(asked: list[list[int]], failing: int) -> None:
    """Threads ask for numbers in their order, some fail, some raise of their own, and all come to an end."""
    gathering, running = Gathering(), [0, 0]

    def together(questions: list[tuple[int, int]]) -> list[int]:
        running[0] += 1
        assert running[0] == 1  # never two batches at once
        running[0] -= 1
        running[1] = max(running[1], len(questions))
        if any(who == failing for who, _ in questions):
            raise ValueError(failing)
        return [100 * who + number for who, number in questions]

    def work(who: int) -> list[int]:
        found = [gathering.ask((number,), together, (who, number)) for number in asked[who]]
        if who % 5 == 4:
            raise KeyError(who)
        return found

    for who, result in enumerate(list(at_once(gathering.member(work), range(len(asked)), lambda _: 1))):
        if who == failing and asked[who]:
            with pytest.raises(ValueError, match=str(failing)):
                result()
        elif who % 5 == 4:
            with pytest.raises(KeyError):
                result()
        else:
            assert result() == [100 * who + number for number in asked[who]]
    assert gathering._members == set() and gathering._waiting == []


def test_who_is_behind_comes_first() -> None:
    gathering, order = Gathering(), list[tuple[int, int]]()
    begin = threading.Barrier(3)

    def work(who: int) -> None:
        begin.wait()
        for stage in range(who, 3):

            def together(questions: list[int], stage: int = stage) -> list[int]:
                order.append((stage, len(questions)))
                return questions

            gathering.ask((stage,), together, who)

    for result in list(at_once(gathering.member(work), range(3), lambda _: 1)):
        result()
    assert order == [(0, 1), (1, 2), (2, 3)]


def test_only_so_many_members() -> None:
    """However many pictures have tiles at once."""
    gathering, sizes = Gathering(), list[int]()

    def together(questions: list[int]) -> list[int]:
        sizes.append(len(questions))
        return questions

    work = gathering.member(lambda who: gathering.ask((0,), together, who))
    results = [list(at_once(work, range(12), lambda _: 1)) for _ in range(3)]
    assert [[result() for result in some] for some in results] == [list(range(12))] * 3
    assert max(sizes) <= vaecodec.together.MOST and sum(sizes) == 36


def test_who_is_no_member_asks_alone() -> None:
    assert Gathering().ask((0,), lambda questions: [len(questions)], "?") == 1


def test_only_so_many_at_once() -> None:
    lock, running, most, taken = threading.Lock(), [0], [0], list[int]()

    def items() -> Iterator[int]:
        for size in (5, 5, 5, 30, 1, 2, 3):
            taken.append(size)
            yield size * 2**20

    def work(size: int) -> int:
        with lock:
            running[0] += size
            most[0] = max(most[0], running[0] if running[0] > size else 0)
        time.sleep(0.002)
        with lock:
            running[0] -= size
        return size

    results = at_once(work, items(), lambda size: size)
    first = next(results)
    assert taken == [5, 5, 5, 30]  # the last of which waits
    assert [first(), *(result() for result in results)] == [size * 2**20 for size in taken]
    assert 0 < most[0] <= vaecodec.together.ROOM


def test_items_that_raise_and_results_that_nobody_wants() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no file")

    with pytest.raises(OSError, match="no file"):
        list(at_once(lambda item: item, items(), lambda _: 1))
    with pytest.raises(OSError, match="no file"):
        list(one_by_one(lambda item: item, items(), lambda _: 1))
    done = list[int]()
    results = at_once(done.append, range(3), lambda _: vaecodec.together.ROOM)
    next(results)()
    del results
    assert done == [0]
