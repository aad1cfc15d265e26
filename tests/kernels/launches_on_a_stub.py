"""Print what the launchers do on a GPU that is not there, as JSON. `test_launch` runs this without the interpreter."""

import json
from typing import Any

import torch
from torch import Tensor

from sdnet.bench.layer_shapes import LayerShape, csc_layers
from sdnet.bench.stub_gpu import use_stub_gpu
from sdnet.kernels.coding import Coding
from sdnet.kernels.torch_path import Needs, Problem
from sdnet.kernels.triton_path import launch, loop, pointwise
from sdnet.kernels.triton_path.paths import Entry

gpu = use_stub_gpu()
scalar = torch.empty((), device="meta")


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)


def train(layer: LayerShape, batch: int, asked: str, needs_x: bool = True) -> None:
    """Launch the kernels of two steps, forward and backward."""
    square, stride, padding = ((n, n) for n in (layer.kernel_size, layer.stride, layer.padding))
    x, weight = empty(batch, layer.channels, *layer.size), empty(layer.atoms, layer.channels, *square)
    problem = Problem(scalar, scalar, Coding(), stride, padding)
    codes, _ = loop.forward(x, weight, problem, torch.channels_last, False, asked)
    needs = Needs(needs_x, True, False)
    loop.backward(torch.empty_like(codes[-1]), x, weight, codes, [], problem, needs, torch.channels_last, asked)


def entry_of(layer: LayerShape, batch: int) -> str:
    """Return the entry of a verdict on a layer that takes the rules' tiles for this batch."""
    square, stride, padding = ((n, n) for n in (layer.kernel_size, layer.stride, layer.padding))
    x, weight = empty(batch, layer.channels, *layer.size), empty(layer.atoms, layer.channels, *square)
    chosen = loop.choice_of(loop.layer_of(x, weight, stride, padding, torch.channels_last), "fused")
    return Entry("fused", chosen.tiles).encoded()


def network(image_size: int, batch: int, full: int) -> dict[str, int]:
    """Launch a training step of SDNet-18_all with the tiles of a full batch; return launches and new compilations."""
    gpu.clear()
    for index, layer in enumerate(csc_layers("sdnet18_all", image_size)):
        train(layer, batch, entry_of(layer, full), needs_x=index > 0)
    return {"launches": len(gpu.launches), "compilations": len(gpu.compilations)}


def seen() -> Any:
    """Return the launches, with a tensor's type, sizes and strides in its place."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), list(value.shape), list(value.stride())]
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return json.loads(json.dumps(plain(gpu.launches)))


def launches_of_both_ways(layer: LayerShape, batch: int, asked: str) -> tuple[Any, Any]:
    """Return the launches by kept kernels, and those by Triton's own search."""
    train(layer, batch, asked)
    gpu.clear()
    train(layer, batch, asked)
    kept = seen()
    has_hooks, launch.has_hooks = launch.has_hooks, lambda kernel: True
    gpu.clear()
    train(layer, batch, asked)
    launch.has_hooks = has_hooks
    return kept, seen()


def misaligned() -> list[int]:
    """Return the compilations of a kernel for a step size at a multiple of 16 bytes, beside it, and for both again."""
    numbers, codes, counts = torch.zeros(8), torch.zeros(1, 16, 2, 2), []
    for step_size in (numbers[0], numbers[1], numbers[4], numbers[5]):
        gpu.clear()
        pointwise.shrink_step(codes, Problem(step_size, numbers[0], Coding(), (1, 1), (0, 0)))
        counts.append(len(gpu.compilations))
    return counts


layers = csc_layers("sdnet18_all", 224)
cases = {
    "stem": (0, 64, "fused"),
    "cudnn": (2, 64, "cudnn"),
    "descriptors": (2, 64, "fused"),
    "pointers": (2, 8, "fused"),
}
results = {
    "misaligned": misaligned(),
    "224": network(224, 256, 256),
    "224 again": network(224, 256, 256),
    "224 partial": [network(224, batch, 256) for batch in (80, 16, 1)],
    "32": network(32, 512, 512),
    "32 partial": [network(32, batch, 512) for batch in (336, 16)],
    "both ways": {name: launches_of_both_ways(layers[n], batch, path) for name, (n, batch, path) in cases.items()},
}
print(json.dumps(results))
