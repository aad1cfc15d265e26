"""The instructions that the kernels of a stem issue, counted in their machine code for sm_90, fused and padded.

    python -m sdnet.bench.issued [--image-size 224] [--batch 256]

Operands of the form "few" are gathered, so instructions limit these kernels rather than memory or tensor cores. A
program issues the instructions outside its loop once, and those of the loop as often as it has steps. The milliseconds
are those in which the multiprocessors of an H100 issue them all, four a cycle. Nothing runs: this is a count, in which
every branch is taken and no instruction waits.
"""

import argparse
import re
from collections.abc import Iterator
from math import prod

from sdnet.bench.common_options import at_least
from sdnet.bench.compile_check.candidate_cases import cases
from sdnet.bench.compile_check.compile_case import PROCESSORS, CompileCase
from sdnet.bench.compile_check.sass import BRANCH, disassembled, instructions_of
from sdnet.bench.cost import ARCH, tile_shape
from sdnet.bench.layer_shapes import LayerShape, csc_layers
from sdnet.bench.tables import markdown
from sdnet.bench.work import convolution_steps
from sdnet.kernels.triton_path.grids import analysis_programs, boxes, correlation_blocks, synthesis_programs
from sdnet.kernels.triton_path.paths import choose_path

PER_SECOND = PROCESSORS * 4 * 1.55e9
"""Instructions of a warp that the multiprocessors issue in a second, at 1.55 GHz."""

SHORTEST_LOOP = 10
"""Instructions below which a loop is one that waits, and not that of the products."""

LAUNCHES = {"proximal_step": 2, "codes_gradient": 1, "synthesis": 2, "correlate": 1}
"""Launches in a training step that keeps the residual and needs no gradient of the pictures."""


def machine_code(case: CompileCase) -> str:
    """Return the listing of a compiled kernel."""
    return disassembled(case.compiled(ARCH).asm["cubin"])


def lengths(listing: str) -> tuple[int, list[int]]:
    """Return the number of instructions outside the loops of a listing, and that of each loop."""
    code, labels = instructions_of(listing)
    loops = []
    for index, text in enumerate(code):
        branch = BRANCH.search(text)
        if branch and index - labels.get(branch[2], index) >= SHORTEST_LOOP:
            loops.append(index - labels[branch[2]])
    return len(code) - sum(loops), loops


def issued(case: CompileCase, layer: LayerShape, batch: int, path: str) -> float:
    """Return the instructions that all warps of a launch issue."""
    shape = tile_shape(layer, batch, 2, "ieee", True, ARCH)
    tiles = choose_path(shape, path).tiles
    shape = shape.padded if path == "padded" else shape
    once, loops = lengths(machine_code(case))
    if case.name.startswith("correlate"):  # one loop for each pair; every box of pixels meets every block
        steps = boxes(tiles.correlation, batch, shape.codes_size) * correlation_blocks(shape, tiles.correlation)
        return tiles.correlation.warps * sum(loops) * steps
    product, tile = ("synthesis", tiles.synthesis) if case.name.startswith("synth") else ("analysis", tiles.analysis)
    programs = prod((synthesis_programs if product == "synthesis" else analysis_programs)(shape, tile))
    steps = convolution_steps(product, layer._replace(channels=shape.channels), shape, tile)[0]
    return tile.warps * programs * (once + sum(loops) * steps)


def rows(layer: LayerShape, batch: int) -> Iterator[list[str]]:
    """Yield a row of the table for each kernel, and one for all launches."""
    totals = dict.fromkeys(("fused", "padded"), 0.0)
    kernels: dict[str, dict[str, float]] = {}
    for path in totals:
        for case in cases(layer, "bf16", ARCH, path):
            kernel = re.split(r"\W", case.name)[0]
            kernels.setdefault(kernel, {})[path] = issued(case, layer, batch, path)
    for kernel, counts in kernels.items():
        yield [kernel, str(LAUNCHES[kernel]), *cells(counts)]
        totals = {path: total + LAUNCHES[kernel] * counts[path] for path, total in totals.items()}
    yield ["all", str(sum(LAUNCHES.values())), *cells(totals)]


def cells(counts: dict[str, float]) -> list[str]:
    """Return millions of instructions and milliseconds, by path."""
    return [text for count in counts.values() for text in (f"{count / 1e6:.0f}", f"{1e3 * count / PER_SECOND:.2f}")]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sdnet.bench.issued", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--image-size", type=at_least(1), default=224)
    parser.add_argument("--batch", type=at_least(1), default=256)
    options = parser.parse_args()
    layer = csc_layers("sdnet18_all", options.image_size)[0]
    print(f"{layer}, batch {options.batch}, bf16, channels_last; millions of a warp's instructions:\n")
    print(markdown(["kernel", "launches", "fused", "ms", "padded", "ms"], rows(layer, options.batch)))


if __name__ == "__main__":
    main()
