"""Bjontegaard delta rate (VCEG-M33), with Akima interpolation in place of the cubic fit, which can overshoot."""

import math
import warnings
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

    Nothing is extrapolated: where the curves cover less than was asked for, the result's range is smaller. None, and a
    UserWarning that says why, if they share no range or if one is no curve.
    """
    for name, curve in (("anchor", anchor), ("test", test)):
        if fault := oddity(curve):
            warnings.warn(f"no BD-rate: the {name} curve {fault}", stacklevel=2)
            return None
    low = max(low, *(min(psnr for _, psnr in curve) for curve in (anchor, test)))
    high = min(high, *(max(psnr for _, psnr in curve) for curve in (anchor, test)))
    if not low < high:
        warnings.warn("no BD-rate: the curves share no range", stacklevel=2)
        return None
    difference = (log_rate(test, low, high) - log_rate(anchor, low, high)) / (high - low)
    return BdRate(100 * math.expm1(difference), low, high)


def oddity(curve: Curve) -> str:
    """Why no rate can be read off a curve at each PSNR between its ends, "" if it can."""
    if len(curve) < 2:
        return f"has {len(curve)} points"
    if not all(math.isfinite(value) for point in curve for value in point):
        return "has a point that is not finite"
    if any(bpp <= 0 for bpp, _ in curve):
        return "has a rate that is not positive"
    return "" if len({psnr for _, psnr in curve}) == len(curve) else "has two points of one PSNR"


def log_rate(curve: Curve, low: float, high: float) -> float:
    """Integral over PSNR of the logarithm of the rate."""
    rate, psnr = np.array(sorted(curve, key=lambda point: point[1])).T
    return float(Akima1DInterpolator(psnr, np.log(rate)).integrate(low, high))
