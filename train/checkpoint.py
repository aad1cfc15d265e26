"""The state of a run in one file: written whole or not at all, read without executing pickles."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdnet.train.errors import UserError
from sdnet.train.files import write_atomically


@dataclass
class Checkpoint:
    """All that decides how a run goes on, of all ranks.

    `epoch` whole epochs are done and `batch` batches of the next one; `data` is the digest of the training set.
    `ranks` holds what differs between processes, one dictionary each: a single file cannot disagree with itself.
    """

    epoch: int
    batch: int
    step: int
    best_top1: float
    data: str
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ranks: list[dict[str, Tensor]]

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        state = {item.name: getattr(self, item.name) for item in fields(self)}
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint onto the CPU.

        Raises:
            UserError: there is none.
        """
        if not path.is_file():
            raise UserError(f"{path.parent} holds no checkpoint yet: there is no {path.name}.")
        return cls(**torch.load(path, map_location="cpu", weights_only=True))

    def check(self, data: str, processes: int) -> None:
        """Raise a UserError if the run would go on with other pictures or another number of processes."""
        if self.data != data:
            raise UserError("The run cannot be resumed: the files or classes of the training data have changed.")
        if len(self.ranks) != processes:
            raise UserError(f"The run cannot be resumed with {processes} processes: it began with {len(self.ranks)}.")
