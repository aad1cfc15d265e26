"""What a CSC layer costs, counted: passes over tensors, bytes and floating-point operations of four formulations.

    python -m sdnet.bench.cost [--image-size 224] [--batch 256] [--n-steps 2] [--keep-residual]

    official    the released code in eager PyTorch, with its copies of x, its losses and their fourth convolution
    torch       `torch_path`: cuDNN convolutions and PyTorch's own element-wise operators
    cudnn       cuDNN convolutions with all that lies between two of them in one kernel
    fused       convolutions with all that surrounds them in the epilogue, and one reduction for the dictionary

A pass is one reading or one writing of a whole tensor, as if nothing stayed in a cache: images are of x's size
[N, C, H, W] (residuals and reconstructions too), codes [N, K, h, w]. A convolution reads each operand once; a kernel
that reads one again for each tap hopes for the cache. FLOPs are those of the convolutions without products with the
padding, which most kernels compute as well and our steps by descriptors leave out. All tensors are of one type:
autocast's conversions are not counted. The problem is the published one: squared data term, one dictionary, one-sided
codes, a scalar lambda without gradient, and no momentum, so counts are exact up to two steps.

This is arithmetic, not measurement.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, get_args

from sdnet.bench.layer_shapes import LayerShape, csc_layers
from sdnet.kernels.triton_path.correlation_tiles import Shape, splits_of, tile_of

Formulation = Literal["official", "torch", "cudnn", "fused"]
FORMULATIONS = get_args(Formulation)

PROCESSORS, ARCH = 132, 90
"""The GPU whose splits the partial sums of our weight gradient are counted for: an H100."""


class Operation(NamedTuple):
    """One kernel: its passes over images, codes and the dictionary, and the convolutions in it.

    `sums` tells that it adds partial sums of the dictionary's size in fp32, written and read again. What cuDNN's weight
    gradients do of the kind is not known and not counted.
    """

    name: str
    images: int = 0
    codes: int = 0
    weights: int = 0
    convolutions: int = 0
    sums: bool = False

    @property
    def passes(self) -> int:
        """Passes over images and codes together."""
        return self.images + self.codes

    def bytes(self, layer: LayerShape, batch: int, itemsize: int = 2) -> int:
        """Bytes read and written."""
        elements = self.images * images_of(layer, batch) + self.codes * codes_of(layer, batch)
        elements += self.weights * weights_of(layer)
        return elements * itemsize + (partial_sums(layer, batch, itemsize) if self.sums else 0)

    def flops(self, layer: LayerShape, batch: int) -> int:
        """Multiplications and additions of the convolutions, those with padding left out."""
        return 2 * self.convolutions * batch * layer.atoms * layer.channels * layer.products


def images_of(layer: LayerShape, batch: int) -> int:
    """Elements of x."""
    height, width = layer.size
    return batch * layer.channels * height * width


def codes_of(layer: LayerShape, batch: int) -> int:
    """Elements of z."""
    height, width = layer.codes_size
    return batch * layer.atoms * height * width


def weights_of(layer: LayerShape) -> int:
    """Elements of the dictionary."""
    return layer.atoms * layer.channels * layer.kernel_size**2


def partial_sums(layer: LayerShape, batch: int, itemsize: int) -> int:
    """Bytes of our weight gradient's partial sums, written and read, for channels_last tensors."""
    kernel_size = (layer.kernel_size, layer.kernel_size)
    aligned = itemsize == 2 and layer.channels % 8 == 0 and layer.atoms % 8 == 0
    shape = Shape(batch, layer.channels, layer.atoms, kernel_size, layer.codes_size, itemsize, True, aligned)
    tile = tile_of(shape, ARCH)
    blocks = tile.blocks(layer.atoms, layer.channels, layer.kernel_size**2)
    return 2 * 4 * splits_of(blocks, tile.boxes(batch, shape.grid), PROCESSORS) * weights_of(layer)


ANALYSIS = Operation("A'", images=1, codes=1, weights=1, convolutions=1)
SYNTHESIS = Operation("A", images=1, codes=1, weights=1, convolutions=1)
CORRELATION = Operation("corr", images=1, codes=1, weights=1, convolutions=1)
SUBTRACT = Operation("x - reconstruction", images=3)
ADD_IMAGES = Operation("add to dx", images=3)
ADD_WEIGHTS = Operation("add to dW", weights=3)


def codes_operation(name: str, passes: int) -> Operation:
    return Operation(name, codes=passes)


def official_forward(n_steps: int) -> Iterator[Operation]:
    repeat = Operation("x.repeat", images=2)
    shrink = [codes_operation(name, 2) for name in ("* scaling_mu", "softshrink", "relu")]
    yield Operation("normalise atoms", weights=3)
    yield from (repeat, ANALYSIS, codes_operation("step *", 2), *shrink)
    for _ in range(n_steps - 1):
        yield from (SYNTHESIS, repeat, SUBTRACT, ANALYSIS)
        yield from (codes_operation("step *", 2), codes_operation("c + gradient", 3), *shrink)
    yield from (SYNTHESIS, repeat, SUBTRACT, Operation("r ** 2", images=2), Operation("sum", images=1))
    yield from (codes_operation("|c|", 2), codes_operation("sum", 1))
    yield from (codes_operation("c ** 2", 2), codes_operation("sum", 1))


def official_backward(n_steps: int, needs_x: bool) -> Iterator[Operation]:
    shrink = [codes_operation("d relu", 3), codes_operation("d softshrink", 3)]
    shrink += [codes_operation("d scaling_mu", 2), codes_operation("d step", 2)]
    for k in range(n_steps - 1):
        yield from (*shrink, SYNTHESIS, CORRELATION, Operation("negate", images=2), ANALYSIS, CORRELATION)
        yield from (codes_operation("add to dc", 3), *[ADD_WEIGHTS] * (2 if k else 1))
        yield from [ADD_IMAGES] * (needs_x and k > 0)
    yield from (*shrink, *last_dx(n_steps, needs_x), CORRELATION)
    yield from [ADD_WEIGHTS] * (n_steps > 1)


def last_dx(n_steps: int, needs_x: bool) -> list[Operation]:
    """The first step's share of dx, added to the others' if there are any."""
    return [SYNTHESIS] * needs_x + [ADD_IMAGES] * (needs_x and n_steps > 1)


def torch_forward(n_steps: int) -> Iterator[Operation]:
    # cuDNN's convolution is followed by a kernel for the bias, which holds the threshold.
    bias, clamp = codes_operation("- threshold", 2), codes_operation("clamp", 2)
    yield Operation("gamma W", weights=2)
    yield from (ANALYSIS, bias, clamp)
    for _ in range(n_steps - 1):
        yield from (SYNTHESIS, SUBTRACT, ANALYSIS, bias, codes_operation("+ y", 3), clamp)


def torch_backward(n_steps: int, needs_x: bool, keep_residual: bool) -> Iterator[Operation]:
    mask = codes_operation("mask", 3)
    yield Operation("gamma W", weights=2)
    for k in range(n_steps - 1):
        yield from [] if keep_residual else [SYNTHESIS, SUBTRACT]
        yield from (mask, SYNTHESIS, CORRELATION, CORRELATION, ANALYSIS)
        yield from (codes_operation("negate", 2), codes_operation("add to dz", 3))
        yield from [ADD_WEIGHTS] * (2 if k else 0)
        yield from [ADD_IMAGES] * (needs_x and k > 0)
    yield from (mask, *last_dx(n_steps, needs_x), CORRELATION, Operation("gamma dW", weights=2))
    yield from [ADD_WEIGHTS, Operation("- dW", weights=3)] * (n_steps > 1)


def cudnn_forward(n_steps: int) -> Iterator[Operation]:
    yield from (ANALYSIS, codes_operation("shrink", 2))
    for _ in range(n_steps - 1):
        yield from (SYNTHESIS, SUBTRACT, ANALYSIS, codes_operation("y + step v, shrink", 3))


def cudnn_backward(n_steps: int, needs_x: bool, keep_residual: bool) -> Iterator[Operation]:
    yield from (Operation("gamma W", weights=2), codes_operation("mask", 3))
    for k in range(n_steps - 1):
        yield from [] if keep_residual else [SYNTHESIS, SUBTRACT]
        yield from (SYNTHESIS, ANALYSIS, codes_operation("mask of difference", 4))
        yield from [ADD_IMAGES] * (needs_x and k > 0)
    yield from last_dx(n_steps, needs_x)
    yield correlations(2 * n_steps - 1)


def fused_forward(n_steps: int) -> Iterator[Operation]:
    yield ANALYSIS._replace(name="encode")
    for _ in range(n_steps - 1):
        yield SYNTHESIS._replace(name="residual", images=2)
        yield ANALYSIS._replace(name="encode", codes=2)


def fused_backward(n_steps: int, needs_x: bool, keep_residual: bool) -> Iterator[Operation]:
    yield codes_operation("mask", 3)
    for k in range(n_steps - 1):
        yield from [] if keep_residual else [SYNTHESIS._replace(name="residual", images=2)]
        yield from (SYNTHESIS._replace(name="spread"), ANALYSIS._replace(name="backstep", codes=3))
        yield from [ADD_IMAGES] * (needs_x and k > 0)
    if needs_x:
        yield SYNTHESIS._replace(name="spread", images=2 if n_steps > 1 else 1)
    yield correlations(2 * n_steps - 1)


def correlations(pairs: int) -> Operation:
    """Our weight gradient: all pairs in one reduction."""
    return Operation("dW", images=pairs, codes=pairs, weights=1, convolutions=pairs, sums=True)


def forward(formulation: Formulation, n_steps: int = 2) -> list[Operation]:
    """The kernels of a forward pass."""
    makers = {
        "official": official_forward,
        "torch": torch_forward,
        "cudnn": cudnn_forward,
        "fused": fused_forward,
    }
    return list(makers[formulation](n_steps))


def backward(
    formulation: Formulation, n_steps: int = 2, needs_x: bool = True, keep_residual: bool = False
) -> list[Operation]:
    """The kernels of a backward pass for the dictionary and, if needed, x, with residuals kept or made anew.

    The official formulation keeps them anyway.
    """
    match formulation:
        case "official":
            return list(official_backward(n_steps, needs_x))
        case "torch":
            return list(torch_backward(n_steps, needs_x, keep_residual))
        case "cudnn":
            return list(cudnn_backward(n_steps, needs_x, keep_residual))
        case "fused":
            return list(fused_backward(n_steps, needs_x, keep_residual))


class Total(NamedTuple):
    """The sum over operations."""

    images: int
    codes: int
    convolutions: int
    bytes: int
    flops: int

    @property
    def passes(self) -> int:
        """Passes over images and codes together: of one size where the stride is 1 and channels equal atoms."""
        return self.images + self.codes


def total(operations: Iterable[Operation], layer: LayerShape, batch: int, itemsize: int = 2) -> Total:
    """What the operations cost on a layer."""
    operations = list(operations)
    return Total(
        images=sum(operation.images for operation in operations),
        codes=sum(operation.codes for operation in operations),
        convolutions=sum(operation.convolutions for operation in operations),
        bytes=sum(operation.bytes(layer, batch, itemsize) for operation in operations),
        flops=sum(operation.flops(layer, batch) for operation in operations),
    )


Row = list[str]


def passes_table(n_steps: int, keep_residual: bool) -> tuple[Row, list[Row]]:
    """Header and rows: passes over images + codes and convolutions of each formulation."""
    header = ["formulation", "forward passes", "convolutions", "kernels", "backward passes", "convolutions", "kernels"]
    layer = LayerShape("", 1, 1, 1, 1, (1, 1))
    rows = []
    for formulation in FORMULATIONS:
        row = [formulation]
        for operations in (forward(formulation, n_steps), backward(formulation, n_steps, True, keep_residual)):
            cost = total(operations, layer, 1)
            row += [f"{cost.images} + {cost.codes} = {cost.passes}", str(cost.convolutions), str(len(operations))]
        rows.append(row)
    return header, rows


def layers_table(image_size: int, batch: int, n_steps: int, keep_residual: bool) -> tuple[Row, list[Row]]:
    """Header and rows: for the CSC layers of SDNet-18_all, GB moved forward + backward by each formulation."""
    header = ["layers", "shape", "x MB", "z MB", "GFLOP", *(f"{formulation} GB" for formulation in FORMULATIONS)]
    header += ["official / fused", "cudnn / fused"]
    layers = csc_layers("sdnet18_all", image_size)
    counts = Counter(layer.geometry for layer in layers)
    rows, sums = [], [0.0] * len(FORMULATIONS)
    for layer, count in counts.items():
        needs_x = layer != layers[0].geometry  # pictures need no gradient
        flops, cells, moved = 0, [], []
        for formulation in FORMULATIONS:
            forth = total(forward(formulation, n_steps), layer, batch)
            back = total(backward(formulation, n_steps, needs_x, keep_residual), layer, batch)
            flops = forth.flops + back.flops  # of the last one, ours
            cells.append(f"{forth.bytes / 1e9:.2f} + {back.bytes / 1e9:.2f}")
            moved.append((forth.bytes + back.bytes) / 1e9)
        sums = [before + count * one for before, one in zip(sums, moved, strict=True)]
        sizes = [f"{2 * elements(layer, batch) / 1e6:.0f}" for elements in (images_of, codes_of)]
        rows.append([str(count), str(layer), *sizes, f"{flops / 1e9:.0f}", *cells, *ratios(moved)])
    rows.append([str(len(layers)), "all", "", "", "", *(f"{moved:.1f}" for moved in sums), *ratios(sums)])
    return header, rows


def ratios(moved: list[float]) -> Row:
    """Of the official and the cudnn formulation to the fused one."""
    official, _, cudnn, fused = moved
    return [f"{official / fused:.1f}", f"{cudnn / fused:.2f}"]


def show(title: str, header: Row, rows: list[Row]) -> None:
    """Prints a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(title)
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*row)
    # As wide as the table needs, whatever the terminal: a wrapped cell is hard to read.
    width = sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)) + 1
    Console(width=max(80, width)).print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m sdnet.bench.cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, help="256 at 224 pixels, 512 below 65, unless given")
    parser.add_argument("--n-steps", type=int, default=2)
    parser.add_argument("--keep-residual", action="store_true", help="all formulations keep their residuals")
    options = parser.parse_args()
    batch = options.batch or (512 if options.image_size <= 64 else 256)
    header, rows = passes_table(options.n_steps, options.keep_residual)
    show(f"Passes over images + codes, {options.n_steps} steps", header, rows)
    header, rows = layers_table(options.image_size, batch, options.n_steps, options.keep_residual)
    show(f"SDNet-18_all at {options.image_size} px, batch {batch}, 16 bits: forward + backward", header, rows)


if __name__ == "__main__":
    main()
