"""The figures of `python -m sdnet.bench look`, for print: 300 dots per inch, colours of viridis and cividis.

Both colour maps grow evenly in lightness and are told apart by colour-blind readers and in grey print.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sdnet.inspection import ObjectiveCurve, atom_grid
from sdnet.layers import CSCConv2d

DPI = 300
WIDTH = 7.0
"""Inches: the width of a page between its margins."""

SHOWN_MAPS = 15
SMALLEST_GAP = 1e-8


def show(axes: Axes, picture: Tensor, title: str = "") -> None:
    """Show a picture [C, H, W] with values in [0, 1]."""
    pixels = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()


def tiles(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with room for `count` pictures, all axes switched off."""
    rows = ceil(count / columns)
    figure = Figure(figsize=(WIDTH, rows * (WIDTH / columns + 0.3)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for each in axes:
        each.set_axis_off()
    return figure, axes


def atoms(name: str, layer: CSCConv2d) -> Figure:
    """Draw the atoms of a layer."""
    figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
    axes = figure.subplots()
    height, width = layer.kernel_size
    channels = "" if layer.weight.shape[1] == 3 else ", the strongest input channel of each"
    show(axes, atom_grid(layer.weight))
    axes.set_title(f"{name}: {layer.out_channels} atoms, {height}x{width}{channels}", fontsize=9)
    return figure


def codes(name: str, picture: Tensor, maps: Tensor) -> Figure:
    """Draw the code maps [K, h, w] of the atoms with the largest sums of absolute codes, on one scale."""
    strength = maps.abs().sum((1, 2))
    strongest = strength.argsort(descending=True)[:SHOWN_MAPS].tolist()
    figure, axes = tiles(1 + len(strongest), 4)
    show(axes[0], picture, "image")
    limit = float(maps[strongest].abs().max()) or 1.0
    signed = bool((maps < 0).any())
    image = None
    for each, k in zip(axes[1:], strongest, strict=False):
        low, colours = (-limit, "PuOr") if signed else (0.0, "viridis")
        image = each.imshow(maps[k].numpy(), cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
        each.set_title(f"atom {k}, {float((maps[k] == 0).float().mean()):.0%} zeros", fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.6, label="code")
    figure.suptitle(f"codes of {name}", fontsize=9)
    return figure


def inversions(picture: Tensor, matched: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the image and what the codes of every layer say about it, with matched contrast."""
    figure, axes = tiles(1 + len(matched), 5)
    show(axes[0], picture, "image")
    for each, (name, rebuilt) in zip(axes[1:], matched.items(), strict=False):
        show(each, rebuilt[0], f"{name}\n{facts[name]['psnr_matched']:.1f} dB")
    figure.suptitle("pictures from the codes of each layer, contrast matched to the image; PSNR", fontsize=9)
    return figure


def objective(curves: Mapping[str, ObjectiveCurve], n_steps: Mapping[str, int]) -> Figure:
    """Draw the relative distance of the objective from its minimum over the iterations, a line for each layer."""
    figure = Figure(figsize=(WIDTH, 0.7 * WIDTH), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"]
    for index, (name, curve) in enumerate(curves.items()):
        colour = colours(0.9 * index / max(len(curves) - 1, 1))
        gap, steps = curve.gap.clamp_min(SMALLEST_GAP), range(1, len(curve.values) + 1)
        axes.plot(steps, gap, color=colour, linewidth=1, label=name, linestyle=("-", "--", ":")[index % 3])
        if n_steps[name] <= len(gap):
            axes.plot(n_steps[name], gap[n_steps[name] - 1], "o", color=colour, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("FISTA iterations; a dot marks those of the forward")
    axes.set_ylabel("(objective - minimum) / minimum")
    axes.legend(fontsize=6, ncols=2)
    return figure


def dictionaries(spectra: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the singular values of every dictionary, and their mutual coherences."""
    figure = Figure(figsize=(WIDTH, 0.6 * WIDTH), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = mpl.colormaps["viridis"]
    for index, (name, values) in enumerate(spectra.items()):
        position = [i / max(len(values) - 1, 1) for i in range(len(values))]
        colour = colours(0.9 * index / max(len(spectra) - 1, 1))
        left.plot(position, values, color=colour, linewidth=1, linestyle=("-", "--", ":")[index % 3], label=name)
    left.set_xlabel("rank, as a share of all")
    left.set_ylabel("singular value of the atoms")
    left.set_ylim(bottom=0)
    names = list(spectra)
    blue, orange = colours(0.15), colours(0.75)
    right.plot([facts[name]["coherence"] for name in names], names, "o", color=blue, label="all shifts")
    apart = [facts[name]["coherence_without_shifts"] for name in names]
    right.plot(apart, names, "s", color=orange, markerfacecolor="none", label="same place")
    right.set_xlim(0, 1.02)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=6)
    right.set_xlabel("mutual coherence")
    right.legend(fontsize=7)
    return figure
