"""The work of a CSC layer on the fused Triton path, counted: passes over tensors, bytes and floating-point operations.

    python -m sdnet.bench.cost [--image-size 224] [--batch 256] [--n-steps 2] [--no-keep-residual]

A pass is one reading or one writing of a whole tensor, as if nothing stayed in a cache: images have the size of x,
[N, C, H, W] (residuals and reconstructions too), codes [N, K, h, w]. A convolution reads each operand once. The
floating-point operations are those of the convolutions, without products with the padding. All tensors have one type;
conversions by autocast are not counted. The problem is the published one (squared data term, one dictionary, one-sided
codes, a scalar lambda without gradient, no momentum), so that the counts are exact for up to two steps.

Two steps take 8 passes forward and 18 backward (21 if the forward pass does not keep the residual). Other formulations
take more:

    cudnn       14 and 22 (27): cuDNN convolutions, with one kernel for all that lies between two of them
    torch       20 and 26 (31): cuDNN convolutions and PyTorch's element-wise operators
    official    48 and 40:      the released code, with copies of x and with losses that need a fourth convolution

This is arithmetic, not a measurement.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sdnet.bench.common_options import at_least
from sdnet.bench.layer_shapes import LayerShape, csc_layers
from sdnet.bench.tables import markdown
from sdnet.kernels.triton_path.grids import boxes, correlation_blocks, splits_of
from sdnet.kernels.triton_path.tiles import Shape, correlation_tile

PROCESSORS, ARCH = 132, 90
"""The GPU for which the partial sums of the weight gradient are counted: an H100."""


class Operation(NamedTuple):
    """One kernel.

    Attributes:
        name: What it computes.
        images: Passes over images.
        codes: Passes over codes.
        weights: Passes over the dictionary.
        convolutions: Convolutions, transposed convolutions and correlations in it.
        sums: Whether it writes and reads partial sums of the dictionary's size in fp32.
    """

    name: str
    images: int = 0
    codes: int = 0
    weights: int = 0
    convolutions: int = 0
    sums: bool = False

    def bytes(self, layer: LayerShape, batch: int, itemsize: int = 2) -> int:
        """Return the bytes read and written."""
        elements = self.images * images_of(layer, batch) + self.codes * codes_of(layer, batch)
        elements += self.weights * weights_of(layer)
        return elements * itemsize + (partial_sums(layer, batch, itemsize) if self.sums else 0)

    def flops(self, layer: LayerShape, batch: int) -> int:
        """Return the multiplications and additions of the convolutions, without those with the padding."""
        return 2 * self.convolutions * batch * layer.atoms * layer.channels * layer.products


def images_of(layer: LayerShape, batch: int) -> int:
    """Return the number of elements of x."""
    height, width = layer.size
    return batch * layer.channels * height * width


def codes_of(layer: LayerShape, batch: int) -> int:
    """Return the number of elements of the codes."""
    height, width = layer.codes_size
    return batch * layer.atoms * height * width


def weights_of(layer: LayerShape) -> int:
    """Return the number of elements of the dictionary."""
    return layer.atoms * layer.channels * layer.kernel_size**2


def tile_shape(layer: LayerShape, batch: int, itemsize: int, precision: str, channels_last: bool, arch: int) -> Shape:
    """Return a layer as the rules for tiles see it."""
    kernel_size, stride, _ = layer.pairs
    return Shape(
        batch=batch,
        channels=layer.channels,
        atoms=layer.atoms,
        image_size=layer.size,
        codes_size=layer.codes_size,
        kernel_size=kernel_size,
        stride=stride,
        itemsize=itemsize,
        precision=precision,
        channels_last=channels_last,
        arch=arch,
    )


def partial_sums(layer: LayerShape, batch: int, itemsize: int) -> int:
    """Return the bytes of the weight gradient's partial sums, written and read, for channels_last tensors."""
    shape = tile_shape(layer, batch, itemsize, "tf32", True, ARCH)
    tile = correlation_tile(shape)
    splits = splits_of(correlation_blocks(shape, tile), boxes(tile, batch, shape.codes_size), PROCESSORS)
    return 2 * 4 * splits * weights_of(layer)


def padding_bytes(layer: LayerShape, channels: int, batch: int, needs_x: bool, keep_residual: bool) -> int:
    """Return the bytes in 16 bits that padding up to so many channels costs, beside their share of the passes.

    Padding fills the images with zeros and copies into them; x is padded forward and backward, a kept residual is cut
    and padded again, and a gradient of x is cut. A copy of some of a pixel's channels touches the whole pixel.
    """
    bare, padded = images_of(layer, batch), images_of(layer._replace(channels=channels), batch)
    return 2 * ((2 + keep_residual) * (bare + 2 * padded) + (keep_residual + needs_x) * (bare + padded))


ANALYSIS = Operation("A'", images=1, codes=1, weights=1, convolutions=1)
SYNTHESIS = Operation("A", images=1, codes=1, weights=1, convolutions=1)
RESIDUAL = SYNTHESIS._replace(name="residual", images=2)
ADD_IMAGES = Operation("add to dx", images=3)


def correlations(pairs: int) -> Operation:
    """Return the weight gradient, a sum of correlations of so many pairs of images and codes in one kernel."""
    return Operation("dW", images=pairs, codes=pairs, weights=1, convolutions=pairs, sums=True)


def forward(n_steps: int = 2) -> list[Operation]:
    """Return the kernels of a forward pass."""
    later = [RESIDUAL, ANALYSIS._replace(name="encode", codes=2)]
    return [ANALYSIS._replace(name="encode"), *later * (n_steps - 1)]


def backward(n_steps: int = 2, needs_x: bool = True, keep_residual: bool = False) -> list[Operation]:
    """Return the kernels of a backward pass.

    Args:
        n_steps: The unrolled steps.
        needs_x: Whether x needs a gradient; the dictionary always does.
        keep_residual: Whether the forward pass has kept the residuals; else they are computed again.
    """
    return list(_backward(n_steps, needs_x, keep_residual))


def _backward(n_steps: int, needs_x: bool, keep_residual: bool) -> Iterator[Operation]:
    yield Operation("mask", codes=3)
    for k in range(n_steps - 1):
        yield from [] if keep_residual else [RESIDUAL]
        yield from (SYNTHESIS._replace(name="spread"), ANALYSIS._replace(name="backstep", codes=3))
        yield from [ADD_IMAGES] * (needs_x and k > 0)
    if needs_x:
        yield SYNTHESIS._replace(name="spread", images=2 if n_steps > 1 else 1)
    yield correlations(2 * n_steps - 1)


class Total(NamedTuple):
    """The sum over operations."""

    images: int
    codes: int
    convolutions: int
    bytes: int
    flops: int

    @property
    def passes(self) -> int:
        """Passes over images and codes together, which have one size if the stride is 1 and channels equal atoms."""
        return self.images + self.codes


def total(operations: Iterable[Operation], layer: LayerShape, batch: int, itemsize: int = 2) -> Total:
    """Return the cost of the operations on a layer."""
    operations = list(operations)
    return Total(
        images=sum(operation.images for operation in operations),
        codes=sum(operation.codes for operation in operations),
        convolutions=sum(operation.convolutions for operation in operations),
        bytes=sum(operation.bytes(layer, batch, itemsize) for operation in operations),
        flops=sum(operation.flops(layer, batch) for operation in operations),
    )


def layers_table(image_size: int, batch: int, n_steps: int, keep_residual: bool) -> str:
    """Return a table of the CSC layers of SDNet-18_all: sizes, operations and bytes of a forward and backward pass."""
    layers = csc_layers("sdnet18_all", image_size)
    lines, moved = [], 0.0
    for layer, count in Counter(layer.geometry for layer in layers).items():
        needs_x = layer != layers[0].geometry  # the pictures need no gradient
        forth = total(forward(n_steps), layer, batch)
        back = total(backward(n_steps, needs_x, keep_residual), layer, batch)
        moved += count * (forth.bytes + back.bytes) / 1e9
        sizes = [f"{2 * elements(layer, batch) / 1e6:.0f}" for elements in (images_of, codes_of)]
        work = [f"{(forth.flops + back.flops) / 1e9:.0f}", f"{forth.bytes / 1e9:.2f}", f"{back.bytes / 1e9:.2f}"]
        lines.append([str(layer), str(count), *sizes, *work])
    table = markdown(["shape", "layers", "x, MB", "z, MB", "GFLOP", "GB forward", "GB backward"], lines)
    return f"{table}\n\nAll {len(layers)} layers move {moved:.1f} GB."


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sdnet.bench.cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--image-size", type=at_least(1), default=224)
    parser.add_argument("--batch", type=at_least(1), help="default 256, below 65 pixels 512")
    parser.add_argument("--n-steps", type=at_least(1), default=2)
    parser.add_argument(
        "--keep-residual",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the forward pass keeps the residuals; with --no-keep-residual they are computed again",
    )
    options = parser.parse_args()
    batch = options.batch or (512 if options.image_size <= 64 else 256)
    print(f"SDNet-18_all at {options.image_size} px, batch {batch}, 16 bits, {options.n_steps} steps:\n")
    print(layers_table(options.image_size, batch, options.n_steps, options.keep_residual))


if __name__ == "__main__":
    main()
