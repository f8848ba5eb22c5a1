"""Latents under tables that are all but certain are not coded: tile method 1."""

from functools import partial

import numpy as np
import pytest
import second_decoder as second
import second_networks as networks
from conftest import TINY, picture

from bitstream import NETWORK, SPARSE, AnsStack, Tables, gaussian_tables, unpack
from vaecodec import Codec
from vaecodec.lossy import coder
from vaecodec.lossy.tile import push_tile


def test_which_tables_are_certain() -> None:
    most = 2**24 - 2**16
    counts = [[most, 2**16], [most - 1, 2**16 + 1], [5, 2**24 - 5], [2**23 - 1, 2**23 - 1, 2]]
    tables = Tables(np.array([0, 1, 2, -7]), [np.array(c) for c in counts], escape=True)
    assert tables.certain.tolist() == [True, False, False, False]
    assert tables.likeliest.tolist() == [0, 1, 2, -7] and tables.likeliest.dtype == np.int32
    listed = Tables(tables.lows, tables.counts, escape=False)
    assert listed.certain.tolist() == [True, False, True, False] and listed.likeliest.tolist() == [0, 1, 3, -7]


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_certain_latents_are_not_coded(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, pushed = Codec("cpu", TINY, engine=engine), list[int]()
    normal = gaussian_tables(np.geomspace(0.5, 30, 64), escape=True)
    counts = [np.array([9, 2**16 - 18, 2**24 - 2**16, 9]) if t % 3 else c for t, c in enumerate(normal.counts)]
    tables = Tables(np.where(np.arange(64) % 3, -1, normal.lows), counts, escape=True)
    assert tables.certain.sum() == 42 and set(tables.likeliest[tables.certain]) == {1}
    monkeypatch.setattr(codec.lossy, "tables", tables)
    push = AnsStack.push

    def spy(self: AnsStack, values: np.ndarray, of: Tables, ids: np.ndarray, locs: np.ndarray | None = None) -> None:
        if of is tables:
            pushed.append(len(ids))
        push(self, values, of, ids, locs)

    monkeypatch.setattr(AnsStack, "push", spy)
    data = codec.compress(picture(90, 70), 60)
    latents, hyper_latents = 16 * 6 * 5, 4 * 2 * 2
    assert [tile.method for tile in unpack(data).tiles] == [SPARSE]
    assert len(pushed) == 5 and hyper_latents < sum(pushed) < latents / 2
    pixels = codec.decode_array(data)
    header, _, tiles = second.read(data)
    weights = networks.Weights(TINY, header.quality)
    stored = tables.lows.tolist(), [c.tolist() for c in tables.counts], True
    monkeypatch.setattr(weights, "tables", lambda _: stored)
    assert (np.array(networks.decode_lossy(header, tiles, weights)) == pixels).all()
    # With method 0 all of them are.
    monkeypatch.setattr(coder, "push_tile", partial(push_tile, method=NETWORK))
    pushed.clear()
    whole = codec.compress(picture(90, 70), 60)
    assert [tile.method for tile in unpack(whole).tiles] == [NETWORK] and sum(pushed) == latents + hyper_latents
    assert codec.decode_array(whole).shape == pixels.shape
