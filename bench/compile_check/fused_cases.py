"""The configurations of the fused kernels that the compile check compiles: what their launchers choose."""

from collections.abc import Iterator
from itertools import product

import torch

from sdnet.bench.compile_check.compile_case import (
    DTYPES,
    EVERY_LAYER,
    EVERY_LAYER_ON,
    CompileCase,
    Recorder,
    cases_of_launches,
    fullest,
    recorded,
)
from sdnet.bench.layer_shapes import LayerShape, csc_layers, distinct, distinct_layers
from sdnet.kernels.coding import Coding
from sdnet.kernels.torch_path import Needs, Problem
from sdnet.kernels.triton_path import loop, pointwise
from sdnet.kernels.triton_path.correlation import weight_gradient
from sdnet.kernels.triton_path.fused import path

BATCH = 256

KERNELS = ((path, "proximal_step_kernel"), (path, "codes_gradient_kernel"), (path, "synthesis_kernel"))
SILENCED = (
    (pointwise, "mask_kernel"),
    (weight_gradient, "correlate_kernel"),
    (weight_gradient, "correlate_by_descriptors_kernel"),
    (weight_gradient, "add_splits_kernel"),
)
"""Kernels that the loop launches too, which have cases of their own."""

CODINGS = (
    Coding(n_steps=4, mu=0.5, nonnegative=False),
    Coding(n_steps=4, solver="sdnet", data_term="norm", n_dict=2),
)
"""Codings whose launches two steps of the published problem do not make."""


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Two steps on every layer; all types, other codings, layouts and sizes on a layer of each form.

    On every layer a kernel is compiled with the most operands that two steps give it, for these cost registers.
    """
    layers = distinct_layers()
    for layer, dtype in layers_and_types(arch):
        yield from fullest(list(cases(layer, dtype, torch.channels_last, Coding(), arch)))
    if arch not in EVERY_LAYER_ON:
        return
    chosen = [layer for layer in layers if layer.channels == 3]
    chosen.append(next(layer for layer in layers if layer.channels == layer.atoms == 64 and layer.stride == 1))
    for layer in chosen:
        yield from cases(layer, "fp16", torch.channels_last, Coding(), arch)
        yield from cases(layer, "fp16", torch.contiguous_format, Coding(), arch)
        for coding in CODINGS:
            yield from cases(layer, "bf16", torch.channels_last, coding, arch, name=coding.solver)
        # Sizes of 1 become constants at a launch.
        yield from cases(layer._replace(size=(1, 1)), "bf16", torch.channels_last, Coding(), arch, batch=1)
    yield from cases(chosen[-1]._replace(size=(1, 1)), "bf16", torch.channels_last, Coding(), arch)


def layers_and_types(arch: int) -> Iterator[tuple[LayerShape, str]]:
    """Yield the layers and types of two steps: all on some architectures, on others a sample in which every form is."""
    if arch in EVERY_LAYER_ON:
        yield from product(distinct_layers(), EVERY_LAYER)
        return
    large = distinct(csc_layers("sdnet18_all", 224))
    yield from product(large, ["bf16"])
    yield from product(large[:3], ["fp32"])


def cases(
    layer: LayerShape,
    dtype: str,
    layout: torch.memory_format,
    coding: Coding,
    arch: int,
    batch: int = BATCH,
    name: str = "",
) -> Iterator[CompileCase]:
    """Return the cases of a layer's forward and backward pass."""
    memory = "channels_last" if layout == torch.channels_last else "contiguous"
    words = [str(layer), f"batch {batch}" if batch != BATCH else "", dtype, memory, name]
    with recorded(arch, *KERNELS, *SILENCED) as recorders:
        run(layer, DTYPES[dtype], layout, coding, batch)
    named: list[Recorder] = recorders[: len(KERNELS)]
    yield from cases_of_launches(named, " ".join(word for word in words if word))


def run(
    layer: LayerShape, dtype: torch.dtype, layout: torch.memory_format, coding: Coding, batch: int, asked: str = "fused"
) -> None:
    """Run the loop forward and backward on tensors of the meta device."""
    per_sample = not coding.nonnegative

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)

    kernel_size, stride, padding = layer.pairs
    x, weight = (
        empty(batch, layer.channels, *layer.size),
        empty(layer.atoms, coding.n_dict * layer.channels, *kernel_size),
    )
    step_size = torch.empty((), device="meta")
    lam = torch.empty((batch, 1, 1, 1) if per_sample else (), device="meta")
    problem = Problem(step_size, lam, coding, stride, padding)
    codes, residuals = loop.forward(x, weight, problem, layout, asked=asked)
    loop.backward(
        empty(*codes[-1].shape), x, weight, codes, residuals, problem, Needs(True, True, True), layout, asked=asked
    )
