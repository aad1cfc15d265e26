"""The run folder: what was run, what came out, and what a resume needs.

recipe.json        the settings of the run
model.json         the arguments of `sdnet.create_model`, and the names of the classes
environment.json   versions, commit, devices and command line, one entry per start
metrics.jsonl      one line per epoch: epoch, step, losses, rate, top-1 and top-5, step margin, images/s, data wait
train.log          the lines that the program showed, with the date
curve.png          loss and accuracy over the epochs
atoms.png          the atoms of the first CSC layer after the last epoch
tensorboard/       the same, and the training loss within epochs
left_out.tsv       files of the data that are not used, and why; special characters of names are escaped
best.safetensors   weights of the epoch with the highest validation top-1
last.safetensors   weights of the last checkpoint
best_ema.safetensors, last_ema.safetensors   the same of the averaged weights, with --ema
best.later.safetensors   best weights from after the checkpoint that the run went on from, such as one of --keep-every
last.pt            all that a resume needs, in one file (see sdnet.train.checkpoint)
previous.pt        the checkpoint before, which a resume takes if last.pt is damaged
epoch-0030.*       checkpoint and weights of an epoch that --keep-every keeps
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sdnet.files import link_atomically, remove_unfinished, write_atomically, write_text
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.errors import UserError
from sdnet.train.recipes import Recipe
from sdnet.weights import weights_bytes

CURVES = ("train_loss", "val_loss", "val_top1", "val_top5")
ESCAPES = str.maketrans({"\t": r"\t", "\n": r"\n", "\r": r"\r"})


class RunFolder:
    """Paths, reading and writing of one run folder; only the main process writes.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.json"
        self.metrics_file = path / "metrics.jsonl"
        self.environment_file = path / "environment.json"
        self.curve_file = path / "curve.png"
        self.log_file = path / "train.log"
        self.checkpoint_file = path / "last.pt"
        self.previous_file = path / "previous.pt"

    def create(self, recipe: Recipe, model: Mapping[str, Any] | None = None, classes: Sequence[str] = ()) -> None:
        """Make the folder, if it is new, and store what is run; files that a killed process left unfinished go.

        Args:
            recipe: The settings of the run.
            model: The arguments of `sdnet.create_model`.
            classes: The names of the classes.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        _write_json(self.recipe_file, recipe.to_json())
        if model:
            _write_json(self.path / "model.json", {"model": dict(model), "classes": list(classes)})

    def has_checkpoint(self) -> bool:
        """Return whether a run in this folder has written a checkpoint, even if it is damaged."""
        return self.checkpoint_file.exists() or self.previous_file.exists()

    def load_checkpoint(self) -> tuple[Checkpoint, tuple[str, ...]]:
        """Return the last checkpoint, or the one before if the last one is missing or damaged.

        Returns:
            The checkpoint, and a sentence for the user if it is not the last one.

        Raises:
            UserError: There is no checkpoint that can be read.
        """
        try:
            return Checkpoint.load(self.checkpoint_file), ()
        except UserError as error:
            if not self.previous_file.exists():
                raise
            try:
                checkpoint = Checkpoint.load(self.previous_file)
            except UserError as second:
                raise UserError(f"{error} {second}") from error
            state = checkpoint.shared.get("state", {})
            where = f"epoch {state.get('epoch', 0) + 1}, step {state.get('step', 0)}"
            return checkpoint, (f"{error} The run goes on from the checkpoint before, {self.previous_file}, {where}.",)

    def checkpoint_of(self, resume: bool) -> tuple[Checkpoint | None, tuple[str, ...]]:
        """Return `load_checkpoint` if the run is resumed; otherwise check once more that the folder is unused."""
        if resume:
            return self.load_checkpoint()
        self.check_unused()  # another program may have used it before this one locked it
        return None, ()

    def keep_checkpoint(self, epoch: int) -> None:
        """Keep the checkpoint and the weights of an epoch under names of their own.

        There is no last checkpoint if a resume has set it aside because it was damaged.
        """
        for file in (self.checkpoint_file, self.path / "last.safetensors"):
            if file.exists():
                link_atomically(file, file.with_stem(f"epoch-{epoch:04}"))

    def set_aside_damaged(self) -> None:
        """Rename a damaged last checkpoint, so that the next one does not take the place of the one before."""
        if self.checkpoint_file.exists():
            os.replace(self.checkpoint_file, self.path / "last.damaged.pt")

    def set_aside_later(self, step: int) -> tuple[str, ...]:
        """Rename best weights from after a step that the run goes on from: they do not belong to it any more.

        Args:
            step: The optimizer steps of the checkpoint.

        Returns:
            A sentence for the user for each file.
        """
        from safetensors import SafetensorError, safe_open

        notes = []
        for file in (self.path / "best.safetensors", self.path / "best_ema.safetensors"):
            later = file.with_stem(f"{file.stem}.later")
            try:
                with safe_open(file, framework="pt") as content:
                    of_step = int((content.metadata() or {}).get("step", 0))
            except (SafetensorError, OSError, ValueError):
                continue  # there is none, or none of a run
            if of_step > step:
                os.replace(file, later)
                notes.append(f"{file} is of step {of_step}, after this checkpoint; it is now {later.name}.")
        return tuple(notes)

    def check_unused(self) -> None:
        """Check that a new run would overwrite no other.

        Raises:
            UserError: The folder holds a run with a checkpoint.
        """
        if self.has_checkpoint():
            raise UserError(f"{self.path} holds a run: go on with --resume {self.path} or choose another --out.")

    def check_writable(self) -> None:
        """Check that files can be written into the folder, which need not exist yet; leaves nothing behind.

        Raises:
            UserError: It is a file or lies below one, its name is not UTF-8, or the system refuses to write there.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            name = str(self.path).encode(errors="backslashreplace").decode()
            raise UserError(f"The run folder {name} has a name that is not UTF-8, which TensorBoard needs.") from None
        place = next(place for place in (self.path, *self.path.absolute().parents) if os.path.lexists(place))
        if not place.is_dir():
            raise UserError(f"The run folder {self.path} cannot be made: {place} is not a folder.")
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"0")
        except OSError as error:
            raise UserError(f"The run folder {self.path} cannot be written: {error.strerror}.") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failure of the system to write, such as a full disk, into one sentence.

        Raises:
            UserError: A file could not be written in the block; files that it would have replaced are unchanged.
        """
        try:
            yield
        except OSError as error:
            kept = (
                f"{self.checkpoint_file} is the last checkpoint" if self.has_checkpoint() else "there is no checkpoint"
            )
            raise UserError(f"The run folder {self.path} cannot be written: {error.strerror}; {kept}.") from error

    def check_resumable(self) -> tuple[Recipe, tuple[str, ...]]:
        """Read the files that a resume needs, apart from the checkpoint.

        Returns:
            The recipe of the run, and sentences that the user should read.

        Raises:
            UserError: There is no run in this folder, or one of its files is damaged.
        """
        recipe, notes = self.recipe(), []
        if missing := sorted(set(recipe.to_json()) - set(_read_json(self.recipe_file, dict))):
            values = ", ".join(f"{name} {recipe.to_json()[name]}" for name in missing)
            notes.append(f"{self.recipe_file} is from an older version of sdnet; the defaults are used for {values}.")
        self.metrics()
        self.environments()
        return recipe, tuple(notes)

    def recipe(self) -> Recipe:
        """Return the recipe of the run.

        Raises:
            UserError: There is no run in this folder, or its recipe cannot be read by this version.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path} holds no run to resume: there is no {self.recipe_file.name}.")
        values = _read_json(self.recipe_file, dict)
        try:
            return Recipe.from_json(values)
        except UserError as error:
            raise UserError(f"The recipe in {self.recipe_file} cannot be used: {error}") from error

    def environments(self) -> list[dict[str, Any]]:
        """Return the environment of each start of the run.

        Raises:
            UserError: environment.json is damaged.
        """
        return _read_json(self.environment_file, list) if self.environment_file.exists() else []

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Store the environment of a start or resume of the run."""
        _write_json(self.environment_file, [*self.environments(), environment])

    def note_left_out(self, files: Sequence[tuple[str, str]]) -> None:
        """Write which files of the data are not used, and why: one line for each file.

        Args:
            files: (file, reason), with names from `sdnet.train.data.names.printable`.
        """
        path = self.path / "left_out.tsv"
        text = "".join(f"{file.translate(ESCAPES)}\t{reason.translate(ESCAPES)}\n" for file, reason in files)
        if files:
            write_atomically(path, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))
        else:
            path.unlink(missing_ok=True)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; one that an interruption cut off at the end is left out.

        Raises:
            UserError: Another line is damaged.
        """
        if not self.metrics_file.exists():
            return []
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(_read_text(self.metrics_file).split("\n")[:-1], 1):
            try:
                lines.append(json.loads(text))
                curves = CURVES if "val_loss" in lines[-1] else ("train_loss",)  # an epoch without an evaluation
                whole = all(isinstance(lines[-1][name], int | float) for name in ("epoch", *curves))
            except (ValueError, TypeError, KeyError, RecursionError):
                whole = False
            if not whole:
                raise UserError(f"Line {number} of {self.metrics_file} is damaged; remove this line to go on.")
        return lines

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one epoch and redraw the curve."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.draw_curve()

    def missing_metrics(self, epochs: int) -> tuple[str, ...]:
        """Return a sentence for the user if metrics.jsonl lacks lines of the finished epochs."""
        missing = sorted(set(range(1, epochs + 1)) - {line["epoch"] for line in self.metrics()})
        if not missing:
            return ()
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        return (f"{self.metrics_file} lacks the finished epochs {shown}; the curve leaves them out.",)

    def keep_metrics(self, epochs: int) -> None:
        """Remove the lines of epochs after the checkpoint, which will be run again."""
        kept = [line for line in self.metrics() if line["epoch"] <= epochs]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.metrics_file, text)

    def save_weights(self, name: str, weights: dict[str, Tensor], facts: dict[str, str]) -> None:
        """Write `name`.safetensors with `facts` in its header."""
        content = weights_bytes(weights, facts)
        write_atomically(self.path / f"{name}.safetensors", lambda path: path.write_bytes(content))

    def copy_weights(self, source: str, name: str) -> None:
        """Give `source`.safetensors a second name."""
        link_atomically(self.path / f"{source}.safetensors", self.path / f"{name}.safetensors")

    def draw_curve(self) -> None:
        """Draw loss and validation accuracy, in percent, over the epochs."""
        from matplotlib.figure import Figure

        lines = self.metrics()
        figure = Figure(figsize=(7, 4), layout="constrained")
        losses, accuracies = figure.subplots(1, 2)
        plots = {
            losses: {"train_loss": "train", "val_loss": "val", "ema_val_loss": "val, EMA"},
            accuracies: {"val_top1": "top-1", "val_top5": "top-5", "ema_val_top1": "top-1, EMA"},
        }
        for axes, curves in plots.items():
            for name, label in curves.items():
                points = [(line["epoch"], line[name]) for line in lines if name in line]
                if points or name in CURVES:
                    axes.plot(*zip(*points, strict=True) if points else ((), ()), label=label)
        losses.set(xlabel="epoch", ylabel="cross-entropy")
        losses.legend()
        accuracies.set(xlabel="epoch", ylabel="val accuracy, %", ylim=(0, 100))
        accuracies.legend()
        write_atomically(self.curve_file, lambda path: figure.savefig(path, format="png", dpi=120))


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _read_json(path: Path, kind: type) -> Any:
    """Return the value in a JSON file.

    Raises:
        UserError: The file is damaged, or its value is not of the type `kind`.
    """
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged: it should hold a JSON {'object' if kind is dict else 'list'}.")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not UTF-8 text.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
