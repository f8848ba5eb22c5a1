"""A training step as one function of tensors that stay where they are: a CPU calls it, a GPU replays it as a graph."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitstream import VaeError

from ..exact import Conv
from . import ranks
from .crops import Crops
from .objective import Objective, Phase
from .soap import Kernel, Soap

AVERAGE_EVERY = 5  # steps; each update reads all weights
JUDGE_EVERY = 200
"""Steps over which the guard takes the mean of the loss."""
JUMP, SLOWER = 1.15, 2 / 3
"""How many times the smallest mean so far is a jump, and what is then left of the learning rate."""
CLIP, NORM_LERP = 2.0, 0.02
"""How many times their usual norm gradients may have, and how fast that follows."""
WARM_UP, IN_FLIGHT = 3, 2
"""Steps before a graph is captured, and how many a GPU may lag behind."""


class UnsoundError(VaeError):
    """The loss or a gradient is not finite any more."""


class Trainer:
    """A model in training, its average, its optimisers, and the guard that goes back where the loss jumps.

    ``step`` is the whole of a step: crops, loss, gradients, clipping, optimisers. It waits for nothing and changes
    tensors in place, ``changing`` all of them, so that ``capture`` can make graphs of it; ``launch`` runs either.
    """

    def __init__(
        self, objective: Objective, model: Any, crops: Crops, *, lr: float, soap: float = 0.0, ema: float = 0.999
    ) -> None:
        """lr: Adam's rate; soap: that of SOAP for the layers' matrices, 0 leaves them to Adam. ema: of the average."""
        self.objective, self.model, self.crops, self.ema = objective, model, crops, ema
        self.device = crops.device
        self.average = copy.deepcopy(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.steps, self.slowed = 0, 1.0
        self.loss, self.total, self.norm, self.unsound = (torch.zeros((), device=self.device) for _ in range(4))

        convs = [m for m in model.modules() if isinstance(m, Conv) and m.weight.requires_grad] if soap else []
        matrices = {id(conv.weight) for conv in convs}
        others = [p for p in self.parameters if id(p) not in matrices]
        self.rates = [(torch.zeros((), device=self.device), base) for base in ((lr, soap) if convs else (lr,))]
        adam = torch.optim.Adam(others, lr=self.rates[0][0], fused=True, capturable=self.device.type == "cuda")
        begin(adam)
        self.optimisers: list[torch.optim.Optimizer] = [adam]
        self.soap: Soap | None = None
        if convs:
            # Wide layers are linear paths, whose sizes are what the data make them.
            kernels = [Kernel(conv.weight, conv.shape[1], not conv.wide) for conv in convs]
            self.soap = Soap(kernels, self.rates[1][0])
            self.optimisers.append(self.soap)

        self.graphs: dict[tuple[Phase, bool], Callable[[], None]] = {}
        self.events = deque[torch.cuda.Event]()
        self.phase: Phase | None = None
        self.best, self.count = math.inf, 0
        self.kept = [tensor.clone() for tensor in self.weights()]

    def step(self, phase: Phase, learn: bool = True) -> None:
        """learn: SOAP's factors, too."""
        self.model.exact(phase.exact)
        for parameter in self.objective.frozen(self.model):
            parameter.requires_grad_(not phase.hard)
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.objective.loss(self.model, self.crops, phase)
        loss.backward()  # type: ignore[no-untyped-call]
        loss = loss.detach()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        ranks.mean([loss, *grads])
        norm = clip(grads, self.norm)
        for optimiser in self.optimisers:
            optimiser.step()
        if self.soap is not None and learn:
            self.soap.learn()
        self.loss.copy_(loss)
        self.total.add_(loss)
        self.unsound.add_(1 - (loss.isfinite() & norm.isfinite()).float())

    def launch(self, phase: Phase, rate: float) -> None:
        """A step at a part of the learning rates, and what is done between steps."""
        for tensor, base in self.rates:
            tensor.fill_(base * rate * self.slowed)
        learn = self.soap is not None and self.soap.learns(self.steps)
        self.graphs.get((phase, learn), partial(self.step, phase, learn))()
        self.steps += 1
        self.count += 1
        if self.soap is not None and self.soap.turns(self.steps):
            self.soap.turn()
        if self.steps % AVERAGE_EVERY == 0:
            keep = min(self.ema**AVERAGE_EVERY, self.steps / (self.steps + 10 * AVERAGE_EVERY))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        if self.device.type == "cuda":
            self.events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            self.events[-1].record()
            if len(self.events) > IN_FLIGHT:
                self.events.popleft().synchronize()

    def capture(self, phases: Sequence[Phase]) -> None:
        """Two graphs for each phase, with and without SOAP's factors; what the warm-up changes is put back."""
        before, random = [t.clone() for t in self.changing()], torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        for phase in phases:
            self.warm_up(phase, stream)
            pool = None
            for learn in (True, False) if self.soap is not None else (False,):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self.step(phase, learn)
                pool = graph.pool()
                self.graphs[phase, learn] = graph.replay
        torch._foreach_copy_(self.changing(), before)
        torch.cuda.set_rng_state(random, self.device)

    def warm_up(self, phase: Phase, stream: torch.cuda.Stream) -> None:
        """Some steps at rate 0, so that libraries have chosen their kernels, and crops have their tables."""
        for tensor, _ in self.rates:
            tensor.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.step(phase)
        torch.cuda.current_stream().wait_stream(stream)

    def weights(self) -> list[Tensor]:
        """What the guard keeps: the weights and their averages."""
        return [p.detach() for part in (self.model, self.average) for p in part.parameters()]

    def changing(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        states = [state for optimiser in self.optimisers for state in optimiser.state.values()]
        moments = [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
        return [*self.weights(), *moments, self.loss, self.total, self.norm, self.unsound]

    def check(self) -> float:
        """The last loss. Raises UnsoundError if it or any before was not finite, with the weights that are sound."""
        loss = float(self.loss)
        if self.unsound:
            self.back()
            what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise UnsoundError(f"step {self.steps}: {what}; training stopped, at the last sound weights")
        return loss

    def enter(self, phase: Phase) -> None:
        """Begin a phase. It has other losses than the one before: the guard forgets those it has seen."""
        if phase.exact and not (self.phase is not None and self.phase.exact):
            self.calibrate(phase.crop)
        self.phase = phase
        self.model.exact(phase.exact)
        self.average.exact(phase.exact)
        self.best, self.count = math.inf, 0
        self.total.zero_()

    def calibrate(self, side: int) -> None:
        """Set the units of 8-bit layers, by the averaged weights on crops of ``side`` pixels."""
        self.objective.calibrate(self.average, self.crops, side)
        with torch.no_grad():
            for mine, set_ in zip(self.model.buffers(), self.average.buffers(), strict=True):
                mine.copy_(set_)

    def judge(self) -> str:
        """Keep the weights if the loss behaves; otherwise go back to those kept, more slowly, and say so."""
        mean = float(self.total) / max(self.count, 1)
        if mean < JUMP * self.best:
            self.total.zero_()
            self.count = 0
            self.best = min(self.best, mean)
            torch._foreach_copy_(self.kept, self.weights())
            return ""
        self.back()
        self.slowed *= SLOWER
        return f"step {self.steps}: a loss of {mean:.4g} after {self.best:.4g}: back to the weights before, more slowly"

    def back(self) -> None:
        """To the weights that were kept, with optimisers that head nowhere."""
        torch._foreach_copy_(self.weights(), self.kept)
        for optimiser in self.optimisers:
            for state in optimiser.state.values():
                for name, tensor in state.items():
                    if name in ("exp_avg", "first") or not tensor.isfinite().all():
                        tensor.zero_()
        self.norm.nan_to_num_(0, 0, 0)
        for tensor in (self.loss, self.total, self.unsound):
            tensor.zero_()
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on as if it had not been interrupted."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optim": [optimiser.state_dict() for optimiser in self.optimisers],
            "norm": self.norm,
            "guard": {"total": self.total, "kept": self.kept, "best": self.best, "count": self.count},
            "phase": None if self.phase is None else asdict(self.phase),
            "step": self.steps,
            "slowed": self.slowed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of other optimisers."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        if len(state["optim"]) != len(self.optimisers):
            raise ValueError("the checkpoint has other optimisers than the configuration")
        for optimiser, kept, (rate, _) in zip(self.optimisers, state["optim"], self.rates, strict=True):
            optimiser.load_state_dict(kept)
            for group in optimiser.param_groups:
                group["lr"] = rate
        if state["phase"] is not None:
            self.phase = Phase(**state["phase"])
            self.model.exact(self.phase.exact)
            self.average.exact(self.phase.exact)
        self.norm.copy_(state["norm"])
        self.total.copy_(state["guard"]["total"])
        torch._foreach_copy_(self.kept, state["guard"]["kept"])
        self.best, self.count = state["guard"]["best"], state["guard"]["count"]
        self.steps, self.slowed = state["step"], state["slowed"]


def begin(adam: torch.optim.Adam) -> None:
    """Make Adam's state, which would come with its first step: a graph wants it where it stays."""
    parameters = [p for group in adam.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    adam.step()  # of 0, at rate 0
    for parameter in parameters:
        parameter.grad = None
        for tensor in adam.state[parameter].values():
            tensor.zero_()


@torch.no_grad()
def clip(grads: list[Tensor], usual: Tensor) -> Tensor:
    """Scale gradients down to CLIP times their usual norm [], which is updated; 0 is that of none. Gives their norm.

    Outliers, clipped, hardly move what is usual.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    limit = torch.where(usual > 0, CLIP * usual, norm)
    torch._foreach_mul_(grads, (limit / (norm + 1e-12)).clamp(max=1.0))
    usual.copy_(torch.lerp(torch.where(usual > 0, usual, norm), norm.minimum(limit), NORM_LERP))
    return norm
