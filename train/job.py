"""What a training program was asked to do: a recipe, and where its data and its run folder are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder

Verify = Literal["header", "full"]  # look at the ends of every picture, or decode it
BadFiles = Literal["fail", "skip"]


@dataclass(frozen=True)
class Job:
    """What to run and where: the recipe, and what does not change its numbers.

    `threads` are the decoding threads of each process, 0 for its share of the machine's cores; `prefetch` and
    `hw_decoder_load` are DALI's. `verify`, `bad_files` and `val_labels` are those of `sdnet.train.data.sources`.
    """

    recipe: Recipe
    data: Path
    run: RunFolder
    resume: bool
    threads: int
    log_every: int
    verify: Verify = "header"
    bad_files: BadFiles = "fail"
    val_labels: Path | None = None
    prefetch: int = 2
    hw_decoder_load: float = 0.65
