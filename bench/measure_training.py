"""`train`: images per second of whole training steps, and the time of each phase of a step.

All models and settings of one batch and image size train in turns in one process, so that their ratios hold whatever
else the machine does. A turn is a few steps, timed by the host's clock between two waits for the device: launches
count, as they do in training. On a GPU a group trains in a child process: a setting that ends it is refused, and the
others are trained again without it.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sdnet.bench import isolation
from sdnet.bench.common_options import (
    add_common_options,
    add_data_options,
    add_setting_options,
    at_least,
    open_ledger,
    seconds,
)
from sdnet.bench.isolation import Loss, Worker, survivors
from sdnet.bench.layer_shapes import stem_for
from sdnet.bench.ledger import Ledger, print_outcome
from sdnet.bench.tables import training_table
from sdnet.bench.training_run import OFFICIAL, Batches, TrainingRun, TrainingSetting, batches_of, known_models
from sdnet.kernels.dispatch import IMPLEMENTATIONS
from sdnet.kernels.qualify.timing import Timing, fp32_products, interleave, wall_time
from sdnet.models import WIDTH
from sdnet.train.errors import UserError

MODELS = ("resnet18", "sdnet18", "sdnet18_all", "official_sdnet18", "official_sdnet18_all")
KEEP_RESIDUALS = {"auto": None, "off": False, "on": True}
MS_PER_TURN = 500
"""On a GPU a turn takes as many steps as fit into these milliseconds; on a CPU it takes one."""
MOST_COMPILED = 1000
"""The most compiled networks of one class in a process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--model", nargs="+", default=list(MODELS), help=f"registered or official; default {' '.join(MODELS)}"
    )
    add_setting_options(parser, "tf32 and bf16, autocast's")
    parser.add_argument("--batch", type=at_least(1), nargs="+", help="one or several; default 256, on a CPU 32")
    parser.add_argument("--n-steps", type=at_least(1), nargs="+", default=[2], help="one or several; default 2")
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"], help="default off")
    parser.add_argument(
        "--keep-residuals", nargs="+", choices=KEEP_RESIDUALS, default=["auto"], help="for the backward; default auto"
    )
    parser.add_argument(
        "--impl", nargs="+", choices=IMPLEMENTATIONS, default=["auto"], help="of the CSC operator; default auto"
    )
    add_data_options(parser)
    parser.add_argument(
        "--seconds", type=seconds, default=30, help="of each batch and image size, all models; default 30"
    )
    parser.add_argument("--turns", type=at_least(1), default=3, help="the least number of turns; default 3")
    parser.add_argument("--warm-up", type=at_least(1), default=15, help="steps before timing; default 15")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for; return 1 if a model was lost or its loss became infinite or NaN, else 0."""
    if unknown := [name for name in options.model if name not in known_models()]:
        raise UserError(f"--model is {unknown[0]}; it must be one of {', '.join(known_models())}.")
    if options.width != WIDTH and (official := [name for name in options.model if name in OFFICIAL]):
        raise UserError(f"--width is {options.width}; {official[0]} has width {WIDTH} alone, so choose other models.")
    device, ledger = open_ledger(options, "train")
    if device.type == "cpu":
        print("No GPU: this is training on a CPU, whose ratios say nothing about a GPU.")
    deadline = time.perf_counter() + options.budget
    with Worker(isolated=device.type == "cuda") as worker:
        for image_size, batch, tf32 in itertools.product(
            options.image_size or ([224, 32] if device.type == "cuda" else [32]),
            options.batch or ([256] if device.type == "cuda" else [32]),
            (False, True),
        ):
            settings = [item for item in chosen(options, device, batch, image_size) if item.tf32 == tf32]
            measure_group(settings, device, options, deadline, ledger, worker)
    print("\n" + training_table(ledger.rows) + "\n")
    return print_outcome(ledger)


def chosen(options: argparse.Namespace, device: torch.device, batch: int, image_size: int) -> Iterator[TrainingSetting]:
    """Yield the settings of one batch and image size; official networks run contiguous and eager."""
    on_gpu = device.type == "cuda"
    dtypes = options.dtype or (["tf32", "bf16"] if on_gpu else ["fp32"])
    layouts = options.layout or (["channels_last", "contiguous"] if on_gpu else ["contiguous"])
    for model in options.model:
        official, plain = model in OFFICIAL, model.startswith("resnet")
        for n_steps, dtype, layout, compiled, impl, keep in itertools.product(
            options.n_steps[:1] if plain else options.n_steps,
            dtypes,
            ["contiguous"] if official else layouts,
            ["off"] if official else options.compile,
            ["auto"] if official or plain else options.impl,
            ["auto"] if official or plain else options.keep_residuals,
        ):
            stem = stem_for(image_size)
            execution = (dtype, layout, compiled == "on", impl, KEEP_RESIDUALS[keep], options.width)
            yield TrainingSetting(model, stem, batch, image_size, n_steps, *execution)


def measure_group(
    settings: list[TrainingSetting],
    device: torch.device,
    options: argparse.Namespace,
    deadline: float,
    ledger: Ledger,
    worker: Worker,
) -> None:
    """Train all settings in turns and add one row each; a setting that ends its process is refused."""
    missing = list(settings)
    for found in survivors(worker, train_in_turns, settings, device, options, deadline):
        if isinstance(found, Loss):
            rows = [(setting, without_time(setting, "refused", found.reason)) for setting in found.items]
        else:
            rows = [found]
        for setting, values in rows:
            if setting in missing:
                missing.remove(setting)
                ledger.add(**values)


def train_in_turns(
    settings: list[TrainingSetting], device: torch.device, options: argparse.Namespace, deadline: float
) -> Iterator[tuple[TrainingSetting, dict[str, Any]]]:
    """Yield the contents of the row of each setting; all of them compute fp32 products in one precision.

    No setting is begun after the deadline; those begun before it are measured.
    """
    gc.collect()  # the runs of an earlier group hold each other, and their memory
    shared: dict[str, Batches] = {}
    runs: dict[TrainingSetting, TimedRun] = {}
    compiled = any(setting.compiled for setting in settings)
    with fp32_products(settings[0].tf32 if settings else False), many_compiled() if compiled else nullcontext():
        for setting in settings:
            if time.perf_counter() > deadline:
                reason = f"the budget of {options.budget:.0f} seconds was spent"
                yield setting, without_time(setting, "skipped", reason)
                continue
            isolation.announce(str(setting))
            print(f"Warming up {setting}", flush=True)
            if setting.layout not in shared:
                shared[setting.layout] = batches_of(setting, device, options)
            try:
                run = TimedRun(setting, device, shared[setting.layout])
                run.warm_up(options.warm_up)
            except UserError:
                raise
            except Exception as error:
                isolation.wait_for(device)
                status = "unsupported" if isinstance(error, NotImplementedError) else "refused"
                yield setting, without_time(setting, status, isolation.one_line(error))
                continue
            runs[setting] = run
        turns = {str(setting): isolation.announced(str(setting), run.turn) for setting, run in runs.items()}
        timings = interleave(turns, options.seconds, least=options.turns)
        for setting, run in runs.items():
            yield setting, run.result(timings[str(setting)], "pictures" if options.data else "noise", options.warm_up)


def many_compiled() -> AbstractContextManager[Any]:
    """Return the context in which torch.compile compiles each network; by default it gives up after 8 of one class."""
    from torch._dynamo import config

    return config.patch(recompile_limit=MOST_COMPILED, accumulated_recompile_limit=MOST_COMPILED)


def without_time(setting: TrainingSetting, status: str, reason: str) -> dict[str, Any]:
    """Return the contents of the row of a setting without a measurement."""
    return facts_of(setting) | {"settings": {"impl": setting.impl}, "status": status, "reason": reason}


def facts_of(setting: TrainingSetting) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    shape = setting.describe()
    return {"provider": setting.model, "mode": "step", "shape": shape, "dtype": setting.dtype, "layout": setting.layout}


class TimedRun:
    """The turns of a training run, the phases of its steps over all turns, and its memory."""

    def __init__(
        self, setting: TrainingSetting, device: torch.device, batches: Batches, model: nn.Module | None = None
    ) -> None:
        self.setting, self.device, self.batches, self.steps = setting, device, batches, 1
        self.before = self._allocated()
        self.training = TrainingRun(setting, device, model)
        self.phases: dict[str, float] = {}
        self.taken = 0
        self.kept: float | None = None
        self.peak = 0.0
        self.own = 0.0

    def warm_up(self, steps: int) -> None:
        """Take untimed steps, for momentum, compilation, cuDNN's choices and converging power vectors.

        In its first steps the official loop takes up to 50 power iterations per layer, a dozen steps later a few. A
        ratio taken in the first steps would favour ours.
        """
        for _ in range(steps):
            self.training.step(self.batches)
        if not self.setting.compiled:
            self.kept = self.training.kept_for_backward(self.batches)
        self.own = self._allocated() - self.before
        if self.device.type == "cuda":
            self.steps = max(1, min(50, round(MS_PER_TURN / self.turn())))
            self.phases, self.taken = {}, 0

    def turn(self) -> float:
        """Return the milliseconds of one step, the mean over a turn."""
        resident = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = self.training.clock
        clock.lap()
        steps = [lambda: self.training.step(self.batches)] * self.steps
        spent = wall_time([*steps, lambda: isolation.wait_for(self.device)])
        for phase, elapsed in clock.split().items():
            self.phases[phase] = self.phases.get(phase, 0.0) + elapsed
        self.taken += self.steps
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - resident + self.own
            self.peak = max(self.peak, peak)
        return spent / self.steps

    def result(self, timing: Timing, source: str, warm_up: int) -> dict[str, Any]:
        """Return the contents of the row; it is refused if the loss is not finite, because NaN weights train faster."""
        setting = self.setting
        facts = facts_of(setting) | {
            "settings": {
                "compile": setting.compiled,
                "impl": setting.impl,
                "keep_residuals": setting.keep_residuals,
                "input": source,
                "warm_up": warm_up,
            }
        }
        loss = float(self.training.loss)
        if not abs(loss) < float("inf"):
            return facts | {"status": "refused", "reason": f"its loss is {loss}"}
        metrics = {f"{phase}_ms": elapsed / self.taken for phase, elapsed in self.phases.items()}
        metrics["images_per_second"] = 1e3 * setting.batch / timing.p50
        if self.kept is not None:
            metrics["kept_for_backward_mib"] = self.kept
        memory = self.peak / 2**20 if self.device.type == "cuda" else None
        return facts | {"time_ms": timing._asdict(), "memory_mib": memory, "metrics": metrics}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
