"""Check of the answers: every provider is compared with the reference in fp64 before it is timed.

The error is |answer - oracle| / |oracle| over all elements. The bound is twice the error of plain PyTorch in the same
type (the baseline), or a floor if that is larger: 16 eps for an output and 4 sqrt(eps) for a gradient. The floor of a
gradient is larger because its masks are a step function of the codes: a fraction eps of the elements on the other side
of the threshold changes the gradient by sqrt(eps) of its norm. If the baseline itself is off by more than 1/4, every
provider is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdnet.bench.providers import BoundCall, Inputs, Operator, Workload, in_double

EPSILON = {"fp32": 2.0**-23, "tf32": 2.0**-10, "fp16": 2.0**-10, "bf16": 2.0**-7}
WORST_BASELINE = 0.25

Answers = dict[str, Tensor]


def answers(call: BoundCall, grad: Tensor, modes: tuple[str, ...]) -> Answers:
    """Return the output without gradients and, if a mode needs them, "d_x" and "d_weight"."""
    with torch.no_grad():
        found = {"output": call.run()}
    if modes != ("forward",):
        output = call.run()
        gradients = torch.autograd.grad(output, call.leaves, grad.to(output.dtype))
        found |= dict(zip(("d_x", "d_weight"), gradients, strict=True))
    return found


def oracle(operator: Operator, workload: Workload, inputs: Inputs) -> Answers:
    """Return the answers of the reference in fp64."""
    workload, inputs = in_double(workload, inputs)
    with cudnn_heuristics():
        return answers(operator.providers["reference"](workload, inputs), inputs["grad"], operator.modes)


@contextmanager
def cudnn_heuristics() -> Iterator[None]:
    """Let cuDNN choose by heuristics: in fp64, timing all algorithms takes longer than the few calls of the oracle."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, False
    try:
        yield
    finally:
        cudnn.benchmark = before


def objection(found: dict[str, float], baseline: dict[str, float], dtype: str) -> str:
    """Return why a provider with these errors is refused; "" if it is not."""
    epsilon = EPSILON[dtype]
    for name, error in found.items():
        floor = 16 * epsilon if name == "output" else 4 * epsilon**0.5
        allowed = max(2 * baseline[name], floor)
        if baseline[name] > WORST_BASELINE:
            return f"plain PyTorch itself is off by {baseline[name]:.2g} in {name}, so that no answer can be checked"
        if error > allowed:
            return f"{name} is off by {error:.2g} relative, allowed is {allowed:.2g}"
    return ""
