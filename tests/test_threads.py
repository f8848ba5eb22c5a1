"""Eight threads share one codec: lossy, lossless and damaged files at once.

A few seconds here; `python tests/test_threads.py 10` goes on for ten minutes and prints figures.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_LOSSLESS, picture

from bitstream import VaeError
from vaecodec import Codec

THREADS = 8
STATM = Path("/proc/self/statm")

Check = Callable[[Codec], bool]


def checks(codec: Codec) -> dict[str, list[Check]]:
    """By kind of work, calls that give True for what a single thread has given before."""
    images = [picture(30 + 9 * seed, 50 - 5 * seed, "L" if seed % 3 == 0 else "RGB", seed=seed) for seed in range(6)]
    images.append(picture(40, 30).quantize(4).convert("RGB"))
    found: dict[str, list[Check]] = {"lossy": [], "lossless": [], "region": [], "bad": []}
    for image in images:
        for lossless in (False, True):
            data = codec.compress(image, lossless=lossless)
            pixels = codec.decode_array(data)
            assert not lossless or (pixels.squeeze() == np.asarray(image)).all()
            found["lossless" if lossless else "lossy"] += [
                lambda codec, data=data, pixels=pixels: bool((codec.decode_array(data) == pixels).all()),
                lambda codec, data=data, image=image, lossless=lossless: (
                    codec.compress(image, lossless=lossless) == data
                ),
            ]
            found["region"].append(
                lambda codec, data=data, pixels=pixels: bool(
                    (codec.decode_array(data, region=(3, 5, 20, 14)) == pixels[5:19, 3:23]).all()
                )
            )
            for bad in (data[:-4], data[:-9] + b"\1" + data[-8:], data[:60] + b"\xff" + data[61:]):
                found["bad"].append(lambda codec, bad=bad: fails(codec, bad))
    return found


def fails(codec: Codec, data: bytes) -> bool:
    try:
        codec.decode_array(data)
    except VaeError:
        return True
    return False


def memory() -> float:
    """Megabytes that the process occupies."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if STATM.exists() else 0.0


def soak(codec: Codec, seconds: float) -> tuple[Counter[str], list[str], list[float]]:
    """What was done, what went wrong, and the memory at ten moments after a tenth of the time."""
    work, done, wrong = checks(codec), Counter[str](), list[str]()
    end, lock = time.monotonic() + seconds, threading.Lock()

    def loop(seed: int) -> None:
        rng = Random(seed)
        while time.monotonic() < end:
            kind = rng.choice(list(work))
            number = rng.randrange(len(work[kind]))
            try:
                problem = "" if work[kind][number](codec) else "wrong"
            except BaseException as error:
                problem = repr(error)
            with lock:
                done[kind] += 1
                if problem:
                    wrong.append(f"{kind} {number}: {problem}")

    threads = [threading.Thread(target=loop, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    sizes = []
    for _ in range(10):
        time.sleep(seconds / 11)
        sizes.append(memory())
    for thread in threads:
        thread.join()
    return done, wrong, sizes


@pytest.mark.usefixtures("threads")
def test_no_wrong_pixel(codec: Codec) -> None:
    torch.set_num_threads(1)
    done, wrong, _ = soak(codec, 4)
    assert not wrong and len(done) == 4


def main(minutes: float) -> None:
    torch.set_num_threads(1)
    codec = Codec("cpu", [TINY, TINY_LOSSLESS])
    done, wrong, sizes = soak(codec, 60 * minutes)
    print(dict(done), f"{len(wrong)} wrong", *wrong[:5], "megabytes:", *(f"{size:.0f}" for size in sizes))


if __name__ == "__main__":
    main(float(sys.argv[1]))
