"""How exact an implementation is: its error against fp64, which may be twice that of torch's own operators.

Or a floor, the rounding of the result itself.
"""

import torch

from .cases import Case

TF32_FLOOR = 1e-3
"""The error that products in tf32 may have in any case.

The tensor cores drop 13 bits of each operand where Triton multiplies, and cuDNN may round them to the nearest. Dropping
has twice the error, most of it towards zero: 7.7e-4 against 2.9e-4 for sums of 576 products.
"""

FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}


def errors(case: Case, dtype: torch.dtype, impl: str) -> dict[str, float]:
    """The codes' error against the reference, and the gradients' against those of fp64 at the same codes."""
    codes, *gradients = case.results(dtype, impl)
    leaves = case.leaves(dtype)
    exact = [leaf.detach().double() for leaf in leaves]
    grad = case.grad(codes)
    expected = case.exact_gradients(leaves, grad, impl)
    found = {"codes": (codes, case.encode(*exact, impl="reference"))}
    found |= dict(zip(("x", "weight", "lam"), zip(gradients, expected, strict=True), strict=True))
    # dL/dlam is a sum of both signs: its error is measured against the sum of their sizes.
    scales = {name: exact.norm().clamp_min(1e-9) for name, (_, exact) in found.items()} | {
        "lam": case.step_size * grad.double().abs().sum()
    }
    return {name: ((actual.double() - exact).norm() / scales[name]).item() for name, (actual, exact) in found.items()}


def assert_as_exact_as_torch(
    case: Case, dtype: torch.dtype, lam_floor: float = 0.0, floor: float | None = None
) -> None:
    """By the rule above; `floor` stands in the place of the type's, and `lam_floor` is one for dL/dlam above it."""
    ours, theirs = errors(case, dtype, "triton"), errors(case, dtype, "torch")
    allowed = {name: max(2 * error, FLOOR[dtype] if floor is None else floor) for name, error in theirs.items()}
    allowed["lam"] = max(allowed["lam"], lam_floor)
    assert all(error <= allowed[name] for name, error in ours.items()), f"{ours}, torch's {theirs}"
