"""DALI loaders: decode, crop, flip and normalise; on the GPU if there is one, otherwise on the CPU.

The order of the images is that of `EpochLoader`, not DALI's: a fresh pipeline reads the images of each epoch in turn,
so they may lie in files or in tars. (DALI's `random_shuffle` shuffles within a buffer only, and its sharding policies
repeat or drop images when counts are uneven.)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Unpack

import numpy as np
import torch
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from sdnet.train.bad_images import read_bad_images
from sdnet.train.data.epochs import EpochLoader, LoaderOptions, loader_options
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.formats import why_unusable
from sdnet.train.data.holdout import divide
from sdnet.train.data.loader import Data, Rank
from sdnet.train.data.mixing import mixing_of
from sdnet.train.data.names import printable
from sdnet.train.data.pipeline import decode, make_pipeline
from sdnet.train.data.read_ahead import ReadAhead
from sdnet.train.data.sources import read_checked
from sdnet.train.data.unused import refuse_unused
from sdnet.train.errors import DataError, UserError
from sdnet.train.job import Job
from sdnet.train.schedule import training_size

Extras = Literal["none", "trivial", "rand"]


def open_pictures(job: Job, rank: Rank, device: torch.device) -> Data:
    """Return the loaders of one rank for any source that `sdnet.train.data.sources` reads.

    Raises:
        UserError: The source is damaged or too small, holds unusable images, or the batch does not divide.
    """
    recipe = job.recipe
    refuse_unused(job, "train/imagenet.py", {"crop_padding": "random crops are of DALI's kind, without a margin"})
    cores, neighbours = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    recorded = read_bad_images(job.run.path) if job.resume else None
    checked = read_checked(job.data, job.val_labels, job.verify, job.bad_files, cores, recorded)
    train, val, held = checked.train, checked.val, None
    val_digest, val = val.digest(), checked.without_dropped(val)
    if recipe.holdout:
        parts = divide(train.labels, recipe.holdout, f"The training set in {printable(job.data)}")
        train, held = (train.select(part.tolist()) for part in parts)
        held = checked.without_dropped(held)
    options: dict[str, Any] = {
        **loader_options(job, rank, device),
        "batch": recipe.local_batch(rank.world),
        "size": recipe.image_size,
        "threads": job.threads or max(1, cores // neighbours),
        "prefetch": job.prefetch,
        "hw_decoder_load": job.hw_decoder_load,
    }
    training: dict[str, Any] = {
        "augment": True,
        "dropped": checked.dropped_from(train),
        "extras": recipe.extras,
        "mixing": mixing_of(recipe, len(train.classes)),
        "erasing": recipe.random_erasing,
        "size_of": partial(training_size, recipe),
        **options,
    }
    evaluation: dict[str, Any] = {"augment": False, "resize": recipe.eval_resize, **options}
    return Data(
        train=DaliLoader(train, **training),
        val=DaliLoader(val, **evaluation),
        val_size=len(val),
        classes=train.classes,
        digest=train.digest(),
        val_digest=val_digest,
        bad_images=checked.bad,
        dropped=tuple(checked.dropped.items()),
        left_out=checked.left_out,
        notes=checked.notes,
        holdout=None if held is None else DaliLoader(held, **evaluation),
        train_size=len(train),
        holdout_size=0 if held is None else len(held),
    )


class DaliLoader(EpochLoader):
    """Batches of one rank from a set of images in files or tars; see `EpochLoader` for order, shares and states.

    Training: a random resized crop to `size` (area 0.08 to 1, aspect 3/4 to 4/3) and a random flip. Evaluation: the
    shorter side is resized to `resize`, then the centre is cropped to `size`.

    Args:
        images: The split to read.
        size: Height and width of the output.
        size_of: Returns another height and width for an epoch; training only.
        resize: The shorter side before the centre crop; evaluation only.
        extras: DALI's TrivialAugmentWide or RandAugment (2 operations of magnitude 9) after the crop; training only.
        threads: Decoding threads of this rank.
        prefetch: Batches that DALI prepares in advance.
        hw_decoder_load: Share of a batch for the GPU's JPEG unit, where it has one.
        **options: The arguments of `EpochLoader`: batch, augment, mixing, erasing, rank, device (a CUDA device decodes
            too), seed, channels_last and dtype.

    Raises:
        UserError: There are fewer images than ranks, or the evaluation crops more than it resizes to.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        size: int,
        size_of: Callable[[int], int] | None = None,
        resize: int = 0,
        extras: Extras = "none",
        threads: int = 2,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
        **options: Unpack[LoaderOptions],
    ) -> None:
        name, digest = printable(images.root), images.digest()
        super().__init__(total=len(images), name=name, digest=digest, **options)
        if not self.augment and resize < size:
            raise UserError(f"resize is {resize}; it must be at least size, {size}, for a centre crop.")
        self.images, self.threads, self.prefetch = images, threads, prefetch
        self._size_of = size_of or (lambda epoch: size)
        self._graph: dict[str, Any] = {
            "size": size,
            "resize": resize,
            "augment": self.augment,
            "extras": extras,
            "decoder": "mixed" if self.device.type == "cuda" else "cpu",
            "hw_decoder_load": hw_decoder_load,
            "layout": "HWC" if self.channels_last else "CHW",
            "half": self.dtype == torch.float16,
        }
        self._reader: ReadAhead | None = None
        self._iterator: Any = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining batches of the epoch."""
        if self._iterator is not None:
            self.load_state(self.state())  # continue where another iteration stopped
        begin, batches = self._step, self._batches()
        labels = np.asarray(self.images.labels)
        reader = self._reader = ReadAhead(self.images, batches, self.prefetch)
        for step in range(begin, len(batches)):
            with self._naming_image(reader):
                if self._iterator is None:
                    self._iterator = self._open(reader)
                images = next(self._iterator)[0]["images"].to(self.device, self.dtype, non_blocking=True)
            if self.channels_last:
                images = images.permute(0, 3, 1, 2)
            targets = torch.from_numpy(labels[batches[step]]).long().to(self.device, non_blocking=True)
            batch = self._mixed(images, targets, step)
            self._step = step + 1
            yield batch
        self.close()

    def close(self) -> None:
        """Release the pipeline with its threads and buffers, and go back to the start of the epoch."""
        super().close()
        self._iterator = None
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _private_state(self) -> bytes:
        """Return DALI's own state, that of its random operators."""
        return self._iterator.checkpoints()[0] if self._iterator is not None else self._restored

    def _open(self, reader: ReadAhead) -> DALIGenericIterator:
        entropy = (self.seed, self.epoch, self.rank.index)
        graph: dict[str, Any] = self._graph | {"size": self._size_of(self.epoch)}
        pipeline = make_pipeline(
            reader,
            **graph,
            batch_size=self.batch,
            num_threads=self.threads,
            prefetch_queue_depth=self.prefetch,
            device_id=self._device_id,
            seed=int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1),
            enable_checkpointing=True,
            checkpoint=self._restored or None,
        )
        return DALIGenericIterator([pipeline], ["images"], last_batch_policy=LastBatchPolicy.PARTIAL)

    @contextmanager
    def _naming_image(self, reader: ReadAhead) -> Iterator[None]:
        """Turn DALI's error about an image into one that names the image."""
        try:
            yield
        except RuntimeError as error:
            if broken := reader.first_broken(why_unusable):
                raise DataError(f"The image {broken[0]} broke during the run: it {broken[1]}.", *broken) from error
            if broken := reader.first_broken(self._why_not_decoded):
                raise DataError(f"The image {broken[0]} {broken[1]}.", *broken) from error
            raise

    def _why_not_decoded(self, data: bytes) -> str | None:
        """Return what DALI alone objects to in an image; None if it decodes it."""
        try:
            decode(data, self._graph["decoder"], self._device_id)
        except RuntimeError:
            return "cannot be decoded by DALI"
        return None

    @property
    def _device_id(self) -> int | None:
        return (self.device.index or 0) if self.device.type == "cuda" else None
