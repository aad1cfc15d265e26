"""PNG plots of the ledger's rows. Each returns whether there was something to draw."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnet.bench.ledger import Row
from sdnet.bench.step_clock import PHASES
from sdnet.bench.tables import case_key, grouped, p50, rate, setting_words, speed_up, yardstick_of

Rows = Sequence[Row]


def drawn(path: Path, draw: Callable[[Axes], Any], width: float = 8, height: float = 4) -> bool:
    """Draw on fresh axes and write the PNG, without a date in it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.subplots())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def timed(rows: Rows) -> list[Row]:
    """The rows that have a time."""
    return [row for row in rows if row.time_ms is not None]


def label(row: Row) -> str:
    """A training row in two lines."""
    return f"{row.provider}\n{', '.join(setting_words(row))}"


def training_ratios(rows: Rows, path: Path) -> bool:
    """Bars: images per second over ResNet-18's in the same run."""
    pairs = [(row, yardstick_of(row, rows)) for row in timed(rows)]
    ratios = {label(row): p50(yardstick) / p50(row) for row, yardstick in pairs if yardstick is not None}

    def draw(axes: Axes) -> None:
        bars = axes.barh(list(ratios), list(ratios.values()))
        axes.bar_label(bars, fmt="%.2f×", padding=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("training speed over ResNet-18 in the same run")

    return bool(ratios) and drawn(path, draw, height=1 + 0.45 * len(ratios))


def kernel_ratios(rows: Rows, path: Path) -> bool:
    """Bars: how much faster our CSC layer is than the faster of eager and compiled torch, forward and backward."""
    groups = grouped([row for row in rows if row.mode == "both"], case_key)
    gains = {}
    for members in groups.values():
        gain, first = speed_up({row.provider: row for row in members}), members[0]
        if gain is not None:
            gains[f"{first.shape['layer']}, {first.dtype}, {first.layout}"] = gain

    def draw(axes: Axes) -> None:
        bars = axes.barh(list(gains), list(gains.values()))
        axes.bar_label(bars, fmt="%.2f×", padding=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("speed over the faster of eager and compiled torch, forward and backward")

    return bool(gains) and drawn(path, draw, height=1 + 0.3 * len(gains))


def roofline(rows: Rows, path: Path) -> bool:
    """Points: operations per second over operations per byte, below the ceilings of the same run."""
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
        axes.set_xlabel("operations per byte, both at their least")
        axes.set_ylabel("TFLOP/s")
        axes.legend(fontsize="small")

    return bool(points) and drawn(path, draw, height=5)


def over(rows: Rows, path: Path, dimension: str, axis_label: str) -> bool:
    """Lines: images per second over a size that varies within the runs ("batch" or "n_steps")."""

    def line_of(row: Row) -> tuple[Any, ...]:
        others = tuple((name, value) for name, value in row.shape.items() if name != dimension)
        return (row.run, row.provider, row.dtype, row.layout, *others, *row.settings.items())

    lines = {key: members for key, members in grouped(timed(rows), line_of).items() if len(members) > 1}

    def draw(axes: Axes) -> None:
        for members in lines.values():
            members.sort(key=lambda row: row.shape[dimension])
            first = members[0]
            name = f"{first.provider}, {first.shape['image_size']} px, {first.dtype}, {first.layout}"
            axes.plot([row.shape[dimension] for row in members], [rate(row) for row in members], "o-", label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(axis_label)
        axes.set_ylabel("training images per second")
        axes.legend(fontsize="small")

    return bool(lines) and drawn(path, draw)


def step_bars(rows: Rows, path: Path) -> bool:
    """Stacked bars: milliseconds of a step by phase."""
    bars = [row for row in timed(rows) if any(f"{phase}_ms" in row.metrics for phase in PHASES)]

    def draw(axes: Axes) -> None:
        names, left = [label(row) for row in bars], [0.0] * len(bars)
        for phase in PHASES:
            widths = [row.metrics.get(f"{phase}_ms", 0.0) for row in bars]
            axes.barh(names, widths, left=left, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds of a training step")
        axes.legend(fontsize="small", ncols=len(PHASES), loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return bool(bars) and drawn(path, draw, height=1.6 + 0.45 * len(bars))
