"""What the trainer asks of a loader, whatever stands behind it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Which of how many processes a loader feeds."""

    rank: int = 0
    world: int = 1


class Loader(Protocol):
    """Batches of one rank: images [B, 3, S, S] fp32, normalised, and labels [B] int64, on the loader's device.

    A batch is a pure function of (seed, epoch, rank, step): a loader rebuilt with the same arguments and
    `set_epoch` gives the same batches, and `load_state` resumes in the midst of an epoch.
    """

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch that are left; afterwards the epoch is over and a new iteration starts it anew."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its start."""
        ...

    def state(self) -> Tensor:
        """The position within the epoch as bytes [K] uint8; empty before the first batch."""
        ...

    def load_state(self, state: Tensor) -> None:
        """Let the next iteration of the chosen epoch start where `state` was taken."""
        ...

    def close(self) -> None:
        """Release threads, memory and files."""
        ...


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by.

    `val_size` is the number of validation pictures over all ranks; `digest` fingerprints the training set; `notes` are
    sentences that the user should read before the training.
    """

    train: Loader
    val: Loader
    val_size: int
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()
