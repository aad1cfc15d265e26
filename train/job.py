"""The request of a training program: a recipe, the place of its data and its run folder, and how to run it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdnet.train.errors import UserError
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder
from sdnet.train.settings import check_settings, setting

Verify = Literal["header", "full"]
BadFiles = Literal["fail", "skip"]
Qualify = Literal["auto", "always", "never"]
Tracker = Literal[
    "none", "tensorboard", "wandb", "trackio", "aim", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"
]


@dataclass(frozen=True)
class Job:
    """A recipe, where to run it, and the settings that do not change its results.

    `sdnet.train.cli` makes a command-line option of every field that is a `setting`.

    Attributes:
        recipe: The settings that decide the results.
        data: The folder of the images.
        run: The run folder.
        resume: Whether the run continues from its last checkpoint.
        changes: The settings that a resumed run changes: `name: new, not old`.
        notes: Sentences that the user should read before the training.

    Raises:
        UserError: A setting has the wrong type or is out of range.
    """

    recipe: Recipe
    data: Path
    run: RunFolder
    resume: bool = False

    threads: int = setting(0, "data", "decoding threads of each process, 0 for its share of the cores", most=1024)
    log_every: int = setting(20, "run", "optimizer steps between two reports", least=1)
    checkpoint_every: int = setting(0, "run", "optimizer steps between two checkpoints, 0 for epoch ends only")
    checkpoint_minutes: float = setting(15.0, "run", "minutes between two checkpoints, 0 for epoch ends only")
    keep_every: int = setting(0, "run", "epochs between two checkpoints that are kept for good, 0 for none")
    timeout: float = setting(
        1800.0, "run", "seconds that a process waits in training for one that does not answer", most=1e6
    )
    qualify: Qualify = setting(
        "auto", "run", "test and time kernels on a GPU: of layers without a verdict, of all layers again, or of none"
    )
    qualify_seconds: float = setting(600.0, "run", "the most seconds that --qualify takes before the first step")
    runs: int = setting(1, "run", "runs with the seeds seed, seed + 1 ...; their mean and deviation", least=1)
    tracker: tuple[Tracker, ...] = setting(("tensorboard",), "run", "experiment trackers of Accelerate, or none")
    verify: Verify = setting("header", "data", "check the header of each image before the training, or decode it")
    bad_files: BadFiles = setting("fail", "data", "stop at images that cannot be read, or leave them out")
    val_labels: Path | None = setting(None, "data", "labels of the images of a flat validation folder")
    prefetch: int = setting(2, "data", "batches that DALI prepares in advance", least=1, most=1000)
    hw_decoder_load: float = setting(0.65, "data", "share of the images for the JPEG unit of the GPU", most=1)

    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.timeout:
            raise UserError("timeout is 0; it must be more than 0.")
