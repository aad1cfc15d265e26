"""The other tiles that a measurement may choose, for one layer of 64, 128 and 256 channels."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from sdnet.bench.compile_check import correlation_cases, fused_cases
from sdnet.bench.compile_check.compile_case import CompileCase, cases_of_launches, fullest, recorded
from sdnet.bench.cost import tile_shape
from sdnet.bench.layer_shapes import csc_layers, distinct
from sdnet.kernels.coding import Coding
from sdnet.kernels.triton_path.candidates import candidates
from sdnet.kernels.triton_path.paths import Entry
from sdnet.kernels.triton_path.tiles import by_rule

KERNELS = (*fused_cases.KERNELS, *correlation_cases.KERNELS)
SILENCED = [kernel for kernel in fused_cases.SILENCED if kernel not in correlation_cases.KERNELS]


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Yield the kernels of two steps in bf16, channels_last, with each candidate, where tensor descriptors are used."""
    found: dict[str, CompileCase] = {}
    for layer in distinct(csc_layers("sdnet18_all", 224)):
        if layer.stride != 1 or layer.channels > 256 or arch < 90:
            continue
        shape = tile_shape(layer, fused_cases.BATCH, 2, "ieee", True, arch)
        for tiles in candidates(shape)[1:]:
            with recorded(arch, *KERNELS, *SILENCED) as recorders:
                asked = Entry("fused", tiles).encoded()
                fused_cases.run(layer, torch.bfloat16, torch.channels_last, Coding(), fused_cases.BATCH, asked)
            for case in fullest(list(cases_of_launches(recorders[: len(KERNELS)], f"{layer} bf16"))):
                if case.tile not in by_rule(shape):
                    name = f"{case.name}: {case.tile}"
                    found.setdefault(name, replace(case, name=name))
    yield from found.values()
