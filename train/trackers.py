"""The experiment trackers of Accelerate, by name; each gets the same scalars."""

import json
from hashlib import sha256

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType

from sdnet.train.errors import UserError
from sdnet.train.job import Job

PROJECT = "sdnet"


def check_trackers(job: Job) -> None:
    """Check that the trackers of a job can be used.

    Raises:
        UserError: One is not installed, is named twice, or stands beside "none".
    """
    names = job.tracker
    if "none" in names and len(names) > 1:
        raise UserError(f"tracker is {' '.join(names)}; none stands alone.")
    if len(set(names)) < len(names):
        raise UserError(f"tracker is {' '.join(names)}; each can be named once.")
    installed = {str(name) for name in get_available_trackers()}
    if missing := [name for name in names if name not in installed | {"none"}]:
        raise UserError(f"tracker is {missing[0]}, whose package is not installed: pip install {missing[0]}.")


def run_id(job: Job) -> str:
    """Return an identifier that all starts of a run share: of its seed and of the environment of its first start."""
    first = json.dumps([job.recipe.seed, job.run.environments()[:1]])
    return sha256(first.encode()).hexdigest()[:16]


def start_trackers(accelerator: Accelerator, job: Job, step: int) -> None:
    """Start the trackers of a job.

    TensorBoard writes to `tensorboard/` in the run folder, and forgets what was logged after the step at which a run is
    resumed. The others get the project "sdnet", the name of the run folder where they take one, and the recipe. In
    wandb a resumed run goes on under its first id.

    Args:
        accelerator: Accelerate, which passes scalars on to the trackers.
        job: The job.
        step: The optimizer steps that the run has taken.
    """
    names = [name for name in job.tracker if name != "none"]
    folder = str(job.run.path)
    options = {
        "wandb": {"name": job.run.path.name, "dir": folder, "id": run_id(job), "resume": "allow"},
        "dvclive": {"dir": f"{folder}/dvclive"},
    }
    board = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    started: list[str | LoggerType | GeneralTracker] = [board if name == "tensorboard" else name for name in names]
    accelerator.log_with = started
    accelerator.init_trackers(PROJECT, init_kwargs=options)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(job.recipe.to_json())
