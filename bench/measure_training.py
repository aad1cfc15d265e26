"""`train`: images per second of whole training steps, and where a step's time goes.

All models and settings of one batch and image size train in turns within one process, so their ratios hold whatever
else the machine does. A turn is a few steps, timed by the host's clock between two waits for the device: launches
count, as they do in training.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from sdnet.bench.common_options import add_common_options, open_ledger
from sdnet.bench.ledger import Ledger, refused
from sdnet.bench.operators import DTYPES, LAYOUTS
from sdnet.bench.participants import OFFICIAL, Batches, Participant, Setting, noise, pictures, stem_for
from sdnet.bench.tables import training_table
from sdnet.bench.timing import Timing, fp32_products, interleave, wall_time
from sdnet.kernels.dispatch import IMPLEMENTATIONS

MODELS = ("resnet18", "sdnet18", "sdnet18_all", "official_sdnet18", "official_sdnet18_all")
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
        "--keep-residuals", nargs="+", choices=("off", "on"), default=["off"], help="for the backward; default off"
    )
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="auto", help="of the CSC operator; default auto")
    parser.add_argument("--data", type=Path, help="an ImageFolder tree; without it, noise on the device")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads for --data; default 2")
    parser.add_argument(
        "--seconds", type=float, default=30, help="of each batch and image size, all models; default 30"
    )
    parser.add_argument("--turns", type=int, default=3, help="the least number of turns; default 3")
    parser.add_argument("--budget", type=float, help="seconds after which no further batch or image size is begun")
    parser.add_argument("--warm-up", type=int, default=15, help="steps before timing; default 15")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for; 1 if a model did not learn but blew up, else 0."""
    device, ledger = open_ledger(options, "train")
    if device.type == "cpu":
        print("No GPU: training on the CPU. Ratios here say nothing about a GPU.")
    deadline = time.perf_counter() + (float("inf") if options.budget is None else options.budget)
    for image_size, batch, products in itertools.product(
        options.image_size or ([224, 32] if device.type == "cuda" else [32]),
        options.batch or ([256] if device.type == "cuda" else [32]),
        (False, True),
    ):
        settings = [item for item in chosen(options, device, batch, image_size) if (item.dtype == "tf32") == products]
        if settings and time.perf_counter() > deadline:
            for setting in settings:
                skip(setting, ledger, f"the budget of {options.budget:.0f} seconds was spent")
        elif settings:
            with fp32_products(tf32=products):
                measure_group(settings, device, options, ledger)
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
        for n_steps, dtype, layout, compiled, keep in itertools.product(
            options.n_steps[:1] if plain else options.n_steps,
            dtypes,
            ["contiguous"] if official else layouts,
            ["off"] if official else options.compile,
            ["off"] if official or plain else options.keep_residuals,
        ):
            stem = stem_for(image_size)
            execution = (dtype, layout, compiled == "on", options.impl, keep == "on")
            yield Setting(model, stem, batch, image_size, n_steps, *execution)


def measure_group(settings: list[Setting], device: torch.device, options: argparse.Namespace, ledger: Ledger) -> None:
    """Train all settings in turns; one row each."""
    shared: dict[str, Batches] = {}
    runners: dict[str, Runner] = {}
    for setting in settings:
        if setting.layout not in shared:
            shared[setting.layout] = (
                pictures(setting, device, options.data, options.threads) if options.data else noise(setting, device)
            )
        name = repr(setting)
        runners[name] = Runner(setting, device, shared[setting.layout])
        runners[name].warm_up(options.warm_up)
    timings = interleave({name: runner.turn for name, runner in runners.items()}, options.seconds, least=options.turns)
    for name, runner in runners.items():
        runner.report(ledger, timings[name], "pictures" if options.data else "noise", options.warm_up)


def skip(setting: Setting, ledger: Ledger, reason: str) -> None:
    """A row that says why there is no measurement."""
    shape = setting.describe()
    ledger.add(
        setting.model, "step", shape, status="skipped", reason=reason, dtype=setting.dtype, layout=setting.layout
    )


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

    def report(self, ledger: Ledger, timing: Timing, source: str, warm_up: int) -> None:
        """One row: refused unless the loss stayed finite, for NaN weights have a speed of their own."""
        setting = self.setting
        facts = {
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
            ledger.add(setting.model, "step", status="refused", reason=f"its loss is {loss}", **facts)
            return
        metrics = {f"{phase}_ms": elapsed / self.taken for phase, elapsed in self.split.items()}
        metrics |= {"images_per_second": 1e3 * setting.batch / timing.p50}
        if self.kept is not None:
            metrics["kept_for_backward_mib"] = self.kept
        memory = self.peak / 2**20 if self.device.type == "cuda" else None
        ledger.add(setting.model, "step", time_ms=timing._asdict(), memory_mib=memory, metrics=metrics, **facts)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
