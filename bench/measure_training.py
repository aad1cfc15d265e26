"""`train`: images per second of whole training steps, and where a step's time goes.

All models and settings of one batch and image size train in turns within one process, so their ratios hold whatever
else the machine does. A turn is a few steps, timed by the host's clock between two waits for the device: launches
count, as they do in training. On a GPU a group trains in a process apart: a setting that brings it down is refused, and
the others train anew without it.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sdnet.bench import isolation
from sdnet.bench.common_options import add_common_options, open_ledger
from sdnet.bench.isolation import LostError, Workshop
from sdnet.bench.layer_shapes import stem_for
from sdnet.bench.ledger import Ledger, refused
from sdnet.bench.operators import DTYPES, LAYOUTS
from sdnet.bench.participants import OFFICIAL, Batches, Participant, Setting, noise, pictures
from sdnet.bench.tables import training_table
from sdnet.bench.timing import Timing, fp32_products, interleave, wall_time
from sdnet.kernels.dispatch import IMPLEMENTATIONS

MODELS = ("resnet18", "sdnet18", "sdnet18_all", "official_sdnet18", "official_sdnet18_all")
KEEPING = {"auto": None, "off": False, "on": True}
MS_PER_TURN = 500
"""On a GPU a turn takes as many steps as fit; on a CPU it takes one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", default=list(MODELS), help=f"registered or official; default {' '.join(MODELS)}"
    )
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels; default 224 and 32, on a CPU 32")
    parser.add_argument("--batch", type=int, nargs="+", help="default 256, on a CPU 32; several show how speed scales")
    parser.add_argument("--n-steps", type=int, nargs="+", default=[2], help="default 2; several show what a step costs")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="autocast's; default tf32 and bf16, on a CPU fp32")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default both, on a CPU contiguous")
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"], help="default off")
    parser.add_argument(
        "--keep-residuals", nargs="+", choices=KEEPING, default=["auto"], help="for the backward; default auto"
    )
    parser.add_argument(
        "--impl", nargs="+", choices=IMPLEMENTATIONS, default=["auto"], help="of the CSC operator; default auto"
    )
    parser.add_argument("--data", type=Path, help="an ImageFolder tree; without it, noise on the device")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads for --data; default 2")
    parser.add_argument(
        "--seconds", type=float, default=30, help="of each batch and image size, all models; default 30"
    )
    parser.add_argument("--turns", type=int, default=3, help="the least number of turns; default 3")
    parser.add_argument("--budget", type=float, help="seconds after which no further model or size is begun")
    parser.add_argument("--warm-up", type=int, default=15, help="steps before timing; default 15")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for; 1 if a model did not learn but blew up, else 0."""
    device, ledger = open_ledger(options, "train")
    if device.type == "cpu":
        print("No GPU: training on the CPU. Ratios here say nothing about a GPU.")
    deadline = time.perf_counter() + (float("inf") if options.budget is None else options.budget)
    with Workshop(apart=device.type == "cuda") as workshop:
        for image_size, batch, tf32 in itertools.product(
            options.image_size or ([224, 32] if device.type == "cuda" else [32]),
            options.batch or ([256] if device.type == "cuda" else [32]),
            (False, True),
        ):
            settings = [item for item in chosen(options, device, batch, image_size) if item.tf32 == tf32]
            measure_group(settings, device, options, deadline, ledger, workshop)
    print("\n" + training_table(ledger.rows))
    print(f"\n{len(ledger.rows)} rows in {ledger.path}")
    return 1 if refused(ledger.rows) else 0


def chosen(options: argparse.Namespace, device: torch.device, batch: int, image_size: int) -> Iterator[Setting]:
    """The settings of one batch and image size: plain networks have no steps; official ones run NCHW and eager."""
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
            execution = (dtype, layout, compiled == "on", impl, KEEPING[keep])
            yield Setting(model, stem, batch, image_size, n_steps, *execution)


def measure_group(
    settings: list[Setting],
    device: torch.device,
    options: argparse.Namespace,
    deadline: float,
    ledger: Ledger,
    workshop: Workshop,
) -> None:
    """Train all settings in turns; one row each. Whoever brings down a process apart is left out of the next one."""
    left = list(settings)
    while left:
        try:
            for values in workshop.run(train_in_turns, left, device, options, deadline):
                ledger.add(**values)
            return
        except LostError as lost:
            culprits = [setting for setting in left if repr(setting) == lost.tried] or left
            for setting in culprits:
                ledger.add(**left_out(setting, "refused", f"its process was lost: {lost}"))
                print(f"Lost with {setting}: {lost}", flush=True)
            left = [setting for setting in left if setting not in culprits]


def train_in_turns(
    settings: list[Setting], device: torch.device, options: argparse.Namespace, deadline: float
) -> Iterator[dict[str, Any]]:
    """What a row holds for each of these settings, which share their precision of fp32 products.

    No setting is begun after the deadline; those begun before are measured.
    """
    gc.collect()  # participants of another group hold each other, and their memory
    shared: dict[str, Batches] = {}
    runners: dict[str, Runner] = {}
    with fp32_products(settings[0].tf32):
        for setting in settings:
            if time.perf_counter() > deadline:
                yield left_out(setting, "skipped", f"the budget of {options.budget:.0f} seconds was spent")
                continue
            name = repr(setting)
            isolation.trying(name)
            print(f"Warming up {setting}", flush=True)
            if setting.layout not in shared:
                shared[setting.layout] = (
                    pictures(setting, device, options.data, options.threads) if options.data else noise(setting, device)
                )
            runners[name] = Runner(setting, device, shared[setting.layout])
            runners[name].warm_up(options.warm_up)
        turns = {name: isolation.naming(name, runner.turn) for name, runner in runners.items()}
        timings = interleave(turns, options.seconds, least=options.turns)
        for name, runner in runners.items():
            yield runner.result(timings[name], "pictures" if options.data else "noise", options.warm_up)


def left_out(setting: Setting, status: str, reason: str) -> dict[str, Any]:
    """What the row of a setting without a measurement holds."""
    facts = {"dtype": setting.dtype, "layout": setting.layout, "settings": {"impl": setting.impl}}
    return {"provider": setting.model, "mode": "step", "shape": setting.describe(), **facts} | {
        "status": status,
        "reason": reason,
    }


class Runner:
    """A participant's turns, its split of the step over all of them, and its memory."""

    def __init__(self, setting: Setting, device: torch.device, batches: Batches) -> None:
        self.setting, self.device, self.batches, self.steps = setting, device, batches, 1
        self.before = self._allocated()
        self.participant = Participant(setting, device)
        self.split: dict[str, float] = {}
        self.taken = 0
        self.kept: float | None = None
        self.peak = 0.0
        self.own = 0.0

    def warm_up(self, steps: int) -> None:
        """Untimed steps: momentum, compilation, cuDNN's choices, and power iterations until their vectors are warm.

        In the first steps the official loop runs to its limit of 50 iterations per layer; a dozen steps later a few do.
        A ratio taken in those first steps would flatter us.
        """
        for _ in range(max(1, steps)):
            self.participant.step(self.batches)
        if not self.setting.compiled:
            self.kept = self.participant.kept_for_backward(self.batches)
        self.own = self._allocated() - self.before
        if self.device.type == "cuda":
            self.steps = max(1, min(50, round(MS_PER_TURN / self.turn())))
            self.split, self.taken = {}, 0

    def turn(self) -> float:
        """Milliseconds of one step, mean over a turn."""
        resident = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = self.participant.clock
        clock.lap()
        spent = wall_time([lambda: self.participant.step(self.batches)] * self.steps + [self._wait])
        for phase, elapsed in clock.split().items():
            self.split[phase] = self.split.get(phase, 0.0) + elapsed
        self.taken += self.steps
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - resident + self.own
            self.peak = max(self.peak, peak)
        return spent / self.steps

    def result(self, timing: Timing, source: str, warm_up: int) -> dict[str, Any]:
        """What its row holds: refused unless the loss stayed finite, for NaN weights have a speed of their own."""
        setting = self.setting
        facts = {
            "provider": setting.model,
            "mode": "step",
            "shape": setting.describe(),
            "dtype": setting.dtype,
            "layout": setting.layout,
            "settings": {
                "compile": setting.compiled,
                "impl": setting.impl,
                "keep_residuals": setting.keep_residuals,
                "input": source,
                "warm_up": warm_up,
            },
        }
        loss = float(self.participant.loss)
        if not abs(loss) < float("inf"):
            return facts | {"status": "refused", "reason": f"its loss is {loss}"}
        metrics = {f"{phase}_ms": elapsed / self.taken for phase, elapsed in self.split.items()}
        metrics |= {"images_per_second": 1e3 * setting.batch / timing.p50}
        if self.kept is not None:
            metrics["kept_for_backward_mib"] = self.kept
        memory = self.peak / 2**20 if self.device.type == "cuda" else None
        return facts | {"time_ms": timing._asdict(), "memory_mib": memory, "metrics": metrics}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
