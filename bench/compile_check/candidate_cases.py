"""What a measurement may choose instead of the rules: other tiles, and stems whose images are padded with channels."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from sdnet.bench.compile_check import correlation_cases, fused_cases
from sdnet.bench.compile_check.compile_case import DTYPES, CompileCase, cases_of_launches, fullest, recorded
from sdnet.bench.cost import tile_shape
from sdnet.bench.layer_shapes import LayerShape, csc_layers, distinct, distinct_layers
from sdnet.kernels.coding import Coding
from sdnet.kernels.triton_path.candidates import candidates
from sdnet.kernels.triton_path.paths import Entry
from sdnet.kernels.triton_path.tiles import by_rule

KERNELS = (*fused_cases.KERNELS, *correlation_cases.KERNELS)
SILENCED = [kernel for kernel in fused_cases.SILENCED if kernel not in correlation_cases.KERNELS]


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Yield the kernels of two steps, channels_last, with each candidate.

    Other tiles are those of one layer of 64, 128 and 256 channels in bf16, where tensor descriptors are used. Padded
    stems are those of all models in bf16 and fp32.
    """
    found: dict[str, CompileCase] = {}
    for layer in distinct(csc_layers("sdnet18_all", 224)):
        if layer.stride != 1 or layer.channels > 256 or arch < 90:
            continue
        shape = tile_shape(layer, fused_cases.BATCH, 2, "ieee", True, arch)
        for tiles in candidates(shape)[1:]:
            for case in cases(layer, "bf16", arch, Entry("fused", tiles).encoded()):
                if case.tile not in by_rule(shape):
                    name = f"{case.name}: {case.tile}"
                    found.setdefault(name, replace(case, name=name))
    for layer in distinct_layers():
        for dtype in ("bf16", "fp32") if layer.channels == 3 else ():
            found |= {case.name: case for case in cases(layer, dtype, arch, "padded")}
    yield from found.values()


def cases(layer: LayerShape, dtype: str, arch: int, asked: str) -> list[CompileCase]:
    """Return the cases of a layer's forward and backward pass on the path that is asked for."""
    with recorded(arch, *KERNELS, *SILENCED) as recorders:
        fused_cases.run(layer, DTYPES[dtype], torch.channels_last, Coding(), fused_cases.BATCH, asked)
    padded = " padded" if asked == "padded" else ""
    return fullest(list(cases_of_launches(recorders[: len(KERNELS)], f"{layer} {dtype}{padded}")))
