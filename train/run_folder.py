"""The run folder: what was run, what came out, and what a resume needs.

recipe.json        the resolved recipe
environment.json   versions, commit, devices, data and command line, one entry per start
metrics.jsonl      one line per epoch: epoch, step, loss, rate, val top-1 and top-5, images/s, data wait
curve.png          loss and accuracy over the epochs
tensorboard/       the same, and the training loss within epochs
left_out.tsv       files of the data that are not used, and why
best.safetensors   weights of the epoch with the highest val top-1
last.safetensors   weights of the last checkpoint
last.pt            all that a resume needs, in one file (see sdnet.train.checkpoint)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from sdnet.train.errors import UserError
from sdnet.train.files import write_atomically
from sdnet.train.recipes import Recipe


class RunFolder:
    """Paths, writing and reading of one run folder; only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.json"
        self.metrics_file = path / "metrics.jsonl"
        self.environment_file = path / "environment.json"
        self.curve_file = path / "curve.png"
        self.checkpoint_file = path / "last.pt"

    def create(self, recipe: Recipe) -> None:
        """Make the folder of a new run."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_json(self.recipe_file, recipe.to_json())

    def check_unused(self) -> None:
        """Raise a UserError if the folder holds a run that got as far as a checkpoint."""
        if self.checkpoint_file.exists():
            raise UserError(f"{self.path} holds a run: go on with --resume {self.path} or choose another --out.")

    def recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            UserError: there is no run in this folder, or not one of this version.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path} holds no run to resume: there is no {self.recipe_file.name}.")
        return Recipe.from_json(json.loads(self.recipe_file.read_text()))

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Note under what a start or resume of the run happened."""
        starts = json.loads(self.environment_file.read_text()) if self.environment_file.exists() else []
        _write_json(self.environment_file, [*starts, environment])

    def note_left_out(self, files: Sequence[tuple[str, str]]) -> None:
        """Write which files of the data are not used, and why."""
        path = self.path / "left_out.tsv"
        text = "".join(f"{file}\t{reason}\n" for file, reason in files)
        if files:
            write_atomically(path, lambda temporary: temporary.write_text(text, errors="surrogateescape"))
        else:
            path.unlink(missing_ok=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one epoch and redraw the curve."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.draw_curve()

    def keep_metrics(self, epochs: int) -> None:
        """Forget lines of epochs that the checkpoint does not know: they will be run again."""
        kept = [line for line in self.metrics() if line["epoch"] <= epochs]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.metrics_file, lambda path: path.write_text(text))

    def save_weights(self, name: str, weights: dict[str, Tensor], facts: dict[str, str]) -> None:
        """Write `name`.safetensors; `facts` go into its header."""
        tensors = {key: value.contiguous() for key, value in weights.items()}
        content = save(tensors, metadata=facts)
        write_atomically(self.path / f"{name}.safetensors", lambda path: path.write_bytes(content))

    def draw_curve(self) -> None:
        """Loss (left axis) and val top-1 in percent (right axis) against the epoch."""
        from matplotlib.figure import Figure

        lines = self.metrics()
        epochs = [line["epoch"] for line in lines]
        figure = Figure(figsize=(7, 4), layout="constrained")
        losses, accuracies = figure.subplots(1, 2)
        losses.plot(epochs, [line["train_loss"] for line in lines], label="train")
        losses.plot(epochs, [line["val_loss"] for line in lines], label="val")
        losses.set(xlabel="epoch", ylabel="cross-entropy")
        losses.legend()
        accuracies.plot(epochs, [line["val_top1"] for line in lines], label="top-1")
        accuracies.plot(epochs, [line["val_top5"] for line in lines], label="top-5")
        accuracies.set(xlabel="epoch", ylabel="val accuracy, %", ylim=(0, 100))
        accuracies.legend()
        write_atomically(self.curve_file, lambda path: figure.savefig(path, format="png", dpi=120))


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))
