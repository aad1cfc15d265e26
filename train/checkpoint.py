"""The state of a run in one file: written whole or not at all, and read without executing a pickle."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile, ZipFile

import torch

from sdnet.files import link_atomically, write_atomically
from sdnet.train.data.loader import Loader
from sdnet.train.errors import UserError

State = dict[str, Any]


class Stateful(Protocol):
    """A part of a run that a checkpoint stores: anything that can give and take its state."""

    def state_dict(self) -> State:
        """Return the state as nested dictionaries of tensors, numbers and strings."""
        ...

    def load_state_dict(self, state_dict: State, /) -> object:
        """Set the state to one that `state_dict` returned."""
        ...


@dataclass
class TrainState:
    """Where a run stands; an epoch is a fixed number of optimizer steps.

    Attributes:
        epoch: The number of finished epochs.
        batch: The number of finished batches of the running epoch.
        step: The number of optimizer steps of the whole run.
        best_top1: The highest top-1 accuracy so far, in percent, of the images that choose the best weights; -1 before
            the first evaluation.
        best_ema_top1: The same of the averaged weights.
        best_epoch: The number of epochs after which one of these was last raised.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_top1: float = -1.0
    best_ema_top1: float = -1.0
    best_epoch: int = 0

    def note_best(self, scores: Mapping[str, float]) -> dict[str, str]:
        """Note the scores of an epoch, and return {best file: last file} for the weights that are the best so far."""
        deciding, copies = "holdout_top1" if "holdout_top1" in scores else "val_top1", {}
        if scores.get(deciding, -1) > self.best_top1:
            self.best_top1, self.best_epoch = scores[deciding], self.epoch
            copies["best"] = "last"
        if scores.get(f"ema_{deciding}", -1) > self.best_ema_top1:
            self.best_ema_top1, self.best_epoch = scores[f"ema_{deciding}"], self.epoch
            copies["best_ema"] = "last_ema"
        return copies

    def state_dict(self) -> State:
        """Return all fields."""
        return asdict(self)

    def load_state_dict(self, state_dict: State, /) -> None:
        """Set all fields."""
        state_dict = {"best_ema_top1": -1.0, "best_epoch": 0} | state_dict  # an older version did not store these
        for item in fields(self):
            setattr(self, item.name, type(item.default)(state_dict[item.name]))


class RandomState:
    """The state of the random number generators of PyTorch on one device.

    Args:
        device: The device of the run; the generator of the CPU is always included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> State:
        """Return the states of the generators, on the CPU."""
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def load_state_dict(self, state_dict: State, /) -> None:
        """Set the generators; a run that moved to another kind of device keeps the fresh generator there."""
        torch.set_rng_state(state_dict["cpu"])
        if "cuda" in state_dict and self.device.type == "cuda":
            torch.cuda.set_rng_state(state_dict["cuda"], self.device)


class LoaderPosition:
    """The place of a loader within the epoch of a run, as a part of its checkpoint.

    Args:
        loader: The loader.
        state: The state of the run, which is restored before.
    """

    def __init__(self, loader: Loader, state: TrainState) -> None:
        self.loader, self.state = loader, state

    def state_dict(self) -> State:
        """Return the bytes of the loader."""
        return {"position": self.loader.state()}

    def load_state_dict(self, state_dict: State, /) -> None:
        """Choose the epoch of the run and go to the stored place in it."""
        self.loader.set_epoch(self.state.epoch)
        self.loader.load_state(state_dict["position"])


@dataclass
class Checkpoint:
    """Everything that decides how a run continues, for all processes.

    Attributes:
        data: The digest of the training set.
        shared: The state of each part that is the same in all processes, by the name of the part.
        ranks: For each process the state of each part that is its own, by the name of the part. One file holds them
            all, so that the processes cannot resume from different steps.
        val: The digest of the validation set; empty in a checkpoint of an older version.
    """

    data: str
    shared: dict[str, State]
    ranks: list[dict[str, State]]
    val: str = ""

    def save(self, path: Path, previous: Path | None = None) -> None:
        """Write the checkpoint atomically.

        Args:
            path: The file.
            previous: Another file, which takes the checkpoint that `path` held before.
        """
        state = {item.name: getattr(self, item.name) for item in fields(self)}
        content = BytesIO()
        torch.save(state, content)  # in memory, so that a full disk is an OSError and not one of many of torch

        def write(temporary: Path) -> None:
            temporary.write_bytes(content.getbuffer())
            if previous and path.exists():
                link_atomically(path, previous)  # only now, so that a full disk costs neither of them

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint onto the CPU.

        Raises:
            UserError: There is no checkpoint, it is damaged, or it is another kind of file.
        """
        if not path.is_file():
            raise UserError(f"{path.parent} holds no checkpoint yet: there is no {path.name}.")
        try:
            with ZipFile(path) as archive:  # torch.load does not compare the checksums of the archive
                broken = archive.testzip()
            if broken:
                raise UserError(f"The checkpoint {path} is damaged: the checksum of {broken} is wrong.")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except UserError:
            raise
        except BadZipFile as error:
            raise UserError(f"The checkpoint {path} is damaged or cut off: it is no whole archive.") from error
        except Exception as error:  # torch.load raises many kinds of errors on a damaged or foreign file
            raise UserError(f"The checkpoint {path} cannot be read: {_one_line(error)}.") from error
        needed = {"data": str, "shared": dict, "ranks": list}
        kinds = needed | {"val": str}
        found = {name: type(value) for name, value in state.items()} if isinstance(state, dict) else {}
        if not needed.items() <= found.items() <= kinds.items():
            raise UserError(f"{path} is no checkpoint of this version of sdnet: it does not hold {', '.join(needed)}.")
        return cls(**state)

    def check_processes(self, processes: int) -> None:
        """Check that the run continues with as many processes as it began with.

        Raises:
            UserError: It does not.
        """
        if len(self.ranks) != processes:
            now = f"{processes} process{'es' * (processes > 1)}"
            raise UserError(f"The run cannot be resumed with {now}: it began with {len(self.ranks)}.")

    def check_data(self, data: str, val: str = "") -> None:
        """Check that the run continues with the images that it began with.

        Args:
            data: The digest of the training set.
            val: The digest of the validation set, if it is known.

        Raises:
            UserError: It does not.
        """
        for split, stored, now in (("training", self.data, data), ("validation", self.val, val)):
            if stored != now and stored and now:
                raise UserError(f"The run cannot be resumed: the files or classes of the {split} data have changed.")


def states_of(parts: Mapping[str, Stateful]) -> dict[str, State]:
    """Return the state of each part."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: Mapping[str, Stateful], states: Mapping[str, State], path: Path) -> tuple[str, ...]:
    """Set the state of each part to the stored one; a part that is not stored keeps its fresh state.

    Args:
        parts: The parts of the run.
        states: What a checkpoint stored for them.
        path: The file of the checkpoint, for messages.

    Returns:
        Sentences about parts that the checkpoint lacks, for the user.

    Raises:
        UserError: A stored state does not fit its part, or there is no such part.
    """
    if unknown := sorted(set(states) - set(parts)):
        raise UserError(f"The checkpoint {path} holds parts that this run does not have: {', '.join(unknown)}.")
    for name in parts:
        if name in states:
            try:
                parts[name].load_state_dict(states[name])
            except UserError:
                raise
            except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"The {name} in the checkpoint {path} does not fit: {_one_line(error)}.") from error
    missing = [name for name in parts if name not in states]
    return tuple(
        f"{path} does not hold {name}, which starts afresh: a setting has changed, or an older version wrote the file."
        for name in missing
    )


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300].rstrip(".")
