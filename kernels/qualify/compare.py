"""The check of a candidate: its codes and gradients against PyTorch in fp32, on synthetic pictures.

The reference runs the torch path in fp32 without tf32, on the same inputs rounded to the call's type. For each result
(codes, d_x, d_weight, d_lam) the error is |result - reference| / |reference| over all elements. It may be at most

    max(2 * error of the torch path in the call's own type, FLOORS[type]),

for gradients plus 2 / sqrt(number of codes), for some codes lie so close to the threshold that rounding decides whether
they are zero, and a gradient jumps there. The torch path itself may be off by at most `WORST_TORCH`. The error of a
single image, pixel or channel may be at most half of the mean norm of these, so that no part of a result is missing.
Besides, there is no NaN where the reference has none, nothing is written before or behind a tensor, and two calls give
the same bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.kernels import step_sizes, torch_path
from sdnet.kernels.coding import Coding
from sdnet.kernels.csc import step_size as step_size_of
from sdnet.kernels.qualify.candidates import Candidate
from sdnet.kernels.qualify.guards import GuardedMemory
from sdnet.kernels.qualify.key import Call, Flags, Update
from sdnet.kernels.qualify.verdicts import TORCH
from sdnet.kernels.reference import codes_size
from sdnet.kernels.step_sizes import DictionaryState
from sdnet.kernels.torch_path import Needs, Problem

FLOORS = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 2e-3}
"""The error that is allowed in any case. In fp32 it is that of tf32; see `FLOOR_IEEE` for products in fp32."""

FLOOR_IEEE = 1e-5

WORST_TORCH = 0.25

WORST_SLICE = 0.5
"""The error that is allowed for one image, pixel or channel, relative to the mean norm of these."""

LEAST_SLICE = 32
"""Elements below which the error of a single image, pixel or channel is not looked at."""

UPDATE_ERRORS = {"weight": 1e-5, "step_size": 1e-2, "power_vector": 5e-2}
"""The errors that are allowed for an update of dictionaries."""

CHUNK = 32
"""Images that the reference takes at a time."""

MU = 0.1
"""mu of the comparison where the call has one."""

Results = dict[str, Tensor]


class Inputs(NamedTuple):
    """The inputs of a comparison."""

    x: Tensor
    weight: Tensor
    problem: Problem
    grad: Tensor
    layout: torch.memory_format

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """The inputs x and weight as autograd takes them, sharing their memory."""
        return self.x.detach().requires_grad_(), self.weight.detach().requires_grad_()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute products of fp32 in fp32."""
    before = Flags.now()
    before._replace(convolutions="ieee", products="ieee").set()
    try:
        yield
    finally:
        before.set()


def inputs_of(call: Call, device: torch.device, seed: int = 0) -> Inputs:
    """Return synthetic inputs for a call: smooth pictures with noise, atoms of unit norm, and about half the codes."""
    random = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, call.dtype)
    layout = torch.channels_last if call.channels_last else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    coarse = [max(1, n // 4) for n in call.image_size]
    channels = call.channels // call.n_dict
    smooth = F.interpolate(normal(call.batch, channels, *coarse), size=call.image_size, mode="bilinear")
    x = (smooth + 0.3 * normal(call.batch, channels, *call.image_size)).to(dtype).contiguous(memory_format=layout)
    weight = normal(call.atoms, call.channels, *call.kernel_size)
    step_sizes.project_atoms(weight)
    weight = weight.to(dtype).contiguous(memory_format=layout)
    with without_tf32():
        step_size = step_size_of(weight.float(), call.image_size, call.stride, call.padding, tolerance=1e-2)
        summed = weight.float().view(call.atoms, call.n_dict, channels, *call.kernel_size).sum(1)
        lam = 0.5 * F.conv2d(x[:8].float(), summed, None, call.stride, call.padding).abs().mean()
    if call.lam_per_sample:
        lam = lam * torch.linspace(0.8, 1.2, call.batch, device=device).view(-1, 1, 1, 1)
    coding: Any = {name: getattr(call, name) for name in ("n_steps", "solver", "data_term", "nonnegative", "n_dict")}
    problem = Problem(step_size, lam, Coding(mu=MU if call.has_mu else 0.0, **coding), call.stride, call.padding)
    codes = codes_size(call.image_size, call.kernel_size, call.stride, call.padding)
    # A mean above 0 keeps the sum that d_lam is from cancelling.
    grad = (1 + normal(call.batch, call.atoms, *codes)).to(dtype).contiguous(memory_format=layout)
    return Inputs(x, weight, problem, grad, layout)


@torch.no_grad()
def results_of(path: str, inputs: Inputs, keep_residuals: bool = False) -> Results:
    """Return the codes and all gradients of a path."""
    x, weight, problem, grad, layout = inputs
    needs = Needs(True, True, True)
    if path == TORCH:
        codes, residuals = torch_path.forward(x, weight, problem, keep_residuals)
        gradients = torch_path.backward(grad, x, weight, codes, residuals, problem, needs)
    else:
        from sdnet.kernels.triton_path import loop

        codes, residuals = loop.forward(x, weight, problem, layout, keep_residuals, path)
        gradients = loop.backward(grad, x, weight, codes, residuals, problem, needs, layout, path)
    found = {"codes": codes[-1], "d_x": gradients.x, "d_weight": gradients.weight, "d_lam": gradients.lam}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def reference_of(inputs: Inputs) -> Results:
    """Return the results of the torch path in fp32 without tf32, a few images at a time."""
    parts: list[Results] = []
    with without_tf32():
        for start in range(0, len(inputs.x), CHUNK):
            some = slice(start, start + CHUNK)
            lam = inputs.problem.lam[some] if inputs.problem.lam.ndim else inputs.problem.lam
            problem = inputs.problem._replace(lam=lam)
            tensors = inputs.x[some].float(), inputs.weight.float(), problem, inputs.grad[some].float()
            parts.append(results_of(TORCH, Inputs(*tensors, inputs.layout)))
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("codes", "d_x")}
    for name in ("d_weight", "d_lam"):
        each = [part[name] for part in parts]
        per_sample = name == "d_lam" and each[0].ndim > 0
        joined[name] = torch.cat(each) if per_sample else torch.stack(each).double().sum(0)
    return joined


def errors_of(found: Results, truth: Results) -> dict[str, float]:
    """Return the relative error of each result; infinite for a missing one, another shape or NaN."""
    errors = {}
    for name, right in truth.items():
        result, error = found.get(name), float("inf")
        if result is not None and result.shape == right.shape:
            right = right if right.dtype == torch.float64 else right.float()
            norm = torch.linalg.vector_norm(right).clamp_min(1e-30)
            error = float(torch.linalg.vector_norm(result.to(right.dtype) - right) / norm)
        errors[name] = error if error == error else float("inf")
    return errors


def worst_slice(found: Results, truth: Results) -> tuple[float, str]:
    """Return the largest error of one image, pixel or channel, and what it is one of."""
    worst = (0.0, "nothing")
    for name in ("codes", "d_x"):
        right = truth[name].float()
        difference = (found[name].float() - right).square_()
        squares = right.square()
        for what, axes in (("an image", (1, 2, 3)), ("a pixel", (0, 1)), ("a channel", (0, 2, 3))):
            kept = squares.sum(axes)
            if right.numel() < LEAST_SLICE * kept.numel():
                continue
            error = float((difference.sum(axes) / kept.mean().clamp_min(1e-30)).max().sqrt())
            worst = max(worst, (error if error == error else float("inf"), f"{what} of {name}"))
    return worst


def allowed(name: str, call: Call, tf32: bool, of_torch: float, codes: int) -> float:
    """Return the error that a result may have.

    Args:
        name: the name of the result.
        call: the call.
        tf32: whether products of fp32 are in tf32.
        of_torch: the error of the torch path in the call's type.
        codes: the number of codes.
    """
    floor = FLOOR_IEEE if call.dtype == "float32" and not tf32 else FLOORS[call.dtype]
    return max(2 * of_torch, floor) + (0.0 if name == "codes" else 2 / codes**0.5)


class Comparison:
    """The check of the candidates of one call."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.inputs = call, inputs_of(call, device)
        self.tf32 = call.dtype == "float32" and Flags.now().convolutions == "tf32"
        self.truth = reference_of(self.inputs)
        by_torch = results_of(TORCH, self.inputs)
        self.of_torch, self.slice_of_torch = errors_of(by_torch, self.truth), worst_slice(by_torch, self.truth)[0]

    def check(self, candidate: Candidate) -> tuple[str, dict[str, float]]:
        """Return why a candidate is refused, "" if it is right, and its errors."""
        if max(self.of_torch.values()) > WORST_TORCH:
            return "PyTorch itself is off in this type, so nothing can be compared with it", self.of_torch
        if candidate.path == TORCH:
            return "", self.of_torch
        memory = GuardedMemory()
        with memory:
            first = results_of(candidate.path, self.inputs)
        first = {name: tensor.clone() for name, tensor in first.items()}
        harmed = memory.harmed()
        del memory
        errors = errors_of(first, self.truth)
        if harmed:
            return f"it wrote before or behind {harmed} of its tensors", errors
        if fault := self.fault_of(first):
            return fault, errors
        second = results_of(candidate.path, self.inputs)
        if candidate.is_ours:
            for name, tensor in second.items():
                if not torch.equal(tensor, first[name]):
                    return f"two calls gave different bits in {name}", errors
        if fault := self.fault_of(results_of(candidate.path, self.inputs, keep_residuals=True)):
            return f"with kept residuals, {fault}", errors
        return "", errors

    def fault_of(self, found: Results) -> str:
        """Return why results are refused; "" if they are right."""
        for name, right in self.truth.items():
            if name in found and bool((~found[name].isfinite() & right.isfinite()).any()):
                return f"{name} has NaN or infinity where PyTorch has none"
        for name, error in errors_of(found, self.truth).items():
            bound = allowed(name, self.call, self.tf32, self.of_torch[name], self.truth["codes"].numel())
            if error > bound:
                return f"{name} is off by {error:.2g}, allowed is {bound:.2g}"
        error, where = worst_slice(found, self.truth)
        if error > max(3 * self.slice_of_torch, WORST_SLICE):
            return f"{where} is off by {error:.2g} of the mean"
        return ""


def dictionaries_of(update: Update, device: torch.device, seed: int = 0) -> list[DictionaryState]:
    """Return synthetic dictionaries with the state of a training run."""
    random = torch.Generator().manual_seed(seed)
    formats = (torch.contiguous_format, torch.channels_last)
    found = []
    for channels, atoms, kernel_size, stride, padding, size, last, vector_last in update.layers:
        weight = torch.randn(atoms, channels, *kernel_size, generator=random)
        vector = step_sizes.initial_power_vector((1, channels, *size))
        weight = weight.contiguous(memory_format=formats[last]).to(device)
        vector = vector.contiguous(memory_format=formats[vector_last]).to(device)
        found.append(DictionaryState(weight, vector, torch.full((), 0.1, device=device), stride, padding))
    return found


def updated(dictionaries: Sequence[DictionaryState], by_triton: bool, times: int = 3) -> list[dict[str, Tensor]]:
    """Return copies of the dictionaries after so many updates, between which the atoms move."""
    from sdnet.kernels.dictionaries import update_by_triton

    copies = [d._replace(weight=d.weight.clone(), power_vector=d.power_vector.clone(), step_size=d.step_size.clone())
              for d in dictionaries]  # fmt: skip
    for _ in range(times):
        for copy in copies:
            copy.weight.add_(copy.weight.roll(1, 0), alpha=0.1)
        if by_triton:
            update_by_triton(copies)
        else:
            for copy in copies:
                step_sizes.update_dictionary(copy)
    return [{name: getattr(copy, name) for name in UPDATE_ERRORS} for copy in copies]


@torch.no_grad()
def check_update(update: Update, device: torch.device) -> tuple[str, dict[str, float]]:
    """Return why the Triton update of dictionaries is refused, "" if it is right, and its errors."""
    dictionaries = dictionaries_of(update, device)
    with without_tf32():
        truth = updated(dictionaries, by_triton=False)
    memory = GuardedMemory()
    with memory:
        first = updated(dictionaries, by_triton=True)
    harmed = memory.harmed()
    errors = dict.fromkeys(UPDATE_ERRORS, 0.0)
    for found, right in zip(first, truth, strict=True):
        for name, error in errors_of(found, right).items():
            errors[name] = max(errors[name], error)
    if harmed:
        return f"it wrote before or behind {harmed} of its tensors", errors
    for name, bound in UPDATE_ERRORS.items():
        if errors[name] > bound:
            return f"{name} is off by {errors[name]:.2g}, allowed is {bound:.2g}", errors
    second = updated(dictionaries, by_triton=True)
    for mine, other in zip(first, second, strict=True):
        if any(not torch.equal(mine[name], other[name]) for name in mine):
            return "two calls gave different bits", errors
    return "", errors
