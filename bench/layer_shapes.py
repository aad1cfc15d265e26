"""The shapes of the CSC layers of SDNet-18 and SDNet-34: what costs are counted for and kernels are compiled for.

No model is built: `kernels` knows nothing of the layers above it.
"""

from collections.abc import Iterator
from typing import NamedTuple

from sdnet.kernels.reference import Pair, codes_size

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Basic blocks of each of the four stages."""

WIDTHS = (64, 128, 256, 512)


class LayerShape(NamedTuple):
    """One CSC layer, [N, channels, *size] -> [N, atoms, *codes_size], with square atoms."""

    name: str
    channels: int
    atoms: int
    kernel_size: int
    stride: int
    size: Pair

    @property
    def padding(self) -> int:
        return self.kernel_size // 2

    @property
    def codes_size(self) -> Pair:
        """Height and width of the codes."""
        kernel_size, stride, padding = ((n, n) for n in (self.kernel_size, self.stride, self.padding))
        return codes_size(self.size, kernel_size, stride, padding)

    @property
    def products(self) -> int:
        """Pairs of a pixel of the codes and a tap that meets the image there: products that padding does not void."""
        met = 1
        for size, grid in zip(self.size, self.codes_size, strict=True):
            places = (i * self.stride - self.padding + tap for i in range(grid) for tap in range(self.kernel_size))
            met *= sum(0 <= place < size for place in places)
        return met

    @property
    def geometry(self) -> "LayerShape":
        """The shape without its name: equal for layers that cost the same."""
        return self._replace(name="")

    def __str__(self) -> str:
        height, width = self.size
        shape = f"{self.channels}->{self.atoms} {self.kernel_size}x{self.kernel_size}"
        return f"{shape}/{self.stride} @ {height}x{width}"


def csc_layers(depth: int = 18, image_size: int = 224, every: bool = True) -> Iterator[LayerShape]:
    """The CSC layers of `sdnet{depth}_all`, or of `sdnet{depth}` (its stem alone) without `every`, in data's order.

    Images of up to 64 pixels take the CIFAR stem, 3x3 with stride 1; others the ImageNet stem, 7x7 with stride 2 and a
    second CSC layer in the place of the pooling. Names are those of the modules in `sdnet.create_model`.
    """
    size = (image_size, image_size)
    if image_size <= 64:
        stem = [LayerShape("stem.conv", 3, WIDTHS[0], 3, 1, size)]
    else:
        first = LayerShape("stem.conv", 3, WIDTHS[0], 7, 2, size)
        stem = [first, LayerShape("stem.pool", WIDTHS[0], WIDTHS[0], 3, 2, first.codes_size)]
    if not every:
        yield stem[0]
        return
    yield from stem
    size, channels = stem[-1].codes_size, WIDTHS[0]
    for stage, (width, blocks) in enumerate(zip(WIDTHS, DEPTHS[depth], strict=True)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            for name, step in (("conv1", stride), ("conv2", 1)):
                layer = LayerShape(f"stages.{stage}.{block}.{name}", channels, width, 3, step, size)
                yield layer
                size, channels = layer.codes_size, width


def distinct_layers() -> list[LayerShape]:
    """Every distinct geometry of SDNet-18/34(_all) at 32 and 224 px, each under the name of its first layer."""
    found: dict[LayerShape, LayerShape] = {}
    for image_size in (32, 224):
        for depth in DEPTHS:
            for layer in csc_layers(depth, image_size):
                found.setdefault(layer.geometry, layer)
    return list(found.values())
