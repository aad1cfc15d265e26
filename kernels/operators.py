"""The private custom operators behind `csc_encode`: opaque to torch.compile, with a gradient written by hand.

`csc_forward` returns all codes, so that its gradient can save them; `csc_operator` returns the last. Their schemas are
plain: step_size and lam are always tensors, and the options are the fields of `Coding`, the geometry, and what
`csc_encode` chose. For a backward pass autograd keeps x, weight, step_size, lam, the codes, and the residuals if asked.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl

from sdnet.kernels import flops, reference, torch_path
from sdnet.kernels.autocast import without_autocast
from sdnet.kernels.coding import Coding
from sdnet.kernels.dispatch import transform_of
from sdnet.kernels.qualify import job
from sdnet.kernels.qualify.key import Call, Flags
from sdnet.kernels.reference import Pair, codes_size

SCHEMA_TYPES: dict[Any, str] = {int: "int", float: "float", bool: "bool"}
"""The schema's name of a field's type; a `Literal` is a str."""


def memory_format_of(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return channels_last if x or weight is unambiguously so, as convolutions choose."""
    for tensor in (x, weight):
        if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


def problem_of(step_size: Tensor, lam: Tensor, options: tuple[Any, ...]) -> torch_path.Problem:
    """Return the problem of a schema's arguments; `options` are those of `OPTIONS`, in its order."""
    *coding, (stride_h, stride_w), (padding_h, padding_w) = options
    return torch_path.Problem(step_size, lam, cached_coding(*coding), (stride_h, stride_w), (padding_h, padding_w))


@cache
def cached_coding(*values: Any) -> Coding:
    """Return the `Coding` of its fields' values."""
    return Coding(*values)


@contextmanager
def plain_context(x: Tensor) -> Iterator[None]:
    """Make x's device the current one, for Triton launches there, and turn autocast off."""
    device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with device, without_autocast(x.device):
        yield


Result = TypeVar("Result")


def computed(
    impl: str,
    path: str,
    call: Callable[[], Call],
    device: torch.device,
    by_triton: Callable[[str], Result],
    by_torch: Callable[[], Result],
) -> Result:
    """Return the result of one implementation.

    Args:
        impl: "torch", "triton", or "auto" for what this machine's verdict says, where PyTorch takes over if a kernel of
            Triton does not compile.
        path: what "triton" is asked for.
        call: describes the call, for its verdict.
        device: the device of its tensors.
        by_triton: computes it by Triton, on the path that it is given.
        by_torch: computes it by PyTorch.
    """
    if impl == "triton":
        return by_triton(path)
    if impl == "auto":
        described = call()
        decision = job.decide(described, device)
        if decision.impl == "triton":
            try:
                return by_triton(decision.path)
            except Exception as error:
                job.rescue(error, described.key(Flags.now()), device, f"the layer {described.layer}")
    return by_torch()


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise a NotImplementedError if something transforms these tensors that an operator has no rule for."""
    if transform := transform_of(*tensors):
        raise no_rule_for(transform)


def no_rule_for(transform: str) -> NotImplementedError:
    """Return the error for what the operators have no rule for, which names the way out."""
    return NotImplementedError(
        f"A compiled or exported CSC layer has no rule for {transform}; compile or export the model after "
        'sdnet.set_impl(model, "reference"), with csc_encode(..., impl="reference") in place of the bare operator.'
    )


def csc_forward(x: Tensor, weight: Tensor, step_size: Tensor, lam: Tensor, *options: Any) -> list[Tensor]:
    """Return [z_1, ..., z_n], before them [r_1, ..., r_{n-1}] if keep_residuals; [z_n] alone unless keep_all."""
    impl, path, keep_residuals, keep_all = options[-4:]
    problem = problem_of(step_size, lam, options[:-4])
    layout = memory_format_of(x, weight)
    keep_residuals = keep_residuals and keep_all
    with plain_context(x):
        x = x.contiguous(memory_format=layout)

        def by_triton(path: str) -> tuple[list[Tensor], list[Tensor]]:
            from sdnet.kernels.triton_path import loop

            return loop.forward(x, weight, problem, layout, keep_residuals, path, keep_all)

        def by_torch() -> tuple[list[Tensor], list[Tensor]]:
            return torch_path.forward(x, weight, problem, keep_residuals, keep_all)

        codes, residuals = computed(
            impl, path, lambda: Call.of(x, weight, problem, layout), x.device, by_triton, by_torch
        )
    kept = [*residuals, *codes] if keep_all else codes[-1:]
    return [tensor.contiguous(memory_format=layout) for tensor in kept]


def csc_forward_fake(x: Tensor, weight: Tensor, step_size: Tensor, lam: Tensor, *options: Any) -> list[Tensor]:
    """Return what `csc_forward` would return, without values."""
    keep_residuals, keep_all = options[-2:]
    _, _, coding, stride, padding = problem_of(step_size, lam, options[:-4])
    (height, width), (kernel_h, kernel_w) = x.shape[2:], weight.shape[2:]
    codes = (x.shape[0], weight.shape[0], *codes_size((height, width), (kernel_h, kernel_w), stride, padding))
    residual = (x.shape[0], weight.shape[1], *x.shape[2:])
    shapes = [codes] * (coding.n_steps if keep_all else 1)
    if keep_residuals and keep_all:
        shapes = [residual] * (coding.n_steps - 1) + shapes
    layout = memory_format_of(x, weight)
    return [x.new_empty(shape).to(memory_format=layout) for shape in shapes]


def csc_backward(
    grad: Tensor, x: Tensor, weight: Tensor, step_size: Tensor, lam: Tensor, kept: list[Tensor], *options: Any
) -> list[Tensor]:
    """Return the gradients for x, weight and lam that `needs` asks for, in this order, from grad = dL/dz_n.

    `kept` is what csc_forward returned.
    """
    refuse_transforms(grad, x, weight, step_size, lam)
    impl, path, needs = options[-3:]
    problem = problem_of(step_size, lam, options[:-3])
    n_steps = problem.coding.n_steps
    layout = memory_format_of(x, weight)
    residuals, codes = kept[:-n_steps], kept[-n_steps:]
    wanted = torch_path.Needs(*needs)
    with plain_context(x):
        x, grad = (tensor.contiguous(memory_format=layout) for tensor in (x, grad))

        def by_triton(path: str) -> torch_path.Gradients:
            from sdnet.kernels.triton_path import loop

            return loop.backward(grad, x, weight, codes, residuals, problem, wanted, layout, path)

        def by_torch() -> torch_path.Gradients:
            return torch_path.backward(grad, x, weight, codes, residuals, problem, wanted)

        gradients = computed(impl, path, lambda: Call.of(x, weight, problem, layout), x.device, by_triton, by_torch)
    layouts = layout, memory_format_of(weight, weight), torch.contiguous_format
    return [
        gradient.contiguous(memory_format=of)
        for gradient, of in zip(gradients, layouts, strict=True)
        if gradient is not None
    ]


def csc_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, step_size: Tensor, lam: Tensor, kept: list[Tensor], *options: Any
) -> list[Tensor]:
    """Return what `csc_backward` would return, without values."""
    needs = options[-1]
    layouts = memory_format_of(x, weight), memory_format_of(weight, weight), torch.contiguous_format
    return [
        torch.empty_like(tensor, memory_format=layout)
        for tensor, layout, needed in zip((x, weight, lam), layouts, needs, strict=True)
        if needed
    ]


def csc_operator(
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lam: Tensor,
    coding: Coding,
    stride: Pair,
    padding: Pair,
    impl: str,
    path: str,
    keep_residuals: bool,
    needs_gradient: bool,
) -> Tensor:
    """Return the codes [N, K, h, w] of a checked call, by the custom operator."""
    eager = not torch.compiler.is_compiling()
    if eager and torch._C._len_torch_dispatch_stack():
        flops.register()
    options = (*coding.values(), stride, padding, impl, path, keep_residuals)
    codes = torch.ops.sdnet.csc_forward(x, weight, step_size, lam, *options, needs_gradient)[-1]
    if eager and codes.requires_grad:
        _allow_changes_in_place(codes)
    return codes


def _allow_changes_in_place(codes: Tensor) -> None:
    """Let the backward pass accept that the codes, which it keeps, have been changed in place.

    As after a convolution, `nn.ReLU(inplace=True)` or the addition of a shortcut may follow. The backward pass compares
    the version of the codes, and computes those that were changed again.
    """
    node: Any = codes.grad_fn
    if not hasattr(node, "_raw_saved_tensors"):  # codes of a subclass of Tensor are an alias of the operator's
        node = node.next_functions[0][0]
    # With hooks PyTorch leaves the comparison of versions to us. It has some where the caller uses
    # torch.autograd.graph.saved_tensors_hooks, as activation checkpointing does.
    with suppress(RuntimeError):
        node._raw_saved_tensors[-1].register_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, step_size, lam, *options, keep_all = inputs
    assert keep_all, "a gradient needs all codes"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None:
        # While torch.compile traces: an operation in place after the layer changes the codes that are returned, and its
        # passes remove this copy where there is none.
        output = [*output[:-1], output[-1].clone()]
        ctx.codes_version = sys.maxsize  # no change in place reaches the copy
    else:
        ctx.codes_version = output[-1]._version
    # As a rule the backward pass does not read lambda's value, so a lambda without a gradient may change between the
    # passes: it is not saved with the others. Where its value is needed after all, `_lambda` checks it.
    ctx.save_for_backward(x, weight, step_size, lam if lam.requires_grad else step_size, *output)
    ctx.lam = None if lam.requires_grad else lam
    ctx.lam_version = 0 if lam.is_inference() else lam._version
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    # csc_operator returns the last codes alone, so no other has a gradient.
    grad, needs = grads[-1], [ctx.needs_input_grad[n] for n in (0, 1, 3)]
    untouched = (None,) * (len(ctx.options) + 1)
    if grad is None:
        return None, None, None, None, *untouched
    x, weight, step_size, lam, *kept = ctx.saved_tensors
    if torch.is_grad_enabled() or transform_of(grad) is not None:
        found = _reference_gradients(grad, x, weight, step_size, _lambda(ctx, lam), ctx.options, needs)
    else:
        if torch._C._len_torch_dispatch_stack():
            flops.register()
        if kept[-1]._version > ctx.codes_version:  # a copy that hooks on saved tensors made has a lower one
            kept = torch.ops.sdnet.csc_forward(x, weight, step_size, _lambda(ctx, lam), *ctx.options, True)
        options = ctx.options[:-1]  # without keep_residuals
        lam = lam if ctx.lam is None else ctx.lam
        found = torch.ops.sdnet.csc_backward(grad, x, weight, step_size, lam, kept, *options, needs)
    wanted = iter(found)
    d_x, d_weight, d_lam = (next(wanted) if needed else None for needed in needs)
    return d_x, d_weight, None, d_lam, *untouched


def _lambda(ctx: Any, saved: Tensor) -> Tensor:
    """Return the lambda of the forward pass, for a backward pass that solves the problem again."""
    lam = ctx.lam
    if lam is None:
        return saved
    if not lam.is_inference() and lam._version != ctx.lam_version:
        raise RuntimeError(
            "lam was changed in place between the forward pass and a backward pass that needs its value, because the "
            "codes were changed in place too or higher derivatives are asked for; pass a copy of lam to the forward."
        )
    return lam


def _reference_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, step_size: Tensor, lam: Tensor, options: list[Any], needs: list[bool]
) -> tuple[Tensor, ...]:
    """Return the gradients for x, weight and lam that `needs` asks for, by autograd through the reference.

    They can be differentiated again, and grad may be a batch of gradients (`is_grads_batched`).
    """
    *_, coding, stride, padding = problem_of(step_size, lam, tuple(options[:-3]))
    create_graph = torch.is_grad_enabled()
    with plain_context(x), torch.enable_grad():
        # Aliases, for x may depend on weight or lam: these are the derivatives of this call alone.
        inputs = [tensor.view_as(tensor) for tensor in (x, weight, lam)]
        codes = reference.csc_encode(inputs[0], inputs[1], step_size, inputs[2], coding, stride, padding)
        wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
        return torch.autograd.grad(codes, wanted, grad, create_graph=create_graph)


OPTIONS = ", ".join(
    [
        *(f"{SCHEMA_TYPES.get(field.type, 'str')} {field.name}" for field in fields(Coding)),
        "int[2] stride",
        "int[2] padding",
    ]
)
"""The options of both operators, as their schemas name them."""

library = torch.library.Library("sdnet", "DEF")


def define(schema: str, function: Callable[..., list[Tensor]], fake: Callable[..., list[Tensor]]) -> None:
    """Register an operator of this namespace for all devices, and its shapes for the compiler."""
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.partition("(")[0]
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sdnet::{name}", fake, lib=library)


define(
    f"csc_forward(Tensor x, Tensor weight, Tensor step_size, Tensor lam, {OPTIONS}, "
    "str impl, str path, bool keep_residuals, bool keep_all) -> Tensor[]",
    csc_forward,
    csc_forward_fake,
)
define(
    f"csc_backward(Tensor grad, Tensor x, Tensor weight, Tensor step_size, Tensor lam, Tensor[] kept, {OPTIONS}, "
    "str impl, str path, bool[] needs) -> Tensor[]",
    csc_backward,
    csc_backward_fake,
)

info = Info(_backward, _setup_context)
differentiable = make_autograd_impl(torch.ops.sdnet.csc_forward.default, info)


def _autograd(keyset: Any, *arguments: Any) -> list[Tensor]:
    """Compute `csc_forward` with its gradient.

    This is `torch.library.register_autograd` with one check more: without it forward-mode derivatives of an exported
    program, which calls this operator whatever transforms it, would be zero without a word.
    """
    refuse_transforms(*arguments[:4])
    return differentiable(keyset, *arguments)


library.impl("csc_forward", _autograd, "Autograd", with_keyset=True)


def _vmap(operator: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    """Compute an operator for each element of a batch: the rule of `torch.vmap`.

    Only compiled and exported functions need it, for `csc_encode` itself takes the reference under vmap.
    """

    def element(argument: Any, dim: Any, index: int) -> Any:
        if isinstance(argument, list) and isinstance(dim, list):
            return [element(*each, index) for each in zip(argument, dim, strict=True)]
        return argument.select(dim, index) if isinstance(argument, Tensor) and dim is not None else argument

    found = [
        operator(*(element(argument, dim, index) for argument, dim in zip(arguments, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    stacked = [torch.stack(each) for each in zip(*found, strict=True)]
    return stacked, [0] * len(stacked)


def _refuse_batched(*_: Any) -> list[Tensor]:
    """Refuse the batched gradients of a compiled or exported function (`is_grads_batched`)."""
    raise no_rule_for("batched gradients")


for _operator in (torch.ops.sdnet.csc_forward, torch.ops.sdnet.csc_backward):
    torch.library.register_vmap(_operator.default, partial(_vmap, _operator), lib=library)
    library.impl(_operator.default, _refuse_batched, "Batched")
