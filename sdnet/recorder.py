"""`Recorder`: what one CSC layer computed last, kept for diagnostics."""

from torch import Tensor


class Recorder:
    """The input, the codes and lambda of the last call of a layer, as copies.

    Copies, because a later operation may change the tensors in place.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor, float | Tensor] | None = None

    def keep(self, x: Tensor, codes: Tensor, lam: float | Tensor) -> None:
        """Replace what is kept by a copy of these."""
        self.last = x.clone(), codes.clone(), lam.clone() if isinstance(lam, Tensor) else lam
