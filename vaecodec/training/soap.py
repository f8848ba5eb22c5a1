"""SOAP (Vyas et al. 2024, arXiv:2409.11321): Adam in the slowly turning eigenbasis of Shampoo's two factors.

Ours and not a package's: pytorch_optimizer's counts its steps in Python, takes the rate as a number and replaces the
bases by new tensors, none of which survives in a CUDA graph; heavyball's is built on torch.compile and some thirty
other optimisers. Neither has the floor, without which training failed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEARN_EVERY = 4
TURN_EVERY = 20
EARLY, TURN_EARLY = 100, 5
"""So many first steps learn each time, and turn more often."""
LARGEST = 512
"""A side of more channels is left as it is."""


class Kernel(NamedTuple):
    """A weight [out, in * positions] of a layer with so many inputs, and whether it decays."""

    weight: nn.Parameter
    inputs: int
    decays: bool


class Soap(torch.optim.Optimizer):
    """Over stacks of equally shaped kernels [out, in, positions]: outputs and inputs are turned, positions are not.

    A training step calls ``step`` and, where ``learns`` says so, ``learn``; both can be part of a CUDA graph. Between
    steps, where ``turns`` says so, it calls ``turn``.

    rate: float [], changed in place from outside. floor: what is added to the root of the second moment, in units of
    its mean over the kernel: without it rows that are hardly ever active drift away at full speed. decay: decoupled
    weight decay of the kernels that decay. shampoo: how much of the factors is kept, each time they learn.
    """

    def __init__(
        self,
        kernels: Iterable[Kernel],
        rate: Tensor,
        *,
        betas: tuple[float, float] = (0.95, 0.99),
        shampoo: float = 0.85,
        floor: float = 0.02,
        decay: float = 0.05,
    ) -> None:
        stacks = defaultdict[tuple[int, int, int, bool], list[nn.Parameter]](list)
        for weight, inputs, decays in kernels:
            stacks[weight.shape[0], inputs, weight.shape[1] // inputs, decays].append(weight)
        groups = [
            {"params": weights, "shape": shape, "decay": decay if decays else 0.0}
            for (*shape, decays), weights in stacks.items()
        ]
        super().__init__(groups, {"lr": rate})
        self.betas, self.shampoo, self.floor = betas, shampoo, floor
        for group in self.param_groups:
            self.state[group["params"][0]] = fresh(group)

    def stacks(self) -> Iterable[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Each group with its state, which is kept under its first kernel."""
        return ((group, self.state[group["params"][0]]) for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the kernels that have a gradient."""
        for group, state in self.stacks():
            grad = stacked(group)
            state["first"].lerp_(grad, 1 - self.betas[0])
            # Both are turned at once: fewer and larger products.
            now, mean = turned(state, torch.cat([grad, state["first"]], 3)).chunk(2, 3)
            state["second"].lerp_(now.square(), 1 - self.betas[1])
            floor = self.floor * state["second"].mean((1, 2, 3), keepdim=True).sqrt()
            update = turned(state, mean / (state["second"].sqrt() + floor + 1e-12), back=True).flatten(2)
            if group["decay"]:
                update = update + group["decay"] * torch.stack(group["params"])
            moves = [
                (weight, move)
                for weight, move in zip(group["params"], (update * -group["lr"]).unbind(0), strict=True)
                if weight.grad is not None
            ]
            if moves:
                torch._foreach_add_(*map(list, zip(*moves, strict=True)))

    @torch.no_grad()
    def learn(self) -> None:
        """Update Shampoo's factors from the gradients."""
        for group, state in self.stacks():
            grad = stacked(group)
            for name, rows in (("left", grad.flatten(2)), ("right", grad.transpose(1, 2).flatten(2))):
                if name in state:
                    state[name].lerp_(rows @ rows.mT, 1 - self.shampoo)

    @torch.no_grad()
    def turn(self) -> None:
        """Turn the bases towards the factors' eigenvectors, by one step of orthogonal iteration."""
        for _, state in self.stacks():
            for name in ("left", "right"):
                if name in state:
                    basis = state[f"{name}_basis"]
                    basis.copy_(iterated(state[name], basis))

    def learns(self, step: int) -> bool:
        return step < EARLY or step % LEARN_EVERY == 0

    def turns(self, step: int) -> bool:
        return step % (TURN_EARLY if step < EARLY else TURN_EVERY) == 0


def fresh(group: dict[str, Any]) -> dict[str, Tensor]:
    """The state before the first step: moments [n, out, in, positions], factors and bases of the sides [n, d, d]."""
    weights, (out, inputs, _) = group["params"], group["shape"]
    like, count = weights[0], len(weights)
    state = {name: like.new_zeros(count, *group["shape"]) for name in ("first", "second")}
    for name, side in (("left", out), ("right", inputs)):
        if side <= LARGEST:
            state[name] = like.new_zeros(count, side, side)
            state[f"{name}_basis"] = torch.eye(side, device=like.device).repeat(count, 1, 1)
    return {name: tensor.detach() for name, tensor in state.items()}


def stacked(group: dict[str, Any]) -> Tensor:
    """The gradients [n, out, in, positions] of a group, 0 for a kernel that has none."""
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in group["params"]]
    return torch.stack(grads).view(len(grads), *group["shape"])


def turned(state: dict[str, Tensor], x: Tensor, back: bool = False) -> Tensor:
    """x [n, out, in, c] in the bases, or back from them."""
    n, out, inputs, c = x.shape
    if "left" in state:
        basis = state["left_basis"]
        x = ((basis if back else basis.mT) @ x.reshape(n, out, inputs * c)).view(n, out, inputs, c)
    if "right" in state:
        basis = state["right_basis"]
        rows = x.transpose(1, 2).reshape(n, inputs, out * c)
        x = ((basis if back else basis.mT) @ rows).view(n, inputs, out, c).transpose(1, 2)
    return x


def iterated(factor: Tensor, basis: Tensor) -> Tensor:
    """factor @ basis made orthonormal [n, d, d], in float64; the old basis where the factor is nothing or unsound."""
    size = factor.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].double()
    ridge = 1e-3 * torch.eye(factor.shape[1], dtype=torch.float64, device=factor.device)
    image = (factor.double() / (size + 1e-300) + ridge) @ basis.double()
    root, _ = torch.linalg.cholesky_ex(image.mT @ image)
    new = torch.linalg.solve_triangular(root, image.mT, upper=False).mT.to(basis.dtype)
    sound = new.isfinite().all(2).all(1)[:, None, None] & (size > 0)
    return torch.where(sound, new, basis)
