"""`Recorder`: what one CSC layer computed last, kept for diagnostics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Recorder:
    """The input, the codes and lambda of the last call of a layer, as copies.

    Copies, because a later operation may change the tensors in place.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor, float | Tensor] | None = None

    def keep(self, x: Tensor, codes: Tensor, lam: float | Tensor) -> None:
        """Replace what is kept by a copy of these."""
        self.last = x.clone(), codes.clone(), lam.clone() if isinstance(lam, Tensor) else lam


class Recordable(nn.Module):
    """The part of a layer that gives its calls to recorders."""

    def __init__(self) -> None:
        super().__init__()
        self._recorders: tuple[Recorder, ...] = ()

    def add_recorder(self, recorder: Recorder) -> None:
        """Give the input, the codes and lambda of every later call to `recorder`."""
        self._recorders = (*self._recorders, recorder)

    def remove_recorder(self, recorder: Recorder) -> None:
        """End what `add_recorder` began."""
        self._recorders = tuple(other for other in self._recorders if other is not recorder)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that a copy or a pickle takes over: all but the recordings in progress."""
        return {**self.__dict__, "_recorders": ()}


@contextmanager
def recorded(recorders: Mapping[Recordable, Recorder]) -> Iterator[None]:
    """Give the calls of layers to recorders within a `with` block."""
    for layer, recorder in recorders.items():
        layer.add_recorder(recorder)
    try:
        yield
    finally:
        for layer, recorder in recorders.items():
            layer.remove_recorder(recorder)
