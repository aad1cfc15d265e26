"""One small call of every Triton kernel, for tools that watch kernels: compute-sanitizer and Nsight Compute.

    compute-sanitizer --tool memcheck python -m sdnet.bench.gpu_calls
    ncu --set base python -m sdnet.bench.gpu_calls --layer 64@56 256@14 --batch 256

Without --layer the calls take each form of the kernels once: a stem, also with padded channels, descriptors of stride 1
and 2, pointers in fp32, and the steps between cuDNN's convolutions, each forward and backward, and the update of the
dictionaries.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sdnet.bench.layer_shapes import LayerShape
from sdnet.kernels.coding import Coding
from sdnet.kernels.csc import encode
from sdnet.kernels.step_sizes import DictionaryState, initial_power_vector

SMALL = (
    ("3->64 7x7/2 @ 32", "bfloat16", "fused"),
    ("3->64 7x7/2 @ 32", "bfloat16", "padded"),
    ("64@8", "bfloat16", "fused"),
    ("64->128 3x3/2 @ 8", "bfloat16", "fused"),
    ("64@8", "float32", "fused"),
    ("64@8", "bfloat16", "cudnn"),
)
"""Layers, types and paths; two steps call every kernel of a path."""


UPDATED = ("3->64 7x7/2 @ 32", "64@8")
"""The layers whose dictionaries are updated together."""

LAYER = re.compile(r"(\d+)(?:->(\d+) (\d+)x\3/(\d+))? ?@ ?(\d+)")


def parsed(text: str) -> LayerShape:
    """Return the layer that is written as "3->64 7x7/2 @ 32", or as "64@56" with atoms of 3x3 and stride 1."""
    match = LAYER.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no layer; write it as 64@56, or as 3->64 7x7/2@32")
    channels, atoms, kernel, stride, size = (int(group) if group else 0 for group in match.groups())
    return LayerShape("", channels, atoms or channels, kernel or 3, stride or 1, (size, size))


def call(layer: LayerShape, batch: int, dtype: torch.dtype, path: str, device: torch.device) -> Tensor:
    """Call two steps of a layer forward and backward; return the gradient of the dictionary."""
    kernel_size, stride, padding = layer.pairs
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, layer.channels, *layer.size, generator=generator)
    weight = torch.nn.functional.normalize(
        torch.randn(layer.atoms, layer.channels * prod(kernel_size), generator=generator)
    )
    x, weight = (
        tensor.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        for tensor in (x, weight.view(layer.atoms, layer.channels, *kernel_size))
    )
    for keep in (True, False):  # the backward pass computes the residual again, or has it
        codes = encode(x, weight, 0.2, 0.1, Coding(), stride, padding, "triton", keep, path=path)
        codes.square().sum().backward()
    assert weight.grad is not None
    return weight.grad


def update(device: torch.device) -> Tensor:
    """Update two dictionaries together; return a step size."""
    from sdnet.kernels.triton_path.step_sizes import update_dictionaries

    states = []
    for layer in map(parsed, UPDATED):
        kernel_size, stride, padding = layer.pairs
        shape = (layer.atoms, layer.channels, *kernel_size)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        vector = initial_power_vector((1, layer.channels, *layer.size)).to(device)
        states.append(DictionaryState(weight, vector, torch.ones((), device=device), stride, padding))
    update_dictionaries(states)
    return states[0].step_size


def main(argv: Sequence[str] | None = None) -> int:
    """Make the calls; return 1 if a result is not finite."""
    parser = argparse.ArgumentParser(prog="python -m sdnet.bench.gpu_calls", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--layer", nargs="+", type=parsed, help="layers in bf16 by the fused path; default each form of the kernels"
    )
    parser.add_argument("--batch", type=int, default=64, help="default 64, the least for descriptors")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    small = [(parsed(layer), dtype, path) for layer, dtype, path in SMALL]
    layers = [(layer, "bfloat16", "fused") for layer in options.layer] if options.layer else small
    results = []
    for layer, dtype, path in layers:
        dtype = dtype if device.type == "cuda" else "float32"  # Triton's interpreter gets bfloat16 wrong
        results.append(call(layer, options.batch, getattr(torch, dtype), path, device))
        print(f"{layer} {dtype} {path}", flush=True)
    if not options.layer:
        results.append(update(device))
        print("update of the dictionaries", flush=True)
    return 0 if all(bool(result.isfinite().all()) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
