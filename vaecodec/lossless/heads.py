"""From known pixels and features to the densities of the pixels of one phase."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exact import ExactConv, keep_in, reach_of, requantise, snap
from .layers import (
    CENTRE,
    CHANNEL_ORDER,
    GATE_UNIT,
    HIDDEN_MAX,
    LEVEL_UNIT,
    MEAN_UNIT,
    OF_BYTE,
    OF_COARSE,
    OF_SIGNS,
    SCALES,
    SHAPES,
    Config,
    act,
    byte,
    byte_conv,
    coarse,
    coarse_bytes,
    conv,
    joined,
    last,
    logarithm,
    normalised,
    pixel_bits,
    signs,
)

MEAN_REACH, NEAREST_REACH = 1, 1
"""How many pixels beyond each ``local_mean`` and ``nearest`` look at."""


class Head(nn.Module):
    """From features and known pixels to mean, scale and shape of one phase, colour by colour.

    mean = centre + linear filter + gated linear filters + correction + shares of the residuals of the colours that are
    known. The centre is the median of the four nearest known pixels; for red and blue, green and the median of their
    differences from green. ``known``: phases whose pixels are known;
    ``span``: how many grey levels a correction of 1 means.
    """

    in_bytes = False

    def __init__(self, c: Config, channels: int, known: int, span: float) -> None:
        super().__init__()
        self.filters, self.span = (c.filters if known else 0), span
        if known:
            self.base = ExactConv(
                3 * known,
                3 * (1 + c.filters),
                5,
                in_unit=1.0,
                in_max=CENTRE,
                out_unit=MEAN_UNIT,
                low=round(-255 / MEAN_UNIT),
                high=round(255 / MEAN_UNIT),
                wide=True,
                linear=True,
            )
            self.base.weight.data.mul_(0.3)
        self.build_hidden(c, channels, known)
        self.out = nn.ModuleList(
            last(c.hidden, 3 + self.filters + k, zero=True, in_bytes=self.in_bytes) for k in range(3)
        )

    def build_hidden(self, c: Config, channels: int, known: int) -> None:
        given = HIDDEN_MAX + 1  # and what is added to it can change nothing beyond twice that
        self.hidden: Any = conv(channels + 3 * (known > 0), 3 * c.hidden, low=-2 * given, high=2 * given)
        self.given = nn.ModuleList(conv(3 * k, c.hidden, low=-given, high=given) for k in (1, 2))

    def enter(self, h: Tensor, spread: Tensor | None, colour: int | None = None) -> list[Tensor]:
        """What ``activations`` takes of the state h [B, width, h, w], for one colour or for all. spread: see
        ``Start``."""
        inputs = h if spread is None else joined(h, spread)
        rows = torch.arange(len(self.hidden.weight), device=h.device)
        if colour is not None:
            return [self.hidden(inputs, rows=rows.chunk(3)[colour])]
        return list(self.hidden(inputs).chunk(3, 1))

    def activations(self, k: int, entered: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden activations of the k-th colour [B, K, h, w]. See ``enter`` and ``colour``."""
        if not k:
            return act(entered)
        inputs = torch.stack(
            [part for r, e in seen for part in (coarse(r, self.exact), e, logarithm(r, self.exact))], 1
        )
        return act(entered + self.given[k - 1](inputs.to(entered.dtype)))

    @property
    def exact(self) -> bool:
        layer = self.out[0]
        assert isinstance(layer, ExactConv)
        return layer.exact

    @property
    def reach(self) -> int:
        """How many pixels beyond each a start looks at, see ``Level.prepare``."""
        return max(reach_of(self.base), NEAREST_REACH)

    @property
    def reach_of_colour(self) -> int:
        """And how many ``enter`` and ``colour`` do."""
        return reach_of(self.hidden, self.given, self.out)

    def linear(self, known: list[Tensor]) -> Tensor:
        """The linear filters [B, 3 (1 + filters), h, w], colours in coding order, of known pixels [B, 3, h, w] each."""
        edge = self.base.reach
        pixels = F.pad(torch.cat(known, 1) - CENTRE, (edge,) * 4, mode="replicate")
        x: Tensor = self.base(pixels)[..., edge:-edge, edge:-edge]
        return x

    def colour(
        self, k: int, entered: Tensor, linear: Tensor | None, centre: Tensor, seen: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, scale index and shape [B, h, w] of the k-th colour.

        entered: of ``enter``; centre [B, h, w]; seen: for each earlier colour its
        residual in grey levels and the residual in scales (``normalised``).
        """
        exact = self.exact
        out = F.hardtanh(self.out[k](self.activations(k, entered, seen)).float(), -16, 16)
        mean = centre + out[:, 0] * self.span
        # The factors set how far a training step moves each: many filters add up, so a gate must move little.
        gates = requantise(out[:, 3 : 3 + self.filters] / 8, GATE_UNIT, -2, 2, exact)
        shares = requantise(out[:, 3 + self.filters :] / 2, GATE_UNIT, -2, 2, exact)
        if linear is not None:
            own = linear.chunk(3, 1)[k]
            mean = mean + own[:, 0] + (own[:, 1:] * gates).sum(1)
        for (residual, _), share in zip(seen, shares.unbind(1), strict=True):
            mean = mean + residual * share
        index = requantise(keep_in(16 + 4 * out[:, 1], 0, SCALES - 1), 1.0, 0, SCALES - 1, exact)
        shape = requantise(keep_in(1 + 2 * out[:, 2], 0, SHAPES - 1), 1.0, 0, SHAPES - 1, exact)
        return requantise(mean, MEAN_UNIT, 0, 255, exact), index, shape


class ByteHead(Head):
    """A head whose hidden activations are bytes, each colour's of one layer."""

    in_bytes = True

    def build_hidden(self, c: Config, channels: int, known: int) -> None:
        spread, given = (3 * (known > 0), OF_BYTE), ((1, OF_COARSE), (1, OF_SIGNS), (1, OF_BYTE))
        self.given = nn.ModuleList()
        self.hidden = nn.ModuleList(byte_conv(channels, c.hidden, 1, spread, *given * k) for k in range(3))

    def enter(self, h: Tensor, spread: Tensor | None, colour: int | None = None) -> list[Tensor]:
        inputs = h if spread is None else joined(h, byte(spread))
        return [inputs] * (3 if colour is None else 1)

    def activations(self, k: int, entered: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        given = []
        for r, e in seen:
            r, e = r[:, None], e[:, None]
            given += [coarse_bytes(coarse(r, self.exact), self.exact), signs(e), byte(logarithm(r, self.exact))]
        hidden: Tensor = self.hidden[k](joined(entered, *given) if given else entered)
        return hidden


class Phase(NamedTuple):
    """What a training pass gives for the samples of one phase [B, 3, h, w]: residual, scale index, shape."""

    residual: Tensor
    scale: Tensor
    shape: Tensor

    def bits(self) -> Tensor:
        return pixel_bits(*self)


class Start(NamedTuple):
    """What a head starts from beside the state: where means start [B, 3, h, w] and, where there are known pixels, the
    linear filters [B, 3 (1 + filters), h, w] and how far those pixels lie apart, as an activation [B, 3, h, w]."""

    centre: Tensor
    linear: Tensor | None = None
    spread: Tensor | None = None


def predict(head: Head, h: Tensor, start: Start, x: Tensor) -> tuple[Phase, Tensor]:
    """All colours of a phase whose pixels x [B, 3, h, w] are known, and the activations that tell later phases how
    good the prediction was [B, 3, h, w]."""
    seen: list[tuple[Tensor, Tensor]] = []
    parts = []
    entered = head.enter(h, start.spread)
    for k, c in enumerate(CHANNEL_ORDER):
        centre = start.centre[:, c] + x[:, 1] if k and start.linear is not None else start.centre[:, c]
        mean, index, shape = head.colour(k, entered[k], start.linear, centre, seen)
        residual = x[:, c] - mean
        seen.append((residual, normalised(residual, index, head.exact)))
        parts.append((residual, index, shape))
    phase = Phase(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))
    return phase, torch.stack([e for _, e in seen], 1)


def split(x: Tensor) -> dict[str, Tensor]:
    """The four phases of x [B, 3, 2h, 2w]: [B, 3, h, w] each."""
    return {"A": x[..., ::2, ::2], "B": x[..., ::2, 1::2], "C": x[..., 1::2, ::2], "D": x[..., 1::2, 1::2]}


def local_mean(a: Tensor) -> Tensor:
    """Binomial 3x3 mean of a [B, 3, h, w] in steps of LEVEL_UNIT."""
    x = F.pad(a, (1, 1, 1, 1), mode="replicate")
    x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    x = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    return snap(x / 16, LEVEL_UNIT)


def differences(x: Tensor) -> Tensor:
    """Red and blue less green, and green, of x [B, 3, h, w]."""
    green = x[:, 1:2]
    return torch.cat([x[:, :1] - green, green, x[:, 2:] - green], 1)


def nearest(phase: str, known: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the four nearest known pixels, for each pixel of a phase, the mean of the two middle ones and the difference
    of the outer ones [B, 3, h, w]; of red and blue, of their differences from green."""
    known = [differences(pixels) for pixels in known]
    height, width = known[0].shape[2:]

    def at(pixels: Tensor, row: int, column: int) -> Tensor:
        padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
        return padded[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    a = known[0]
    if phase == "D":
        four = (a, at(a, 1, 1), at(a, 0, 1), at(a, 1, 0))
    elif phase == "B":
        four = (a, at(a, 0, 1), at(known[1], -1, 0), known[1])
    else:
        four = (a, at(a, 1, 0), at(known[1], 0, -1), known[1])
    lows = torch.minimum(four[0], four[1]), torch.minimum(four[2], four[3])
    highs = torch.maximum(four[0], four[1]), torch.maximum(four[2], four[3])
    middle = (torch.maximum(*lows) + torch.minimum(*highs)) / 2
    return middle, torch.maximum(*highs) - torch.minimum(*lows)
