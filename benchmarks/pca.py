"""The PCA codec: how far a linear transform goes with the same coder and container. FORMAT.md specifies its files.

    pixels -> blocks of 8 x 8 -> principal components -> dead-zone quantiser -> ANS words -> container
                                       ^ prediction and scale of each
                                       | linear, in integers, from the components coded before, here and around

The means of the three colours are components of their own: they make up a small picture, which is coded first, coarse
to fine. The other components follow in groups, in order of variance: each group first in the blocks of one colour of a
chessboard, then in the others. No networks: every matrix comes from an eigenvalue problem or from least squares.
"""

from __future__ import annotations

import functools
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors import numpy as safetensors
from tqdm import tqdm

from bitstream import (
    AnsStack,
    CorruptError,
    Header,
    Kind,
    Limits,
    Tables,
    Tile,
    VersionError,
    normalise,
    pack,
    unpack,
)
from vaecodec.codec import TILE_MAX, Box, tiles
from vaecodec.crops import load_images
from vaecodec.image import ImageError, grey_of, info_of, metadata_of, picture_of, samples_of
from vaecodec.weights import WeightsError

PARAMETERS = Path(__file__).with_name("pca.safetensors")
SIDE = 8
SIZE = 3 * SIDE * SIDE
GROUPS = [(3, 5), (5, 8), (8, 12), (12, 17), (17, 24), (24, 34), (34, 48), (48, 68), (68, 96), (96, 136), (136, 192)]
TILE = 1024

COARSEST, FINEST = 160.0, 8.0  # steps at quality 0 and 100; a quality between them is a power between them
KNOTS = 5  # qualities at which the weights are stored
UNIT = 16  # values are multiples of 1/16 step
PREDICTORS = 12  # components that predictions look at, in nine blocks
PREDICTION_BITS, SCALE_BITS = 12, 14
BESIDE = [1, 3, 5, 7]  # of nine blocks, those that share an edge with the fifth
MAGNITUDE_MAX = 127  # as contexts see it
TABLES, FIRST_OCTAVE = 60, 6  # four tables for each octave of the scale; below 2**6 / 2**14 steps all share table 0
LEVELS = 512  # magnitudes of which lengths and frequencies are kept

RATE_WEIGHT = 0.12 * UNIT**2  # squared error worth a bit; 0.116 steps^2 in theory, for fine steps
DEAD_ZONE = 0.4 * UNIT  # what is smaller becomes 0 whatever the tables say

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


def step_of(quality: float) -> float:
    """The quantiser's step for a quality of 0 to 100."""
    return float(COARSEST * (FINEST / COARSEST) ** (quality / 100))


def blocks_of(pixels: NDArray[np.uint8]) -> Floats:
    """float32 [rows, columns, 192] of uint8 [H, W, 3], a block in the order row, column, colour; edges are repeated."""
    rows, columns = -(-pixels.shape[0] // SIDE), -(-pixels.shape[1] // SIDE)
    missing = (rows * SIDE - pixels.shape[0], columns * SIDE - pixels.shape[1])
    padded = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")
    blocks = padded.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2)
    return blocks.reshape(rows, columns, SIZE).astype(np.float32)


def pixels_from(blocks: Floats) -> NDArray[np.uint8]:
    """uint8 [8 rows, 8 columns, 3], the inverse of ``blocks_of``, rounded."""
    rows, columns, _ = blocks.shape
    rounded = np.floor(blocks + 0.5).clip(0, 255).astype(np.uint8)
    picture: NDArray[np.uint8] = rounded.reshape(rows, columns, SIDE, SIDE, 3).swapaxes(1, 2)
    return picture.reshape(rows * SIDE, columns * SIDE, 3)


@dataclass(frozen=True)
class Parameters:
    """What the codec has learned.

    mean: float32 [3]. basis: float32 [192, 192], orthonormal columns, those of flat blocks first. weights: by name
    int16 [KNOTS, inputs, outputs]. components: int64 [KNOTS], how many are coded. shrink: int64 [TABLES, 4], by how
    much magnitudes of 0, 1, 2, more are reconstructed below their value, in 1/16 step. identity: 16 bytes.
    """

    mean: Floats
    basis: Floats
    weights: dict[str, Ints]
    components: Ints
    shrink: Ints
    tables: Tables
    identity: bytes

    def at(self, hundredths: int) -> dict[str, Floats]:
        """The weights for a quality, as whole numbers in float64."""
        position = hundredths * (KNOTS - 1)
        knot = min(position // 10_000, KNOTS - 2)
        above = position - 10_000 * knot
        weights = {}
        for name, knots in self.weights.items():
            low, high = knots[knot : knot + 2].astype(np.int64)
            weights[name] = ((low * (10_000 - above) + high * above + 5000) // 10_000).astype(np.float64)
        return weights

    def count(self, hundredths: int) -> int:
        """How many components a quality codes."""
        return int(self.components[-(-hundredths * (KNOTS - 1) // 10_000)])


def lengths_of(tables: Tables) -> Floats:
    """float32 [TABLES, LEVELS]: bits of each magnitude, sign included."""
    ids, magnitudes = np.indices((TABLES, LEVELS))
    return tables.bits(ids.ravel(), magnitudes.ravel()).astype(np.float32).reshape(ids.shape)


def load(path: Path) -> Parameters:
    """Read a parameter file. Raises WeightsError if it is missing or damaged."""
    try:
        data = path.read_bytes()
        tensors = safetensors.load(data)
        tables = {name: tensors.pop(f"tables.{name}") for name in ("lows", "sizes", "counts", "escape")}
        return Parameters(
            mean=tensors.pop("mean"),
            basis=tensors.pop("basis"),
            components=tensors.pop("components").astype(np.int64),
            shrink=tensors.pop("shrink").astype(np.int64),
            tables=Tables.from_arrays(tables),
            weights=tensors,
            identity=hashlib.sha256(data).digest()[:16],
        )
    except FileNotFoundError:
        raise WeightsError(f"no parameters at {path}") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise WeightsError(f"{path.name} is damaged: {error}") from None


@functools.cache
def packaged() -> Parameters:
    """The parameters beside this file. Raises WeightsError as ``load`` does."""
    return load(PARAMETERS)


@dataclass
class Walk:
    """Goes through the components of N pictures of the same size in coding order, with predictions and contexts.

    Subclasses say in ``choose`` where the integers come from, and ``Trainer`` in ``fit`` where the weights do. All
    arithmetic is on whole numbers that float64 holds exactly.

    weights: of one quality. shrink: see ``Parameters``. shape: N, rows and columns of blocks. components: how many.
    """

    weights: dict[str, Floats]
    shrink: Ints
    shape: tuple[int, int, int]
    components: int

    def choose(self, blocks: Ints, columns: slice, prediction: Floats, ids: Ints) -> Ints:
        """Integers [n, c] for blocks [n] and components ``columns``. prediction: [n, c] in 1/16 step; ids: [n, c]."""
        raise NotImplementedError

    def fit(self, name: str, blocks: Ints, columns: slice, inputs: Floats, prediction: Floats | None) -> None:
        """Called before weights are used; without a prediction they are those of one."""

    def run(self) -> Floats:
        """The reconstructed components, float64 [N * rows * columns, components], in 1/16 step."""
        self.values = np.zeros((math.prod(self.shape), self.components))
        self._others(self._means())
        return self.values

    def _code(self, name: str, blocks: Ints, columns: slice, prediction: Floats, contexts: Floats) -> Floats:
        """Codes components; returns their magnitudes."""
        self.fit(f"scale.{name}", blocks, columns, contexts, prediction)
        scales = contexts @ self.weights[f"scale.{name}"]
        # The exponent and the first two bits of the mantissa.
        octaves = (np.maximum(scales, 1.0).view(np.int64) >> 50) - 4 * (1023 + FIRST_OCTAVE)
        ids = octaves.clip(0, TABLES - 1)
        integers = self.choose(blocks, columns, prediction, ids)
        magnitudes = np.abs(integers)
        levels = UNIT * magnitudes - self.shrink[ids, np.minimum(magnitudes, 3)]
        self.values[blocks, columns] = prediction + np.sign(integers) * levels
        return np.minimum(magnitudes, MAGNITUDE_MAX).astype(np.float64)

    def _means(self) -> Floats:
        """Codes the first three components, coarse to fine; returns their magnitudes."""
        magnitudes = np.zeros((len(self.values), 3))
        for phase, blocks, neighbours, inside in passes(self.shape):
            around = self.values[neighbours, :3] * inside[..., None]
            count = np.maximum(inside.sum(0), 1)[:, None]
            mean = np.floor((2 * around.sum(0) + count) / (2 * count))
            spread = np.floor((np.abs(around - mean) * inside[..., None]).sum(0) / (2 * count))
            for k in range(3):
                contexts = np.column_stack([np.ones(len(blocks)), spread, magnitudes[blocks, :k]])
                column = slice(k, k + 1)
                magnitudes[blocks, column] = self._code(f"{phase}.{k}", blocks, column, mean[:, column], contexts)
        return magnitudes

    def _others(self, magnitudes: Floats) -> None:
        """Codes the other components, group by group."""
        odd = np.indices(self.shape)[1:].sum(0).ravel() % 2
        # Rows of the contexts are by colour of the chessboard, so that what a phase sees need not be gathered.
        order, half = np.argsort(odd, kind="stable"), int((odd == 0).sum())
        contexts = np.zeros((len(order), 4 + 2 * self.components))
        nine = nine_of(self.values[:, :3], self.shape)
        spread = np.abs(nine - nine[4])[BESIDE].sum(0) // 8
        contexts[:, 0], contexts[:, 1:4] = 1, spread[order]
        inputs: Floats = np.empty((0, 0))
        for group, (start, end) in enumerate([(0, 3), *GROUPS]):
            if start >= self.components:
                break
            columns, known = slice(start, end), 4 + 2 * start
            if group:
                seen = min(start, PREDICTORS)
                if inputs.shape[1] < 9 * seen:
                    inputs = np.concatenate(list(nine_of(self.values[:, :seen], self.shape)), 1)[order]
                self.fit(f"predict.{group}", order, columns, inputs, None)
                sums = inputs @ self.weights[f"predict.{group}"]
                prediction = np.floor(sums * 2.0**-PREDICTION_BITS + 0.5)
                magnitudes = np.zeros((len(order), end - start))
                for phase, rows in enumerate((slice(0, half), slice(half, None))):
                    blocks, width = order[rows], known
                    if phase:
                        width += end - start
                        contexts[rows, known:width] = nine_of(magnitudes, self.shape)[BESIDE].sum(0)[blocks]
                    magnitudes[blocks] = self._code(
                        f"{group}.{phase}", blocks, columns, prediction[rows], contexts[rows, :width]
                    )
            nine = nine_of(magnitudes, self.shape)
            around = nine.sum(0) + nine[BESIDE].sum(0) - nine[4]
            contexts[:, known : known + 2 * (end - start)] = np.column_stack([magnitudes, around])[order]


def nine_of(planes: Floats, shape: tuple[int, int, int]) -> Floats:
    """[9, n, C] of [n, C]: the components of the block above on the left, above, ..., below on the right.

    Beyond the edges of its picture a block sees the nearest inside.
    """
    _, rows, columns = shape
    padded = np.pad(planes.reshape(*shape, -1), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    nine: Floats = np.stack(shifted).reshape(9, *planes.shape)
    return nine


def passes(shape: tuple[int, int, int]) -> Iterator[tuple[str, Ints, Ints, Ints]]:
    """Coarse to fine: name, blocks [n], four neighbours of each [4, n] that come before, and which exist [4, n]."""
    pictures, rows, columns = shape
    numbers = np.arange(math.prod(shape)).reshape(shape)
    i, j = np.indices(shape[1:])
    corner = numbers[:, 0, 0]
    yield "first", corner, np.tile(corner, (4, 1)), np.zeros((4, pictures), np.int64)
    step = 1 << (max(rows, columns) - 1).bit_length() >> 1
    while step:
        on_grid = (i % step == 0) & (j % step == 0)
        odd_row, odd_column = i // step % 2 == 1, j // step % 2 == 1
        diagonal, straight = on_grid & odd_row & odd_column, on_grid & (odd_row != odd_column)
        for name, mask, offsets in (
            ("diagonal", diagonal, ((-1, -1), (-1, 1), (1, -1), (1, 1))),
            ("straight", straight, ((-1, 0), (0, -1), (0, 1), (1, 0))),
        ):
            near = [(i[mask] + step * down, j[mask] + step * right) for down, right in offsets]
            inside = np.array([(r >= 0) & (r < rows) & (c >= 0) & (c < columns) for r, c in near], np.int64)
            found = [numbers[:, r.clip(0, rows - 1), c.clip(0, columns - 1)].ravel() for r, c in near]
            yield name, numbers[:, mask].ravel(), np.array(found), np.tile(inside, pictures)
        step //= 2


@dataclass
class Encoder(Walk):
    """Chooses integers and keeps them, with their tables, for the coder.

    targets: float32 [n, 192], the components in 1/16 step. lengths: see ``lengths_of``.
    """

    targets: Floats
    lengths: Floats
    coded: list[tuple[Ints, Ints]] = field(default_factory=list)

    def choose(self, blocks: Ints, columns: slice, prediction: Floats, ids: Ints) -> Ints:
        difference = (self.targets[blocks, columns] - prediction).ravel()
        # Rate and distortion decide between the two magnitudes around the value and 0.
        some = np.flatnonzero(np.abs(difference) > DEAD_ZONE)
        value, table = np.abs(difference[some]), ids.ravel()[some]
        floor = (value / UNIT).astype(np.int64)
        cost, best = value**2 + RATE_WEIGHT * self.lengths[table, 0], np.zeros_like(floor)
        for magnitude in (floor, floor + 1):
            error = value - UNIT * magnitude + self.shrink[table, np.minimum(magnitude, 3)]
            other = error**2 + RATE_WEIGHT * self.lengths[table, np.minimum(magnitude, LEVELS - 1)]
            best, cost = np.where(other < cost, magnitude, best), np.minimum(other, cost)
        chosen = np.zeros(ids.size, np.int64)
        chosen[some] = np.where(difference[some] < 0, -best, best)
        self.coded.append((chosen, ids.ravel()))
        return chosen.reshape(ids.shape)


@dataclass
class Decoder(Walk):
    """Pops integers from a coder."""

    stack: AnsStack
    tables: Tables
    crc: int = 0

    def choose(self, blocks: Ints, columns: slice, prediction: Floats, ids: Ints) -> Ints:
        integers = self.stack.pop(self.tables, ids.ravel())
        self.crc = zlib.crc32(integers.astype("<i4").tobytes(), self.crc)
        return integers.astype(np.int64).reshape(ids.shape)


def compress(picture: Image.Image, quality: float) -> bytes:
    """The bytes of a ``.vae`` file of kind PCA.

    picture: 8-bit grey or colour. quality: 0 (smallest) to 100, in hundredths. Raises ImageError for pictures that are
    not supported, ValueError for a quality out of range, LimitError for a picture that no reader would accept.
    """
    if not 0 <= quality <= 100:
        raise ValueError(f"quality {quality} is not in 0..100")
    parameters, hundredths = packaged(), round(quality * 100)
    samples, mode, _ = samples_of(picture)
    if mode.name not in ("L", "RGB"):
        raise ImageError(f"files of kind PCA hold 8-bit grey and colour, not {mode.name}")
    height, width, _ = samples.shape
    pixels = np.broadcast_to(samples, (height, width, 3)).astype(np.uint8, copy=False)
    header = Header(Kind.PCA, mode, width, height, 8, hundredths, 0, TILE, parameters.identity)
    Limits().check(header)
    weights, count = parameters.at(hundredths), parameters.count(hundredths)
    step = np.float32(step_of(hundredths / 100) / UNIT)
    mean, lengths, coded = np.tile(parameters.mean, SIDE * SIDE), lengths_of(parameters.tables), []
    for box in boxes_of(header):
        blocks = blocks_of(pixels[box.top * SIDE : box.bottom * SIDE, box.left * SIDE : box.right * SIDE])
        targets = (blocks.reshape(-1, SIZE) - mean) @ parameters.basis[:, :count] / step
        shape = (1, blocks.shape[0], blocks.shape[1])
        encoder = Encoder(weights, parameters.shrink, shape, count, targets, lengths)
        encoder.run()
        stack, crc = AnsStack(), 0
        for integers, _ in encoder.coded:
            crc = zlib.crc32(integers.astype("<i4").tobytes(), crc)
        for integers, ids in reversed(encoder.coded):
            stack.push(integers, parameters.tables, ids)
        coded.append(Tile(0, crc, stack.to_bytes()))
    return pack(header, coded, metadata_of(picture))


def decompress(data: bytes) -> Image.Image:
    """The picture in a file of kind PCA, in the mode it had.

    Raises CorruptError, TruncatedError, VersionError or LimitError (see ``bitstream``) and WeightsError if the file was
    made with other parameters.
    """
    container, parameters = unpack(data), packaged()
    header = container.header
    if header.kind != Kind.PCA or header.colour != 0 or header.mode.name not in ("L", "RGB"):
        raise VersionError(f"kind {header.kind.name}, mode {header.mode.name}: not a PCA file of this version")
    if header.tile > TILE_MAX:
        raise CorruptError(f"tile size {header.tile} is larger than {TILE_MAX}")
    if header.model != parameters.identity:
        raise WeightsError(f"made with parameters {header.model.hex()}, these are {parameters.identity.hex()}")
    weights, count = parameters.at(header.quality), parameters.count(header.quality)
    step = np.float32(step_of(header.quality / 100) / UNIT)
    boxes, mean = boxes_of(header), np.tile(parameters.mean, SIDE * SIDE)
    pixels = np.empty((boxes[-1].bottom * SIDE, boxes[-1].right * SIDE, 3), np.uint8)
    for box, tile in zip(boxes, container.tiles, strict=True):
        if tile.method != 0:
            raise CorruptError(f"tile method {tile.method} is unknown")
        shape = (1, box.bottom - box.top, box.right - box.left)
        stack = AnsStack(tile.words)
        decoder = Decoder(weights, parameters.shrink, shape, count, stack, parameters.tables)
        values = decoder.run()
        if decoder.crc != tile.crc or not stack.is_empty():
            raise CorruptError("a tile fails its checksum")
        blocks = (values.astype(np.float32) * step) @ parameters.basis[:, :count].T + mean
        inside = pixels[box.top * SIDE : box.bottom * SIDE, box.left * SIDE : box.right * SIDE]
        inside[:] = pixels_from(blocks.reshape(*shape[1:], SIZE))
    pixels = pixels[: header.height, : header.width]
    samples = grey_of(pixels).astype(np.uint8) if header.mode.name == "L" else pixels
    picture = picture_of(samples)
    picture.info |= info_of(container.sections)
    return picture


def boxes_of(header: Header) -> list[Box]:
    """The tiles, in blocks."""
    return tiles(-(-header.height // SIDE), -(-header.width // SIDE), header.tile // SIDE)


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
