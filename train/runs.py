"""Several runs with other seeds, one after another: `--runs N`; mean and deviation of what they reached."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch
from accelerate.state import AcceleratorState

from sdnet.files import write_text
from sdnet.train.build import launched_processes
from sdnet.train.data.loader import Data, Rank
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.outcome import outcome
from sdnet.train.progress import Display
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

SCORES = ("val_top1", "ema_val_top1")


def train_runs(job: Job, open_data: Callable[[Job, Rank, torch.device], Data]) -> None:
    """Train a job, or as many runs of it as it asks for, with the seeds seed, seed + 1 and so on.

    Run k is in the folder `seed<k>` of the run folder, and `summary.json` there gives the accuracies of all. The same
    command goes on after an interruption: finished runs are kept, and an unfinished one is resumed.

    Args:
        job: The job.
        open_data: Returns the loaders of a process.

    Raises:
        UserError: A run cannot be done, there are several processes, or a single run would share a folder with several.
        SystemExit: A signal ended the training.
    """
    if job.runs == 1:
        if not job.resume and (others := sorted(job.run.path.glob("seed*/last.pt"))):
            raise UserError(
                f"{job.run.path} holds several runs, such as {others[0].parent.name}: go on with --runs N or choose "
                "another --out."
            )
        Trainer(job, open_data).train()
        return
    if job.resume:
        raise UserError("--runs is for new runs; repeat the same command with --out to go on with several runs.")
    if (processes := launched_processes()) > 1:
        raise UserError(f"--runs {job.runs} needs a single process; this launch has {processes}.")
    seeds = [job.recipe.seed + index for index in range(job.runs)]
    jobs = [job_of(job, seed) for seed in seeds]
    for one in jobs:
        Trainer(one, open_data).train()
        AcceleratorState._reset_state(reset_partial_state=True)  # for the next run of this process
    found = summarise([one.run.metrics() for one in jobs])
    with job.run.writing():
        write_text(job.run.path / "summary.json", json.dumps({"seeds": seeds, **found}, indent=2) + "\n")
    Display(clock=True).say(describe_summary(found, job.runs))


def job_of(job: Job, seed: int) -> Job:
    """Return the job of one seed, which is resumed if its folder holds a checkpoint.

    Raises:
        UserError: The folder holds a run of another recipe.
    """
    recipe, run = replace(job.recipe, seed=seed), RunFolder(job.run.path / f"seed{seed}")
    if not run.has_checkpoint():
        return replace(job, recipe=recipe, run=run, runs=1)
    stored, notes = run.check_resumable()
    if differences := recipe.differences(stored):
        raise UserError(f"{run.path} holds a run of another recipe; {'; '.join(differences)}.")
    return replace(job, recipe=recipe, run=run, runs=1, resume=True, notes=job.notes + notes)


def summarise(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return the mean, the sample deviation and the values of each score, of the best and of the last weights.

    Args:
        runs: The lines of metrics.jsonl of each run; at least two runs.
    """
    found: dict[str, Any] = {}
    outcomes = [outcome(lines) for lines in runs]
    for which in ("best", "last"):
        for score in SCORES:
            values = [one[which][score] for one in outcomes if score in one[which]]
            if len(values) == len(runs):
                found[f"{which}_{score}"] = {"mean": mean(values), "deviation": stdev(values), "values": values}
    return found


def describe_summary(found: dict[str, Any], runs: int) -> str:
    """Return the means and deviations in words."""

    def words(name: str) -> str:
        return f"{found[name]['mean']:.2f} ± {found[name]['deviation']:.2f}%"

    text = f"{runs} runs: best top-1 {words('best_val_top1')}, last {words('last_val_top1')}"
    averaged = "last_ema_val_top1"
    return f"{text}, last EMA {words(averaged)}" if averaged in found else text
