"""Plots of a sweep: accuracy over lambda per severity, the best lambda over the residual, and rebuilt pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sdnet.bench.plots import save_figure
from sdnet.robustness.rules import line_through

DPI = 110


def curves_plot(
    path: Path,
    lambdas: Sequence[float],
    scores: Mapping[str, Mapping[int, Sequence[float]]],
    points: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Draw the accuracy over lambda for each noise, and beside them the best lambda over the residual with its line.

    Args:
        path: the PNG file.
        lambdas: the grid.
        scores: the accuracies over the grid, by noise and severity; severity 0 is the clean picture.
        points: (mean residual, best lambda) of every severity, by noise.
    """
    count = len(scores)
    figure = Figure(figsize=(2.6 * count + 3.4, 3), layout="constrained")
    axes = figure.subplots(1, count + 1, width_ratios=[1.0] * count + [1.4])
    for axis, (noise, by_severity) in zip(axes, scores.items(), strict=False):
        for severity, values in sorted(by_severity.items()):
            axis.plot(lambdas, values, marker=".", label=f"severity {severity}" if severity else "clean")
        axis.set(title=noise, xlabel="lambda")
        axis.sharey(axes[0])
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(fontsize="x-small")
    draw_line(axes[-1], points)
    save_figure(figure, path, DPI)


def draw_line(axis: Axes, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw the best lambda over the mean residual, with the least-squares line through all points."""
    for noise, of_noise in points.items():
        axis.plot([r for r, _ in of_noise], [lam for _, lam in of_noise], "o", markersize=4, label=noise)
    every = [point for of_noise in points.values() for point in of_noise]
    residuals = [r for r, _ in every]
    if len(set(residuals)) > 1:
        slope, intercept = line_through(residuals, [lam for _, lam in every])
        ends = [min(residuals), max(residuals)]
        axis.plot(ends, [slope * r + intercept for r in ends], "k-", label=f"{slope:.2g} r {intercept:+.2g}")
    axis.set(xlabel="mean residual r at the training lambda", ylabel="best lambda")
    axis.legend(fontsize="x-small")


def pictures_plot(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Draw pictures: a row for each picture, a column for each version.

    Args:
        path: the PNG file.
        columns: pixels in [0, 1], [N, 3, H, W], by title.
    """
    count = len(next(iter(columns.values())))
    figure = Figure(figsize=(2 * len(columns), 2 * count), layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, pixels) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize="small")
        for row in range(count):
            axes[row][column].imshow(pixels[row].clamp(0, 1).permute(1, 2, 0).cpu().numpy())
            axes[row][column].set_axis_off()
    save_figure(figure, path, DPI)
