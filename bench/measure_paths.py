"""`paths`: how the steps of each CSC layer run on this GPU, measured and kept in a table.

Ways to run a layer are pointwise steps around cuDNN, and fused ones with the rules' tiles or, with --tiles, others.
For every layer of a model, type and memory format all are held against the mathematics in fp64, then timed in turns,
forward and backward together. The quickest one enters the table that `impl="auto"` and "triton" read. A way with a
wrong answer never does, and the exit status is 1. Entries of an earlier run that this one does not measure stay. The
table is written after every case, and each case runs in a process apart, so that a way that breaks the device, or an
end before time, leaves what was measured until then.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sdnet.bench import environment, measure_kernels, timing
from sdnet.bench.isolation import LostError, Workshop
from sdnet.bench.layer_shapes import csc_models
from sdnet.bench.operators import CSC, DTYPES, LAYOUTS, Bound, Case, Inputs, Operator, Provider, csc_by, layer_inputs
from sdnet.kernels.triton_path import paths, tiles
from sdnet.kernels.triton_path.hardware import arch_of
from sdnet.kernels.triton_path.paths import Entry
from sdnet.train.errors import UserError
from sdnet.train.files import write_atomically

TYPES = ("bf16", "fp16", "tf32")
SECONDS = 0.3
"""Of timing per case, two ways together; each further one adds as much as one of them."""


class Trial(NamedTuple):
    """One case: its key in the table, the milliseconds of the ways whose answers were right, and how many were not."""

    key: str
    times: Mapping[Entry, float]
    faults: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=csc_models(), default="sdnet18_all", help="whose layers; default sdnet18_all"
    )
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels; default 224 and 32")
    parser.add_argument("--layer", nargs="+", metavar="C,K,k,S,H", help="given shapes instead of a model's")
    parser.add_argument("--limit", type=int, help="only so many distinct shapes of each image size, the first ones")
    parser.add_argument("--batch", type=int, help="default 256 at 224 px and 512 at 32 px")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=TYPES, help=f"default {' '.join(TYPES)}")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default both")
    parser.add_argument("--tiles", action="store_true", help="try other tiles than the rules'; takes a minute a layer")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of timing two ways; default {SECONDS}")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which the rest is left out")
    parser.add_argument("--device", default="auto", help="default: the GPU")
    parser.add_argument("--out", type=Path, default=paths.MEASURED, help="the tables' folder; default the one read")
    parser.set_defaults(operator=["csc"], n_steps=[2])


def run(options: argparse.Namespace) -> int:
    """Measure and write the table; 1 if an answer was wrong or nothing was measured, else 0."""
    device = environment.choose_device(options.device)
    if device.type != "cuda":
        raise UserError("paths needs a GPU, and torch sees none; without a table a rule chooses the path.")
    deadline = time.perf_counter() + options.budget
    cases = list(measure_kernels.cases(options, device))
    trials: list[Trial] = []
    gpu = environment.device_name(device)
    file, before = paths.file_of(gpu, options.out), paths.table(gpu, options.out)
    with Workshop(apart=True) as workshop:
        for case in cases:
            if time.perf_counter() > deadline:
                print(f"The budget of {options.budget:.0f} s was spent: {len(cases) - len(trials)} cases left out.")
                break
            trials.append(survivors(case, ways_of(case, options.tiles), options.seconds, workshop))
            if table := merged(before, trials):
                write(file, table)
    if trials and file.is_file():
        print(f"{len(merged(before, trials))} layers in {file}")
    return 0 if trials and not any(trial.faults for trial in trials) else 1


def ways_of(case: Case, all_tiles: bool) -> dict[str, Entry]:
    """The ways to run a case, by name."""
    shape = shape_of(case)._replace(arch=arch_of(case.device))
    chosen = tiles.by_rule(shape)
    ways = {"cudnn": Entry("cudnn", chosen), "fused": Entry("fused", chosen)}
    for other in tiles.candidates(shape)[1:] if all_tiles else []:
        ways[f"fused {other.analysis}, {other.synthesis}"] = Entry("fused", other)
    return ways


def survivors(case: Case, ways: Mapping[str, Entry], seconds: float, workshop: Workshop) -> Trial:
    """The trial of a case with the ways that do not bring down the process that runs it."""
    left, trial = dict(ways), Trial(paths.key_of(shape_of(case)), {})
    while left:
        try:
            (trial,) = workshop.run(measure, case, left, seconds)
            break
        except LostError as lost:
            culprits = [lost.tried] if lost.tried in left else list(left)
            print(f"{case.layer.geometry} {case.dtype} {case.layout}: lost {' '.join(culprits)}: {lost}", flush=True)
            left = {name: way for name, way in left.items() if name not in culprits}
    return trial._replace(faults=len(ways) - len(trial.times))


def measure(case: Case, ways: Mapping[str, Entry], seconds: float) -> Iterator[Trial]:
    """Check these ways on one case, and time those that are right in turns."""
    with (
        tempfile.TemporaryDirectory() as folder,
        timing.fp32_products(case.dtype == "tf32"),
        timing.measuring_stream(case.device),
        choices_as_they_were(),
    ):
        providers = {name: by_entry(way, Path(folder, str(n))) for n, (name, way) in enumerate(ways.items())}
        operator = Operator(layer_inputs, ("both",), {"reference": CSC.providers["reference"], **providers})
        verdicts = measure_kernels.verdicts(case, operator, providers)
        right = {name: providers[name] for name, (status, _, _) in verdicts.items() if status == "ok"}
        timed = measure_kernels.time_mode(case, operator, right, "both", seconds * len(ways) / 2)
    times = {name: measured.p50 for name, (measured, _, _) in timed.items()}
    told = [
        f"{name} {times[name]:.3f} ms" if name in times else f"{name} {status}: {reason}"
        for name, (status, reason, _) in verdicts.items()
    ]
    print(f"{case.layer.geometry} {case.dtype} {case.layout}: {'; '.join(told)}", flush=True)
    yield Trial(paths.key_of(shape_of(case)), {ways[name]: time for name, time in times.items()})


def by_entry(way: Entry, folder: Path) -> Provider:
    """The Triton kernels as a table in `folder` has them run, which holds this entry alone.

    It holds from a forward pass through the backward pass that follows.
    """

    def bind(case: Case, inputs: Inputs) -> Bound:
        bound = csc_by("triton")(case, inputs)
        gpu = environment.device_name(case.device)
        write(paths.file_of(gpu, folder), {paths.key_of(shape_of(case)): way})

        def run() -> Tensor:
            paths.MEASURED = folder
            return bound.run()

        return Bound(run, bound.leaves)

    return bind


@contextmanager
def choices_as_they_were() -> Iterator[None]:
    """Within, no environment variable decides; on leaving, all is as before."""
    measured, asked = paths.MEASURED, os.environ.pop(paths.ENVIRONMENT_VARIABLE, None)
    try:
        yield
    finally:
        paths.MEASURED = measured
        if asked is not None:
            os.environ[paths.ENVIRONMENT_VARIABLE] = asked


def shape_of(case: Case) -> tiles.Shape:
    """The case as the rules for tiles see it."""
    layer = case.layer
    return tiles.Shape(
        batch=case.batch,
        channels=layer.channels,
        atoms=layer.atoms,
        size=layer.size,
        grid=layer.codes_size,
        kernel_size=(layer.kernel_size, layer.kernel_size),
        stride=(layer.stride, layer.stride),
        itemsize=DTYPES[case.dtype].itemsize,
        precision="tf32" if case.dtype == "tf32" else "ieee",
        channels_last=case.layout == "channels_last",
        arch=0,  # a table is one GPU's, so its keys do not tell
    )


def quickest(trials: Iterable[Trial]) -> Entry | None:
    """The way that was right in all trials of a layer and took the least time in all together; None if none was."""
    trials = list(trials)
    right = [way for way in trials[0].times if all(way in trial.times for trial in trials)]
    return min(right, key=lambda way: sum(trial.times[way] for trial in trials), default=None)


def merged(table: Mapping[str, Entry], trials: Iterable[Trial]) -> dict[str, Entry]:
    """The table with the layers of these trials measured anew. bf16 and fp16 share an entry, and both have a say."""
    by_key: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_key[trial.key].append(trial)
    entries = {**table, **{key: quickest(group) for key, group in by_key.items()}}
    return {key: way for key, way in sorted(entries.items()) if way is not None}


def write(file: Path, table: Mapping[str, Entry]) -> None:
    """The table as the file that `paths.table` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {key: (way.steps, *(tile._asdict() for tile in way.tiles)) for key, way in table.items()}
    write_atomically(file, lambda unfinished: unfinished.write_text(json.dumps(rows, indent=1) + "\n"))
