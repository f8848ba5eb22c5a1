"""Which library runs the networks: torch, or on a CPU ONNX Runtime, which starts ten times as fast.

torch may be missing, and is imported where it is needed and not before.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

from bitstream import VaeError

ENGINES = ("auto", "onnx", "torch")

_wanted: int | None = None


class MissingError(VaeError, ImportError):
    """A library that is needed is not installed."""


def need(name: str, purpose: str, extra: str) -> None:
    """Raises MissingError where a library is not installed that an extra of the package brings."""
    if not installed(name):
        raise MissingError(f"{purpose} needs {name}: pip install 'vaecodec[{extra}]'")


def torch_for(purpose: str) -> ModuleType:
    """torch, imported. Raises MissingError."""
    need("torch", purpose, "torch")
    first = torch_if_loaded() is None
    import torch

    if first and _wanted:
        torch.set_num_threads(_wanted)
    return torch


def torch_if_loaded() -> ModuleType | None:
    """Who has not imported torch has no tensors and compiles nothing."""
    return sys.modules.get("torch")


def installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def device_named(name: str) -> str:
    """A device in torch's words; "auto" is CUDA if there is any. Raises RuntimeError if it is not there."""
    if name == "auto":
        name = "cuda" if has_cuda() else "cpu"
    if name == "cpu":
        return name
    torch = torch_for(f"device {name}")
    return str(torch.empty(0, device=name).device)


def has_cuda() -> bool:
    """torch knows, but takes seconds to import: without a driver there is none to ask it for."""
    if torch_if_loaded() is None:
        drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl", "/dev/nvmap", "/dev/kfd")
        if sys.platform == "darwin" or not (sys.platform == "win32" or any(map(os.path.exists, drivers))):
            return False
        if not installed("torch"):
            return False
    return bool(torch_for("CUDA").cuda.is_available())


def use_threads(count: int) -> None:
    """CPU threads of what runs from here on."""
    global _wanted
    _wanted = count
    if torch := torch_if_loaded():
        torch.set_num_threads(count)


def threads() -> int:
    """As many as were asked for, or as torch would take."""
    if _wanted:
        return _wanted
    if torch := torch_if_loaded():
        return int(torch.get_num_threads())
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdigit() and int(first) > 0:
        return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
