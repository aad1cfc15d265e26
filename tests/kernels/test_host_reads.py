"""Nothing on the way through the Triton kernels asks what a tensor holds: what a CUDA graph can capture.

On a GPU every such question waits for the device, and a capture fails at it. Here each is an error, inside the custom
operators too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sdnet
from sdnet import stored_weight
from sdnet.kernels import operators
from sdnet.kernels.triton_path import step_sizes as triton_step_sizes

from ..triton_interpreter.numerics import needs_interpreter
from .cases import Case

pytestmark = needs_interpreter


class HostReadError(AssertionError):
    """A value went from the device to the host, or the other way."""


READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_static", "masked_select",
    "unique_dim", "_unique2", "unique_consecutive", "bincount", "_is_any_true", "_is_all_true", "repeat_interleave",
}  # fmt: skip
"""aten's operators that need a value on the host, or make a tensor whose size depends on one."""
WRITES = {"lift_fresh", "lift_fresh_copy"}
"""What torch.tensor calls: numbers of the host that go to the device."""
METHODS = ("tolist", "numpy", "cpu")
"""What reads a tensor on the CPU without an operator."""
INDICES = {"index", "index_put", "index_put_"}
INSIDE = {"csc_forward": operators.csc_forward, "csc_backward": operators.csc_backward}


class Watch(TorchDispatchMode):
    """Raises HostReadError at the operators above, and notes those that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READS | WRITES:
            raise HostReadError(name)
        if name in INDICES and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise HostReadError(f"{name} by a mask")
        self.passed.add(name)
        if func.namespace == "sdnet":
            with self:  # in here it is off, and so it would be in the operator's body
                return INSIDE[name](*args, **kwargs or {})
        return func(*args, **kwargs or {})


@contextmanager
def no_host_reads() -> Iterator[set[str]]:
    """All that is listed above is an error; yields the names of the operators that passed."""
    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, side_effect=HostReadError(name)))
        yield stack.enter_context(Watch()).passed


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x * torch.tensor(0.5),
    ],
    ids=["item", "bool", "float", "mask", "nonzero", "equal", "tolist", "cpu", "tensor"],
)
def test_a_read_is_an_error(read: Any) -> None:
    with no_host_reads(), pytest.raises(HostReadError):
        read(torch.ones(3))


CASES = {
    "fused": Case(9, 12, size=(4, 3), batch=2, n_steps=3, mu=0.5, nonnegative=False),
    "a stem": Case(3, 12, (3, 3), (2, 2), (6, 5), batch=2),
    "the official loop": Case(5, 12, size=(4, 3), batch=2, n_steps=3, solver="sdnet", data_term="norm", n_dict=2),
}


@pytest.mark.parametrize("steps", ["fused", "cudnn"])
@pytest.mark.parametrize("name", CASES)
def test_codes_and_gradients_without_a_host_read(name: str, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    case = CASES[name]
    leaves = case.leaves()
    with no_host_reads() as passed:
        case.encode(*leaves).square().sum().backward()
    assert {"csc_forward", "csc_backward"} <= passed
    assert all(leaf.grad is not None for leaf in leaves)
    expected = case.leaves()
    case.encode(*expected).square().sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], [leaf.grad for leaf in expected])


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("updated_by", ["torch", "triton"])
def test_a_training_step_and_its_update_without_a_host_read(updated_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if updated_by == "triton":  # which is for a GPU
        update = triton_step_sizes.update_dictionaries
        monkeypatch.setattr(stored_weight, "update_dictionaries", lambda states, n, impls: update(states, n))
    torch.manual_seed(0)
    options: Any = {"lam": 0.02, "input_size": (6, 5), "impl": "triton"}
    model = nn.Sequential(
        sdnet.CSCConv2d(3, 8, 3, **options), nn.BatchNorm2d(8), sdnet.CSCConv2d(8, 12, 3, stride=2, **options)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    sdnet.attach(model, optimizer)
    x = torch.randn(2, 3, 6, 5)
    training_step(model, optimizer, x)  # the first makes the plan of the power iterations
    before = [layer.step_size.clone() for layer in model if isinstance(layer, sdnet.CSCConv2d)]
    with no_host_reads() as passed:
        training_step(model, optimizer, x)
    assert {"csc_forward", "csc_backward"} <= passed
    after = [layer.step_size for layer in model if isinstance(layer, sdnet.CSCConv2d)]
    assert not any(map(torch.equal, before, after))
