"""The part that all loaders share: the order of an epoch, the share of a rank, and the state to resume from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from sdnet.train.data.erasing import erase
from sdnet.train.data.loader import Rank
from sdnet.train.data.mixing import Mixing
from sdnet.train.data.position import pack, unpack
from sdnet.train.errors import UserError
from sdnet.train.job import Job

ERASING = 1  # the stream of random numbers of erasing, beside that of mixing
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CommonOptions(TypedDict, total=False):
    """The options that the training and the validation loader of a job share."""

    rank: Rank
    device: torch.device | str
    seed: int
    channels_last: bool
    dtype: torch.dtype
    dropped: Sequence[int]


class LoaderOptions(CommonOptions):
    """The options of every loader, described at `EpochLoader`."""

    batch: int
    augment: bool
    mixing: NotRequired[Mixing | None]
    erasing: NotRequired[float]


def loader_options(job: Job, rank: Rank, device: torch.device) -> CommonOptions:
    """Return the options that the training and the validation loader of a job share."""
    recipe = job.recipe
    return {
        "rank": rank,
        "device": device,
        "seed": recipe.seed,
        "channels_last": recipe.channels_last,
        "dtype": DTYPES[recipe.input_dtype],
    }


class EpochLoader(ABC):
    """Base class of the loaders: which images come in which batch of which rank.

    Training: each epoch permutes the N images by (seed, epoch), and every rank takes every `world`-th image of that
    order, `batch * (N // (batch * world))` in all. So no image comes twice in an epoch, all ranks take equally many
    steps, and an epoch needs no state of the epochs before it. Evaluation: every image comes exactly once over the
    ranks, in batches of `batch` or somewhat fewer.

    A subclass implements `__iter__` and sets `_step` to the number of batches that it has given.

    Args:
        total: N, the number of images.
        name: The name of the set, for messages.
        digest: A fingerprint of the set, for states.
        batch: Images of one batch of one rank.
        augment: True for training, False for evaluation.
        mixing: Mixup and CutMix; labels are then targets [B, classes]; training only.
        erasing: The probability that an image loses a rectangle; training only.
        dropped: Indices of images that are left out, because they broke during the run; training only. The order of the
            others stays, so that a run can be resumed in the middle of an epoch.
        rank: The rank that this loader feeds.
        device: Where batches come out.
        seed: The seed of order and augmentation.
        channels_last: Give images channels_last strides.
        dtype: The type of the images: fp32, fp16 or bf16.

    Raises:
        UserError: There are fewer images than ranks.
    """

    def __init__(
        self,
        *,
        total: int,
        name: str,
        digest: str,
        batch: int,
        augment: bool,
        mixing: Mixing | None = None,
        erasing: float = 0.0,
        dropped: Sequence[int] = (),
        rank: Rank | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.total, self.batch, self.augment, self.mixing, self.erasing = total, batch, augment, mixing, erasing
        self.rank, self.device = rank or Rank(), torch.device(device)
        self.seed, self.epoch, self.dtype, self.channels_last = seed, 0, dtype, channels_last
        self._digest, self._step, self._restored = digest, 0, b""
        self._dropped = np.array(sorted(dropped), dtype=int)
        if total < self.rank.world:
            raise UserError(f"{name} has {total} images, fewer than the {self.rank.world} processes.")
        used = total - len(self._dropped)
        self._steps = used // (batch * self.rank.world) if augment else len(self._evaluation_batches())

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return self._steps

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining batches of the epoch; a later iteration starts the same epoch from its beginning."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its start."""
        self.close()
        self.epoch = epoch

    def state(self) -> Tensor:
        """Return the position within the epoch as bytes [K] uint8."""
        return pack(self._facts(), self._step, self._private_state())

    def load_state(self, state: Tensor) -> None:
        """Let the next iteration of the chosen epoch start where `state` was taken.

        Raises:
            UserError: The state was taken with another batch, number of ranks, seed, epoch or list of images.
        """
        step, restored = unpack(state, self._facts())
        self.close()
        self._step, self._restored = step, restored

    def close(self) -> None:
        """Go back to the start of the epoch; a subclass releases its threads and buffers too."""
        self._step, self._restored = 0, b""

    def _private_state(self) -> bytes:
        """Return what a subclass adds to the state; `_restored` holds it after `load_state`."""
        return self._restored

    def _facts(self) -> dict[str, object]:
        """Return what a state depends on."""
        return {
            "batch": self.batch,
            "processes": self.rank.world,
            "rank": self.rank.index,
            "seed": self.seed,
            "epoch": self.epoch,
            "images": self._digest,
        }

    def _generator(self) -> np.random.Generator:
        """Return the generator of the epoch, the same on every rank; the order is the first thing drawn from it."""
        return np.random.default_rng((self.seed, self.epoch))

    def _own(self, values: np.ndarray) -> np.ndarray:
        """Return this rank's part of values [..., N] that stand in the order of a training epoch."""
        return values[..., self.rank.index :: self.rank.world][..., : self._steps * self.batch]

    def _batches(self) -> list[np.ndarray]:
        """Return the indices of the images of each step of this rank."""
        if not self.augment:
            return self._evaluation_batches()
        order = self._generator().permutation(self.total)
        order = self._own(order[~np.isin(order, self._dropped)])
        return np.split(order, self._steps) if self._steps else []

    def _evaluation_batches(self) -> list[np.ndarray]:
        """Return all images of this rank in as many batches as the largest share needs, none of them empty."""
        largest = -(-self.total // self.rank.world)
        own = np.arange(self.rank.index, self.total, self.rank.world)
        return [batch for batch in np.array_split(own, -(-largest // self.batch)) if len(batch)]

    def _mixed(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step after random erasing, Mixup and CutMix, where they are asked for."""
        place = (self.seed, self.epoch, self.rank.index, step)
        if self.erasing:
            images = erase(images, self.erasing, np.random.default_rng((*place, ERASING)))
        if self.mixing:
            return self.mixing(images, labels, np.random.default_rng(place))
        return images, labels
