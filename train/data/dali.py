"""DALI loaders: decode, crop, flip, normalise; on the GPU where there is one, else on the CPU.

The order is ours, not DALI's: each epoch permutes the whole set by (seed, epoch), every rank takes every world-th
picture of it, and a fresh pipeline is fed just those. So an epoch needs no state of the epochs before it, no picture
comes twice, all ranks take the same number of steps, and pictures may lie in files or in shards alike. (DALI's
`random_shuffle` shuffles within a buffer only, and its sharding policies repeat or drop pictures when counts are
uneven.)
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from sdnet.train.data.folder import ImageSet
from sdnet.train.data.loader import DTYPES, Data, Shard
from sdnet.train.data.mixing import Mixing
from sdnet.train.data.pipeline import make_pipeline
from sdnet.train.data.position import pack, unpack
from sdnet.train.data.read_ahead import ReadAhead
from sdnet.train.data.sources import read_checked
from sdnet.train.errors import DataError, UserError
from sdnet.train.job import Job

Extras = Literal["none", "trivial", "rand"]


def open_pictures(job: Job, shard: Shard, device: torch.device) -> Data:
    """The loaders of one rank for any source that `sdnet.train.data.sources` reads.

    Raises:
        UserError: the source is not whole or too small, holds bad pictures, or the batch does not divide.
    """
    recipe = job.recipe
    cores, neighbours = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = job.threads or max(1, cores // neighbours)
    checked = read_checked(job.data, job.val_labels, job.verify, job.bad_files, cores)
    train, val = checked.train, checked.val
    options: dict[str, Any] = {
        "batch": recipe.local_batch(shard.world),
        "size": recipe.image_size,
        "shard": shard,
        "device": device,
        "threads": threads,
        "seed": recipe.seed,
        "channels_last": recipe.channels_last,
        "dtype": DTYPES[recipe.input_dtype],
        "prefetch": job.prefetch,
        "hw_decoder_load": job.hw_decoder_load,
    }
    mixing = Mixing(recipe.mixup, recipe.cutmix, len(train.classes)) if recipe.mixup or recipe.cutmix else None
    return Data(
        train=DaliLoader(train, augment=True, extras=recipe.extras, mixing=mixing, **options),
        val=DaliLoader(val, augment=False, resize=recipe.eval_resize, **options),
        val_size=len(val),
        classes=train.classes,
        digest=train.digest(),
        left_out=checked.left_out,
        notes=checked.notes,
    )


class DaliLoader:
    """Batches of one rank from a set of pictures; see `Loader`.

    Training (`augment=True`): random resized crop to `size` (area 0.08 to 1, aspect 3/4 to 4/3) and flip; each rank
    gets `batch * (N // (batch * world))` of the N pictures in an order that changes with the epoch. Evaluation:
    shorter side to `resize`, centre crop to `size`; all N pictures once over the ranks, in batches of `batch` or
    somewhat less, and as many on every rank (unless `batch` is 1).

    Args:
        images: the split to read.
        batch: pictures of one batch of one rank.
        size: height and width of the output.
        resize: shorter side before the centre crop; evaluation only.
        augment: training or evaluation.
        extras: DALI's TrivialAugmentWide or RandAugment (2 operations of magnitude 9) after the crop; training only.
        mixing: Mixup and CutMix; then labels are targets [B, classes]; training only.
        shard: which of how many ranks this loader feeds.
        device: where batches come out; a CUDA device decodes too.
        threads: decoding threads of this rank.
        seed: of order and augmentation.
        channels_last: give images with channels_last strides, without a transpose.
        dtype: of the images: fp32, fp16 or bf16.
        prefetch: batches that DALI works on in advance.
        hw_decoder_load: share of a batch for the GPU's JPEG unit, where it has one.

    Raises:
        UserError: fewer pictures than ranks.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch: int,
        size: int,
        augment: bool,
        resize: int = 0,
        extras: Extras = "none",
        mixing: Mixing | None = None,
        shard: Shard | None = None,
        device: torch.device | str = "cpu",
        threads: int = 2,
        seed: int = 0,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
    ) -> None:
        self.images, self.batch, self.augment, self.mixing = images, batch, augment, mixing
        self.shard = shard or Shard()
        self.device, self.dtype, self.channels_last = torch.device(device), dtype, channels_last
        self.threads, self.seed, self.prefetch, self.epoch = threads, seed, prefetch, 0
        total, world = len(images), self.shard.world
        if total < world:
            raise UserError(f"{images.root} has {total} pictures, fewer than the {world} processes.")
        self._steps = total // (batch * world) if augment else len(self._split_evenly())
        self._graph = {
            "size": size,
            "resize": resize,
            "augment": augment,
            "extras": extras,
            "decoder": "mixed" if self.device.type == "cuda" else "cpu",
            "hw_decoder_load": hw_decoder_load,
            "layout": "HWC" if channels_last else "CHW",
            "half": dtype == torch.float16,
        }
        self._digest = images.digest()
        self._reader: ReadAhead | None = None
        self._iterator: Any = None
        self._step, self._restored = 0, b""

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._iterator is not None:
            self.load_state(self.state())  # go on where another iteration was left
        begin, batches = self._step, self._batches()
        labels = np.asarray(self.images.labels)
        reader = self._reader = ReadAhead(self.images, batches, self.prefetch)
        for step in range(begin, len(batches)):
            with self._blaming(reader, step):
                if self._iterator is None:
                    self._iterator = self._open(reader)
                images = next(self._iterator)[0]["images"].to(self.device, self.dtype, non_blocking=True)
            if self.channels_last:
                images = images.permute(0, 3, 1, 2)
            targets = torch.from_numpy(labels[batches[step]]).long().to(self.device, non_blocking=True)
            if self.mixing:
                generator = np.random.default_rng((self.seed, self.epoch, self.shard.rank, step))
                images, targets = self.mixing(images, targets, generator)
            self._step = step + 1
            yield images, targets
        self.close()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its start."""
        self.close()
        self.epoch = epoch

    def state(self) -> Tensor:
        """The place within the running epoch as bytes [K] uint8."""
        state = self._iterator.checkpoints()[0] if self._iterator is not None else self._restored
        return pack(self._facts(), self._step, state)

    def load_state(self, state: Tensor) -> None:
        """Let the next iteration of the chosen epoch start where `state` was taken.

        Raises:
            UserError: it was taken with another batch, number of ranks, seed, epoch or list of pictures.
        """
        self.close()
        self._step, self._restored = unpack(state, self._facts())

    def close(self) -> None:
        """Release the pipeline with its threads and buffers, and go back to the start of the epoch."""
        self._iterator = None
        if self._reader is not None:
            self._reader.close()
        self._reader, self._step, self._restored = None, 0, b""

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

    def _batches(self) -> list[np.ndarray]:
        """Indices of the pictures of each step of this rank."""
        if not self.augment:
            return self._split_evenly()
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.images))
        mine = order[self.shard.rank :: self.shard.world][: self._steps * self.batch]
        return np.split(mine, self._steps) if self._steps else []

    def _split_evenly(self) -> list[np.ndarray]:
        """All pictures of this rank in as many batches as the largest share needs, none of them empty."""
        total, world = len(self.images), self.shard.world
        largest = -(-total // world)
        steps = -(-largest // self.batch)
        mine = np.arange(self.shard.rank, total, world)
        return [batch for batch in np.array_split(mine, steps) if len(batch)]

    def _open(self, reader: ReadAhead) -> DALIGenericIterator:
        entropy = (self.seed, self.epoch, self.shard.rank)
        pipeline = make_pipeline(
            reader,
            **self._graph,
            batch_size=self.batch,
            num_threads=self.threads,
            prefetch_queue_depth=self.prefetch,
            device_id=self.device.index or 0 if self.device.type == "cuda" else None,
            seed=int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1),
            enable_checkpointing=True,
            checkpoint=self._restored or None,
        )
        return DALIGenericIterator([pipeline], ["images"], last_batch_policy=LastBatchPolicy.PARTIAL)

    @contextmanager
    def _blaming(self, reader: ReadAhead, step: int) -> Iterator[None]:
        """Turns DALI's complaint about a picture into one that names the picture."""
        try:
            yield
        except RuntimeError as error:
            if broken := reader.broken():
                name, reason = broken[0]
                raise DataError(f"The picture {name} broke during the run: it {reason}.") from error
            if sample := re.search(r"decode sample #(\d+)", str(error)):
                name = reader.name(step, int(sample[1]))
                raise DataError(f"DALI cannot decode the picture {name}.") from error
            raise
