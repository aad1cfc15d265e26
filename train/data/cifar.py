"""CIFAR-10, CIFAR-100 and other sets of small images of one size, as arrays.

A folder may hold the official archive (`cifar-10-python.tar.gz`, `cifar-100-python.tar.gz`, or `-binary`), what comes
out of it (`cifar-10-batches-py/`, `cifar-100-python/`, ...), or an image folder with train/<class>/* and test/<class>/*
or val.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdnet.train.data.cifar_files import Arrays, find_official, read_official
from sdnet.train.data.decoded import decode_once
from sdnet.train.data.epochs import loader_options
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.formats import FORMATS
from sdnet.train.data.holdout import divide
from sdnet.train.data.loader import Data, Rank
from sdnet.train.data.mixing import mixing_of
from sdnet.train.data.names import printable
from sdnet.train.data.resident import ResidentLoader
from sdnet.train.data.sources import read_checked
from sdnet.train.data.unused import refuse_unused
from sdnet.train.data.watch import tell
from sdnet.train.errors import UserError
from sdnet.train.job import BadFiles, Job, Verify
from sdnet.train.recipes import Recipe

UNUSED = {
    "first_image_size": "all images are of one size",
    "extras": "these augmentations are DALI's, in train/imagenet.py",
    "prefetch": "all images are in memory",
    "hw_decoder_load": "all images are in memory",
    "val_labels": "the labels are those of CIFAR or of the folders",
}
"""Settings that have no effect here."""


@dataclass(frozen=True)
class SmallPictures:
    """Both splits of a set of small images; `left_out` and `notes` as in `Data`."""

    classes: tuple[str, ...]
    train: Arrays
    val: Arrays
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def open_small_pictures(job: Job, rank: Rank, device: torch.device) -> Data:
    """Return the loaders of one rank, with all images on the device.

    Raises:
        UserError: The data are missing or not what they should be, or the batch does not divide.
    """
    recipe = job.recipe
    refuse_unused(job, "train/cifar.py", UNUSED)
    if recipe.crop_padding > (most := max(recipe.image_size, Recipe().crop_padding)):  # the default is always allowed
        raise UserError(f"crop_padding is {recipe.crop_padding}; it must be at most {most} at this image_size.")
    found = read_small_pictures(job.data, job.verify, job.bad_files, job.threads or 2)
    height, width = found.train.images.shape[2:]
    if (height, width) != (recipe.image_size, recipe.image_size):
        raise UserError(
            f"The images are {width} x {height}, not {recipe.image_size} x {recipe.image_size}: pass --image-size and "
            "--eval-resize, or train with train/imagenet.py."
        )
    if recipe.eval_resize != recipe.image_size:
        raise UserError(
            f"eval_resize is {recipe.eval_resize}; train/cifar.py evaluates the images as they are, so it must be "
            f"image_size, {recipe.image_size}."
        )
    batch, options = recipe.local_batch(rank.world), loader_options(job, rank, device)
    name, val_name = (f"The {split} set in {printable(job.data)}" for split in ("training", "test"))
    train, held = found.train, None
    if recipe.holdout:
        train, held = (train.select(part) for part in divide(train.labels, recipe.holdout, name))

    def evaluated(images: Arrays, title: str) -> ResidentLoader:
        digest = images.digest()
        return ResidentLoader(
            images.images, images.labels, name=title, digest=digest, batch=batch, augment=False, **options
        )

    digest = train.digest()
    return Data(
        train=ResidentLoader(
            train.images,
            train.labels,
            name=name,
            digest=digest,
            batch=batch,
            augment=True,
            padding=recipe.crop_padding,
            mixing=mixing_of(recipe, len(found.classes)),
            erasing=recipe.random_erasing,
            **options,
        ),
        val=evaluated(found.val, val_name),
        val_size=len(found.val.labels),
        classes=found.classes,
        digest=digest,
        val_digest=found.val.digest(),
        left_out=found.left_out,
        notes=found.notes,
        holdout=None if held is None else evaluated(held, "The held-out set"),
        train_size=len(train.labels),
        holdout_size=recipe.holdout,
        program="cifar",
    )


def read_small_pictures(
    root: Path, verify: Verify = "header", bad_files: BadFiles = "fail", threads: int = 2
) -> SmallPictures:
    """Return the small images under `root`.

    Args:
        root: A folder, or an official archive of CIFAR.
        verify: How images in files of their own are checked; see `sdnet.train.data.sources`.
        bad_files: What happens to those that cannot be used; see `sdnet.train.data.sources`.
        threads: Threads that look at images and decode them.

    Raises:
        UserError: There are no such data, they are damaged, or there is more than one data set.
    """
    if (found := find_official(root)) is not None:
        official = read_official(found)
        return SmallPictures(official.classes, official.train, official.val, notes=official.notes)
    checked = read_checked(root, None, verify, bad_files, threads)
    train, val = (
        Arrays(
            decode_once(images, lambda images: decode_all(images, threads).images), np.asarray(images.labels, np.int64)
        )
        for images in (checked.train, checked.val)
    )
    if train.images.shape[2:] != val.images.shape[2:]:
        raise UserError(f"The images of both splits in {printable(root)} are not of the same size.")
    return SmallPictures(checked.train.classes, train, val, checked.left_out, checked.notes)


def decode_all(images: ImageSet, threads: int = 4) -> Arrays:
    """Return all images of a set as Pillow decodes them.

    Args:
        images: The set.
        threads: Threads that decode.

    Raises:
        UserError: An image does not decode, or is not of the size of the first one.
    """

    def decode(index: int) -> np.ndarray:
        try:
            with Image.open(BytesIO(images.where(index).read()), formats=FORMATS) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"The image {images.name(index)} cannot be decoded: {error}; repair it, or leave such images out with "
                "--verify full --bad-files skip."
            ) from error

    with ThreadPoolExecutor(threads) as executor:
        first = decode(0)
        decoded = np.empty((len(images), 3, *first.shape[:2]), np.uint8)
        for index, pixels in enumerate(executor.map(decode, range(len(images)))):
            tell("decoding images", index, len(images))
            if pixels.shape != first.shape:
                sizes = [f"{shape[1]} x {shape[0]}" for shape in (pixels.shape, first.shape)]
                raise UserError(f"The image {images.name(index)} is {sizes[0]}, the first {sizes[1]}.")
            decoded[index] = pixels.transpose(2, 0, 1)
    return Arrays(decoded, np.asarray(images.labels, np.int64))
