"""PNG plots of the ledger's rows. Each function returns whether there was something to draw."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnet.bench.ledger import Row
from sdnet.bench.step_clock import PHASES
from sdnet.bench.tables import comparison, grouped, over_baseline, rate, setting_words, speed_up, timed
from sdnet.files import write_atomically

Rows = Sequence[Row]


def save(path: Path, draw: Callable[[Axes], Any], height: float = 4) -> bool:
    """Draw on new axes and write the PNG, without a date in it."""
    figure = Figure(figsize=(8, height), layout="constrained")
    draw(figure.subplots())
    save_figure(figure, path)
    return True


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG, whole or not at all, without a date in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"format": "png", "dpi": dpi, "metadata": {"Software": None}}
    write_atomically(path, lambda temporary: figure.savefig(temporary, **options))


def bars(ratios: Mapping[str, float | None], path: Path, axis_label: str, height: float) -> bool:
    """Draw a bar for each ratio, with a line at 1."""
    found = {name: value for name, value in ratios.items() if value is not None}

    def draw(axes: Axes) -> None:
        axes.bar_label(axes.barh(list(found), list(found.values())), fmt="%.2f×", padding=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(axis_label)

    return bool(found) and save(path, draw, 1 + height * len(found))


def label(row: Row) -> str:
    """Return a training row in two lines."""
    return f"{row.provider}\n{', '.join(setting_words(row))}"


def training_ratios(rows: Rows, path: Path) -> bool:
    """Draw the training speed over ResNet-18's in the same run."""
    ratios = {label(row): over_baseline(row, rows) for row in timed(rows)}
    return bars(ratios, path, "training speed over ResNet-18 in the same run", 0.45)


def kernel_ratios(rows: Rows, path: Path) -> bool:
    """Draw the speed of our CSC layer over the faster of eager and compiled PyTorch, forward and backward."""
    groups = grouped([row for row in rows if row.mode == "both"], comparison).values()
    names = {", ".join((of[0].shape["layer"], of[0].dtype, of[0].layout)): of for of in groups}
    ratios = {name: speed_up(members) for name, members in names.items()}
    return bars(ratios, path, "speed over the faster of eager and compiled PyTorch, forward and backward", 0.3)


def roofline(rows: Rows, path: Path) -> bool:
    """Draw operations per second over operations per byte, below the ceilings of the same run."""
    points = [row for row in timed(rows) if row.metrics.get("flops")]

    def draw(axes: Axes) -> None:
        for provider, members in grouped(points, lambda row: row.provider).items():
            intensities = [row.metrics["flops"] / row.metrics["bytes"] for row in members]
            axes.scatter(intensities, [row.metrics["tflop_s"] for row in members], label=provider, s=18)
        low, high = (limit(row.metrics["flops"] / row.metrics["bytes"] for row in points) for limit in (min, max))
        for dtype, members in grouped(points, lambda row: row.dtype).items():
            copy, product = members[0].metrics["copy_gb_s"] / 1e3, members[0].metrics["gemm_tflop_s"]
            corners = sorted({low / 2, product / copy, high * 2})
            axes.plot(corners, [min(copy * x, product) for x in corners], linewidth=1, label=f"ceilings, {dtype}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte of the fused formulation")
        axes.set_ylabel("TFLOP/s")
        axes.legend(fontsize="small")

    return bool(points) and save(path, draw, 5)


def over(rows: Rows, path: Path, dimension: str, axis_label: str) -> bool:
    """Draw images per second over a size that varies within a run ("batch" or "n_steps")."""

    def line_of(row: Row) -> tuple[Any, ...]:
        others = tuple((name, value) for name, value in row.shape.items() if name != dimension)
        return (row.run, row.provider, row.dtype, row.layout, *others, *row.settings.items())

    lines = [members for members in grouped(timed(rows), line_of).values() if len(members) > 1]

    def draw(axes: Axes) -> None:
        for members in lines:
            members.sort(key=lambda row: row.shape[dimension])
            first = members[0]
            name = f"{first.provider}, {first.shape['image_size']} px, {first.dtype}, {first.layout}"
            axes.plot([row.shape[dimension] for row in members], [rate(row) for row in members], "o-", label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(axis_label)
        axes.set_ylabel("training images per second")
        axes.legend(fontsize="small")

    return bool(lines) and save(path, draw)


def step_bars(rows: Rows, path: Path) -> bool:
    """Draw the milliseconds of a step by phase, as stacked bars."""
    found = [row for row in timed(rows) if any(f"{phase}_ms" in row.metrics for phase in PHASES)]

    def draw(axes: Axes) -> None:
        names, left = [label(row) for row in found], [0.0] * len(found)
        for phase in PHASES:
            widths = [row.metrics.get(f"{phase}_ms", 0.0) for row in found]
            axes.barh(names, widths, left=left, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds of a training step")
        axes.legend(fontsize="small", ncols=len(PHASES), loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return bool(found) and save(path, draw, 1.6 + 0.45 * len(found))
