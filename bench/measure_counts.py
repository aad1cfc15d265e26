"""`counts`: the work of each CSC layer in a training step, counted, and what its launches cost the host, measured.

Nothing runs on a GPU. The layers are those of SDNet-18_all in bf16, channels_last, on the fused path of an H100.

Counted are bytes of tensors that the kernels read and write, floating-point operations, bytes from the L2 cache into
shared memory, and the share of a launch in which the multiprocessors are busy: with the residual computed again and
kept, for the rules' tiles, for the candidate of the least traffic per busy time, and for a stem with padded channels.
The milliseconds of a row are the host's for the launches of forward and backward pass, on a stub of a GPU
(`bench/stub_gpu.py`): all of Python, without Triton's C functions. So rows are those of a CPU, also beside a GPU.
"""

import argparse
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from sdnet.bench.common_options import add_common_options, at_least, open_ledger
from sdnet.bench.layer_shapes import LayerShape, csc_layers
from sdnet.kernels.coding import Coding
from sdnet.kernels.qualify.timing import percentiles
from sdnet.kernels.torch_path import Needs, Problem
from sdnet.train.errors import UserError

SETTINGS = ((224, 256), (32, 128), (32, 512))
"""Image sizes and batches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--repeats", type=at_least(1), default=60, help="calls of which the host's time is taken")
    parser.add_argument("--host-only", action="store_true", help="measure the host alone, count nothing")
    add_common_options(parser)
    parser.set_defaults(device="cpu")


def run(options: argparse.Namespace) -> int:
    """Count and measure; append a row for each layer, setting and variant."""
    if options.device != "cpu":
        raise UserError(f"--device is {options.device}; counts runs nothing on a GPU, so it must be cpu.")
    _, ledger = open_ledger(options, "counts")
    from sdnet.bench.stub_gpu import use_stub_gpu

    gpu = use_stub_gpu()
    gpu.keeps_arguments = False
    for image_size, batch in SETTINGS:
        layers = csc_layers("sdnet18_all", image_size)
        for layer, count in Counter(layer.geometry for layer in layers).items():
            needs_x = layer != layers[0].geometry
            shape = {"layer": str(layer), "batch": batch, "layers": count}
            for keep in (False, True):
                found = {} if options.host_only else counted(layer, batch, needs_x, keep)
                spent: dict[str, dict[str, float]] = {}
                for variant, numbers in found.items() or [("rules", {})]:
                    path = "padded" if variant == "padded" else "fused"
                    if path not in spent:
                        gpu.clear()
                        spent[path] = host_ms(layer, batch, needs_x, keep, options.repeats, path)
                    metrics = {"launches": len(gpu.launches) // (1 + options.repeats)} | numbers
                    words = {"residual": "kept" if keep else "computed again", "tiles": variant}
                    facts = {"metrics": metrics, "settings": words, "time_ms": spent[path]}
                    ledger.add(path, "both", shape, dtype="bf16", layout="channels_last", **facts)
    print(f"{len(ledger.rows)} rows in {ledger.path}")
    return 0


def host_ms(layer: LayerShape, batch: int, needs_x: bool, keep: bool, repeats: int, path: str) -> dict[str, float]:
    """Return quantiles of the milliseconds of processor time for the launches of one training step of a layer."""
    from sdnet.kernels.triton_path import loop

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)

    square, stride, padding = layer.pairs
    x, weight = empty(batch, layer.channels, *layer.size), empty(layer.atoms, layer.channels, *square)
    scalar, layout = torch.empty((), device="meta"), torch.channels_last
    problem, needs = Problem(scalar, scalar, Coding(), stride, padding), Needs(needs_x, True, False)
    grad = empty(batch, layer.atoms, *layer.codes_size)
    times = []
    for _ in range(1 + repeats):
        begin = time.process_time()
        codes, residuals = loop.forward(x, weight, problem, layout, keep, path)
        loop.backward(grad, x, weight, codes, residuals, problem, needs, layout, path)
        times.append(1e3 * (time.process_time() - begin))
    return percentiles(times[1:])._asdict()


def counted(layer: LayerShape, batch: int, needs_x: bool, keep: bool) -> dict[str, dict[str, Any]]:
    """Return the counts of the rules' tiles, of another candidate if it reads less from L2, and of padded channels."""
    from sdnet.bench import cost
    from sdnet.bench.work import training_work
    from sdnet.kernels.triton_path.candidates import candidates
    from sdnet.kernels.triton_path.tiles import by_rule

    shape = cost.tile_shape(layer, batch, 2, "ieee", True, cost.ARCH)
    work = {tiles: training_work(layer, shape, tiles, keep, needs_x) for tiles in candidates(shape)}
    passes = [*cost.forward(), *cost.backward(2, needs_x, keep)]
    total = cost.total(passes, layer, batch)
    rules, least = next(iter(work)), min(work, key=lambda tiles: work[tiles].l2_bytes / work[tiles].busy)
    found = {}
    for name, tiles in {"rules": rules, **({"least": least} if least != rules else {})}.items():
        numbers = {"gb": total.bytes / 1e9, "gflop": total.flops / 1e9}
        numbers |= {"l2_gb": work[tiles].l2_bytes / 1e9, "busy": work[tiles].busy, "programs": work[tiles].programs}
        name = name if tiles == rules else ", ".join(str(a) for a, b in zip(tiles, rules, strict=True) if a != b)
        found[name] = numbers
    if shape.padded != shape:
        channels = shape.padded.channels
        layer, padding = layer._replace(channels=channels), cost.padding_bytes(layer, channels, batch, needs_x, keep)
        done = training_work(layer, shape.padded, by_rule(shape.padded), keep, needs_x)
        moved = cost.total(passes, layer, batch).bytes + padding
        numbers = {"gb": moved / 1e9, "gflop": total.flops / 1e9, "l2_gb": done.l2_bytes / 1e9, "busy": done.busy}
        found["padded"] = numbers | {"programs": done.programs}
    return found
