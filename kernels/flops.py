"""What `torch.utils.flop_counter.FlopCounterMode` counts for the custom operators: the reference's convolutions.

A forward pass of n steps has n analyses (A') and n - 1 syntheses (A), all of the same cost. Its gradient has, for each
of these 2 n - 1 products, one for the input of the product and one for the dictionary; the first analysis has the
former only where the gradient for x is needed. Residuals that the backward pass computes again are not counted, so that
the count does not depend on keep_residuals.
"""

import sys
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sdnet.kernels.coding import CODING_FIELDS, Coding
from sdnet.kernels.reference import codes_size

MODULE = "torch.utils.flop_counter"

Shape = tuple[int, ...]


def register() -> None:
    """Register the formulas, and give them to the counters that are active now.

    Called at each call of an operator under a dispatch mode, for the module of the counter brings Triton with it and so
    is not imported here, and a counter copies the registered formulas when it is made.
    """
    module: Any = sys.modules.get(MODULE)
    if not module:
        return
    formulas = {torch.ops.sdnet.csc_forward: forward_flops, torch.ops.sdnet.csc_backward: backward_flops}
    for operator, formula in formulas.items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if counter is not None and isinstance(counter, module.FlopCounterMode):
            counter.flop_registry |= {operator: module.flop_registry[operator] for operator in formulas}


def forward_flops(x: Shape, weight: Shape, step_size: Shape, lam: Shape, *options: Any, **_: Any) -> int:
    """Count a call of `csc_forward` from the shapes of its tensors and its options."""
    return (2 * _coding(options).n_steps - 1) * _product(x, weight, options)


def backward_flops(
    grad: Shape, x: Shape, weight: Shape, step_size: Shape, lam: Shape, kept: list[Shape], *options: Any, **_: Any
) -> int:
    """Count a call of `csc_backward` from the shapes of its tensors and its options."""
    n_steps, (needs_x, needs_weight, _) = _coding(options).n_steps, options[-1]
    products = 2 * (n_steps - 1) + needs_x + needs_weight * (2 * n_steps - 1)
    return products * _product(x, weight, options)


def _coding(options: tuple[Any, ...]) -> Coding:
    return Coding(*options[: len(CODING_FIELDS)])


def _product(x: Shape, weight: Shape, options: tuple[Any, ...]) -> int:
    """Count one analysis or synthesis: a multiplication and an addition for each pair of a weight and a place."""
    stride, padding = options[len(CODING_FIELDS) : len(CODING_FIELDS) + 2]
    places = codes_size((x[2], x[3]), (weight[2], weight[3]), tuple(stride), tuple(padding))
    return 2 * x[0] * prod(places) * prod(weight)
