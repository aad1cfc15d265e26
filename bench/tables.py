"""Markdown tables of the ledger's rows. Every figure in them is a row's own or a ratio of two rows of one run."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sdnet.bench.ledger import Row
from sdnet.bench.step_clock import PHASES

OURS = ("triton", "torch")
"""What `impl="auto"` may choose, the best first."""

RIVALS = ("reference", "compile")
"""Plain torch without official waste, the stronger of which a kernel has to beat."""

YARDSTICK = "resnet18"

Cell = Callable[[Row], str]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers, flushed right."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by key, in the order of their first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def p50(row: Row) -> float:
    """Median milliseconds of a row with status ok."""
    assert row.time_ms is not None
    return row.time_ms["p50"]


def number(value: float | None) -> str:
    """Three digits, no exponent; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(row: Row) -> str:
    """p50 with p20 and p80, or why there is none."""
    if row.time_ms is None:
        return row.status
    return f"{number(p50(row))} [{number(row.time_ms['p20'])}–{number(row.time_ms['p80'])}]"


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the least median among those that have one."""
    return min((row for row in rows if row.status == "ok"), key=p50, default=None)


def first_of(by_provider: dict[str, Row], names: Sequence[str]) -> Row | None:
    """The first of these providers that was timed."""
    return next((by_provider[name] for name in names if name in by_provider and by_provider[name].status == "ok"), None)


def speed_up(by_provider: dict[str, Row]) -> float | None:
    """The faster rival's time over ours."""
    ours = first_of(by_provider, OURS)
    rival = fastest(by_provider[name] for name in RIVALS if name in by_provider)
    return p50(rival) / p50(ours) if ours and rival else None


def roofline_share(row: Row | None) -> float | None:
    """The least possible time over the measured one."""
    if row is None or "roofline_ms" not in row.metrics:
        return None
    return row.metrics["roofline_ms"] / p50(row)


def case_key(row: Row) -> tuple[Any, ...]:
    """What all providers of one comparison have in common."""
    return (row.run, row.dtype, row.layout, row.mode, *row.shape.items())


def kernels_table(rows: Iterable[Row]) -> str:
    """Milliseconds by operator, shape and mode; one column for each provider, then our speed-up and the rooflines."""
    rows = list(rows)
    providers = list(dict.fromkeys(row.provider for row in rows))
    header = ["operator, shape, mode", *(f"{name}, ms" for name in providers)]
    header += ["faster than the rival by", "of roofline: ours", "rival", "MiB: ours", "rival"]
    lines, gains = [], []
    for members in grouped(rows, case_key).values():
        by_provider, first = {row.provider: row for row in members}, members[0]
        ours = first_of(by_provider, OURS)
        rival = fastest(by_provider[name] for name in RIVALS if name in by_provider)
        gain = speed_up(by_provider)
        if gain and first.mode == "both":
            gains.append(gain)
        shape = f"{first.shape['operator']} {first.shape['layer']}, batch {first.shape['batch']}"
        if first.shape.get("n_steps", 2) != 2:
            shape += f", {first.shape['n_steps']} steps"
        times = [spread(by_provider[name]) if name in by_provider else "–" for name in providers]
        shares = ["–" if share is None else f"{share:.0%}" for share in map(roofline_share, (ours, rival))]
        memory = [number(row and row.memory_mib) for row in (ours, rival)]
        speed = "–" if gain is None else f"{gain:.2f}×"
        lines.append([f"{shape}, {first.dtype}, {first.layout}, {first.mode}", *times, speed, *shares, *memory])
    table = markdown(header, lines)
    if gains:
        mean = math.exp(sum(math.log(gain) for gain in gains) / len(gains))
        table += f"\n\nForward and backward together, geometric mean over {len(gains)} shapes: {mean:.2f}×."
    return table


def comparable(row: Row) -> tuple[Any, ...]:
    """What two training rows must share for a ratio of like with like: run, sizes, type, input."""
    shape = row.shape
    return (row.run, shape["image_size"], shape["stem"], shape["batch"], row.dtype, row.settings.get("input"))


def yardstick_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """ResNet-18 in the same run, size and type, in its fastest layout, compiled or not."""
    return fastest(other for other in rows if other.provider == YARDSTICK and comparable(other) == comparable(row))


def training_table(rows: Iterable[Row]) -> str:
    """Images per second, the ratio to ResNet-18 in the same run, the split of the step, and memory."""
    rows = list(rows)
    header = ["model, setting", "images/s [p20–p80]", f"× {YARDSTICK}", *(f"{phase}, %" for phase in PHASES)]
    header += ["peak MiB", "kept for backward, MiB"]
    lines = []
    for row in rows:
        name = ", ".join([row.provider, *setting_words(row)])
        if row.time_ms is None:
            lines.append([name, row.status, *["–"] * (len(header) - 2)])
            continue
        batch, yardstick = row.shape["batch"], yardstick_of(row, rows)
        low, middle, high = (number(1e3 * batch / row.time_ms[at]) for at in ("p80", "p50", "p20"))
        total = sum(row.metrics.get(f"{phase}_ms", 0.0) for phase in PHASES)
        shares = [number(100 * row.metrics.get(f"{phase}_ms", 0.0) / total) for phase in PHASES]
        ratio = "–" if yardstick is None else f"{p50(yardstick) / p50(row):.2f}×"
        memory = [number(row.memory_mib), number(row.metrics.get("kept_for_backward_mib"))]
        lines.append([name, f"{middle} [{low}–{high}]", ratio, *shares, *memory])
    return markdown(header, lines)


def ratios_table(rows: Iterable[Row]) -> str:
    """`training_table` in short: images per second, and the ratio to ResNet-18 in the same run."""
    rows = [row for row in rows if row.time_ms is not None]
    lines = []
    for row in rows:
        yardstick = yardstick_of(row, rows)
        ratio = "–" if yardstick is None else f"{p50(yardstick) / p50(row):.2f}×"
        lines.append([", ".join([row.provider, *setting_words(row)]), number(rate(row)), ratio])
    return markdown(["training", "images/s", f"× {YARDSTICK}"], lines)


def setting_words(row: Row) -> list[str]:
    """What tells a training row from its neighbours, in words."""
    words = [f"{row.shape['image_size']} px", f"batch {row.shape['batch']}", row.dtype, row.layout]
    if row.shape["n_steps"] != 2:
        words.append(f"{row.shape['n_steps']} steps")
    words += ["compiled"] if row.settings.get("compile") else []
    words += [f"impl {row.settings['impl']}"] if row.settings.get("impl", "auto") != "auto" else []
    kept = row.settings.get("keep_residuals")
    words += [] if kept is None else ["residuals kept" if kept else "residuals computed again"]
    words += ["real pictures"] if row.settings.get("input") == "pictures" else []
    return words


def loading_table(rows: Iterable[Row]) -> str:
    """Images per second and processor time of each loader, by threads, and what one core would feed.

    Two pairs of ratios, in images per second and in images per CPU-second: to PIL on the same source, and to the same
    loader on the first folder of the run, from which the others' shards may come.
    """
    rows = list(rows)
    header = ["loader, threads", "images/s [p20–p80]", "CPU-ms per image", "images/s per busy core"]
    header += [f"× {other}{per}" for other in ("PIL", "folder") for per in ("", " per CPU-s")]
    lines = []
    for row in rows:
        name = f"{loader_words(row)}, {row.shape['threads']} threads, {row.shape['image_size']} px"
        if row.time_ms is None:
            lines.append([name, f"{row.status}: {row.reason}", *["–"] * (len(header) - 2)])
            continue
        batch, cpu = row.shape["batch"], row.metrics["cpu_ms_per_image"]
        low, middle, high = (number(1e3 * batch / row.time_ms[at]) for at in ("p80", "p50", "p20"))
        ratios = [*load_ratios(row, rival_of(row, rows)), *load_ratios(row, original_of(row, rows))]
        cells = ["–" if ratio is None else f"{ratio:.2f}×" for ratio in ratios]
        lines.append([name, f"{middle} [{low}–{high}]", number(cpu), number(1e3 / cpu), *cells])
    return markdown(header, lines)


def loader_words(row: Row) -> str:
    """A loader, and what it read."""
    return f"{row.provider} on {row.settings['data']}" if "data" in row.settings else row.provider


def load_ratios(row: Row, other: Row | None) -> tuple[float | None, float | None]:
    """How many times the other's images per second, and per CPU-second."""
    if other is None:
        return None, None
    return rate(row) / rate(other), other.metrics["cpu_ms_per_image"] / row.metrics["cpu_ms_per_image"]


def rival_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """PIL on the same source, asked for the same in the same run."""
    loads = (other for other in rows if other.provider == "pil" and asked_for(other) == asked_for(row))
    return next((other for other in loads if other.settings.get("data") == row.settings.get("data")), None)


def original_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The same loader on the run's first folder."""
    loads = (other for other in rows if other.provider == row.provider and asked_for(other) == asked_for(row))
    return next((other for other in loads if other.settings.get("source") == "folder"), None)


def asked_for(row: Row) -> tuple[Any, ...]:
    """What two rows of loaders must share for a ratio; one without a time shares it with none that has one."""
    return (row.run, row.status, *(row.shape[name] for name in ("batch", "image_size", "threads")))


def feeding_lines(loads: Iterable[Row], trained: Iterable[Row]) -> list[str]:
    """What the best loader feeds beside what each model eats: newest training rows of the same machine and size."""
    best: dict[tuple[str, int], Row] = {}
    for row in loads:
        place = (row.environment["device"], row.shape["image_size"])
        if row.status == "ok" and (place not in best or rate(row) > rate(best[place])):
            best[place] = row
    newest = {(row.provider, *setting_words(row)): row for row in sorted(trained, key=lambda row: row.run)}
    lines = []
    for row in newest.values():
        load = best.get((row.environment["device"], row.shape["image_size"]))
        if load is not None and row.status == "ok":
            eats, feeds = rate(row), rate(load)
            name = ", ".join([row.provider, *setting_words(row)])
            lines.append(f"- {name} eats {number(eats)} images/s; {loader_words(load)} feeds {feeds / eats:.2f}× that.")
    return lines or ["No training speed of this machine at this size stands in the ledger to compare with."]


def rate(row: Row) -> float:
    """Images per second."""
    return row.metrics["images_per_second"]


def profile_table(rows: Iterable[Row], most: int = 15) -> str:
    """Where the time of a step goes by operator, launches, and reads of the device by the host."""
    tables = []
    for row in rows:
        if row.time_ms is None:
            tables.append(f"{row.provider}: {row.status}, {row.reason}")
            continue
        shares = {name[3:]: value for name, value in row.metrics.items() if name.startswith("ms:")}
        total = row.metrics["operators_ms"]
        top = sorted(shares.items(), key=lambda item: -item[1])[:most]
        title = ", ".join([row.provider, *setting_words(row)])
        facts = ", ".join(
            f"{number(row.metrics[name])} {text}"
            for name, text in (
                ("launches", "launches per step"),
                ("host_syncs", "host syncs per step"),
                ("host_reads", "reads of a tensor's value by the host per step"),
                ("data_wait_share", "% of the step waiting for data"),
            )
            if name in row.metrics
        )
        lines = [[name, number(time), f"{time / total:.1%}"] for name, time in top]
        tables.append(f"{title}: {facts}.\n\n" + markdown(["operator", "ms per step", "share"], lines))
    return "\n\n".join(tables)
