"""Plots of the ``kodak`` benchmark, each as PNG and as SVG."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .bd_rate import Curve

MARKERS = "os^Dv<>pXP*h"
plt.rcParams["svg.hashsalt"] = "vaecodec"  # the same picture gives the same file


def rate_distortion(curves: dict[str, Curve], published: dict[str, Curve], title: str, label: str, path: Path) -> Path:
    """Distortion over rate, which is logarithmic as in the BD-rate; published curves are dashed. Returns the SVG."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    colours = itertools.cycle(f"C{i}" for i in range(10))
    for marker, (name, points) in zip(itertools.cycle(MARKERS), curves.items(), strict=False):
        ours = name == "vaecodec"
        style = {"color": "black", "linewidth": 2.5, "zorder": 5} if ours else {"color": next(colours)}
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name, **style)
    greys = plt.get_cmap("cool")
    for number, (name, points) in enumerate(published.items()):
        colour = greys(number / max(len(published) - 1, 1))
        axes.plot(*zip(*points, strict=True), linestyle="--", linewidth=1, color=colour, label=f"{name} (published)")
    axes.set(title=title, xlabel="bits per pixel", ylabel=label, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return save(figure, path)


def bars(values: dict[str, float], title: str, label: str, path: Path) -> Path:
    """A bar for each codec, smallest first, with its number. Returns the SVG."""
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.45 * len(values)), layout="constrained")
    ordered = sorted(values.items(), key=lambda item: item[1])
    colours = ["black" if name.startswith("vaecodec") else "tab:blue" for name, _ in ordered]
    drawn = axes.barh([name for name, _ in ordered], [value for _, value in ordered], color=colours)
    axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(values.values()))
    axes.set(title=title, xlabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """``path`` with the suffixes .png and .svg."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path.with_suffix(".svg")
