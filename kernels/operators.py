"""The private custom operators behind `csc_encode`: opaque to torch.compile, with a gradient written by hand.

`csc_forward` returns all codes, so that its gradient can save them; `csc_encode` hands out the last. Their schemas are
plain: step and lam are always tensors. What autograd keeps for a layer is x, weight, step, lam and the codes, and the
residuals if asked to. Which implementation runs is chosen here, on real tensors: no compiler traces the choice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from sdnet.kernels import torch_path
from sdnet.kernels.dispatch import choose
from sdnet.kernels.reference import DataTerm, Pair, Solver, codes_size


def memory_format_of(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last if x or weight is unmistakably so, as convolutions choose."""
    for tensor in (x, weight):
        if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


def pair(values: Sequence[int]) -> Pair:
    """The two values of a schema's int[]."""
    first, second = values
    return first, second


def problem_of(
    step_size: Tensor,
    lam: Tensor,
    mu: float,
    n_steps: int,
    stride: Sequence[int],
    padding: Sequence[int],
    nonnegative: bool,
    solver: str,
    data_term: str,
    n_dict: int,
) -> torch_path.Problem:
    """The schema's arguments under their names."""
    return torch_path.Problem(
        step_size=step_size,
        lam=lam,
        mu=mu,
        n_steps=n_steps,
        stride=pair(stride),
        padding=pair(padding),
        nonnegative=nonnegative,
        solver=cast(Solver, solver),
        data_term=cast(DataTerm, data_term),
        n_dict=n_dict,
    )


@contextmanager
def quietly_on(x: Tensor) -> Iterator[None]:
    """x's device is the current one, for Triton launches there, and autocast is off."""
    device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with device, torch.autocast(x.device.type, enabled=False):
        yield


@custom_op("sdnet::csc_forward", mutates_args=())
def csc_forward(
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lam: Tensor,
    mu: float,
    n_steps: int,
    stride: Sequence[int],
    padding: Sequence[int],
    nonnegative: bool,
    solver: str,
    data_term: str,
    n_dict: int,
    impl: str,
    keep_residuals: bool,
    keep_all: bool,
) -> list[Tensor]:
    """[z_1, ..., z_n], before them [r_1, ..., r_{n-1}] if keep_residuals; [z_n] alone unless keep_all."""
    problem = problem_of(step_size, lam, mu, n_steps, stride, padding, nonnegative, solver, data_term, n_dict)
    layout = memory_format_of(x, weight)
    keep_residuals = keep_residuals and keep_all
    with quietly_on(x):
        x = x.contiguous(memory_format=layout)
        if choose(impl, x, weight).impl == "triton":
            from sdnet.kernels.triton_path import loop

            codes, residuals = loop.forward(x, weight, problem, layout, keep_residuals)
        else:
            codes, residuals = torch_path.forward(x, weight, problem, keep_residuals)
    kept = [*residuals, *codes] if keep_all else codes[-1:]
    return [tensor.contiguous(memory_format=layout) for tensor in kept]


@csc_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lam: Tensor,
    mu: float,
    n_steps: int,
    stride: Sequence[int],
    padding: Sequence[int],
    nonnegative: bool,
    solver: str,
    data_term: str,
    n_dict: int,
    impl: str,
    keep_residuals: bool,
    keep_all: bool,
) -> list[Tensor]:
    kernel_size = pair(weight.shape[2:])
    codes = (x.shape[0], weight.shape[0], *codes_size(pair(x.shape[2:]), kernel_size, pair(stride), pair(padding)))
    residual = (x.shape[0], weight.shape[1], *x.shape[2:])
    shapes = [codes] * (n_steps if keep_all else 1)
    if keep_residuals and keep_all:
        shapes = [residual] * (n_steps - 1) + shapes
    layout = memory_format_of(x, weight)
    return [x.new_empty(shape).to(memory_format=layout) for shape in shapes]


@custom_op("sdnet::csc_backward", mutates_args=())
def csc_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lam: Tensor,
    kept: Sequence[Tensor],
    mu: float,
    n_steps: int,
    stride: Sequence[int],
    padding: Sequence[int],
    nonnegative: bool,
    solver: str,
    data_term: str,
    n_dict: int,
    impl: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients for x, weight and lam that `needs` asks for, in this order, from grad = dL/dz_n.

    `kept` is what csc_forward returned.
    """
    problem = problem_of(step_size, lam, mu, n_steps, stride, padding, nonnegative, solver, data_term, n_dict)
    layout = memory_format_of(x, weight)
    residuals, codes = list(kept[:-n_steps]), list(kept[-n_steps:])
    wanted = torch_path.Needs(*needs)
    with quietly_on(x):
        x, grad = (tensor.contiguous(memory_format=layout) for tensor in (x, grad))
        if choose(impl, x, weight).impl == "triton":
            from sdnet.kernels.triton_path import loop

            gradients = loop.backward(grad, x, weight, codes, residuals, problem, wanted, layout)
        else:
            gradients = torch_path.backward(grad, x, weight, codes, residuals, problem, wanted)
    layouts = layout, memory_format_of(weight, weight), torch.contiguous_format
    return [
        gradient.contiguous(memory_format=of)
        for gradient, of in zip(gradients, layouts, strict=True)
        if gradient is not None
    ]


@csc_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lam: Tensor,
    kept: Sequence[Tensor],
    mu: float,
    n_steps: int,
    stride: Sequence[int],
    padding: Sequence[int],
    nonnegative: bool,
    solver: str,
    data_term: str,
    n_dict: int,
    impl: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    layouts = memory_format_of(x, weight), memory_format_of(weight, weight), torch.contiguous_format
    return [
        torch.empty_like(tensor, memory_format=layout)
        for tensor, layout, needed in zip((x, weight, lam), layouts, needs, strict=True)
        if needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, step_size, lam, *options, _, keep_all = inputs
    assert keep_all, "a gradient needs all codes"
    ctx.save_for_backward(x, weight, step_size, lam, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    # csc_encode hands out the last codes alone, so no other has a gradient.
    x, weight, step_size, lam, *kept = ctx.saved_tensors
    needs_x, needs_weight, _, needs_lam = ctx.needs_input_grad[:4]
    needs = [needs_x, needs_weight, needs_lam]
    untouched = (None,) * (len(ctx.options) + 2)
    if grads[-1] is None:
        return None, None, None, None, *untouched
    wanted = iter(csc_backward(grads[-1], x, weight, step_size, lam, kept, *ctx.options, needs))
    d_x, d_weight, d_lam = (next(wanted) if needed else None for needed in needs)
    return d_x, d_weight, None, d_lam, *untouched


csc_forward.register_autograd(_backward, setup_context=_setup_context)
