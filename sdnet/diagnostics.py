"""Diagnostics of the CSC layers of a network for one batch: objective, sparsity and residual."""

from types import TracebackType
from typing import Any, NamedTuple

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from sdnet.kernels.autocast import without_autocast
from sdnet.layers import CSCConv2d, at_least_single
from sdnet.recorder import Recorder
from sdnet.step_size import csc_layers

NORM_FLOOR = 1e-12
"""The least norm of an input that a relative residual is divided by."""


class LayerDiagnostics(NamedTuple):
    """The diagnostics of one CSC layer, one value per sample.

    They are computed in fp32 or better, with the lambda that the forward used, and are differentiable if the forward
    was.

    Attributes:
        objective: lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2, [N]. Its mean over the batch is a reconstruction loss.
            NaN for a layer with a `prox`, whose penalty is not known.
        sparsity: the fraction of codes that are zero, in [0, 1], [N].
        residual: |x - A z|^2 / n_dict, the squared error of one reconstruction, [N].
        relative_residual: |x - A z| / |x|, [N]: 0 for an exact reconstruction, 1 for codes of zero.
    """

    objective: Tensor
    sparsity: Tensor
    residual: Tensor
    relative_residual: Tensor


class Recording:
    """Keep a copy of the input, the codes and lambda of the last batch of every CSC layer, until `remove`.

    A recording is a context manager: `with sdnet.record(model) as recording: logits = model(x)`. A compiled model is
    compiled once more for recording.

    Args:
        model: a network with CSC layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = csc_layers(model)
        self._recorders = {name: Recorder() for name in self._layers}
        for name, layer in self._layers.items():
            layer.add_recorder(self._recorders[name])

    def diagnose(self) -> dict[str, LayerDiagnostics]:
        """Compute the diagnostics of the last batch.

        Returns:
            The diagnostics of every CSC layer that the batch went through, by the name of the layer.

        Raises:
            RuntimeError: no batch has gone through the model yet.
        """
        recorded = {name: recorder.last for name, recorder in self._recorders.items() if recorder.last is not None}
        if self._layers and not recorded:
            raise RuntimeError("no batch has gone through the model since record().")
        return {name: _diagnostics(self._layers[name], *map(_usable, last)) for name, last in recorded.items()}

    def inputs(self) -> dict[str, Tensor]:
        """Return the input of every CSC layer that the last batch went through, by the name of the layer.

        Those of a `CSCLinear` are vectors as pixels, [N, D, T, 1].
        """
        recorded = {name: recorder.last for name, recorder in self._recorders.items()}
        return {name: last[0] for name, last in recorded.items() if last is not None}

    def remove(self) -> None:
        """Stop recording and forget the batch."""
        for name, layer in self._layers.items():
            layer.remove_recorder(self._recorders[name])
            self._recorders[name].last = None

    def __enter__(self) -> "Recording":
        """Return the recording itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop recording."""
        self.remove()


def record(model: nn.Module) -> Recording:
    """Start to keep the last batch of every CSC layer, for `Recording.diagnose`.

    Args:
        model: a network with CSC layers, compiled or not.

    Returns:
        The recording, a context manager. `.remove()` ends it.

    Example:
        >>> with sdnet.record(model) as recording:
        ...     logits = model(images)
        ...     sparsity = recording.diagnose()["stem.conv"].sparsity
    """
    return Recording(model)


def diagnose(model: nn.Module, x: Tensor) -> dict[str, LayerDiagnostics]:
    """Compute the diagnostics of every CSC layer for one batch, by one forward pass of `model` in its present mode.

    Args:
        model: a network with CSC layers.
        x: a batch, as `model` takes it.

    Returns:
        The diagnostics by the name of the layer; empty for a model without CSC layers.

    Example:
        >>> for name, layer in sdnet.diagnose(model, images).items():
        ...     print(name, layer.sparsity.mean(), layer.relative_residual.mean())
    """
    with record(model) as recording:
        model(x)
        return recording.diagnose()


def _usable(value: Any) -> Any:
    """Return a tensor of `torch.inference_mode` as a copy, which autograd can save, and other values as they are."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _diagnostics(layer: CSCConv2d, x: Tensor, codes: Tensor, lam: float | Tensor) -> LayerDiagnostics:
    """Compute the diagnostics of one call of a layer."""
    n_dict = layer.coding.n_dict
    with without_autocast(x.device):
        x, codes = at_least_single(x), at_least_single(codes)
        target = repeat(x, "n c h w -> n (d c) h w", d=n_dict)
        error = target - CSCConv2d.reconstruct(layer, codes, (x.shape[2], x.shape[3]))
        squares = reduce(error.square(), "n c h w -> n", "sum")
        norm = reduce(target.square(), "n c h w -> n", "sum").sqrt().clamp_min(NORM_FLOOR)
        return LayerDiagnostics(
            objective=torch.full_like(norm, torch.nan) if layer.prox else CSCConv2d.objective(layer, x, codes, lam),
            sparsity=reduce((codes == 0).to(codes.dtype), "n k h w -> n", "mean"),
            residual=squares / n_dict,
            relative_residual=squares.sqrt() / norm,
        )
