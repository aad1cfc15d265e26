"""Markdown tables of the ledger's rows. Every figure is one of a row, or a ratio of two rows of one run."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sdnet.bench.ledger import Row
from sdnet.bench.step_clock import PHASES
from sdnet.models import WIDTH

TRITON = ("fused", "cudnn")
BASELINES = ("reference", "compile")
"""Plain PyTorch without the official code's overhead, eager and compiled: what a kernel is compared with."""

BASELINE_MODEL = "resnet18"
NOTHING = "–"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns after the first are aligned right; empty columns are left out."""
    lines = list(lines)
    columns = [i for i in range(len(header)) if i == 0 or not lines or any(line[i] != NOTHING for line in lines)]
    rule = [":--" if i == 0 else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells[i] for i in columns) + " |" for cells in (header, rule, *lines))


def with_left_out(table: str, rows: Iterable[Row]) -> str:
    """Return a table with a line below it that counts the rows without a time."""
    words = []
    for provider, members in grouped((row for row in rows if row.time_ms is None), lambda row: row.provider).items():
        counts = Counter(row.status for row in members)
        words.append(f"{provider} ({', '.join(f'{count} {status}' for status, count in counts.items())})")
    return f"{table}\n\nNot timed: {', '.join(words)}." if words else table


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Return the rows by key, in the order of their first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def timed(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that have a time."""
    return [row for row in rows if row.time_ms is not None]


def p50(row: Row) -> float:
    """Return the median milliseconds of a row that has a time."""
    assert row.time_ms is not None
    return row.time_ms["p50"]


def number(value: float | None) -> str:
    """Return a number with three digits and no exponent."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return NOTHING if value is None else f"{value:.2f}×"


def percent(share: float | None) -> str:
    """Return a share in whole percent."""
    return NOTHING if share is None else f"{share:.0%}"


def spread(row: Row | None) -> str:
    """Return p50 [p20–p80] in milliseconds."""
    if row is None or row.time_ms is None:
        return NOTHING
    return f"{number(p50(row))} [{number(row.time_ms['p20'])}–{number(row.time_ms['p80'])}]"


def rate_spread(row: Row) -> str:
    """Return the images per second at p50 [p80–p20] of the time of a batch."""
    assert row.time_ms is not None
    low, middle, high = (number(1e3 * row.shape["batch"] / row.time_ms[at]) for at in ("p80", "p50", "p20"))
    return f"{middle} [{low}–{high}]"


def rate(row: Row) -> float:
    """Return the images per second of a row."""
    return row.metrics["images_per_second"]


def fastest(rows: Iterable[Row]) -> Row | None:
    """Return the row with the least median."""
    return min(timed(rows), key=p50, default=None)


def ours_and_baseline(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Return the faster Triton path, `torch` if neither was timed, and the faster baseline of one comparison."""
    ours = fastest(row for row in rows if row.provider in TRITON)
    ours = ours or fastest(row for row in rows if row.provider == "torch")
    return ours, fastest(row for row in rows if row.provider in BASELINES)


def speed_up(rows: Sequence[Row]) -> float | None:
    """Return the baseline's time over ours."""
    ours, baseline = ours_and_baseline(rows)
    return p50(baseline) / p50(ours) if ours and baseline else None


def comparison(row: Row) -> tuple[Any, ...]:
    """Return what all providers of one comparison have in common."""
    return (row.run, row.dtype, row.layout, row.mode, *row.shape.items())


def kernels_table(rows: Iterable[Row]) -> str:
    """Return milliseconds by operator, shape, mode and provider, speed-ups, shares of the roofline and memory."""
    rows = list(rows)
    providers = list(dict.fromkeys(row.provider for row in rows))
    header = ["operator, shape, mode", *(f"{name}, ms" for name in providers), "speed-up"]
    header += ["of roofline: ours", "baseline", "MiB: ours", "baseline"]
    lines, gains = [], []
    for members in grouped(rows, comparison).values():
        by_provider, first = {row.provider: row for row in members}, members[0]
        if not timed(members):
            continue
        gain, pair = speed_up(members), ours_and_baseline(members)
        if gain and first.mode == "both":
            gains.append(gain)
        words = [f"{first.shape['operator']} {first.shape['layer']}, batch {first.shape['batch']}"]
        words += [f"{first.shape['n_steps']} steps"] if first.shape.get("n_steps", 2) != 2 else []
        words += [first.dtype, first.layout, first.mode]
        times = [spread(by_provider.get(name)) for name in providers]
        shares = [
            percent(row.metrics["roofline_ms"] / p50(row) if row and "roofline_ms" in row.metrics else None)
            for row in pair
        ]
        memory = [number(row and row.memory_mib) for row in pair]
        lines.append([", ".join(words), *times, ratio(gain), *shares, *memory])
    table = with_left_out(markdown(header, lines), rows)
    if gains:
        mean = math.exp(sum(math.log(gain) for gain in gains) / len(gains))
        table += f"\n\nForward and backward together, geometric mean over {len(gains)} shapes: {mean:.2f}×."
    return table


def comparable(row: Row) -> tuple[Any, ...]:
    """Return what two training rows share if their ratio has a meaning: run, sizes, type and input."""
    shape = row.shape
    width = shape.get("width", WIDTH)
    return (row.run, shape["image_size"], shape["stem"], width, shape["batch"], row.dtype, row.settings.get("input"))


def baseline_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return ResNet-18 in the same run, size and type, in its fastest memory format, compiled or not."""
    return fastest(other for other in rows if other.provider == BASELINE_MODEL and comparable(other) == comparable(row))


def over_baseline(row: Row, rows: Iterable[Row]) -> float | None:
    """Return the training speed of a row over that of ResNet-18."""
    baseline = baseline_of(row, rows)
    return None if baseline is None else p50(baseline) / p50(row)


def training_table(rows: Iterable[Row]) -> str:
    """Return images per second, the ratio to ResNet-18, the phases of a step and memory."""
    rows = list(rows)
    header = ["model, setting", "images/s [p20–p80]", f"× {BASELINE_MODEL}", *PHASES]
    header += ["peak MiB", "kept for backward, MiB"]
    lines = []
    for row in timed(rows):
        phases = [row.metrics.get(f"{phase}_ms", 0.0) for phase in PHASES]
        shares = [percent(phase / sum(phases)) if sum(phases) else NOTHING for phase in phases]
        memory = [number(row.memory_mib), number(row.metrics.get("kept_for_backward_mib"))]
        lines.append([name_of(row), rate_spread(row), ratio(over_baseline(row, rows)), *shares, *memory])
    return with_left_out(markdown(header, lines), rows)


def inference_table(rows: Iterable[Row]) -> str:
    """Return images per second of inference, and the ratio to ResNet-18 in the same form."""
    rows, lines = list(rows), []
    for row in timed(rows):

        def comparable(other: Row, row: Row = row) -> bool:
            same = (other.run, other.shape, other.settings["form"]) == (row.run, row.shape, row.settings["form"])
            return same and other.provider == BASELINE_MODEL

        baseline = fastest(filter(comparable, rows))
        words = [row.provider, f"width {row.shape['width']}", f"{row.shape['image_size']} px"]
        words += [f"batch {row.shape['batch']}", row.dtype, row.settings["form"]]
        times = ratio(None if baseline is None else p50(baseline) / p50(row))
        lines.append([", ".join(words), rate_spread(row), times, number(row.memory_mib)])
    return markdown(["model, setting", "images/s [p20–p80]", f"× {BASELINE_MODEL}", "peak MiB"], lines)


def name_of(row: Row) -> str:
    """Return a training row's model and setting in words."""
    return ", ".join([row.provider, *setting_words(row)])


def setting_words(row: Row) -> list[str]:
    """Return the setting of a training row in words."""
    words = [f"{row.shape['image_size']} px", f"batch {row.shape['batch']}", row.dtype, row.layout]
    if row.shape.get("width", WIDTH) != WIDTH:
        words.insert(0, f"width {row.shape['width']}")
    if row.shape["n_steps"] != 2:
        words.append(f"{row.shape['n_steps']} step{'s' * (row.shape['n_steps'] > 1)}")
    words += ["compiled"] if row.settings.get("compile") else []
    words += [f"impl {row.settings['impl']}"] if row.settings.get("impl", "auto") != "auto" else []
    kept = row.settings.get("keep_residuals")
    words += [] if kept is None else ["residuals kept" if kept else "residuals recomputed"]
    words += ["real images"] if row.settings.get("input") == "pictures" else []
    return words


def loading_table(rows: Iterable[Row]) -> str:
    """Return images per second and CPU time of each loader, with ratios to PIL and to the first folder of the run."""
    rows = list(rows)
    header = ["loader, threads", "images/s [p20–p80]", "CPU-ms per image"]
    header += [f"× {other}{per}" for other in ("PIL", "folder") for per in ("", " per CPU-s")]
    lines = []
    for row in timed(rows):
        threads = row.shape["threads"]
        name = f"{loader_words(row)}, {threads} thread{'s' * (threads > 1)}, {row.shape['image_size']} px"
        ratios = [*load_ratios(row, pil_of(row, rows)), *load_ratios(row, folder_of(row, rows))]
        lines.append([name, rate_spread(row), number(row.metrics["cpu_ms_per_image"]), *map(ratio, ratios)])
    return with_left_out(markdown(header, lines), rows)


def loader_words(row: Row) -> str:
    """Return a loader, and what it read."""
    return f"{row.provider} on {row.settings['data']}" if "data" in row.settings else row.provider


def load_ratios(row: Row, other: Row | None) -> tuple[float | None, float | None]:
    """Return the ratios of two loaders in images per second and in images per CPU-second."""
    if other is None:
        return None, None
    return rate(row) / rate(other), other.metrics["cpu_ms_per_image"] / row.metrics["cpu_ms_per_image"]


def pil_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the row of PIL on the same source, with the same request in the same run."""
    return alike(row, rows, "pil", "data", row.settings.get("data"))


def folder_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the row of the same loader on the first folder of the run."""
    return alike(row, rows, row.provider, "source", "folder")


def alike(row: Row, rows: Iterable[Row], loader: str, setting: str, value: Any) -> Row | None:
    """Return the first row of a loader with this value of a setting, and the request and the run of `row`."""
    loads = (other for other in timed(rows) if other.provider == loader and request_of(other) == request_of(row))
    return next((other for other in loads if other.settings.get(setting) == value), None)


def request_of(row: Row) -> tuple[Any, ...]:
    """Return what two rows of loaders share if their ratio has a meaning."""
    return (row.run, *(row.shape[name] for name in ("batch", "image_size", "threads")))


def loading_and_training(loads: Iterable[Row], trained: Iterable[Row]) -> list[str]:
    """Return lines that compare the fastest loader with the training speed of each model on this machine and size."""
    best: dict[tuple[str, int], Row] = {}
    for row in timed(loads):
        place = (row.environment["device"], row.shape["image_size"])
        if place not in best or rate(row) > rate(best[place]):
            best[place] = row
    newest = {name_of(row): row for row in sorted(trained, key=lambda row: row.run) if row.status == "ok"}
    lines = []
    for name, row in newest.items():
        load = best.get((row.environment["device"], row.shape["image_size"]))
        if load is not None:
            times = f"{rate(load) / rate(row):.2f} times as many"
            lines.append(f"- {name} trains on {number(rate(row))} images/s; {loader_words(load)} loads {times}.")
    return lines or ["The ledger holds no training speed of this machine at this image size."]


COUNTS = {"launches": "launches", "host_syncs": "host syncs", "host_reads": "reads of a tensor's value by the host"}
"""Metrics of a profile, in words."""


def profile_table(rows: Iterable[Row], most: int = 15) -> str:
    """Return the time of a step by operator, the launches, and the reads of the device by the host."""
    tables = []
    for row in timed(rows):
        shares = {name[3:]: value for name, value in row.metrics.items() if name.startswith("ms:")}
        total = row.metrics["operators_ms"]
        facts = ", ".join(f"{number(row.metrics[name])} {text}" for name, text in COUNTS.items() if name in row.metrics)
        waiting = percent(row.metrics["data_wait_share"] / 100)
        top = sorted(shares.items(), key=lambda item: -item[1])[:most]
        lines = [[name, number(time), percent(time / total)] for name, time in top]
        title = f"{name_of(row)}: {facts} per step; {waiting} of the step is spent waiting for data."
        tables.append(f"{title}\n\n" + markdown(["operator", "ms per step", "share"], lines))
    return "\n\n".join(tables)


STEP_DETAILS = ("first_step", "last_step", "largest_margin_by_step", "largest_margin_by_layer", "loss_by_step")
"""The settings of a row of `margins` that belong to its steps, not to its training run."""


def counts_table(rows: Iterable[Row]) -> str:
    """Return the counted work of each layer and variant, and the host's microseconds for its launches."""
    header = [
        "layer, batch",
        "layers",
        "residual",
        "tiles",
        "GB",
        "GFLOP",
        "GB from L2",
        "busy",
        "launches",
        "host, µs",
    ]
    lines = []
    for row in timed(rows):
        counted = [number(row.metrics.get(name)) for name in ("gb", "gflop", "l2_gb")]
        busy, host = percent(row.metrics.get("busy")), number(1000 * p50(row))
        words = [str(row.shape["layers"]), row.settings["residual"], row.settings["tiles"]]
        name = f"{row.shape['layer']}, batch {row.shape['batch']}"
        lines.append([name, *words, *counted, busy, number(row.metrics["launches"]), host])
    return markdown(header, lines)


def gpu_table(rows: Iterable[Row]) -> str:
    """Return the stages of `gpu-check`: how each ended, its seconds, and the numbers that it found."""
    lines = []
    for row in rows:
        found = ", ".join(f"{name} {number(value)}" for name, value in row.metrics.items()) or NOTHING
        seconds = number(p50(row) / 1000) if row.time_ms else NOTHING
        lines.append([row.provider, row.settings["outcome"], seconds, found])
    return markdown(["stage", "outcome", "s", "found"], lines)


def margins_table(rows: Iterable[Row]) -> str:
    """Return the largest step margins of each training run, and the share of the update in a step."""

    def training(row: Row) -> tuple[Any, ...]:
        settings = {name: value for name, value in row.settings.items() if name not in STEP_DETAILS}
        return (row.provider, *row.shape.items(), *settings.items())

    header = ["training", "steps", "largest margin", "from step 3 on", "above 1.05", "above 4/3", "update, % of a step"]
    lines = []
    for members in grouped(rows, training).values():
        first, counted = members[0], timed(members)
        settings = [f"{first.settings[name]}" for name in ("optimizer", "lr")] + [f"seed {first.settings['seed']}"]
        width = first.shape.get("width", WIDTH)
        words = [f"width {width}"] if width != WIDTH else []
        name = ", ".join([first.provider, *words, f"batch {first.shape['batch']}", *settings])
        ended = [f"refused at {row.settings['last_step']}" for row in members if row.time_ms is None]
        steps = max((row.settings["last_step"] for row in counted), default=0)
        margins = {
            row.settings["first_step"] + i: margin
            for row in counted
            for i, margin in enumerate(row.settings["largest_margin_by_step"])
        }
        late = [margin for step, margin in margins.items() if step > 2]
        shares = [p50(row) / row.metrics["step_ms"] for row in counted]
        lines.append(
            [
                name,
                ", ".join([str(steps), *ended]),
                *(NOTHING if not values else f"{max(values):.2f}" for values in (margins.values(), late)),
                *(str(sum(margin > limit for margin in margins.values())) for limit in (1.05, 4 / 3)),
                NOTHING if not shares else f"{100 * sum(shares) / len(shares):.1f}",
            ]
        )
    return markdown(header, lines)
