"""The linear codec, kind PCA: its files, as the benchmarks want them, and the training of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import numpy as safetensors
from tqdm import tqdm

from bitstream import Header, Kind, Limits, Tables, normalise, pack
from vaecodec.codec import Codec, shared
from vaecodec.image import metadata_of, pixels_of
from vaecodec.kinds import load, packaged
from vaecodec.linear.coder import SIDE, SIZE, LinearCoder, blocks_of, step_of
from vaecodec.linear.walk import GROUPS, PREDICTION_BITS, SCALE_BITS, UNIT, Encoder
from vaecodec.linear.weights import FIRST_OCTAVE, KNOTS, LEVELS, TABLES, Floats, Ints, LinearWeights, lengths_of
from vaecodec.tiles import TILE, ignore
from vaecodec.training.crops import load_images

PARAMETERS = packaged("linear")
CPU = torch.device("cpu")


def compress(picture: Image.Image, quality: float, weights: LinearWeights | None = None, tile: int = TILE) -> bytes:
    """The bytes of a ``.vae`` file of kind PCA.

    picture: 8-bit grey or colour. quality: 0 (smallest) to 100, in hundredths. weights: by default the packaged ones.
    Raises ImageError for pictures that are not supported, ValueError for a quality out of range, LimitError for a
    picture that no reader would accept.
    """
    if not 0 <= quality <= 100:
        raise ValueError(f"quality {quality} is not in 0..100")
    weights = weights or packaged_weights()
    pixels = pixels_of(picture)
    size = (pixels.width, pixels.height)
    header = Header(Kind.PCA, pixels.mode, *size, 8, round(quality * 100), 0, tile, weights.identity)
    Limits().check(header)
    return pack(header, LinearCoder(weights, CPU).encode(pixels, header, 0, ignore), metadata_of(picture))


def decompress(data: bytes, weights: Path | None = None) -> Image.Image:
    """The picture in a file, in the mode it had; see ``Codec.decompress``."""
    return (shared("cpu") if weights is None else Codec("cpu", weights)).decompress(data)


@cache
def packaged_weights() -> LinearWeights:
    weights: LinearWeights = load(PARAMETERS, CPU)
    return weights


# Training

CROP, CROPS, SEED = 192, 200, 0
RARE = 1e-3  # a share of blocks with such a component that is not worth coding it
ROUNDS = (8, 4, 1)  # each round has tables and reconstruction points from the one before, and one picture in so many


@dataclass
class Trainer(Encoder):
    """Fits weights where they are needed; counts magnitudes, their excess over the values, and what is not 0."""

    frequencies: Ints = field(default_factory=lambda: np.zeros((TABLES, LEVELS), np.int64))
    excess: Floats = field(default_factory=lambda: np.zeros((TABLES, 4)))
    used: NDArray[np.int64] = field(default_factory=lambda: np.zeros(SIZE, np.int64))

    def fit(self, name: str, blocks: Ints, columns: slice, inputs: Floats, prediction: Floats | None) -> None:
        targets = self.targets[blocks, columns]
        # Errors count in relation to what is to be expected; first by the mean of the inputs.
        expected = np.abs(inputs).mean(1)
        importance = (expected / expected.mean() + 0.1) ** -2
        if prediction is None:
            bits, solution = PREDICTION_BITS, least_squares(inputs, targets, importance)
        else:
            bits, spread = SCALE_BITS, np.abs(targets - prediction) / UNIT
            for _ in range(3):
                solution = least_squares(inputs, spread, importance)
                importance = np.maximum(inputs @ solution, 0.02).mean(1) ** -2
        limit = 2**15 - 1
        self.weights[name] = np.rint(solution * 2**bits).clip(-limit, limit)

    def choose(self, blocks: Ints, columns: slice, prediction: Floats, ids: Ints) -> Ints:
        integers = super().choose(blocks, columns, prediction, ids)
        magnitudes, difference = np.abs(integers), np.abs(self.targets[blocks, columns] - prediction)
        self.used[columns] += (integers != 0).sum(0)
        np.add.at(self.frequencies, (ids, np.minimum(magnitudes, LEVELS - 1)), 1)
        np.add.at(self.excess, (ids, np.minimum(magnitudes, 3)), UNIT * magnitudes - difference)
        return integers


def least_squares(inputs: Floats, targets: Floats, importance: Floats) -> Floats:
    """Weights [F, C] from inputs [n, F], targets [n, C] and how much each row counts [n], with a touch of ridge."""
    weighted = inputs * importance[:, None]
    moments = weighted.T @ inputs
    moments[np.diag_indices_from(moments)] *= 1 + 1e-4
    moments[np.diag_indices_from(moments)] += 1e-9 * moments.trace() + 1e-6
    solution: Floats = np.linalg.solve(moments, weighted.T @ targets)
    return solution


def principal_components(blocks: Floats) -> Floats:
    """float32 [192, 192]: orthonormal columns, by falling variance; those of flat blocks first, then all others."""
    covariance = np.cov(blocks.T.astype(np.float64))
    # Orthonormal: three columns that span the flat blocks, and the rest.
    whole = np.linalg.qr(np.tile(np.eye(3), (SIDE * SIDE, 1)), "complete")[0]
    parts = [part @ np.linalg.eigh(part.T @ covariance @ part)[1][:, ::-1] for part in (whole[:, :3], whole[:, 3:])]
    basis: Floats = np.concatenate(parts, 1).astype(np.float32)
    return basis


def tables_of(frequencies: Ints) -> Tables:
    """Symmetrical tables from the frequencies of magnitudes, with a little of a two-sided geometric distribution."""
    lows, counts = [], []
    for table, row in enumerate(frequencies):
        scale = 2.0 ** (table / 4 + FIRST_OCTAVE - SCALE_BITS)
        reach = math.ceil(min(6 * scale, 120)) + 3
        geometric = np.exp(-np.arange(reach + 1) / max(scale, 0.15))
        mass = row[: reach + 1] + 8 * geometric / geometric.sum()
        sides = mass[1:] / 2
        lows.append(-reach)
        counts.append(normalise(np.concatenate([sides[::-1], mass[:1], sides, [row[reach + 1 :].sum() + 0.01]])))
    return Tables(np.array(lows), counts, escape=True)


def train(data: Path, out: Path) -> None:
    """Learn everything from the pictures below a folder, of which a random part is used, and write it to ``out``."""
    rng = np.random.default_rng(SEED)
    pictures = [image.permute(1, 2, 0).numpy() for image in load_images(data) if min(image.shape[1:]) >= CROP]
    if not pictures:
        raise ValueError(f"no picture has {CROP} pixels on both sides")
    crops = []
    for index in rng.permutation(len(pictures))[:CROPS]:
        top, left = (int(rng.integers(size - CROP + 1)) for size in pictures[index].shape[:2])
        crops.append(blocks_of(pictures[index][top : top + CROP, left : left + CROP]))
    blocks = np.concatenate(crops).reshape(-1, SIZE)
    mean = blocks.reshape(-1, 3).mean(0, dtype=np.float64).astype(np.float32)
    blocks -= np.tile(mean, SIDE * SIDE)
    basis = principal_components(blocks)
    components = blocks @ basis
    shrink, tables = np.zeros((TABLES, 4), np.int64), tables_of(np.zeros((TABLES, LEVELS), np.int64))
    for part in tqdm(ROUNDS, desc="rounds"):
        targets = components.reshape(len(crops), -1, SIZE)[::part]
        shape = (len(targets), CROP // SIDE, CROP // SIDE)
        trainers = []
        for knot in range(KNOTS):
            steps = targets.reshape(-1, SIZE) * (UNIT / np.float32(step_of(100 * knot / (KNOTS - 1))))
            trainers.append(Trainer({}, shrink, shape, SIZE, steps, lengths_of(tables)))
            trainers[-1].run()
        frequencies = np.sum([trainer.frequencies for trainer in trainers], 0)
        tables = tables_of(frequencies)
        counts = np.column_stack([frequencies[:, :3], frequencies[:, 3:].sum(1)])
        excess = np.sum([trainer.excess for trainer in trainers], 0) / np.maximum(counts, 1)
        shrink = np.where((counts < 30) | (np.arange(4) == 0), 0, np.rint(excess)).astype(np.int64)
    shares = [trainer.used / len(trainer.values) for trainer in trainers]
    stored = {
        "mean": mean,
        "basis": basis,
        "components": np.array([next(end for _, end in GROUPS if (s[end:] < RARE).all()) for s in shares], np.int32),
        "shrink": shrink.astype(np.int32),
    }
    stored |= {f"tables.{name}": array for name, array in tables.to_arrays().items()}
    stored |= {n: np.stack([t.weights[n] for t in trainers]).astype(np.int16) for n in trainers[0].weights}
    out.write_bytes(safetensors.save(stored))
