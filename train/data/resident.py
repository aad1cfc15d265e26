"""Small pictures: all of them on the device as uint8; cropped, flipped and normalised there, without any worker."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.train.data.loader import Shard
from sdnet.train.data.mixing import Mixing
from sdnet.train.data.position import pack, unpack
from sdnet.train.errors import UserError

# CIFAR-10's mean of RGB in [0, 255], and the deviation that the field uses: the mean of the pictures' own.
MEAN = [255 * value for value in (0.4914, 0.4822, 0.4465)]
STD = [255 * value for value in (0.2023, 0.1994, 0.2010)]


class ResidentLoader:
    """Batches of one rank from pictures in memory; see `Loader`.

    Training (`augment=True`): a random crop of the picture within a black margin of `padding`, and flip; each rank
    gets `batch * (N // (batch * world))` of the N pictures in an order that changes with the epoch, each one treated
    alike on any number of ranks. Evaluation: all N pictures once over the ranks, as they are.

    Args:
        images: [N, 3, H, W] uint8.
        labels: [N] integers.
        name: of the set, for messages.
        digest: fingerprint of the set, for states.
        batch: pictures of one batch of one rank.
        augment: training or evaluation.
        padding: margin on every side, in pixels; training only.
        mixing: Mixup and CutMix; then labels are targets [B, classes]; training only.
        shard: which of how many ranks this loader feeds.
        device: where pictures lie and batches come out.
        seed: of order and augmentation.
        channels_last: give images with channels_last strides.
        dtype: of the batches: fp32, fp16 or bf16.

    Raises:
        UserError: fewer pictures than ranks.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        name: str,
        digest: str,
        batch: int,
        augment: bool,
        padding: int = 4,
        mixing: Mixing | None = None,
        shard: Shard | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch, self.augment, self.mixing = batch, augment, mixing
        self.shard, self.device = shard or Shard(), torch.device(device)
        self.seed, self.epoch, self.dtype, self._digest = seed, 0, dtype, digest
        self.total, world = len(images), self.shard.world
        if self.total < world:
            raise UserError(f"{name} has {self.total} pictures, fewer than the {world} processes.")
        self._margin = padding if augment else 0
        # Pictures lie in memory as batches will, CHW or HWC: a crop then moves whole rows and needs no transpose.
        self._last = channels_last
        _, _, height, width = images.shape
        padded = F.pad(torch.from_numpy(images), (self._margin,) * 4).to(self.device)
        if channels_last:
            padded = padded.contiguous(memory_format=torch.channels_last)
        # A view of every crop there is: [N, 2 margin + 1, 2 margin + 1, C, H, W], or [..., H, W, C].
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        self._crops = crops.permute(0, 2, 3, 4, 5, 1) if channels_last else crops.permute(0, 2, 3, 1, 4, 5)
        self._labels = torch.from_numpy(labels).long().to(self.device)
        # As large as a picture, which is ten times faster on a CPU than a broadcast along short rows.
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
        self._mean = self._as_stored(mean.expand(3, height, width))
        self._scale = self._as_stored((1 / std).expand(3, height, width))
        largest = -(-self.total // world)
        self._steps = self.total // (batch * world) if augment else -(-largest // batch)
        self._step = 0

    def __len__(self) -> int:
        return self._steps if self.augment else len(self._split_evenly())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._plan()
        for step in range(self._step, len(batches)):
            index, top, left, flip = batches[step]
            images = self._crops[index, top, left]
            if self.augment:
                images = torch.where(flip.bool()[:, None, None, None], images.flip(2 if self._last else 3), images)
            images = images.to(torch.float32).sub_(self._mean).mul_(self._scale).to(self.dtype)
            images = images.permute(0, 3, 1, 2) if self._last else images
            labels = self._labels[index]
            if self.mixing:
                generator = np.random.default_rng((self.seed, self.epoch, self.shard.rank, step))
                images, labels = self.mixing(images, labels, generator)
            self._step = step + 1
            yield images, labels
        self.close()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its start."""
        self.epoch, self._step = epoch, 0

    def state(self) -> Tensor:
        """The place within the running epoch as bytes [K] uint8."""
        return pack(self._facts(), self._step)

    def load_state(self, state: Tensor) -> None:
        """Let the next iteration of the chosen epoch start where `state` was taken.

        Raises:
            UserError: it was taken with another batch, number of ranks, seed, epoch or list of pictures.
        """
        self._step, _ = unpack(state, self._facts())

    def close(self) -> None:
        """Go back to the start of the epoch; the pictures leave memory with the loader."""
        self._step = 0

    def _facts(self) -> dict[str, object]:
        """What a state depends on."""
        return {
            "batch": self.batch,
            "processes": self.shard.world,
            "rank": self.shard.rank,
            "seed": self.seed,
            "epoch": self.epoch,
            "pictures": self._digest,
        }

    def _as_stored(self, values: Tensor) -> Tensor:
        """[3, H, W] in the order of the pictures in memory."""
        return values.permute(1, 2, 0).contiguous() if self._last else values.contiguous()

    def _plan(self) -> list[Tensor]:
        """For each step of this rank [4, B] int64 on the device: picture, top, left, and whether it is flipped."""
        rank, world = self.shard.rank, self.shard.world
        if not self.augment:
            batches = self._split_evenly()
            return [
                torch.from_numpy(np.stack([batch, *np.zeros((3, len(batch)), int)])).to(self.device)
                for batch in batches
            ]
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.total)
        corners = generator.integers(2 * self._margin + 1, size=(2, self.total))
        plan = np.stack([order, *corners, generator.integers(2, size=self.total)])
        mine = torch.from_numpy(plan[:, rank::world][:, : self._steps * self.batch]).to(self.device)
        return list(mine.split(self.batch, 1)) if self._steps else []

    def _split_evenly(self) -> list[np.ndarray]:
        """All pictures of this rank in as many batches as the largest share needs, none of them empty."""
        mine = np.arange(self.shard.rank, self.total, self.shard.world)
        return [batch for batch in np.array_split(mine, self._steps) if len(batch)]
