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
from typing import NamedTuple

import torch
from torch import Tensor

from sdnet.kernels.coding import Coding
from sdnet.kernels.csc import encode
from sdnet.kernels.reference import Pair
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


class Layer(NamedTuple):
    """A layer of square atoms on square images."""

    channels: int
    atoms: int
    kernel: int
    stride: Pair
    padding: Pair
    size: int


def parsed(text: str) -> Layer:
    """Return the layer that is written as "3->64 7x7/2 @ 32", or as "64@56" with atoms of 3x3 and stride 1."""
    match = LAYER.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no layer; write it as 64@56, or as 3->64 7x7/2@32")
    channels, atoms, kernel, stride, size = (int(group) if group else 0 for group in match.groups())
    kernel, stride, half = kernel or 3, stride or 1, (kernel or 3) // 2
    return Layer(channels, atoms or channels, kernel, (stride, stride), (half, half), size)


def call(layer: Layer, batch: int, dtype: torch.dtype, path: str, device: torch.device) -> Tensor:
    """Call two steps of a layer forward and backward; return the gradient of the dictionary."""
    channels, atoms, kernel, stride, padding, size = layer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator)
    weight = torch.nn.functional.normalize(torch.randn(atoms, channels * kernel**2, generator=generator))
    x, weight = (
        tensor.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        for tensor in (x, weight.view(atoms, channels, kernel, kernel))
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
    for channels, atoms, kernel, stride, padding, size in map(parsed, UPDATED):
        weight = torch.randn(atoms, channels, kernel, kernel, generator=torch.Generator().manual_seed(0)).to(device)
        vector = initial_power_vector((1, channels, size, size)).to(device)
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
