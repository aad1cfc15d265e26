"""The child process of a qualification: it compares and times the candidates of each key.

It reads one line of JSON from standard input, the `Job`, and answers with a line that describes the machine. The second
line of input holds the numbers of the items to do; a line of output follows for each candidate that begins and for each
verdict. An illegal memory access ends this process alone. It also ends when its standard input is closed, that is, with
its parent.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TextIO

import torch

from sdnet.kernels.qualify import compare, quarantine, timing
from sdnet.kernels.qualify.candidates import Candidate, candidates_of, judge, judge_update
from sdnet.kernels.qualify.compare import Comparison, Inputs
from sdnet.kernels.qualify.job import shape_of
from sdnet.kernels.qualify.key import Call, Flags, Update, machine_of
from sdnet.kernels.qualify.verdicts import TORCH, UPDATE, Trial, Verdict

BROKEN = 3
"""The exit status after an error that breaks the GPU's context."""

Say = Callable[..., None]
"""Sends an event to the parent."""


@dataclass(frozen=True)
class Job:
    """What a child process is asked to do.

    Attributes:
        device: the name of the device.
        flags: the flags of PyTorch to run with.
        items: calls and updates.
        all_tiles: whether other tiles than the rules' are candidates.
        seconds: of timing two candidates of a call; each further one adds half as much.
        patience: seconds after which a key begins no further candidate.
        memory_gib: the most GPU memory that the process may use; None for all that is free.
    """

    device: str
    flags: Flags
    items: tuple[Call | Update, ...]
    all_tiles: bool = True
    seconds: float = 0.3
    patience: float = 120.0
    memory_gib: float | None = None

    def encoded(self) -> dict[str, Any]:
        """Return the job as a dictionary that `json` can write."""
        items = [{type(item).__name__: item.encoded()} for item in self.items]
        return {**vars(self), "flags": list(self.flags), "items": items}

    @staticmethod
    def decoded(values: dict[str, Any]) -> "Job":
        """Return the job that `encoded` described."""
        items = [
            Call.decoded(item["Call"]) if "Call" in item else Update.decoded(item["Update"]) for item in values["items"]
        ]
        return Job(**(values | {"flags": Flags(*values["flags"]), "items": tuple(items)}))


def main() -> int:
    """Do the job; return the exit status."""
    # What libraries print must not come between the lines of the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: str, **facts: Any) -> None:
        answers.write(json.dumps({"event": event, **facts}) + "\n")
        answers.flush()

    job = Job.decoded(json.loads(sys.stdin.readline()))
    device = torch.device(job.device)
    try:
        prepare(job, device)
        say("machine", facts=machine_of(device))
    except Exception as error:
        say("failed", reason=quarantine.one_line(error))
        return 1
    chosen = json.loads(sys.stdin.readline() or "[]")
    threading.Thread(target=exit_with, args=(sys.stdin,), daemon=True).start()
    for number in chosen:
        item = job.items[number]
        try:
            verdict = qualify_call(item, job, device, say) if isinstance(item, Call) else qualify_update(item, job, say)
        except Exception as error:
            reason = quarantine.one_line(error)
            if quarantine.kind_of(error) == "broken":
                say("broken", item=number, reason=reason)
                answers.flush()
                os._exit(BROKEN)  # the end of the interpreter would wait for the GPU
            batch = item.batch if isinstance(item, Call) else 0
            verdict = Verdict(TORCH, f"PyTorch computes it, because it could not be measured ({reason})", batch)
        say("verdict", item=number, verdict=verdict.encoded())
        if device.type == "cuda":
            torch.cuda.empty_cache()
    say("done")
    return 0


def prepare(job: Job, device: torch.device) -> None:
    """Set the flags, the current device and the limit of its memory."""
    job.flags.set()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if job.memory_gib is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_gib * 2**30 / total), device)
        torch.zeros(1, device=device)  # raises now if the GPU takes no further process


def exit_with(stream: TextIO) -> None:
    """End this process when a stream is closed, even while it is busy."""
    stream.read()
    os._exit(1)


def qualify_call(call: Call, job: Job, device: torch.device, say: Say) -> Verdict:
    """Return the verdict for a call: its candidates are compared one by one, and the right ones timed in turns."""
    end = time.perf_counter() + job.patience
    machine = machine_of(device)
    shape = shape_of(call, job.flags, int(machine["capability"].replace(".", "")))
    candidates = candidates_of(shape, job.all_tiles, machine["multiprocessors"], may_pad=call.n_dict == 1)
    say("started", candidate="the comparison")
    comparison = Comparison(call, device)
    trials: list[Trial] = []
    for candidate in candidates:
        if time.perf_counter() > end:
            break
        say("started", candidate=candidate.name)
        trials.append(trial_of(candidate, partial(comparison.check, candidate)))
    say("started", candidate="timing")
    inputs = comparison.inputs
    del comparison  # and its results, which the timed calls have no use for
    return judge(timed(trials, inputs, job, device), call.batch)


def qualify_update(update: Update, job: Job, say: Say) -> Verdict:
    """Return the verdict for an update of dictionaries."""
    device = torch.device(job.device)
    ours, theirs = Candidate("triton", UPDATE), Candidate("torch", TORCH)
    say("started", candidate="the update by Triton")
    trials = [Trial(theirs.name, theirs.path), trial_of(ours, lambda: compare.check_update(update, device))]
    if not trials[1].fault:
        say("started", candidate="timing of the update")
        calls = {trial.path: update_call(update, device, trial.path == UPDATE) for trial in trials}
        trials = race(trials, {path: [call] for path, call in calls.items()}, job.seconds, device)
    return judge_update(trials)


def trial_of(candidate: Candidate, check: Callable[[], tuple[str, dict[str, float]]]) -> Trial:
    """Return the trial of a candidate after its check; an exception is a fault, unless it breaks the GPU's context."""
    try:
        fault, errors = check()
    except Exception as error:
        if quarantine.kind_of(error) == "broken":
            raise
        fault, errors = quarantine.one_line(error), {}
    finite = {name: error for name, error in errors.items() if error < float("inf")}
    return Trial(candidate.name, candidate.path, fault, finite)


def timed(trials: Sequence[Trial], inputs: Inputs, job: Job, device: torch.device) -> list[Trial]:
    """Return the trials with the times of those that are right."""
    right = [trial for trial in trials if not trial.fault]
    copies = timing.copies_past_cache(inputs.x.nbytes + inputs.grad.nbytes, device, most=4)
    calls = {trial.path: [operator_call(inputs, trial.path) for _ in range(copies)] for trial in right}
    found = race(right, calls, job.seconds * max(len(right), 2) / 2, device)
    by_path = {trial.path: trial for trial in found}
    return [by_path.get(trial.path, trial) for trial in trials]


def race(
    trials: Sequence[Trial], calls: dict[str, list[timing.Call]], seconds: float, device: torch.device
) -> list[Trial]:
    """Return the trials with their times, with launches and as replayed CUDA graphs, all measured in turns."""
    samplers: dict[str, timing.Sampler] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the inputs were made on another stream
    with timing.measuring_stream(device):
        for trial in trials:
            each = calls[trial.path]
            if device.type != "cuda":
                samplers[f"launched {trial.path}"] = timing.wall_sampler(each)
                continue
            samplers[f"launched {trial.path}"] = timing.event_sampler(each)
            replayed, how = timing.make_sampler(each, device, capturable=True)
            if how == "graph":
                samplers[f"replayed {trial.path}"] = replayed
        times = {name: found.p50 for name, found in timing.interleave(samplers, seconds).items()}
    return [
        replace(
            trial, launched_ms=times[f"launched {trial.path}"], replayed_ms=times.get(f"replayed {trial.path}")
        )
        for trial in trials
    ]  # fmt: skip


def operator_call(inputs: Inputs, path: str) -> timing.Call:
    """Return a forward and a backward pass of the public operator on a copy of the inputs."""
    from sdnet.kernels.csc import encode

    x, weight = (leaf.clone().detach().requires_grad_() for leaf in inputs.leaves)
    problem, grad = inputs.problem, inputs.grad.clone()
    impl, asked = ("torch", None) if path == TORCH else ("triton", path)

    def call() -> object:
        options = problem.coding, problem.stride, problem.padding, impl, None, asked
        codes = encode(x, weight, problem.step_size, problem.lam, *options)
        return torch.autograd.grad(codes, (x, weight), grad)

    return call


def update_call(update: Update, device: torch.device, by_triton: bool) -> timing.Call:
    """Return an update of the dictionaries."""
    from sdnet.kernels import step_sizes
    from sdnet.kernels.dictionaries import update_by_triton

    dictionaries = compare.dictionaries_of(update, device)

    @torch.no_grad()
    def call() -> None:
        if by_triton:
            update_by_triton(dictionaries)
        else:
            for dictionary in dictionaries:
                step_sizes.update_dictionary(dictionary)

    return call


if __name__ == "__main__":
    sys.exit(main())
