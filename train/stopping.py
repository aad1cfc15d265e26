"""How the processes of a run agree to stop or to write a checkpoint after the same step, without waiting for a GPU."""

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed


class Decision(NamedTuple):
    """What all processes do after a step.

    Attributes:
        signal: The number of the signal that asks to stop, 0 for none.
        save: Whether to write a checkpoint.
    """

    signal: int
    save: bool


class Agreement:
    """A vote after every step.

    A lone process decides at once. Several processes send their votes in the background, in a group of their own on the
    CPU, and read the outcome after the next step. So they stop two steps after a signal reached one of them, and no
    step waits for the device.

    Args:
        processes: The number of processes.
        timeout: Seconds to wait for the vote of another process.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        self._group: Any = None
        if processes > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._pending: tuple[Any, torch.Tensor] | None = None

    def after_step(self, signal: int, save: bool) -> Decision:
        """Vote, and return the outcome of the vote before.

        Args:
            signal: The signal that this process has received, 0 for none.
            save: Whether this process asks for a checkpoint.
        """
        if self._group is None:
            return Decision(signal, save)
        vote = torch.tensor([signal, int(save)])
        work = torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        decision, self._pending = self.settle(), (work, vote)
        return decision

    def now(self, signal: int) -> int:
        """Return the signal that asks to stop, of all processes; waits for them."""
        if self._group is None:
            return signal
        before = self.settle()
        self.after_step(max(signal, before.signal), False)
        return self.settle().signal

    def settle(self) -> Decision:
        """Wait for the outcome of the last vote, if it has not been read."""
        if self._pending is None:
            return Decision(0, False)
        work, vote = self._pending
        self._pending = None
        work.wait()
        signal, save = vote.tolist()
        return Decision(signal, bool(save))
