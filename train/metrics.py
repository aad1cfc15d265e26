"""Sums that live on the device and reach the host only when somebody asks."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor, nn

from sdnet.train.data.loader import Loader

NEVER = 2**62


class LossReading(NamedTuple):
    """Mean loss since the start of the epoch and since the last reading; the first step without a finite one."""

    epoch: float
    recent: float
    bad_step: int | None


class LossMeter:
    """The mean training loss of an epoch, and the first step whose loss was not finite; no sync on update.

    `state` [4] fp64: sum of losses x pictures, pictures, the same sum since the last `read`, pictures since then.
    """

    def __init__(self, device: torch.device) -> None:
        self.state = torch.zeros(4, dtype=torch.float64, device=device)
        self.bad_step = torch.tensor(NEVER, device=device)

    def update(self, loss: Tensor, count: int, step: int) -> None:
        """Add the mean loss (0-d) of `count` pictures, met in optimiser step `step`."""
        self.state[0::2] += loss.double() * count
        self.state[1::2] += count
        self.bad_step = torch.where(loss.isfinite(), self.bad_step, self.bad_step.clamp(max=step))

    def read(self) -> LossReading:
        """Means over all ranks; a sync and a collective."""
        sums = of_all_ranks(self.state).sum(0).tolist()
        bad_step = int(of_all_ranks(self.bad_step).min())
        self.state[2:] = 0
        epoch, recent = sums[0] / max(sums[1], 1), sums[2] / max(sums[3], 1)
        return LossReading(epoch, recent, None if bad_step == NEVER else bad_step)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, size: int, device: torch.device) -> dict[str, float]:
    """Cross-entropy and top-1, top-5 accuracy in percent over all ranks' pictures.

    `model` is the bare module: ranks may take different numbers of steps, which DDP's forward would not survive.

    Raises:
        RuntimeError: the loaders did not give exactly `size` pictures.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in loader:
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))])
    loss, top1, top5, count = of_all_ranks(sums).sum(0).tolist()
    if count != size:
        raise RuntimeError(f"The evaluation saw {count:.0f} pictures of {size}.")
    return {"val_loss": loss / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}


def of_all_ranks(values: Tensor) -> Tensor:
    """[...] on each rank -> [ranks, ...] on all."""
    return cast(Tensor, gather(values[None]))
