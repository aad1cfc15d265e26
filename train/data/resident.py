"""Small images: all of them on the device as uint8; cropped, flipped and normalised there, without worker processes."""

from collections.abc import Iterator
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.train.data.epochs import EpochLoader, LoaderOptions
from sdnet.train.data.normalisation import NORMS

MEAN, STD = ([255 * value for value in values] for values in NORMS["cifar"])


class ResidentLoader(EpochLoader):
    """Batches of one rank from images in memory; see `EpochLoader` for order, shares and states.

    Training: a random crop of the image within a black margin of `padding`, and a random flip. The crop and the flip
    of an image do not depend on the number of ranks. Evaluation: the images as they are.

    Args:
        images: The images, [N, 3, H, W] uint8.
        labels: The labels, [N] integers.
        name: The name of the set, for messages.
        digest: A fingerprint of the set, for states.
        padding: Margin on every side, in pixels; training only.
        **options: The arguments of `EpochLoader`: batch, augment, mixing, erasing, rank, device, seed, channels_last
            and dtype.

    Raises:
        UserError: There are fewer images than ranks.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        name: str,
        digest: str,
        padding: int = 4,
        **options: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(total=len(images), name=name, digest=digest, **options)
        self._margin = padding if self.augment else 0
        # Images lie in memory as batches will, CHW or HWC: a crop then moves whole rows and needs no transpose.
        _, _, height, width = images.shape
        padded = F.pad(torch.from_numpy(images), (self._margin,) * 4).to(self.device)
        if self.channels_last:
            padded = padded.contiguous(memory_format=torch.channels_last)
        # A view of every possible crop: [N, 2 margin + 1, 2 margin + 1, C, H, W], or [..., H, W, C].
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        self._crops = crops.permute(0, 2, 3, 4, 5, 1) if self.channels_last else crops.permute(0, 2, 3, 1, 4, 5)
        self._labels = torch.from_numpy(labels).long().to(self.device)
        # As large as an image, which is ten times faster on a CPU than a broadcast along short rows.
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
        self._mean = self._as_stored(mean.expand(3, height, width))
        self._scale = self._as_stored((1 / std).expand(3, height, width))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining batches of the epoch."""
        batches = self._crops_of_batches()
        for step in range(self._step, len(batches)):
            index, top, left, flip = batches[step]
            images = self._crops[index, top, left]
            if self.augment:
                columns = 2 if self.channels_last else 3
                images = torch.where(flip.bool()[:, None, None, None], images.flip(columns), images)
            images = images.to(torch.float32).sub_(self._mean).mul_(self._scale).to(self.dtype)
            images = images.permute(0, 3, 1, 2) if self.channels_last else images
            batch = self._mixed(images, self._labels[index], step)
            self._step = step + 1
            yield batch
        self.close()

    def _as_stored(self, values: Tensor) -> Tensor:
        """Return values [3, H, W] in the order of the images in memory."""
        return values.permute(1, 2, 0).contiguous() if self.channels_last else values.contiguous()

    def _crops_of_batches(self) -> list[Tensor]:
        """Return for each step of this rank [4, B] int64 on the device: image, top, left, and whether it is flipped."""
        if not self.augment:
            return [
                torch.from_numpy(np.stack([batch, *np.zeros((3, len(batch)), int)])).to(self.device)
                for batch in self._batches()
            ]
        generator = self._generator()
        order = generator.permutation(self.total)
        corners = generator.integers(2 * self._margin + 1, size=(2, self.total))
        own = self._own(np.stack([order, *corners, generator.integers(2, size=self.total)]))
        return list(torch.from_numpy(own).to(self.device).split(self.batch, 1)) if self._steps else []
