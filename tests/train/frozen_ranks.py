"""A program for test_ranks: `frozen_ranks.py RUN ACCUMULATE` takes three steps on whatever ranks it is launched with.

Batch norm's statistics are frozen, so that a step depends on how the batch is divided through rounding alone. Every
rank writes its whole state after the last step, before the step sizes converge, to RUN/rank<n>.pt.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sdnet.train.data.loader import Data, Rank
from sdnet.train.job import Job
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer


class TensorLoader:
    """Every world-th picture of a fixed order, in batches; the last may be short."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, rank: Rank) -> None:
        self.images, self.labels = images[rank.index :: rank.world], labels[rank.index :: rank.world]
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)

    def set_epoch(self, epoch: int) -> None: ...

    def state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def load_state(self, state: Tensor) -> None: ...

    def close(self) -> None: ...


def open_noise(job: Job, rank: Rank, device: torch.device) -> Data:
    """24 pictures to train on, and 9 to evaluate: 3 batches for one of two ranks, 2 for the other."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(33, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(5, (33,), generator=generator).to(device)
    batch = job.recipe.local_batch(rank.world)
    train = TensorLoader(images[:24], labels[:24], batch, rank)
    return Data(train, TensorLoader(images[24:], labels[24:], 2, rank), 9, tuple("abcde"), "noise")


def main() -> None:
    run = Path(sys.argv[1])
    recipe = Recipe(image_size=32, eval_resize=32, epochs=1, batch=8, accumulate=int(sys.argv[2]), lr=0.01)
    trainer = Trainer(Job(recipe, data=Path(), run=RunFolder(run), resume=False, threads=1, log_every=1), open_noise)
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, frozen=module: frozen
    state: dict[str, Tensor] = {}

    def keep_state(*_: object) -> None:
        state.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

    trainer.optimizer.optimizer.register_step_post_hook(keep_state)  # after the hook of sdnet.attach
    trainer.train()
    torch.save(state, run / f"rank{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main()
