"""Refiners for lossless weights: `python -m vaecodec.training.refiners WEIGHTS DATA OUT`.

They stand behind the networks and are fitted to what these predict, in an hour on one core: each alone, by the bits of
the density that the tables stand for. With a weights file as DATA, its refiners are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .. import weights
from ..lossless import refine
from ..lossless.engine import LosslessNetworks
from ..lossless.layers import pixel_bits, scale_of
from ..lossless.numbers import CHANNEL_ORDER, FRACTIONS, PHASES, SCALES, SHAPES, Config
from ..lossless.samples import PixelCodec
from ..weights import digest_of
from .crops import load_images, wear

LEVELS = 2
NARROW, WIDE = (32, 16), (64, 32)
"""Hidden widths; the later passes of phase D, of which most can be learned, have wide layers."""
STEPS, BATCH, RATE = 2500, 4096, 5e-3
SAMPLES = 2048
"""So many of a picture are kept for each refiner, of a part of SIDE rows and columns."""
SIDE = 320
IN, HIDDEN, WEIGHT, OUT = 16, 32, 512, 2**14
"""How many integer steps make one: of what is seen, of activations, weights of what is on the grid of activations, and
outputs."""

Place = tuple[int, str, int, int]
Seen = tuple[NDArray[np.int8], NDArray[np.uint8], NDArray[np.int16]]
"""What is seen [N, F] and activations [N, W]; mean, scale index, shape and value [4, N]."""


def curved(x: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """A picture after a curve, as scanners and editors apply them: it leaves out values and gathers others."""
    curve = 255 * (np.arange(256) / 255) ** random.uniform(0.8, 1.25) * random.uniform(0.9, 1.1)
    bent: NDArray[np.uint8] = np.rint(curve).clip(0, 255).astype(np.uint8)[x]
    return bent


def seen(networks: LosslessNetworks, picture: NDArray[np.uint8]) -> Iterator[tuple[Place, Seen]]:
    """What each refiner would see of a picture [3, H, W]."""
    features = None
    for depth in range(networks.config.levels):
        number = networks.config.levels - depth
        fine = picture[:, :: 2 ** (number - 1), :: 2 ** (number - 1)]
        a = np.ascontiguousarray(fine[:, ::2, ::2])
        state, known = networks.level(depth, a, features), list[refine.Phase]()
        for name, row, column in zip(PHASES, (1, 0, 1), (1, 1, 0), strict=True):
            phase = refine.Phase(name, (a.shape[1], a.shape[2]))
            for k, c in enumerate(CHANNEL_ORDER):
                inside = fine[c, row::2, column::2]
                rows, columns = inside.shape
                prediction = state.predict()[:, :rows, :columns]
                x = a[c].copy()
                x[:rows, :columns] = inside
                if number <= LEVELS:
                    activations = state.activations()[:rows, :columns]
                    passes = refine.Passes(prediction, phase, tuple(known), refine.usage_of(a[c]), activations)
                    first = PixelCodec(networks, passes.of(0, prediction))
                    passes.move(first.moving(passes.of(0, inside).ravel().astype(np.int32)))
                    for index in range(len(refine.PASSES)):
                        samples = passes.of(index, inside)
                        parts = (*passes.moved(index, None), samples.ravel())
                        inputs, states, _ = passes.inputs(index)
                        samples_of = np.stack(parts).astype(np.int16)
                        yield (number, name, k, index), (inputs.T.astype(np.int8), states, samples_of)
                        passes.see(index, samples)
                state.see(x)
            known.append(phase)
        if number > 1:
            features = state.features()[:, : fine.shape[1], : fine.shape[2]]


def fitted(seen: Seen, widths: tuple[int, int], steps: int) -> dict[str, NDArray[Any]]:
    """The integers of one refiner."""
    torch.manual_seed(0)
    inputs, states, samples = (torch.from_numpy(part) for part in seen)
    sizes = [inputs.shape[1] + states.shape[1], *widths, 3]
    first, second, last = layers = [nn.Linear(*size) for size in pairwise(sizes)]
    net = nn.Sequential(first, nn.Hardtanh(0, 8), second, nn.Hardtanh(0, 8), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    optimiser, scales = torch.optim.Adam(net.parameters(), RATE, betas=(0.9, 0.98)), scale_of(torch.arange(SCALES))
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * min(1, 1.3 * (1 - step / steps))
        some = torch.randint(0, len(inputs), (BATCH,))
        mean, scale, shape, x = samples[:, some].float()
        by = net(torch.cat([inputs[some].float() / IN, states[some].float() / HIDDEN], 1))
        residual = x - mean / FRACTIONS - by[:, 0] * scales[scale.long()]
        index = (scale + 4 * by[:, 1]).clamp(0, SCALES - 1)
        loss = pixel_bits(residual, index, (shape + by[:, 2]).clamp(0, SHAPES - 1)).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            for layer in layers:
                layer.weight.clamp_(-3.99, 3.99)
    return rounded(layers, inputs.shape[1])


def rounded(layers: Sequence[nn.Linear], inputs: int) -> dict[str, NDArray[Any]]:
    """The integers of layers of which the first sees so many inputs, then activations. Their sums are in steps of
    1 / (IN * WEIGHT) and, in the others, of 1 / (HIDDEN * WEIGHT)."""
    tensors = {}
    for number, layer in enumerate(layers, 1):
        weight, bias = (x.detach().double() for x in (layer.weight, layer.bias[:, None]))
        sums = WEIGHT * (IN if number == 1 else HIDDEN)
        weight *= sums / HIDDEN
        if number == 1:
            weight[:, :inputs] *= HIDDEN / IN
        tensors[f"w_{number}"] = np.rint(weight.numpy()).astype(np.int16)
        tensors[f"b_{number}"] = np.rint(sums * bias.numpy()).astype(np.int32)
    return tensors


def altered(number: int, picture: Tensor) -> NDArray[np.uint8]:
    """Of every four pictures [3, H, W] one is worn, one bent, and one both."""
    torch.manual_seed(number)
    x = wear(picture[None].float())[0].byte() if number % 4 in (1, 2) else picture
    samples = curved(x.numpy(), np.random.default_rng(number)) if number % 4 in (2, 3) else x.numpy()
    return np.ascontiguousarray(samples)


def part_of(picture: Tensor, random: np.random.Generator) -> Tensor:
    """At most SIDE rows and columns of a picture [3, H, W]."""
    top, left = (int(random.integers(max(1, size - SIDE + 1))) for size in picture.shape[1:])
    return picture[:, top : top + SIDE, left : left + SIDE]


def some_of(part: Seen, random: np.random.Generator) -> Seen:
    inputs, states, samples = part
    kept = random.permutation(len(inputs))[:SAMPLES]
    return inputs[kept], states[kept], samples[:, kept]


def fit(networks: LosslessNetworks, pictures: Iterable[Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors of all refiners. pictures: uint8 [3, H, W]."""
    found = dict[Place, list[Seen]]()
    for number, picture in enumerate(pictures):
        random = np.random.default_rng(number)
        for place, part in seen(networks, altered(number, part_of(picture, random))):
            found.setdefault(place, []).append(some_of(part, random))
    tensors: dict[str, NDArray[Any]] = {}
    for place, parts in found.items():
        inputs, states, samples = zip(*parts, strict=True)
        whole = np.concatenate(inputs), np.concatenate(states), np.concatenate(samples, 1)
        for name, array in fitted(whole, *size_of(place)).items():
            tensors[f"{refine.name_of(*place)}.{name}"] = array
    return tensors


def size_of(place: Place) -> tuple[tuple[int, int], int]:
    """Hidden widths and steps of training."""
    number, phase, _, index = place
    return WIDE if phase == "D" and index else NARROW, STEPS * (2 if number == 1 else 1)


def attach(path: Path, tensors: dict[str, NDArray[Any]], out: Path) -> None:
    """Write a weights file with these refiners, and a new identity. Raises ValueError for those that do not fit."""
    stored = weights.read(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    config = {**json.loads(metadata["config"]), "refined": LEVELS}
    refine.layers_of(tensors, Config(**config))
    metadata["config"] = json.dumps(config)
    arrays = {name: array for name, array in stored.tensors.items() if not name.startswith("decoder.refine.")}
    arrays |= {f"decoder.{name}": array for name, array in tensors.items()}
    decoder = {name.removeprefix("decoder."): array for name, array in arrays.items() if name.startswith("decoder.")}
    metadata["identity"] = digest_of(decoder, metadata["config"])[:16].hex()
    metadata["digest"] = digest_of(arrays, metadata["config"]).hex()
    out.write_bytes(save({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, metadata))


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(path: Path, data: Path, out: Path) -> None:
    """Write the weights file PATH with refiners to OUT: fitted to the pictures in the folder DATA, or those of DATA."""
    if data.is_file():
        decoder = weights.read(data).part("decoder")
        tensors = {name: array for name, array in decoder.items() if name.startswith("refine.")}
    else:
        tensors = fit(LosslessNetworks(path), load_images(data))
    attach(path, tensors, out)


if __name__ == "__main__":
    main()
