"""Bjontegaard delta rate (VCEG-M33), with Akima interpolation in place of the cubic fit, which can overshoot."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.interpolate import Akima1DInterpolator

Curve = Sequence[tuple[float, float]]
"""Points of a codec: bits per pixel and PSNR in dB."""


class BdRate(NamedTuple):
    """Mean change of rate at equal PSNR, in per cent, and the PSNR range in dB that it was taken over."""

    percent: float
    low: float
    high: float


def bd_rate(anchor: Curve, test: Curve, low: float = -math.inf, high: float = math.inf) -> BdRate | None:
    """Rate of ``test`` against ``anchor`` between ``low`` and ``high`` dB, as far as both curves reach.

    Nothing is extrapolated: where the curves cover less than was asked for, the result's range is smaller.
    None if they share no range.
    """
    low = max(low, *(min(psnr for _, psnr in curve) for curve in (anchor, test)))
    high = min(high, *(max(psnr for _, psnr in curve) for curve in (anchor, test)))
    if low >= high:
        return None
    difference = (log_rate(test, low, high) - log_rate(anchor, low, high)) / (high - low)
    return BdRate(100 * math.expm1(difference), low, high)


def log_rate(curve: Curve, low: float, high: float) -> float:
    """Integral over PSNR of the logarithm of the rate."""
    rate, psnr = np.array(sorted(curve, key=lambda point: point[1])).T
    return float(Akima1DInterpolator(psnr, np.log(rate)).integrate(low, high))
