"""The training loss and the evaluation; sums stay on the device until they are read."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor, nn

from sdnet.train.data.loader import Loader

NEVER = 2**62


class LossReading(NamedTuple):
    """What a `LossMeter` has measured.

    Attributes:
        epoch: The mean loss since the start of the epoch.
        recent: The mean loss since the previous reading.
        bad_step: The first step whose loss was not finite, or None.
    """

    epoch: float
    recent: float
    bad_step: int | None


class LossMeter:
    """The mean training loss of an epoch, and the first step whose loss was not finite; `update` needs no host sync.

    Args:
        device: The device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        # Sum of losses x images, images, the same two since the previous reading: [4] fp64.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._bad_step = torch.tensor(NEVER, device=device)

    def update(self, loss: Tensor, count: int, step: int) -> None:
        """Add the mean loss of a batch.

        Args:
            loss: The mean loss, 0-d.
            count: The number of images of the batch.
            step: The optimizer step that the batch belongs to.
        """
        self._sums[0::2] += loss.double() * count
        self._sums[1::2] += count
        self._bad_step = torch.where(loss.isfinite(), self._bad_step, self._bad_step.clamp(max=step))

    def read(self) -> LossReading:
        """Return the means over all ranks; a host sync and a collective operation."""
        sums = of_all_ranks(self._sums).sum(0).tolist()
        bad_step = int(of_all_ranks(self._bad_step).min())
        self._sums[2:] = 0
        epoch, recent = sums[0] / max(sums[1], 1), sums[2] / max(sums[3], 1)
        return LossReading(epoch, recent, None if bad_step == NEVER else bad_step)

    def reset(self) -> None:
        """Begin a new epoch."""
        self._sums.zero_()
        self._bad_step.fill_(NEVER)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums, on the CPU; a checkpoint is only written while all losses are finite."""
        return {"sums": self._sums.cpu()}

    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> None:
        """Set the sums."""
        self._sums.copy_(state_dict["sums"])


class Counts(NamedTuple):
    """The sum of the cross-entropies, and how many images are among the first one or five classes."""

    loss: float
    top1: int
    top5: int


@torch.no_grad()
def count_hits(model: nn.Module, loader: Loader, size: int, device: torch.device) -> Counts:
    """Return what `evaluate` divides by the number of images; the arguments are the same."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in loader:
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))])
    loss, top1, top5, count = of_all_ranks(sums).sum(0).tolist()
    if count != size:
        raise RuntimeError(f"The evaluation saw {count:.0f} images of {size}.")
    return Counts(loss, int(top1), int(top5))


def evaluate(model: nn.Module, loader: Loader, size: int, device: torch.device) -> dict[str, float]:
    """Return the cross-entropy and the top-1 and top-5 accuracy, in percent, over the images of all ranks.

    Args:
        model: The bare module, not its DDP wrapper: ranks may run different numbers of batches.
        loader: The validation images of this rank.
        size: The number of validation images of all ranks.
        device: The device of the model.

    Returns:
        `val_loss`, `val_top1` and `val_top5`.

    Raises:
        RuntimeError: The loaders did not give exactly `size` images.
    """
    counts = count_hits(model, loader, size, device)
    return {
        "val_loss": counts.loss / size,
        "val_top1": 100 * counts.top1 / size,
        "val_top5": 100 * counts.top5 / size,
    }


def of_all_ranks(values: Tensor) -> Tensor:
    """Gather a tensor of every rank.

    Shape:
        values: [...] on each rank; the result is [ranks, ...] on all ranks.
    """
    return cast(Tensor, gather(values[None]))
