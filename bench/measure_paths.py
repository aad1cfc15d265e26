"""`paths`: which Triton path runs each CSC layer fastest on this GPU, measured and kept in a table.

A layer runs on the cudnn path, or on the fused path with the tiles of the rules or, with --tiles, with others. For
every layer of a model, type and memory format, all of them are compared with the reference in fp64, then timed in
turns, forward and backward together. The fastest enters the table that `impl="auto"` and "triton" read. One with a
wrong answer never does, and the exit status is 1. Entries of an earlier run stay unless they are measured again. The
table is written after every layer, and each layer runs in a child process, so that a crash or an interruption keeps
what was measured.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sdnet.bench import measure_kernels
from sdnet.bench.common_options import choose_device, seconds
from sdnet.bench.cost import tile_shape
from sdnet.bench.isolation import Loss, Worker, survivors
from sdnet.bench.ledger import writable_folder
from sdnet.bench.providers import CSC, DTYPES, Operator, Workload, csc_by, layer_inputs
from sdnet.kernels.qualify import timing
from sdnet.kernels.triton_path import paths, tiles
from sdnet.kernels.triton_path.hardware import arch_of
from sdnet.kernels.triton_path.paths import Entry
from sdnet.train.environment import device_name
from sdnet.train.errors import UserError
from sdnet.train.files import write_atomically

TYPES = ("bf16", "fp16", "tf32")
SECONDS = 0.3
"""Of timing a layer with two candidates; each further candidate adds half as much."""


class Candidate(NamedTuple):
    """A way to run a layer, by name."""

    name: str
    entry: Entry

    def __str__(self) -> str:
        return self.name


class Trial(NamedTuple):
    """One workload: its key in the table, the milliseconds of the right candidates, and the number of the others."""

    key: str
    times: Mapping[Entry, float]
    faults: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    measure_kernels.add_shape_options(parser)
    parser.set_defaults(operator=["csc"], n_steps=[2], dtype=TYPES)
    parser.add_argument("--tiles", action="store_true", help="try other tiles than the rules'; takes a minute a layer")
    parser.add_argument("--seconds", type=seconds, default=SECONDS, help=f"of timing two candidates; default {SECONDS}")
    parser.add_argument("--device", default="auto", help="default: the GPU")
    parser.add_argument("--out", type=Path, default=paths.MEASURED, help="the tables' folder; default the one read")


def run(options: argparse.Namespace) -> int:
    """Measure and write the table; return 1 if an answer was wrong or nothing was measured, else 0."""
    device = choose_device(options.device)
    if device.type != "cuda":
        raise UserError("paths needs a GPU, and torch finds none; without a table a rule chooses the path.")
    writable_folder(options.out)
    deadline = time.perf_counter() + options.budget
    workloads = list(measure_kernels.workloads(options, device))
    trials: list[Trial] = []
    gpu = device_name(device)
    file, before = paths.file_of(gpu, options.out), paths.table(gpu, options.out)
    with Worker(isolated=True) as worker:
        for workload in workloads:
            if time.perf_counter() > deadline:
                left = len(workloads) - len(trials)
                print(f"The budget of {options.budget:.0f} s was spent; {left} workloads are not measured.")
                break
            trials.append(trial_of(workload, candidates_of(workload, options.tiles), options.seconds, worker))
            if table := merged(before, trials):
                write(file, table)
    if trials and file.is_file():
        print(f"{len(merged(before, trials))} layers in {file}")
    return 0 if trials and not any(trial.faults for trial in trials) else 1


def candidates_of(workload: Workload, all_tiles: bool) -> list[Candidate]:
    """Return the ways to run a workload: both paths and, with `all_tiles`, other tiles than the rules'."""
    shape = shape_of(workload)._replace(arch=arch_of(workload.device))
    chosen = tiles.by_rule(shape)
    found = [Candidate("cudnn", Entry("cudnn", chosen)), Candidate("fused", Entry("fused", chosen))]
    for other in tiles.candidates(shape)[1:] if all_tiles else []:
        found.append(Candidate(f"fused {other.analysis}, {other.synthesis}", Entry("fused", other)))
    return found


def trial_of(workload: Workload, candidates: Sequence[Candidate], limit: float, worker: Worker) -> Trial:
    """Return the trial of a workload; candidates that end their process count as faults."""
    times: Mapping[Entry, float] = {}
    for found in survivors(worker, measure, candidates, workload, limit):
        times = {} if isinstance(found, Loss) else found
    return Trial(paths.key_of(shape_of(workload)), times, len(candidates) - len(times))


def measure(candidates: Sequence[Candidate], workload: Workload, limit: float) -> Iterator[dict[Entry, float]]:
    """Check the candidates, time the right ones in turns, and yield the milliseconds of each of these."""
    with (
        timing.fp32_products(workload.dtype == "tf32"),
        timing.measuring_stream(workload.device),
    ):
        providers = {name: csc_by("triton", entry.encoded()) for name, entry in candidates}
        operator = Operator(layer_inputs, ("both",), {"reference": CSC.providers["reference"], **providers})
        verdicts = measure_kernels.verdicts(workload, operator, providers)
        right = {name: providers[name] for name, (status, _, _) in verdicts.items() if status == "ok"}
        timed = measure_kernels.time_mode(workload, operator, right, "both", limit * len(candidates) / 2)
    times = {name: measured.p50 for name, (measured, _, _) in timed.items()}
    outcomes = [
        f"{name} {times[name]:.3f} ms" if name in times else f"{name} {status}: {reason}"
        for name, (status, reason, _) in verdicts.items()
    ]
    print(f"{workload.layer.geometry} {workload.dtype} {workload.layout}: {'; '.join(outcomes)}", flush=True)
    yield {entry: times[name] for name, entry in candidates if name in times}


def shape_of(workload: Workload) -> tiles.Shape:
    """Return the workload as the rules for tiles see it, for any GPU: a table is one GPU's."""
    precision = "tf32" if workload.dtype == "tf32" else "ieee"
    itemsize, last = DTYPES[workload.dtype].itemsize, workload.layout == "channels_last"
    return tile_shape(workload.layer, workload.batch, itemsize, precision, last, arch=0)


def fastest(trials: Iterable[Trial]) -> Entry | None:
    """Return the candidate that was right in all trials of a layer and took the least time in all; None if none was."""
    trials = list(trials)
    right = [entry for entry in trials[0].times if all(entry in trial.times for trial in trials)]
    return min(right, key=lambda entry: sum(trial.times[entry] for trial in trials), default=None)


def merged(table: Mapping[str, Entry], trials: Iterable[Trial]) -> dict[str, Entry]:
    """Return the table with the layers of these trials replaced. bf16 and fp16 share an entry, and both count."""
    by_key: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_key[trial.key].append(trial)
    entries = {**table, **{key: fastest(group) for key, group in by_key.items()}}
    return {key: entry for key, entry in sorted(entries.items()) if entry is not None}


def write(file: Path, table: Mapping[str, Entry]) -> None:
    """Write the table as the file that `paths.table` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {key: json.loads(entry.encoded()) for key, entry in table.items()}
    write_atomically(file, lambda unfinished: unfinished.write_text(json.dumps(rows, indent=1) + "\n"))
