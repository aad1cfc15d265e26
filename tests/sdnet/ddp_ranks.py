"""One of two ranks that train a network with CSC layers under DistributedDataParallel: `ddp_ranks.py RANK FOLDER`.

The ranks have batches of different sizes and a lambda per sample. Each rank writes what it saw to FOLDER/rankN.pt.
"""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import sdnet
from sdnet import CSCConv2d

WORLD = 2


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)  # DDP sends the weights of rank 0 to rank 1
    first, second = CSCConv2d(3, 6, 3, input_size=8), CSCConv2d(6, 4, 3, input_size=8)
    network = nn.Sequential(first, nn.BatchNorm2d(6), second)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sdnet.attach(model, optimizer)
    lam = torch.linspace(0.1, 0.2, 4) if rank == 0 else torch.linspace(0.3, 0.4, 6)
    sdnet.set_lambda(model, lam)
    second.power_vector[0, rank] += 1  # a broadcast would make the ranks equal
    marked = second.power_vector.clone()
    model(torch.randn(len(lam), 3, 8, 8))
    codes = model(torch.randn(len(lam), 3, 8, 8))
    broadcast = not torch.equal(second.power_vector, marked)
    optimizer.zero_grad()
    codes.square().mean().backward()
    optimizer.step()
    torch.save(
        {
            "lam": first.lam.flatten(),
            "expected lam": lam,
            "broadcast": torch.tensor(broadcast),
            "weight": first.weight.detach(),
            "power_vector": first.power_vector,
        },
        folder / f"rank{rank}.pt",
    )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
