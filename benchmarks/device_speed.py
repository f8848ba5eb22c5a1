"""Speed of vaecodec on a device, and where the time goes: networks, refined passes of lossless tiles, entropy coding,
transfers, the rest.

A second run takes the shares: whatever enters one of these waits for the device first, and tiles are coded one after
the other, so it is slower than the one that is timed. With TRITON_INTERPRET=1 a CPU does what a GPU would, slowly.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image, ImageOps

import vaecodec.engine_onnx
import vaecodec.lossless.refine
import vaecodec.lossless.weights
import vaecodec.lossy.weights
import vaecodec.together
from bitstream import AnsStack
from vaecodec import Codec

PARTS = ("networks", "passes", "entropy coding", "transfers", "rest")
MOSAIC = (3072, 2048)
"""Of one large picture on a GPU, 6.3 megapixels."""


class Clock:
    """Seconds spent in each of PARTS; what is entered from within another part does not count for that."""

    def __init__(self, device: str) -> None:
        synchronise: Callable[[], None] = torch.cuda.synchronize
        self.wait = synchronise if device.startswith("cuda") else lambda: None
        self.spent, self._parts, self._since = dict.fromkeys(PARTS, 0.0), ["rest"], time.perf_counter()

    def _turn(self) -> None:
        self.wait()
        now = time.perf_counter()
        self.spent[self._parts[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        self._turn()
        self._parts.append(part)
        try:
            yield
        finally:
            self._turn()
            self._parts.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with self.of(part):
                return function(*arguments, **options)

        return run

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Networks and coder tell when they are entered, in one thread at a time."""
        stacks: list[Any] = [AnsStack]
        with contextlib.suppress(ImportError):
            from vaecodec.device_coder import DeviceStack

            stacks.append(DeviceStack)
        targets = [(stack, name, "entropy coding") for stack in stacks for name in ("push", "pop", "to_bytes")]
        refine = vaecodec.lossless.refine
        targets += [(refine.Passes, name, "passes") for name in ("__init__", "inputs", "moved", "see")]
        targets += [(refine.Layers, "outputs", "passes"), (vaecodec.engine_onnx.Sessions, "run", "networks")]
        targets += [(torch.Tensor, "cpu", "transfers")]
        with contextlib.ExitStack() as patches:
            for owner, name, part in targets:
                patches.enter_context(mock.patch.object(owner, name, self.timed(part, getattr(owner, name))))
            for module in (vaecodec.lossy.weights, vaecodec.lossless.weights):
                patches.enter_context(mock.patch.object(module, "exact_arithmetic", self.within(module)))
            patches.enter_context(mock.patch.object(vaecodec.together, "ROOM", 0))
            patches.enter_context(mock.patch.object(torch.Tensor, "to", self.moving(torch.Tensor.to)))
            self._since = time.perf_counter()
            yield
        self._turn()

    def moving(self, to: Callable[..., Any]) -> Callable[..., Any]:
        """``Tensor.to``, which is also what changes a type."""
        timed = self.timed("transfers", to)

        def run(x: torch.Tensor, where: Any, *arguments: Any, **options: Any) -> Any:
            elsewhere = isinstance(where, torch.device) and where != x.device
            return (timed if elsewhere else to)(x, where, *arguments, **options)

        return run

    def within(self, module: Any) -> Callable[..., Any]:
        """Networks run in this context, and nothing else does."""
        exact = module.exact_arithmetic

        @contextlib.contextmanager
        def entered(device: torch.device) -> Iterator[None]:
            with self.of("networks"), exact(device):
                yield

        return entered


def measured(codec: Codec, pictures: list[Image.Image], device: str, **options: Any) -> list[str]:
    """Rows of the table for encoding and decoding: megapixels a second, and shares in per cent."""
    pixels, rows, files = sum(p.width * p.height for p in pictures) / 1e6, [], list[bytes]()

    def encode() -> None:
        files[:] = codec.compress_batch(pictures, **options)

    def decode() -> None:
        codec.decompress_batch(files)

    for name, work in (("encode", encode), ("decode", decode)):
        work()  # kernels are compiled and tuned
        start = time.perf_counter()
        work()
        speed, clock = pixels / (time.perf_counter() - start), Clock(device)
        with clock.watching():
            work()
        shares = [100 * clock.spent[part] / sum(clock.spent.values()) for part in PARTS]
        rows.append(f"{name} | {pixels:.1f} | {speed:.2f} | " + " | ".join(f"{share:.0f}" for share in shares) + " |")
    return rows


def mosaic(files: list[Path]) -> Image.Image:
    """One large picture of many, two by two."""
    canvas, cell = Image.new("RGB", MOSAIC), (MOSAIC[0] // 2, MOSAIC[1] // 2)
    for place in range(4):
        picture = Image.open(files[place % len(files)]).convert("RGB")
        left, top = place % 2 * cell[0], place // 2 * cell[1]
        canvas.paste(ImageOps.fit(picture, cell, Image.Resampling.LANCZOS), (left, top))
    return canvas


def coding(codec: Codec) -> Codec:
    """The codec, whose symbols are tensors as on a GPU: without one, in Triton's interpreter."""
    codec.lossy.codes = codec.lossless.codes = True
    return codec


def run(files: list[Path], quality: float, device: str) -> None:
    """Print the table: of one picture, on a GPU a large one, and of all of them as a batch."""
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    codec = coding(Codec(device, engine="torch")) if interpreted else Codec(device)
    batch = [Image.open(file).convert("RGB") for file in files]
    one = mosaic(files) if codec.device.startswith("cuda") else batch[0]
    print("| pictures | | megapixels | MP/s | " + " | ".join(f"{part} %" for part in PARTS) + " |")
    print("|---|---|--:|--:|" + "--:|" * len(PARTS))
    modes: dict[str, dict[str, Any]] = {f"quality {quality:g}": {"quality": quality}, "lossless": {"lossless": True}}
    for mode, options in modes.items():
        for name, pictures in (("one", [one]), (f"batch of {len(batch)}", batch)):
            for row in measured(codec, pictures, codec.device, **options):
                print(f"| {name}, {mode} | {row}", flush=True)
