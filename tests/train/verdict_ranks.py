"""A program for test_verdicts: each of two processes finds the verdicts of a run, and then makes a process group.

`verdict_ranks.py FOLDER` takes its rank from the environment, as a launcher sets it. A GPU and the qualification are
scripted. The process groups use the address at which the verdicts were exchanged before.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdnet.kernels.qualify import job, parent
from sdnet.kernels.qualify.key import machine_of
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import PLAIN, Verdict
from sdnet.train import verdicts
from sdnet.train.job import Job
from sdnet.train.recipes import CIFAR_RECIPES
from sdnet.train.run_folder import RunFolder

MACHINE = machine_of(torch.device("cpu"))


def main(folder: Path) -> None:
    rank, qualified = int(os.environ["RANK"]), 0

    def scripted(items: Any, device: str, *, flags: Any, **_: object) -> Outcome:
        nonlocal qualified
        qualified += 1
        return Outcome(MACHINE, {item.key(flags): Verdict(PLAIN, "scripted") for item in items})

    has_gpu = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    parent.qualify = scripted  # pyright: ignore[reportAttributeAccessIssue]
    verdicts.obstacle_of = lambda *_: None
    verdicts.machine_of = lambda _: MACHINE
    recipe = replace(CIFAR_RECIPES["cifar_sdnet18"](), mixed_precision="no", impl="auto")
    found = verdicts.Verdicts()
    found.find(Job(recipe, folder, RunFolder(folder / "run")))
    torch.cuda.is_available = has_gpu
    dist.init_process_group("gloo")
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    facts = {"table": sorted(found.table), "qualified": qualified, "of_job": job.STATE.of_job, "sum": int(total)}
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
