"""Is the answer right? Every provider is held against the reference in fp64 before it is timed.

The error is |answer - oracle| / |oracle| over all elements. Allowed is twice the error of plain torch in the same type
(the yardstick), or, where that is luckier, a floor: 16 eps for an output and 4 sqrt(eps) for a gradient. A gradient has
the larger one because its masks are a step function of the codes: an element in eps that lands on the other side of the
threshold changes the gradient by sqrt(eps) of its norm. A yardstick that is itself further off than 1/4 refuses all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdnet.bench.operators import Bound, Case, Inputs, Operator, in_double

EPSILON = {"fp32": 2.0**-23, "tf32": 2.0**-10, "fp16": 2.0**-10, "bf16": 2.0**-7}
WORST_YARDSTICK = 0.25

Answers = dict[str, Tensor]


def answers(bound: Bound, grad: Tensor, modes: tuple[str, ...]) -> Answers:
    """The output without gradients and, if a mode asks for them, "d_x" and "d_weight"."""
    with torch.no_grad():
        found = {"output": bound.run()}
    if modes != ("forward",):
        output = bound.run()
        gradients = torch.autograd.grad(output, bound.leaves, grad.to(output.dtype))
        found |= dict(zip(("d_x", "d_weight"), gradients, strict=True))
    return found


def oracle(operator: Operator, case: Case, inputs: Inputs) -> Answers:
    """The reference's answers in fp64."""
    case, inputs = in_double(case, inputs)
    with no_trials():
        return answers(operator.providers["reference"](case, inputs), inputs["grad"], operator.modes)


@contextmanager
def no_trials() -> Iterator[None]:
    """cuDNN takes the algorithm that it thinks best: in fp64 to try them all takes longer than what they are for."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, False
    try:
        yield
    finally:
        cudnn.benchmark = before


def errors(found: Answers, truth: Answers) -> dict[str, float]:
    """Relative RMS error by answer; infinite for a wrong shape, a missing answer or NaN."""
    result = {}
    for name, right in truth.items():
        answer = found.get(name)
        error = float("inf")
        if answer is not None and answer.shape == right.shape:
            norm = torch.linalg.vector_norm(right).clamp_min(1e-300)
            error = float(torch.linalg.vector_norm(answer.double() - right) / norm)
        result[name] = error if error == error else float("inf")
    return result


def objection(found: dict[str, float], yardstick: dict[str, float], dtype: str) -> str:
    """Why a provider with these errors is refused; empty if it is not."""
    epsilon = EPSILON[dtype]
    for name, error in found.items():
        floor = 16 * epsilon if name == "output" else 4 * epsilon**0.5
        allowed = max(2 * yardstick[name], floor)
        if yardstick[name] > WORST_YARDSTICK:
            return f"plain torch itself is off by {yardstick[name]:.2g} in {name}: nothing to hold answers against"
        if error > allowed:
            return f"{name} is off by {error:.2g} relative, allowed is {allowed:.2g}"
    return ""
