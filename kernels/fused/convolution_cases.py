"""The configurations of `convolution` that the compile check compiles: what its launchers choose for SDNet's layers."""

from collections.abc import Iterator
from typing import Any

import torch

from sdnet.kernels.fused import tiles
from sdnet.kernels.fused.cases import DTYPES, CompileCase
from sdnet.kernels.fused.convolution import Layer, backstep_kernel, encode_kernel, synthesis_kernel
from sdnet.kernels.shapes import LayerShape, distinct_layers

BATCH = 256

KERNELS = {"encode": encode_kernel, "backstep": backstep_kernel, "synthesis": synthesis_kernel}

TWO_STEPS = (
    ("encode", ("z_ptr",), {"ONE_SIDED": True, "PER_SAMPLE": False}),
    ("backstep", ("z_ptr",), {"AT_Y": True}),
    ("synthesis", ("x_ptr",), {}),
)
"""What two steps call: the kernel, its optional tensors that are there, and its own constexprs."""

OTHERS = (
    ("encode", (), {"ONE_SIDED": True, "PER_SAMPLE": False}),
    ("encode", ("z_ptr", "previous_ptr", "next_ptr", "scale_ptr"), {"ONE_SIDED": False, "PER_SAMPLE": True}),
    ("backstep", ("z_ptr", "later_ptr", "dy_ptr"), {"AT_Y": True}),
    ("backstep", ("z_ptr", "later_ptr"), {"AT_Y": False}),
    ("synthesis", (), {}),
    ("synthesis", ("add_ptr", "scale_ptr"), {}),
)
"""What other calls need, beside a first step and a gradient."""

OPTIONAL = {"z_ptr", "previous_ptr", "next_ptr", "scale_ptr", "later_ptr", "dy_ptr", "x_ptr", "add_ptr"}
FLOATS = ("mu", "beta", "next_beta")
SINGLE = {"step_ptr": "*fp32", "lam_ptr": "*fp32", "scale_ptr": "*fp32"}
INTEGERS = ("N", "taps", "H", "W", "h", "w")


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Two steps on every layer in every type; all else on a layer of 64 channels and on the stem."""
    del arch  # the rules do not ask for it
    layers = distinct_layers()
    for shape in layers:
        for dtype in DTYPES:
            yield from cases(shape, dtype, torch.channels_last, TWO_STEPS)
    chosen = [shape for shape in layers if shape.channels == 3]
    chosen.append(next(shape for shape in layers if shape.channels == shape.atoms == 64 and shape.stride == 1))
    for shape in chosen:
        yield from cases(shape, "bf16", torch.channels_last, OTHERS)
        yield from cases(shape, "fp16", torch.contiguous_format, TWO_STEPS)


def cases(shape: LayerShape, dtype: str, layout: torch.memory_format, calls: Any) -> Iterator[CompileCase]:
    """A layer's cases, one a call."""
    kernel_size, stride, padding = ((n, n) for n in (shape.kernel_size, shape.stride, shape.padding))
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    weight = torch.empty(shape.atoms, shape.channels, *kernel_size, dtype=torch_dtype, device="meta")
    layer = Layer(weight, BATCH, shape.size, stride, padding, layout)
    for kind, present, flags in calls:
        known = layer.shape()._replace(precision="tf32" if dtype == "fp32" else "ieee")
        tile = tiles.synthesis_tile(known) if kind == "synthesis" else tiles.analysis_tile(known)
        constexprs: dict[str, Any] = layer.arguments(tile, **flags) | {"PRECISION": known.precision}
        warps, stages = tile.warps, tile.stages
        del constexprs["num_warps"], constexprs["num_stages"]
        integers = {name: constexprs.pop(name) for name in INTEGERS}
        kernel = KERNELS[kind]
        if kind == "synthesis":
            constexprs["X"] = shape.channels
        absent = {name for name in kernel.arg_names if name in OPTIONAL - set(present)}
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr") and name not in absent]
        types = {name: SINGLE.get(name, f"*{dtype}") for name in pointers}
        types |= {name: "fp32" for name in FLOATS if name in kernel.arg_names}
        form = f"{tile.images}.{tile.rows}.{tile.columns}x{tile.channels}x{tile.reduction}"
        memory = "channels_last" if layout == torch.channels_last else "contiguous"
        given = "+".join(name.removesuffix("_ptr") for name in present) + (" at y" if flags.get("AT_Y") else "")
        yield CompileCase.of(
            f"{kind} {shape} {dtype} {memory} {form} {given}".rstrip(), kernel, types, integers,
            constexprs | dict.fromkeys(absent), warps, stages,
        )  # fmt: skip
