"""When a run writes its state, and in which order: first what a resume needs, then the weights for others."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from sdnet.train.atoms import draw_atoms
from sdnet.train.checkpoint import Checkpoint, State, Stateful, TrainState, states_of
from sdnet.train.ema import Ema
from sdnet.train.job import Job
from sdnet.train.ranks import on_main
from sdnet.train.step_sizes import converged_step_sizes

Scores = Mapping[str, Mapping[str, float]]
"""What each of the exported models reached in the evaluation, by the name of its file."""


class Digests(NamedTuple):
    """The fingerprints of the training and the validation set."""

    train: str
    val: str


class Saver:
    """Writes the checkpoints and the exported weights of a run; a part of the checkpoint itself.

    Args:
        job: Where to write, and how often.
        accelerator: The processes of the run; the main one writes.
        state: Where the run stands.
        digests: The fingerprints of the data.
        facts: What the header of every weights file says.

    Attributes:
        shared: The parts that a checkpoint stores once for all processes, by name.
        own: The parts that it stores for each process, by name.
        models: The models or averages whose weights are exported, by the name of the file without `.safetensors`.
    """

    def __init__(
        self, job: Job, accelerator: Accelerator, state: TrainState, digests: Digests, facts: Mapping[str, str]
    ) -> None:
        self.job, self.run, self.accelerator, self.state = job, job.run, accelerator, state
        self.digests, self.facts = digests, dict(facts)
        self.shared: dict[str, Stateful] = {"state": state, "exports": self}
        self.own: dict[str, Stateful] = {}
        self.models: dict[str, nn.Module | Ema] = {}
        self._scores: dict[str, dict[str, float]] = {}
        self._copies: dict[str, str] = {}
        self._written, self._asked = time.monotonic(), False

    def state_dict(self) -> State:
        """Return what the last export wrote beside the weights."""
        return {"scores": self._scores, "copies": self._copies}

    def load_state_dict(self, state_dict: State, /) -> None:
        """Set what the last export wrote, for `export`."""
        self._scores, self._copies = state_dict["scores"], state_dict["copies"]

    def due(self) -> bool:
        """Return whether it is time for a checkpoint within the epoch; `True` only once until it is written."""
        every, minutes = self.job.checkpoint_every, self.job.checkpoint_minutes
        late = minutes > 0 and not self._asked and time.monotonic() - self._written >= 60 * minutes
        self._asked |= late
        return late or (every > 0 and self.state.step % every == 0)

    def save(self, scores: Scores | None = None, copies: Mapping[str, str] | None = None) -> None:
        """Write the checkpoint, then the weights of `models` with converged step sizes, and after an epoch the atoms.

        Args:
            scores: What the models reached, if this is after an evaluation.
            copies: Other names for exported files, such as {"best": "last"}.

        Raises:
            UserError: The main process could not write; all processes raise the same sentence.
        """
        self._scores = {name: dict(values) for name, values in (scores or {}).items()}
        self._copies = dict(copies or {})
        ranks = gather_object([states_of(self.own)])
        self._written, self._asked = time.monotonic(), False

        def write() -> None:
            checkpoint = Checkpoint(self.digests.train, states_of(self.shared), ranks, self.digests.val)
            checkpoint.save(self.run.checkpoint_file, self.run.previous_file)
            self._export()
            if not self.state.batch:
                draw_atoms(self.accelerator, self.models["last"], self.run.path, self.state.step)

        self.on_main(write)

    def export(self) -> None:
        """Write the weights that belong to a restored checkpoint: the process may have ended before it wrote them."""
        self.on_main(self._export)

    def on_main(self, write: Callable[[], None]) -> None:
        """Let the main process write to the run folder; what it cannot write ends all processes.

        Raises:
            UserError: It could not write.
        """

        def say_why_not() -> None:
            with self.run.writing():
                write()

        on_main(self.accelerator, say_why_not)

    def _export(self) -> None:
        place = {"epoch": str(self.state.epoch), "step": str(self.state.step)}
        for name, model in self.models.items():
            reached = {key: f"{value:.4f}" for key, value in self._scores.get(name, {}).items()}
            with self._ready(model) as ready:
                self.run.save_weights(name, ready.state_dict(), self.facts | place | reached)
        for name, source in self._copies.items():
            self.run.copy_weights(source, name)
        every, state = self.job.keep_every, self.state
        if every and state.epoch and not state.batch and state.epoch % every == 0:
            self.run.keep_checkpoint(state.epoch)

    @contextmanager
    def _ready(self, model: nn.Module | Ema) -> Iterator[nn.Module]:
        """Yield a model with converged step sizes; an average with atoms of unit norm too."""
        if isinstance(model, Ema):
            with model.projected() as averaged:
                yield averaged
        elif self.state.batch:
            with converged_step_sizes(model):
                yield model
        else:  # after an epoch the step sizes have converged already
            yield model
