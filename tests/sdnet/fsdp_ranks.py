"""One of two ranks that train a network whose layers are sharded by fully_shard: `fsdp_ranks.py RANK FOLDER`.

Both ranks have the same batch. Rank 0 writes the whole state to FOLDER/rank0.pt.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sdnet

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.sdnet.small_network import images, network

WORLD = 2


def whole(value: Any) -> torch.Tensor:
    """A copy of a tensor, gathered if it is sharded."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    model, mesh = network(), init_device_mesh("cpu", (WORLD,))
    for layer in list(model.children())[:2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sdnet.attach(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(4)).backward()
        optimizer.step()
    state = {name: whole(value) for name, value in model.state_dict().items()}
    assert max(sdnet.step_margins(model).values()) < 0.95
    sdnet.refresh_step_size(model)
    assert abs(max(sdnet.step_margins(model).values()) - 0.9) < 1e-3
    if rank == 0:
        torch.save(state, folder / "rank0.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
