"""Memory that shows what a kernel did to it: filled with NaN, between words that must not change."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 1024
"""Bytes of guard words before and behind a tensor; a multiple of every alignment that a kernel assumes."""

WORD = 0xA5
"""The value of a guard byte."""

aten: Any = torch.ops.aten

ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


class GuardedMemory(TorchDispatchMode):
    """Inside, every tensor that is allocated without a value gets guard words around it and NaN in it.

    The tensors stay allocated until the mode is deleted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; replace what it allocates."""
        made = func(*args, **(kwargs or {}))
        if func not in ALLOCATIONS or made.numel() == 0 or made.device.type == "meta":
            return made
        steps = zip(made.shape, made.stride(), strict=True)
        length = 1 + sum((size - 1) * stride for size, stride in steps)
        padded = -(-length * made.element_size() // 16) * 16
        block = torch.full((GUARD + padded + GUARD,), WORD, dtype=torch.uint8, device=made.device)
        self.blocks.append(block)
        # The padding up to 16 bytes is guarded too.
        body = block[GUARD : GUARD + length * made.element_size()].view(made.dtype)
        body.fill_(torch.nan if made.is_floating_point() else 0)
        return body.as_strided(made.shape, made.stride())

    def harmed(self) -> int:
        """Return how many tensors have a changed guard word before or behind them. Waits for the device."""
        ends = [(block[:GUARD] != WORD).any() | (block[-GUARD:] != WORD).any() for block in self.blocks]
        return int(torch.stack(ends).sum()) if ends else 0
