"""The interface between the trainer and a loader of batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Program = Literal["imagenet", "cifar"]


@dataclass(frozen=True)
class Rank:
    """Which of how many processes a loader feeds."""

    index: int = 0
    world: int = 1


class Loader(Protocol):
    """Batches of images and labels for one rank.

    A batch is a pure function of (seed, epoch, rank, step): a loader that is built again with the same arguments gives
    the same batches after `set_epoch`, and `load_state` resumes in the middle of an epoch.
    `sdnet.train.data.epochs.EpochLoader` implements all of it except the iteration.

    Shape:
        - images: [B, 3, S, S], normalised, fp32 or the type that was asked for, on the loader's device.
        - labels: [B] int64, or targets [B, classes] fp32 where images are mixed.
    """

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining batches of the epoch; a later iteration starts the same epoch from its beginning."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its start."""
        ...

    def state(self) -> Tensor:
        """Return the position within the epoch as bytes [K] uint8."""
        ...

    def load_state(self, state: Tensor) -> None:
        """Let the next iteration of the chosen epoch start where `state` was taken.

        Raises:
            UserError: The state was taken with another batch, number of ranks, seed, epoch or list of images.
        """
        ...

    def close(self) -> None:
        """Release threads, memory and files."""
        ...


@dataclass(frozen=True)
class Data:
    """The training and validation data of a run.

    Attributes:
        train: The loader of training batches.
        val: The loader of validation batches.
        val_size: The number of validation images over all ranks.
        train_size: The number of training images over all ranks, those included that an epoch leaves out; 0 if it is
            not known.
        classes: The names of the classes, in the order of the labels.
        digest: A fingerprint of the training set.
        notes: Sentences that the user should read before the training.
        left_out: (file, reason) for everything in the data folder that is not used.
        holdout: The loader of the training images that are held out to choose the best weights on; None for none.
        holdout_size: The number of these images over all ranks.
        program: Which entry script reads images this way; the colours are normalised differently.
        bad_images: (image, reason) for the images that were checked and cannot be used, named relative to the folder.
        dropped: (image, reason) for those of them that the run left out after its start.
        val_digest: A fingerprint of the validation set; empty if it has none.
    """

    train: Loader
    val: Loader
    val_size: int
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    train_size: int = 0
    holdout: Loader | None = None
    holdout_size: int = 0
    program: Program = "imagenet"
    val_digest: str = ""
    bad_images: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
