"""The configurations of the correlation that the compile check compiles: what its launcher chooses."""

from collections.abc import Iterator

import torch

from sdnet.bench.compile_check.compile_case import DTYPES, EVERY_LAYER_ON, CompileCase, cases_of_launches, recorded
from sdnet.bench.compile_check.fused_cases import layers_and_types
from sdnet.bench.layer_shapes import LayerShape, distinct_layers
from sdnet.kernels.triton_path.correlation import weight_gradient

KERNELS = ((weight_gradient, "correlate_kernel"), (weight_gradient, "correlate_by_descriptors_kernel"))
PASS_2 = (weight_gradient, "add_splits_kernel")


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Pass 1 for every layer and layout, as two steps call it, fp16 and other pairings for one layer, and pass 2."""
    for layer, dtype in layers_and_types(arch):
        for last in (True, False) if arch in EVERY_LAYER_ON else (True,):
            yield from cases(layer, dtype, last, 2, 1, arch)
    if arch not in EVERY_LAYER_ON:
        return
    layer = next(layer for layer in distinct_layers() if layer.channels == layer.atoms == 64)
    for head, tail in ((1, 0), (3, 0), (1, 1), (0, 3)):
        yield from cases(layer, "bf16", True, head, tail, arch)
    for last in (True, False):
        yield from cases(layer, "fp16", last, 2, 1, arch)
    # Between the forms: more channels than "few" holds, fewer than a block of SDNet's layers.
    narrow = layer._replace(channels=16, atoms=24)
    yield from cases(narrow, "bf16", True, 2, 1, arch)
    yield from cases(layer._replace(size=(1, 1)), "bf16", True, 2, 1, arch)
    for dtype in DTYPES:
        yield from cases(layer, dtype, True, 2, 1, arch, pass_2=True)


def cases(
    layer: LayerShape, dtype: str, last: bool, head: int, tail: int, arch: int, pass_2: bool = False
) -> Iterator[CompileCase]:
    """Return pass 1, or pass 2, for a layer at batch 256 with `head` pairs scaled on the device and `tail` others."""
    batch, layout = 256, torch.channels_last if last else torch.contiguous_format

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta").to(memory_format=layout)

    square, stride, padding = layer.pairs
    images, codes = empty(batch, layer.channels, *layer.size), empty(batch, layer.atoms, *layer.codes_size)
    scale = torch.empty((), device="meta")
    with recorded(arch, *KERNELS, PASS_2) as recorders:
        weight_gradient.weight_correlation(
            [(images, codes, scale)] * head + [(images, codes, -1.0)] * tail,
            empty(layer.atoms, layer.channels, *square),
            stride,
            padding,
        )
    chosen = recorders[len(KERNELS) :] if pass_2 else recorders[: len(KERNELS)]
    name = f"{layer} {dtype} {'channels_last' if last else 'contiguous'} {head}+{tail}"
    yield from cases_of_launches(chosen, name, tensor_cores=not pass_2)
