"""A program for test_fused_ddp: `fused_ranks.py RUN RANK WORLD` takes gradients of a small network on one rank of many.

The ranks start from different dictionaries, which DDP makes those of rank 0, and have a share of one batch each. Every
rank writes to RUN/rank<n>.pt what DDP made of its share, and what the bare network makes of the whole batch.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sdnet


def network() -> nn.Module:
    """Two CSC layers and a classifier; nothing in it looks at more than one picture."""
    return nn.Sequential(
        sdnet.CSCConv2d(3, 8, 3, n_steps=3, lam=0.02, input_size=8, impl="triton"),
        sdnet.CSCConv2d(8, 12, 3, stride=2, lam=0.02, input_size=8, impl="triton"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    nn.functional.cross_entropy(model(images), labels).backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [gradient for gradient in found if gradient is not None]


def main(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    torch.manual_seed(rank)
    shared = DistributedDataParallel(network())
    alone = copy.deepcopy(shared.module)
    images, labels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7)), torch.arange(4)
    found = {
        "shared": gradients(shared, images[rank::world], labels[rank::world]),
        "whole": gradients(alone, images, labels),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
