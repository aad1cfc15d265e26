"""The configurations of `convolution` that the compile check compiles: what its launchers choose for SDNet's layers."""

from collections.abc import Iterator
from typing import Any

import torch

from sdnet.bench.compile_check.compile_case import DTYPES, CompileCase
from sdnet.bench.layer_shapes import LayerShape, distinct_layers
from sdnet.kernels.triton_path import tiles
from sdnet.kernels.triton_path.fused import Layer, backstep_kernel, encode_kernel, synthesis_kernel

BATCH = 256

KERNELS = {"encode": encode_kernel, "backstep": backstep_kernel, "synthesis": synthesis_kernel}

TWO_STEPS = (
    ("encode", ("z",), {"ONE_SIDED": True, "PER_SAMPLE": False}),
    ("backstep", ("m", "z"), {"AT_Y": True}),
    ("synthesis", ("x_ptr",), {}),
)
"""What two steps call: the kernel, its optional tensors that are there, and its own constexprs."""

OTHERS = (
    ("encode", (), {"ONE_SIDED": True, "PER_SAMPLE": False}),
    ("encode", ("z", "previous", "after", "scale_ptr"), {"ONE_SIDED": False, "PER_SAMPLE": True}),
    ("backstep", ("m", "z", "later", "dy"), {"AT_Y": True}),
    ("backstep", ("m", "z", "later"), {"AT_Y": False}),
    ("synthesis", (), {}),
    ("synthesis", ("add_ptr", "scale_ptr"), {}),
)
"""What other calls need, beside a first step and a gradient."""

OPTIONAL = {"z", "previous", "after", "scale_ptr", "later", "dy", "x_ptr", "add_ptr"}
OPERANDS = {"r", "dr", "p"}
CODES = {"z", "previous", "out", "after", "m", "later", "dy"}
"""Arguments that come as pointers or descriptors, after the dictionary: reduced over, and of the epilogue."""

FLOATS = ("mu", "beta", "next_beta")
SINGLE = {"step_ptr": "*fp32", "lam_ptr": "*fp32", "scale_ptr": "*fp32"}
INTEGERS = ("N", "taps", "H", "W", "h", "w")


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Two steps on every layer in every type; all else on a layer of 64 channels and on the stem."""
    layers = distinct_layers()
    for shape in layers:
        for dtype in DTYPES:
            yield from cases(shape, dtype, torch.channels_last, TWO_STEPS, arch)
    chosen = [shape for shape in layers if shape.channels == 3]
    chosen.append(next(shape for shape in layers if shape.channels == shape.atoms == 64 and shape.stride == 1))
    for shape in chosen:
        yield from cases(shape, "bf16", torch.channels_last, OTHERS, arch)
        yield from cases(shape, "fp16", torch.contiguous_format, TWO_STEPS, arch)


def cases(shape: LayerShape, dtype: str, layout: torch.memory_format, calls: Any, arch: int) -> Iterator[CompileCase]:
    """A layer's cases, one a call."""
    kernel_size, stride, padding = ((n, n) for n in (shape.kernel_size, shape.stride, shape.padding))
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    weight = torch.empty(shape.atoms, shape.channels, *kernel_size, dtype=torch_dtype, device="meta")
    layer = Layer(weight, BATCH, shape.size, stride, padding, layout)
    for kind, present, flags in calls:
        known = layer.shape._replace(precision="tf32" if dtype == "fp32" else "ieee", arch=arch)
        chosen = tiles.by_rule(known)
        tile = chosen.synthesis if kind == "synthesis" else chosen.analysis
        constexprs: dict[str, Any] = layer.arguments(tile, **flags) | {"PRECISION": known.precision}
        warps, stages = tile.warps, tile.stages
        del constexprs["num_warps"], constexprs["num_stages"]
        integers = {name: constexprs.pop(name) for name in INTEGERS}
        kernel = KERNELS[kind]
        if kind == "synthesis":
            constexprs["X"] = shape.channels
        absent = {name for name in kernel.arg_names if name in OPTIONAL - set(present)}
        types = {name: kind_of(name, dtype, tile, synthesis=kind == "synthesis") for name in kernel.arg_names}
        types = {name: text for name, text in types.items() if text and name not in absent}
        memory = "channels_last" if layout == torch.channels_last else "contiguous"
        given = "+".join(name.removesuffix("_ptr") for name in present) + (" at y" if flags.get("AT_Y") else "")
        yield CompileCase.of(
            f"{kind} {shape} {dtype} {memory} {tile.form} {tile.sides} {given}".rstrip(), kernel, types, integers,
            constexprs | dict.fromkeys(absent), warps, stages,
        )  # fmt: skip


def kind_of(argument: str, dtype: str, tile: tiles.Tile, synthesis: bool) -> str:
    """The type of an argument that is no integer, empty for the others."""
    if argument in FLOATS:
        return "fp32"
    if argument.endswith("_ptr"):
        return SINGLE.get(argument, f"*{dtype}")
    if argument not in OPERANDS | CODES | {"dictionary"}:
        return ""
    if tile.form != "descriptors":
        return f"*{dtype}"
    if argument == "dictionary":
        rows, columns = (tile.reduction, tile.channels) if synthesis else (tile.channels, tile.reduction)
        return f"tensordesc<{dtype}[{rows}, {columns}]>"
    return f"tensordesc<{dtype}[1, 1, {tile.images}, {tile.reduction if argument in OPERANDS else tile.channels}]>"
