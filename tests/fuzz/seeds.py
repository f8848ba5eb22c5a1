"""Writes the seeds of the fuzzers: small files of every kind, mode and tile method.

python tests/fuzz/seeds.py FOLDER
"""

import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import numpy as np  # noqa: E402
from conftest import picture  # noqa: E402
from PIL import Image  # noqa: E402
from targets import codec  # noqa: E402

from bitstream import Header, Kind, Mode, Section, Tile, coder, pack, unpack  # noqa: E402
from vaecodec import Codec, ImageError  # noqa: E402


def pictures() -> list[object]:
    """Of every mode, tiny, and two of several tiles."""
    grey = np.asarray(picture(18, 14, "L"))
    letters = np.asarray(picture(30, 20).quantize(3).convert("RGB"))
    deep = np.asarray(picture(12, 10)).astype(np.uint16) * 257
    alpha = np.dstack([letters, letters[..., 0] // 128 * 255])
    found = [grey, np.dstack([grey, grey // 64]), letters, alpha, deep[..., 0], deep, np.dstack([deep, deep[..., 0]])]
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    return [*found, noise, picture(16, 16), picture(1, 1), picture(70, 5), picture(20, 66, "L")]


def files(codec: Codec) -> list[bytes]:
    written = []
    for one in pictures():
        written.append(codec.compress(one, lossless=True))
        for quality in (0, 80):
            try:
                written.append(codec.compress(one, quality))
            except ImageError:  # a mode that lossy files do not have
                break
    with_metadata = Image.fromarray(np.full((5, 5), 7, np.uint8))
    with_metadata.info |= {"exif": b"exif", "icc_profile": b"icc", "xmp": b"<x/>"}
    return [*written, codec.compress(with_metadata), *methods(codec), *progressive(codec)]


def progressive(codec: Codec) -> list[bytes]:
    """Of one tile and of two, with networks for all that they are no good at."""
    from unittest.mock import patch

    from vaecodec.lossless.tile import TileCoder
    from vaecodec.lossy.misfits import Signs

    pictures = picture(16, 16), picture(70, 9, "LA")
    by_networks = patch.object(TileCoder, "push", lambda coder, x: coder._push_network(coder.weights, x))
    with by_networks, patch.object(Signs, "doubtful", lambda *_: False):
        return [codec.compress(one, lossless=kind, progressive=True) for one in pictures for kind in (False, True)]


def methods(codec: Codec) -> list[bytes]:
    """Lossless files of one picture, each tile in another way."""
    from vaecodec.lossless.tile import TileCoder
    from vaecodec.plain_tiles import crc_of, plain_tile, raw

    samples = np.asarray(picture(8, 8))
    header = Header(Kind.LOSSLESS, Mode["RGB"], 8, 8, 8, 0, 0, 64, codec.lossless.identity)
    ways = [TileCoder(codec.lossless, 8)._push_network(codec.lossless, samples)]
    plain, stored = TileCoder(None, 8).push(samples // 64), Tile(3, crc_of(samples), raw(samples))
    with mock.patch.object(coder, "_LANES_SHARE", 8):
        ways += [TileCoder(codec.lossless, 8)._push_network(codec.lossless, samples), plain_tile(samples // 64, 8)]
    return [pack(header, [tile]) for tile in (*ways, plain, stored)]


def write(folder: Path) -> None:
    for name in ("container", "coder", "decode"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(files(codec())):
        (folder / "decode" / f"seed-{number:02}").write_bytes(data)
        file = unpack(data)
        small = [
            Tile(t.method, t.crc, bytes(t.words[:8]), t.lanes, (1, *[0] * (number % 3)) * bool(t.parts))
            for t in file.tiles
        ]
        other = [Section(b"new ", b"?")] if number % 2 else []
        (folder / "container" / f"seed-{number:02}").write_bytes(pack(file.header, small, [*file.sections, *other]))
        (folder / "coder" / f"seed-{number:02}").write_bytes(bytes([number]) * 4 + bytes(file.tiles[0].words)[:400])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
