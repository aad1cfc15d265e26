"""`profile`: the operators of a recipe's training step, and what makes the host wait for the device.

First a few plain steps give the time of a step and of its phases. Then torch.profiler records a few more; recording
slows them down, so that only the shares of their operators are used. A Chrome trace and a stacked bar go into --traces.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from sdnet.bench import plots
from sdnet.bench.common_options import add_common_options, add_data_options, at_least, open_ledger
from sdnet.bench.ledger import writable_folder
from sdnet.bench.measure_training import TimedRun
from sdnet.bench.tables import profile_table
from sdnet.bench.training_run import TrainingSetting, batches_of
from sdnet.kernels.qualify.timing import percentiles
from sdnet.train.build import make_model
from sdnet.train.errors import UserError
from sdnet.train.recipes import RECIPES, Recipe

STEP = "sdnet.bench.step"
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
READ = "aten::_local_scalar_dense"
"""The operator behind `item()` and the truth value of a tensor: the host waits for the device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--recipe", choices=RECIPES, default="imagenet_sdnet18", help="default imagenet_sdnet18")
    parser.add_argument("--batch", type=at_least(1), help="default the recipe's, on a CPU 8")
    parser.add_argument("--image-size", type=at_least(1), help="default the recipe's")
    parser.add_argument("--steps", type=at_least(1), default=3, help="recorded steps; default 3")
    add_data_options(parser)
    parser.add_argument("--traces", type=Path, default=Path("runs/profile"), help="default runs/profile")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Profile the recipe and return 0."""
    writable_folder(options.traces)
    device, ledger = open_ledger(options, "profile")
    recipe = recipe_of(options)
    setting = setting_of(recipe, options, device)
    timed = TimedRun(setting, device, batches_of(setting, device, options), make_model(recipe, 1000, device))
    try:
        for _ in range(3):
            timed.training.step(timed.batches)
    except ValueError as error:  # of batch norm, for one value per channel
        raise UserError(f"The recipe {recipe.name} cannot train with these options: {error}.") from error
    times = [timed.turn() for _ in range(options.steps)]
    profiler = recorded_steps(timed, options.steps)
    metrics = {f"{phase}_ms": elapsed / options.steps for phase, elapsed in timed.phases.items()}
    metrics["data_wait_share"] = 100 * timed.phases.get("data", 0.0) / sum(timed.phases.values())
    metrics |= counts(profiler.events() or [], options.steps, device)
    metrics |= operator_times(profiler.key_averages(), options.steps, device)
    ledger.add(
        recipe.name,
        "step",
        setting.describe(),
        dtype=setting.dtype,
        layout=setting.layout,
        time_ms=percentiles(times)._asdict(),
        metrics=metrics,
        settings={"compile": setting.compiled, "input": "pictures" if options.data else "noise"},
    )
    trace, picture = options.traces / f"{recipe.name}.json", options.traces / f"{recipe.name}.png"
    profiler.export_chrome_trace(str(trace))
    plots.step_bars(ledger.rows, picture)
    print(profile_table(ledger.rows))
    print(f"\nTrace for chrome://tracing or ui.perfetto.dev: {trace}\nPhases of a step: {picture}\n{ledger.path}")
    return 0


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe, for images of another size if the options ask for one: step sizes depend on it."""
    recipe = RECIPES[options.recipe]()
    size = options.image_size or recipe.image_size
    return replace(recipe, image_size=size, eval_resize=max(size, recipe.eval_resize))


def setting_of(recipe: Recipe, options: argparse.Namespace, device: torch.device) -> TrainingSetting:
    """Return the settings of a recipe that decide the cost of a step."""
    single = "tf32" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "fp32"
    return TrainingSetting(
        model=recipe.model,
        stem=recipe.stem,
        batch=options.batch or (recipe.batch if device.type == "cuda" else 8),
        image_size=recipe.image_size,
        n_steps=recipe.coding.n_steps,
        dtype=single if recipe.mixed_precision == "no" else recipe.mixed_precision,
        layout="channels_last" if recipe.channels_last else "contiguous",
        compiled=recipe.compile,
        impl=recipe.impl,
        width=recipe.width,
    )


def recorded_steps(timed: TimedRun, steps: int) -> profile:
    """Return the profiler after so many steps, each recorded under the name STEP."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if timed.device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                timed.training.step(timed.batches)
    return profiler


def counts(events: Iterable[Any], steps: int, device: torch.device) -> dict[str, float]:
    """Return launches, host syncs and reads of values per step, counted from begin to end of a step on the host."""
    events = list(events)
    spans = [event.time_range for event in events if event.name == STEP and event.device_type == DeviceType.CPU]

    def count(*names: str) -> float:
        found = [event.time_range.start for event in events if event.name in names]
        return sum(any(span.start <= start <= span.end for span in spans) for start in found) / steps

    result: dict[str, float] = {"host_reads": count(READ)}
    if device.type == "cuda":
        result |= {"launches": count(*LAUNCHES), "host_syncs": count(*SYNCS)}
    return result


def operator_times(averages: Iterable[Any], steps: int, device: torch.device) -> dict[str, float]:
    """Return the milliseconds per step of each operator ("ms:aten::add") and of all operators together.

    On a GPU this is the time of the kernels that an operator launches, on a CPU its own time.
    """
    on_gpu = device.type == "cuda"
    own = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / steps
        for event in averages
        if event.device_type == DeviceType.CPU and event.key != STEP
    }
    total = float(sum(own.values()))
    shown: dict[str, float] = {f"ms:{name}": time for name, time in own.items() if time > total / 1000}
    return shown | {"operators_ms": total}
