"""What the trainer asks of a loader, whatever stands behind it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shard:
    """Which of how many processes a loader feeds."""

    rank: int = 0
    world: int = 1


class Loader(Protocol):
    """Batches of one rank: images [B, 3, S, S], normalised, fp32 or as asked for, and labels [B] int64, or targets
    [B, classes] fp32 where pictures are mixed; on the loader's device.

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
        """The place within the epoch as bytes [K] uint8."""
        ...

    def load_state(self, state: Tensor) -> None:
        """Let the next iteration of the chosen epoch start where `state` was taken.

        Raises:
            UserError: it was taken with another batch, number of ranks, seed, epoch or list of pictures.
        """
        ...

    def close(self) -> None:
        """Release threads, memory and files."""
        ...


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by.

    `val_size` is the number of validation pictures over all ranks; `digest` fingerprints the training set; `notes` are
    sentences that the user should read before the training; `left_out` are (file, reason) of what is not used.
    """

    train: Loader
    val: Loader
    val_size: int
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
