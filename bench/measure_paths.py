"""`paths`: how each CSC layer runs fastest on this GPU, measured and kept as verdicts.

This is the qualification of `python -m sdnet.kernels.qualify` for the layers, types and memory formats of a benchmark:
every candidate is compared with PyTorch in fp32, the right ones are timed in turns, with their launches and as CUDA
graphs, and one verdict per key enters the table that `impl="auto"` reads. A candidate with a wrong answer is never
taken, and the exit status is then 1. Verdicts of an earlier run stay unless they are found out again. The table is
written after every verdict, and the candidates run in a child process, so that a crash or an interruption keeps what
was measured.
"""

import argparse
import time
from pathlib import Path

from sdnet.bench import measure_kernels
from sdnet.bench.common_options import choose_device, seconds
from sdnet.bench.ledger import writable_folder
from sdnet.bench.providers import DTYPES, Workload
from sdnet.kernels.qualify import parent
from sdnet.kernels.qualify.key import Call, Flags
from sdnet.kernels.qualify.verdicts import Store, Table
from sdnet.train.errors import UserError

TYPES = ("bf16", "fp16", "tf32")
SECONDS = 0.3
"""Of timing a layer with two candidates; each further candidate adds half as much."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    measure_kernels.add_shape_options(parser)
    parser.set_defaults(operator=["csc"], n_steps=[2], dtype=TYPES)
    parser.add_argument("--tiles", action="store_true", help="try other tiles than the rules'; takes a minute a layer")
    parser.add_argument("--seconds", type=seconds, default=SECONDS, help=f"of timing two candidates; default {SECONDS}")
    parser.add_argument("--device", default="auto", help="default: the GPU")
    parser.add_argument("--out", type=Path, help="the tables' folder; default the user's cache folder, which is read")


def run(options: argparse.Namespace) -> int:
    """Measure and write the table; return 1 if an answer was wrong or nothing was measured, else 0."""
    device = choose_device(options.device)
    if device.type != "cuda":
        raise UserError("paths needs a GPU, and torch finds none; without verdicts cuDNN's convolutions run.")
    store = Store(options.out)
    if options.out is not None:
        writable_folder(options.out)
    end, found = time.monotonic() + options.budget, Table()
    workloads = list(measure_kernels.workloads(options, device))
    for dtype in dict.fromkeys(workload.dtype for workload in workloads):
        calls = [call_of(workload) for workload in workloads if workload.dtype == dtype]
        outcome = parent.qualify(
            calls,
            str(device),
            flags=flags_of(dtype),
            store=store,
            fresh=True,
            budget=max(0.0, end - time.monotonic()),
            all_tiles=options.tiles,
            seconds=options.seconds,
        )
        found |= {key: verdict for key, verdict in outcome.table.items() if verdict.trials}
        for note in outcome.notes:
            print(note)
        if outcome.machine is not None:
            print(f"{len(found)} layers in {store.file_of(outcome.machine)}")
    return 0 if found and not any(trial.fault for verdict in found.values() for trial in verdict.trials) else 1


def flags_of(dtype: str) -> Flags:
    """Return the flags with which a type is measured: those of this process, with or without tf32."""
    flags = Flags.now()
    return flags if DTYPES[dtype].itemsize == 2 else flags._replace(convolutions="tf32" if dtype == "tf32" else "ieee")


def call_of(workload: Workload) -> Call:
    """Return the key of a workload in the table of verdicts."""
    layer = workload.layer
    return Call(
        layer.channels,
        layer.atoms,
        *layer.pairs,
        image_size=layer.size,
        batch=workload.batch,
        dtype=str(DTYPES[workload.dtype]).removeprefix("torch."),
        channels_last=workload.layout == "channels_last",
        n_steps=workload.n_steps,
    )
