"""`vaecodec train`: rate-distortion training under a time budget, on a CPU, a GPU, or several under torchrun.

The learning rate warms up, stays, and decays over the last part of the time; the checkpoint from before the decay is
kept, because that is the one to go on from. Rate and distortion are those of Balle et al. 2018 (arXiv:1802.01436),
bits per pixel + lambda * MSE, with a quality drawn for each sample.
"""

from __future__ import annotations

import copy
import csv
import math
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .exact import QUALITY_MAX
from .model import PIXEL_SCALE, Config, LossyModel, lagrangian

SUFFIXES = {".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm"}
PCA_CROPS = 700
AVERAGE_EVERY = 5  # steps; each update reads all weights
VALIDATION_QUALITIES = (0, 2500, 5000, 7500, 10000)


@dataclass(frozen=True)
class TrainConfig:
    """The [train] table of a configuration; ``decay`` and ``exact`` are parts of the time, at its end."""

    batch: int = 8
    crop: int = 128
    lr: float = 7e-4
    warmup: int = 300
    decay: float = 0.35
    exact: float = 0.2
    loss_power: float = 0.4
    ema: float = 0.999


def read_config(path: Path) -> tuple[Config, TrainConfig]:
    table = tomllib.loads(path.read_text())
    model = table.get("model", {})
    if "blocks" in model:
        model["blocks"] = tuple(model["blocks"])
    return Config(**model), TrainConfig(**table.get("train", {}))


def load_images(folder: Path) -> list[Tensor]:
    """All pictures below ``folder`` as uint8 [3, H, W]. Raises ValueError if there are none."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"no pictures in {folder}")
    images = []
    for file in files:
        with Image.open(file) as picture:
            images.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous())
    return images


class Crops:
    """Random square crops, flipped and transposed, cut where the pictures lie (on the GPU, if there is one)."""

    def __init__(self, images: list[Tensor], crop: int, device: torch.device, seed: int) -> None:
        self.images = [i.to(device) for i in images if min(i.shape[1:]) >= crop]
        if not self.images:
            raise ValueError(f"no picture has {crop} pixels on both sides")
        self.crop = crop
        self.areas = torch.tensor([float(i.shape[1] * i.shape[2]) for i in self.images])
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def batch(self, size: int) -> Tensor:
        """float32 [size, 3, crop, crop] in 0..255."""
        chosen = torch.multinomial(self.areas, size, replacement=True, generator=self.generator)
        crops = []
        for index in chosen.tolist():
            image = self.images[index]
            top, left = self.draw(0, image.shape[1] - self.crop + 1), self.draw(0, image.shape[2] - self.crop + 1)
            part = image[:, top : top + self.crop, left : left + self.crop]
            turn = self.draw(0, 8)
            part = part.flip(1) if turn & 1 else part
            part = part.flip(2) if turn & 2 else part
            crops.append(part.transpose(1, 2) if turn & 4 else part)
        return torch.stack(crops).float()

    def qualities(self, size: int) -> Tensor:
        """int64 [size]: one quality from each of ``size`` equal parts of the range, in random order."""
        spread = torch.randperm(size, generator=self.generator) + torch.rand(size, generator=self.generator)
        return (spread / size * QUALITY_MAX).round().long()


def start_from_pca(model: LossyModel, crops: Crops) -> None:
    """Make the untrained model the linear codec it generalises: a two-level Karhunen-Loeve transform.

    The residual blocks start at zero, so g_a is then its first two 1x1 layers and g_s the transposes: principal
    components of 8x8x3 pixels, then of 2x2 of those. Streams carry each component divided by the square root of its
    standard deviation: half-way to whitening, so that no channel drowns in its grid or leaves its range.
    """
    c = model.config
    x = (crops.batch(PCA_CROPS).cpu().double() - 128) / PIXEL_SCALE

    def components(features: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        values, vectors = values.flip(0)[:keep].clamp(min=1e-6), vectors.flip(1)[:, :keep].T
        deviation = values.sqrt()
        return vectors, deviation.sqrt() * deviation.mean().sqrt()

    unshuffled = F.pixel_unshuffle(x, 8)
    first, scale_1 = components(unshuffled, c.width)
    fine = torch.einsum("oc,bchw->bohw", first, unshuffled)
    second, scale_2 = components(F.pixel_unshuffle(fine, 2), c.latent)
    spread = scale_1.repeat_interleave(4)
    with torch.no_grad():
        model.g_a.stem.weight.copy_(first / scale_1[:, None])
        model.g_a.down.weight.copy_(second * spread / scale_2[:, None])
        model.g_s.up.weight.copy_((second / spread).T * scale_2)
        model.g_s.head.weight.copy_(first.T * scale_1)
        # Quantiser step at high rate: minimise -3 log2(step) + lambda * step^2 / 12 over the step.
        weight = lagrangian(torch.linspace(0, QUALITY_MAX, c.knots))
        step = (18 / (math.log(2) * weight)).sqrt() / PIXEL_SCALE
        gain = scale_2[None, :] / step[:, None]
        model.log_inverse.copy_(-gain.log())


def rate_distortion_loss(model: nn.Module, x: Tensor, quality: Tensor, power: float) -> Tensor:
    """Mean over the batch of (bpp + lambda * MSE) / lambda^power, MSE on the 0..255 scale."""
    out = model(x, quality)
    bpp = out.bits / (x.shape[2] * x.shape[3])
    mse = (out.x_hat - x).square().mean((1, 2, 3))
    weight = lagrangian(quality)
    loss: Tensor = ((bpp + weight * mse) / weight**power).mean()
    return loss


@torch.no_grad()
def validate(model: LossyModel, images: list[Tensor], device: torch.device) -> list[tuple[int, float, float]]:
    """(quality, mean bpp, mean PSNR) of rounded latents on centre crops of at most 512 x 512."""
    rows = []
    for quality in VALIDATION_QUALITIES:
        bits, psnr = [], []
        for image in images:
            _, height, width = image.shape
            h, w = min(height // 64 * 64, 512), min(width // 64 * 64, 512)
            top, left = (height - h) // 2, (width - w) // 2
            x = image[None, :, top : top + h, left : left + w].to(device).float()
            out = model(x, torch.tensor([quality], device=device), hard=True)
            mse = (out.x_hat.clamp(0, 255).round() - x).square().mean()
            bits.append(float(out.bits) / (h * w))
            psnr.append(10 * math.log10(255**2 / float(mse)))
        rows.append((quality, sum(bits) / len(bits), sum(psnr) / len(psnr)))
    return rows


def train(
    config_path: Path,
    data: Path,
    minutes: float,
    out: Path,
    *,
    val: Path | None = None,
    resume: Path | None = None,
    device_name: str = "auto",
    seed: int = 0,
) -> None:
    """Train for ``minutes`` and write to ``out``: last.pt, stable.pt, curve.csv.

    last.pt holds the whole state: ``resume`` with the one in ``out`` goes on exactly, clock included. stable.pt holds
    the weights before the decay in half precision: resumed, it starts a new run, as any other checkpoint does.
    """
    model_config, config = read_config(config_path)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name == "cuda" and world > 1:
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(device_name)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed + rank)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    images = load_images(data)
    crops = Crops(images, config.crop, device, seed + rank)
    model = LossyModel(model_config)
    if resume is None:
        start_from_pca(model, crops)
    to_device: Any = model.to  # not all versions of torch declare memory_format
    to_device(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    run: nn.Module = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optim = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    step, spent = 0, 0.0
    if resume is not None:
        state = torch.load(resume, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state.get("average", state["model"]))
        if "optim" in state and resume.parent.resolve() == out.resolve():
            step, spent = state["step"], state["spent"]
            optim.load_state_dict(state["optim"])
            if world == 1:
                crops.generator.set_state(state["generator"].cpu())
                torch.set_rng_state(state["torch"].cpu())

    out.mkdir(parents=True, exist_ok=True)
    val_images = load_images(val) if val is not None and rank == 0 else []

    def keep_stable() -> None:
        half = {name: tensor.half().cpu() for name, tensor in average.state_dict().items()}
        torch.save({"model": half, "config": asdict(model_config)}, out / "stable.pt")

    def checkpoint() -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optim": optim.state_dict(),
            "generator": crops.generator.get_state(),
            "torch": torch.get_rng_state(),
            "config": asdict(model_config),
            "step": step,
            "spent": spent,
        }
        torch.save(state, out / "last.pt.tmp")
        (out / "last.pt.tmp").replace(out / "last.pt")

    def log(row: dict[str, float]) -> None:
        path = out / "curve.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" for k, v in row.items()})

    budget = minutes * 60
    last_save = last_log = spent
    kept_stable = spent > (1 - config.decay) * budget
    losses: list[float] = []
    for progress, clock in clocked(budget, spent, device, world):
        spent = clock
        exact = progress >= 1 - config.exact
        if exact != model.g_s.head.exact:
            model.exact(exact)
            average.exact(exact)
        if progress >= 1 - config.decay and not kept_stable:
            kept_stable = True
            if rank == 0:
                keep_stable()
        warm = min(1.0, (step + 1) / config.warmup)
        rate = config.lr * warm * min(1.0, (1 - progress) / config.decay)
        for group in optim.param_groups:
            group["lr"] = rate

        x = crops.batch(config.batch).to(device).contiguous(memory_format=torch.channels_last)
        quality = crops.qualities(config.batch).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = rate_distortion_loss(run, x, quality, config.loss_power)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        step += 1
        if step % AVERAGE_EVERY == 0:
            keep = min(config.ema**AVERAGE_EVERY, step / (step + 10 * AVERAGE_EVERY))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

        if step % 50 == 0:
            losses.append(loss.item())
        if rank == 0 and step % 200 == 0:
            print(f"{spent / 60:7.2f} min  step {step}  loss {np.mean(losses[-4:]):.4f}", flush=True)
        if rank == 0 and spent - last_save > 180:
            checkpoint()
            last_save = spent
        if rank == 0 and val_images and spent - last_log > max(120.0, budget / 12):
            log(validation_row(average, val_images, device, step, spent, losses))
            last_log = spent
    if rank == 0:
        spent = budget
        checkpoint()
        if val_images:
            log(validation_row(average, val_images, device, step, spent, losses))
            plot_curve(out)
    if world > 1:
        dist.destroy_process_group()


def plot_curve(folder: Path) -> None:
    """curve.csv as curve.png: rate-distortion curves over the validation passes. Needs matplotlib."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    with (folder / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(6, 4))
    colours = plt.get_cmap("viridis")
    for i, row in enumerate(rows):
        points = [(float(row[f"bpp_{q // 100}"]), float(row[f"psnr_{q // 100}"])) for q in VALIDATION_QUALITIES]
        label = f"{float(row['minutes']):.0f} min" if i in (0, len(rows) - 1) else None
        axes.plot(*zip(*points, strict=True), color=colours(i / max(1, len(rows) - 1)), label=label)
    axes.set(xlabel="bits per pixel", ylabel="PSNR, dB", title="validation, rounded latents")
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def validation_row(
    model: LossyModel, images: list[Tensor], device: torch.device, step: int, spent: float, losses: list[float]
) -> dict[str, float]:
    row = {"step": float(step), "minutes": spent / 60, "loss": float(np.mean(losses[-20:])) if losses else math.nan}
    for quality, bpp, psnr in validate(model, images, device):
        row |= {f"bpp_{quality // 100}": bpp, f"psnr_{quality // 100}": psnr}
    return row


def clocked(budget: float, spent: float, device: torch.device, world: int) -> Iterator[tuple[float, float]]:
    """(part of the budget used, seconds used) until it is used up; the same on all ranks."""
    last = time.monotonic()
    while True:
        now = time.monotonic()
        # A machine that slept, or a validation pass, must not eat the schedule in one bite.
        spent += min(now - last, 60.0)
        last = now
        if world > 1:
            shared = torch.tensor([spent], dtype=torch.float64, device=device)
            dist.broadcast(shared, 0)
            spent = float(shared)
        if spent >= budget:
            return
        yield spent / budget, spent
