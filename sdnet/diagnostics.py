"""What the CSC layers of a network did with a batch: objective, sparsity, residual."""

from types import TracebackType
from typing import Any, NamedTuple

from einops import reduce, repeat
from torch import Tensor, nn

from sdnet.step_size import csc_layers


class LayerDiagnostics(NamedTuple):
    """Of one CSC layer, one value per sample, [N]; differentiable if the forward was.

    objective: lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2 (its mean over the batch serves as a reconstruction loss).
    sparsity: the share of codes that are zero, in [0, 1].
    residual: |x - A z|^2 / n_dict, the squared error of one reconstruction.
    relative_residual: |x - A z| / |x|, 0 for a perfect reconstruction; 1 is what codes of zero leave.
    """

    objective: Tensor
    sparsity: Tensor
    residual: Tensor
    relative_residual: Tensor


class Recording:
    """Keeps input and codes of the last batch of every CSC layer, from `record` on until `remove`.

    A context manager too: `with sdnet.record(model) as recording: logits = model(x)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = csc_layers(model)
        self._batches: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = [layer.register_forward_hook(self._keep(name)) for name, layer in self._layers.items()]

    def _keep(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], codes: Tensor) -> None:
            self._batches[name] = (inputs[0], codes)

        return hook

    def diagnose(self) -> dict[str, LayerDiagnostics]:
        """The diagnostics of the last batch by layer. RuntimeError before the first."""
        if self._layers and not self._batches:
            raise RuntimeError("no batch has gone through the model since record().")
        diagnostics = {}
        for name, (x, codes) in self._batches.items():
            layer = self._layers[name]
            target = repeat(x, "n c h w -> n (d c) h w", d=layer.coding.n_dict)
            error = target - layer.reconstruct(codes, (x.shape[2], x.shape[3]))
            squares = reduce(error.square(), "n c h w -> n", "sum")
            norm = reduce(target.square(), "n c h w -> n", "sum").sqrt().clamp_min(1e-12)
            diagnostics[name] = LayerDiagnostics(
                objective=layer.objective(x, codes),
                sparsity=reduce((codes == 0).to(codes.dtype), "n k h w -> n", "mean"),
                residual=squares / layer.coding.n_dict,
                relative_residual=squares.sqrt() / norm,
            )
        return diagnostics

    def remove(self) -> None:
        """Stops recording and forgets the batch."""
        for handle in self._handles:
            handle.remove()
        self._batches.clear()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def record(model: nn.Module) -> Recording:
    """Starts to keep the last batch of every CSC layer of `model`; ask it with `.diagnose()`."""
    return Recording(model)


def diagnose(model: nn.Module, x: Tensor) -> dict[str, LayerDiagnostics]:
    """The diagnostics of every CSC layer for a batch x, by one forward of `model` in the mode that it is in."""
    with record(model) as recording:
        model(x)
        return recording.diagnose()
