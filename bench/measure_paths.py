"""`paths`: which path the steps of each CSC layer take on this GPU, fused or pointwise, measured and kept in a table.

For every layer of a model, type and memory format both paths are held against the mathematics in fp64, then timed in
turns, forward and backward together. The quicker one enters the table that `impl="auto"` and "triton" read. A path with
a wrong answer never does, and the exit status is 1. Entries of an earlier run that this one does not measure stay.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sdnet.bench import environment, measure_kernels, timing
from sdnet.bench.operators import CSC, DTYPES, LAYOUTS, Bound, Case, Inputs, Operator, Provider, csc_by, layer_inputs
from sdnet.kernels.fused import tiles
from sdnet.train.errors import UserError
from sdnet.train.files import write_atomically

PATHS = ("fused", "pointwise")
TYPES = ("bf16", "fp16", "tf32")
SECONDS = 0.3
"""Of timing per case, both paths together."""


class Trial(NamedTuple):
    """One case: its entry in the table, and the milliseconds of each path whose answers were right."""

    key: str
    times: Mapping[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = measure_kernels.DEPTHS
    parser.add_argument("--model", choices=models, default="sdnet18_all", help="whose layers; default sdnet18_all")
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels; default 224 and 32")
    parser.add_argument("--layer", nargs="+", metavar="C,K,k,S,H", help="given shapes instead of a model's")
    parser.add_argument("--limit", type=int, help="only so many distinct shapes of each image size, the first ones")
    parser.add_argument("--batch", type=int, help="default 256 at 224 px and 512 at 32 px")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=TYPES, help=f"default {' '.join(TYPES)}")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default both")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of timing per case; default {SECONDS}")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which the rest is left out")
    parser.add_argument("--device", default="auto", help="default: the GPU")
    parser.add_argument("--out", type=Path, default=tiles.MEASURED, help="the tables' folder; default the one read")
    parser.set_defaults(operator=["csc"], n_steps=[2])


def run(options: argparse.Namespace) -> int:
    """Measure and write the table; 1 if an answer was wrong or nothing was measured, else 0."""
    device = environment.choose_device(options.device)
    if device.type != "cuda":
        raise UserError("paths needs a GPU, and torch sees none; without a table a rule chooses the path.")
    deadline = time.perf_counter() + options.budget
    cases = list(measure_kernels.cases(options, device))
    trials: list[Trial] = []
    with steps_as_they_were():
        for case in cases:
            if time.perf_counter() > deadline:
                print(f"The budget of {options.budget:.0f} s was spent: {len(cases) - len(trials)} cases left out.")
                break
            trials.append(measure(case, options.seconds))
    gpu = environment.device_name(device)
    file = tiles.file_of(gpu, options.out)
    table = merged(tiles.table(gpu, options.out), trials)
    if table:
        write(file, table)
        print(f"{len(table)} layers in {file}")
    right = trials and all(set(trial.times) == set(PATHS) for trial in trials)
    return 0 if right else 1


def measure(case: Case, seconds: float) -> Trial:
    """Check both paths on one case, and time those that are right in turns."""
    providers = {path: on_path(path) for path in PATHS}
    operator = Operator(layer_inputs, ("both",), {"reference": CSC.providers["reference"], **providers})
    with timing.fp32_products(case.dtype == "tf32"), timing.measuring_stream(case.device):
        verdicts = measure_kernels.verdicts(case, operator, providers)
        right = {path: providers[path] for path, (status, _, _) in verdicts.items() if status == "ok"}
        timed = measure_kernels.time_mode(case, operator, right, "both", seconds)
    times = {path: measured.p50 for path, (measured, _, _) in timed.items()}
    told = [
        f"{path} {times[path]:.3f} ms" if path in times else f"{path} {status}: {reason}"
        for path, (status, reason, _) in verdicts.items()
    ]
    print(f"{case.layer.geometry} {case.dtype} {case.layout}: {', '.join(told)}", flush=True)
    return Trial(tiles.key_of(shape_of(case)), times)


def on_path(path: str) -> Provider:
    """The Triton kernels on this path. It holds from a forward pass through the backward pass that follows."""

    def bind(case: Case, inputs: Inputs) -> Bound:
        bound = csc_by("triton")(case, inputs)

        def run() -> Tensor:
            os.environ[tiles.ENVIRONMENT_VARIABLE] = path
            return bound.run()

        return Bound(run, bound.leaves)

    return bind


@contextmanager
def steps_as_they_were() -> Iterator[None]:
    """Undoes on leaving what `on_path` asked for."""
    before = os.environ.get(tiles.ENVIRONMENT_VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(tiles.ENVIRONMENT_VARIABLE, None)
        if before is not None:
            os.environ[tiles.ENVIRONMENT_VARIABLE] = before


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


def quicker(trials: Iterable[Trial]) -> str | None:
    """The path that was right in all trials of a layer and took the least time in all together; None if neither was."""
    trials = list(trials)
    right = [path for path in PATHS if all(path in trial.times for trial in trials)]
    return min(right, key=lambda path: sum(trial.times[path] for trial in trials), default=None)


def merged(table: Mapping[str, str], trials: Iterable[Trial]) -> dict[str, str]:
    """The table with the layers of these trials measured anew. bf16 and fp16 share an entry, and both have a say."""
    by_key: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_key[trial.key].append(trial)
    entries = {**table, **{key: quicker(group) for key, group in by_key.items()}}
    return {key: path for key, path in sorted(entries.items()) if path is not None}


def write(file: Path, table: Mapping[str, str]) -> None:
    """The table as the file that `tiles.table` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda unfinished: unfinished.write_text(json.dumps(table, indent=1) + "\n"))
