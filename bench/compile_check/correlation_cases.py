"""The configurations of `correlation` that the compile check compiles: what its launcher chooses for SDNet's layers."""

from collections.abc import Iterator

import torch

from sdnet.bench.compile_check.compile_case import DTYPES, CompileCase
from sdnet.bench.layer_shapes import LayerShape, distinct_layers
from sdnet.kernels.triton_path.correlation import (
    PAIRS,
    REDUCED,
    SPLITS,
    add_splits_kernel,
    blocking_of,
    constants_of,
    correlate_by_descriptors_kernel,
    correlate_kernel,
)
from sdnet.kernels.triton_path.correlation_tiles import Shape, ceil_div, tile_of


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Pass 1 for every layer, type and layout, as two steps call it, other pairings for one layer, and pass 2."""
    for layer in distinct_layers():
        for dtype in DTYPES:
            for last in (True, False):
                yield correlate_case(layer, dtype, last, 2, 1, arch)
    layer = next(layer for layer in distinct_layers() if layer.channels == layer.atoms == 64)
    for head, tail in ((1, 0), (3, 0), (1, 1), (0, 3)):
        yield correlate_case(layer, "bf16", True, head, tail, arch)
    for dtype in DTYPES:
        types = {"partial_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        integers = {"splits": 88, "numel": 36864, "ok": 576, "oc": 1, "ou": 192, "ov": 64}
        constexprs = {"C": 64, "KH": 3, "KW": 3, "BS": SPLITS, "BE": REDUCED}
        yield CompileCase.of(f"splits {dtype}", add_splits_kernel, types, integers, constexprs, tensor_cores=False)


def correlate_case(layer: LayerShape, dtype: str, last: bool, head: int, tail: int, arch: int) -> CompileCase:
    """Pass 1 for a layer at batch 256."""
    batch, layout = 256, torch.channels_last if last else torch.contiguous_format
    r, m = (
        torch.empty((batch, channels, *size), device="meta").to(memory_format=layout)
        for channels, size in ((layer.channels, layer.size), (layer.atoms, layer.codes_size))
    )
    kernel_size, stride, padding = ((n, n) for n in (layer.kernel_size, layer.stride, layer.padding))
    aligned = last and DTYPES[dtype] == 2 and layer.channels % 8 == 0 and layer.atoms % 8 == 0
    shape = Shape(
        batch, layer.channels, layer.atoms, kernel_size, layer.codes_size, DTYPES[dtype], last, aligned
    )  # fmt: skip
    tile = tile_of(shape, arch)
    constexprs = constants_of(shape, stride, padding) | blocking_of(tile) | {"HEAD": head, "TAIL": tail}
    types = {"scale_ptr": "*fp32", "partial_ptr": "*fp32", "factor": "fp32"}
    integers = {"H": layer.size[0], "W": layer.size[1]}
    if tile.descriptors:
        integers["groups"] = ceil_div(batch, tile.box[0])
        for pair in range(PAIRS):
            types[f"r{pair}"] = f"tensordesc<{dtype}[1, 1, {tile.box[0]}, {tile.columns}]>"
            types[f"m{pair}"] = f"tensordesc<{dtype}[1, 1, {tile.box[0]}, {tile.atoms}]>"
    else:
        types |= {f"{name}{pair}_ptr": f"*{dtype}" for pair in range(PAIRS) for name in "rm"}
        names = ("N", "boxes", "rn", "rc", "ry", "rx", "mn", "mk", "mi", "mj")
        integers |= dict(
            zip(names, (batch, tile.boxes(batch, layer.codes_size), *r.stride(), *m.stride()), strict=True)
        )
        constexprs |= {"WIDE": False, "PRECISION": "tf32"}
    form = "descriptors" if tile.descriptors else "pointers"
    name = (
        f"{layer} {dtype} {'channels_last' if last else 'contiguous'} {head}+{tail} {form} "
        f"{tile.atoms}x{tile.columns}x{'.'.join(map(str, tile.box))}"
    )
    kernel = correlate_by_descriptors_kernel if tile.descriptors else correlate_kernel
    return CompileCase.of(name, kernel, types, integers, constexprs, tile.num_warps, tile.num_stages)
