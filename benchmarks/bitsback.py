"""Where the bits of lossless files go, beside the bound that they should reach."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bitstream import BITS_BACK, AnsStack, unpack
from vaecodec.codec import Codec
from vaecodec.exact import exact_arithmetic
from vaecodec.kinds import load, packaged
from vaecodec.lossless.heads import Phase
from vaecodec.lossless.layers import FRACTIONS, MEAN_UNIT, PHASES
from vaecodec.lossless.samples import PixelCodec
from vaecodec.lossless.tile import Network
from vaecodec.lossless.weights import LosslessWeights
from vaecodec.tiles import TILE, tiles

SEED = 0


@dataclass(frozen=True)
class Row:
    """One picture: sub-pixels, bytes of whole files, and bits by part, in our file and in the bound."""

    picture: str
    samples: int
    bytes: int
    webp: int
    png: int
    returned: float
    parts: dict[str, float]
    bound: dict[str, float]
    methods: list[int]


def phase_bits(weights: LosslessWeights, phase: Phase, inside: Tensor) -> float:
    """Bits of the samples of a phase [1, 3, h, w] that lie inside the picture, under the pixel tables, with the offsets
    of scales that a file of them would have."""
    total = 0.0
    for residual, scale, shape in zip(*(part[0] for part in phase), strict=True):
        r, scales, shapes = (part[inside[0, 0]].double().numpy() for part in (residual, scale, shape))
        fraction = np.round(-r / MEAN_UNIT).astype(np.int32) % FRACTIONS
        values = np.round(r + fraction * MEAN_UNIT).astype(np.int32)
        stack = AnsStack()
        prediction = np.stack([fraction, scales.round().astype(np.int32), shapes.round().astype(np.int32)])
        PixelCodec(weights, prediction).codec().push(stack, values)
        total += stack.bits()
    return total


def passes_bits(weights: LosslessWeights, pixels: NDArray[np.uint8]) -> dict[str, float]:
    """Bits of the levels that come in passes, of one tile [h, w, 3], under the tables that code them, and of what the
    tile says of them."""
    if not weights.config.refined:
        return {}
    bits = {f"phases at 1/{2**k}": 0.0 for k in reversed(range(weights.config.refined))}

    def record(name: str, popped: float) -> None:
        phase, _, number = name.split()[0].partition("_")
        if phase in PHASES and int(number) <= len(bits):
            bits[f"phases at 1/{2 ** (int(number) - 1)}"] -= popped

    height, width, colours = pixels.shape
    network = Network(weights, height, width, colours, rounded=True)
    network.push(AnsStack(), pixels.transpose(2, 0, 1).astype(np.int32), record)
    return bits


def negative_elbo(weights: LosslessWeights, pixels: NDArray[np.uint8]) -> dict[str, float]:
    """-ELBO in bits of one tile [h, w, 3]: continuous Gaussian latents, one sample of them, float64 throughout."""
    model, config = weights.model, weights.model.config
    height, width, _ = pixels.shape
    block = 2 ** (config.levels + len(config.latents))
    padding = (0, -width % block, 0, -height % block)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double()
    inside = F.pad(torch.ones(1, 1, height, width), padding) > 0
    x = F.pad(x, padding, mode="replicate")
    step = 2**config.levels
    above, latents = model.vae.sample(x[..., ::step, ::step])
    coarsest, levels = model.vae.likelihood(x[..., ::step, ::step], above), model.phases(x)
    bits = {f"KL {len(latents) - i}": float(latent.kl().sum()) for i, latent in enumerate(latents)}
    bits["x given z"] = phase_bits(weights, coarsest, inside[..., ::step, ::step])
    for number, phases in zip(range(config.levels, 0, -1), levels, strict=True):
        step //= 2
        if number > config.refined:
            fine, places = inside[..., ::step, ::step], ((1, 1), (0, 1), (1, 0))
            bits[f"phases at 1/{step}"] = sum(
                phase_bits(weights, phase, fine[..., row::2, column::2])
                for phase, (row, column) in zip(phases, places, strict=True)
            )
    return bits | passes_bits(weights, pixels)


def groups(account: dict[str, float]) -> dict[str, float]:
    """An account of ``Codec.account`` by the same parts as ``negative_elbo``, and what a file has besides."""
    parts: dict[str, float] = {}
    for name, bits in account.items():
        head = name.split()[0]
        if head.startswith("z_"):
            key = f"KL {head[2:]}"
        elif head == "x":
            key = "x given z"
        elif head[:2] in ("D_", "B_", "C_"):
            key = f"phases at 1/{2 ** (int(head[2:]) - 1)}"
        else:
            key = name
        parts[key] = parts.get(key, 0.0) + bits
    return parts


def run(files: list[Path], out: Path) -> None:
    """Compress each picture to a file's bytes, check the way back, and print the table."""
    codec = Codec("cpu")
    reference = load(packaged("lossless"), torch.device("cpu"))
    assert isinstance(reference, LosslessWeights)
    reference.to(torch.device("cpu"), torch.float64)
    rows = []
    for file in tqdm(files, leave=False):
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        picture.info.clear()  # pixels alone are compared
        data = codec.compress(picture, lossless=True)
        if codec.decompress(data).tobytes() != picture.tobytes():
            raise RuntimeError(f"{file}: the decoded pixels differ")
        account = codec.account(data)
        pixels = np.asarray(picture)
        bound: dict[str, float] = {}
        torch.manual_seed(SEED)
        with exact_arithmetic(torch.device("cpu")):
            for box in tiles(picture.height, picture.width, TILE):
                part = negative_elbo(reference, pixels[box.top : box.bottom, box.left : box.right])
                bound = {name: bound.get(name, 0.0) + bits for name, bits in part.items()}
        returned = -sum(bits for name, bits in account.items() if name.endswith("returned"))
        methods = sorted({tile.method for tile in unpack(data).tiles})
        sizes = (pixels.size, len(data), webp_bytes(picture), png_bytes(picture))
        rows.append(Row(file.stem, *sizes, returned, groups(account), bound, methods))
    text = report(rows, codec.lossless.identity.hex())
    out.mkdir(parents=True, exist_ok=True)
    (out / "lossless.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")
    (out / "lossless.md").write_text(text, "utf-8")
    if networks := [row for row in rows if row.methods == [BITS_BACK]]:
        plot(networks, out / "lossless.png")
    print(text)


def plot(rows: list[Row], path: Path) -> None:
    """The stack while a picture is encoded, as a staircase: what each step pushes or takes back."""

    def mean(bits: Callable[[Row], float]) -> float:
        return fmean(bits(row) / row.samples for row in rows)

    levels = sorted({name for row in rows for name in row.parts if name.startswith("phases")}, key=lambda n: n[-1])
    steps = [(f"push {name}", mean(lambda row, name=name: row.parts.get(name, 0.0))) for name in levels]  # type: ignore[misc]
    kl = mean(lambda row: sum(bits for name, bits in row.parts.items() if name.startswith("KL")))
    returned = mean(lambda row: row.returned)
    steps += [
        ("pop z with q(z|x)", -returned),
        ("push x with p(x|z)", mean(lambda row: row.parts.get("x given z", 0.0))),
        ("push z with p(z)", kl + returned),
    ]
    figure, axes = plt.subplots(figsize=(7, 3))
    height = 0.0
    for i, (_, bits) in enumerate(steps):
        axes.barh(i, bits, left=height, color="tab:blue" if bits > 0 else "tab:orange")
        height += bits
        axes.text(max(height, height - bits) + 0.03, i, f"{bits:+.3f}", va="center", fontsize=8)
    axes.axvline(height, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(steps)), [name for name, _ in steps])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * sum(max(bits, 0) for _, bits in steps))
    axes.set_xlabel("bits per sub-pixel on the stack")
    axes.set_title(f"Encoding by bits-back, mean of {len(rows)} pictures: {height:.3f} in the end", fontsize=10)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def png_bytes(picture: Image.Image) -> int:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return len(stream.getvalue())


def webp_bytes(picture: Image.Image) -> int:
    stream = io.BytesIO()
    picture.save(stream, "WEBP", lossless=True, quality=100, method=6)
    return len(stream.getvalue())


def report(rows: list[Row], model: str) -> str:
    """Bits per sub-pixel, means over pictures."""

    def mean(bits: Callable[[Row], float]) -> float:
        return fmean(bits(row) / row.samples for row in rows)

    def part(name: str, of: Callable[[Row], dict[str, float]]) -> float:
        return mean(lambda row: of(row).get(name, 0.0))

    net, bound = mean(lambda row: 8 * row.bytes), mean(lambda row: sum(row.bound.values()))
    names = dict.fromkeys(name for row in rows for name in (*row.parts, *row.bound))
    lines = [
        f"# Lossless, {len(rows)} pictures, weights {model}",
        "",
        "| mean bits per sub-pixel, whole files | |",
        "|---|--:|",
        f"| vaecodec | {net:.4f} |",
        f"| -ELBO (float64, continuous latents) | {bound:.4f} |",
        f"| difference | {100 * (net / bound - 1):+.3f} % |",
        f"| given back by bits-back | {mean(lambda row: row.returned):.4f} |",
        f"| WebP lossless, method 6 | {mean(lambda row: 8 * row.webp):.4f} |",
        f"| PNG | {mean(lambda row: 8 * row.png):.4f} |",
        "",
        "| part | in files | in -ELBO |",
        "|---|--:|--:|",
        *(f"| {n} | {part(n, lambda r: r.parts):.5f} | {part(n, lambda r: r.bound):.5f} |" for n in names),
        "",
        "| picture | vaecodec | -ELBO | difference | given back | WebP | PNG | tile methods |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        limit = sum(row.bound.values())
        ours, webp, png = (8 * size / row.samples for size in (row.bytes, row.webp, row.png))
        lines.append(
            f"| {row.picture} | {ours:.4f} | {limit / row.samples:.4f} | {100 * (8 * row.bytes / limit - 1):+.3f} % "
            f"| {row.returned / row.samples:.4f} | {webp:.4f} | {png:.4f} | {row.methods} |"
        )
    return "\n".join(lines) + "\n"
