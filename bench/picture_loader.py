"""What the DALI loaders are compared with: PIL in the worker processes of a DataLoader, as in a plain training script.

It does what `sdnet.train.data` does: a random resized crop (area 0.08 to 1, aspect 3/4 to 4/3), a flip, normalisation.
"""

import math
import random
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdnet.train.data.folder import ImageSet
from sdnet.train.data.normalisation import NORMS

MEAN, STD = (np.array(values, dtype=np.float32) for values in NORMS["imagenet"])


class Pictures(Dataset[tuple[Tensor, int]]):
    """Augmented pictures [3, size, size] in fp32 of an image set, and their labels."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(BytesIO(self.images.where(index).read())) as file:
            picture = file.convert("RGB")
        picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, crop_box(*picture.size))
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = (np.asarray(picture, dtype=np.float32) / 255 - MEAN) / STD
        return torch.from_numpy(values).permute(2, 0, 1).contiguous(), self.images.labels[index]


def crop_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Return a random box with 0.08 to 1 of the area and an aspect of 3/4 to 4/3, or the whole picture if none fits."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            return x, y, x + w, y + h
    return 0, 0, width, height


def picture_loader(images: ImageSet, batch: int, size: int, workers: int) -> DataLoader[Any]:
    """Return shuffled batches from `workers` lasting processes with one thread each; the last batch may be short."""
    return DataLoader(Pictures(images, size), batch, shuffle=True, num_workers=workers, persistent_workers=True)
