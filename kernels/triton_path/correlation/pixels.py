"""What the two forms of the correlation share: the constants of a launch, and the share of a split."""

from typing import NamedTuple

import triton.language as tl

from sdnet.kernels.triton_path.jit import jit


class Launch(NamedTuple):
    """What a launch of the correlation is compiled for beside the layer and the tile.

    Attributes:
        HEAD: pairs whose scale is a number on the device.
        TAIL: pairs after them whose scale is a number of the host.
        WIDE: whether offsets within a box need 64 bits.
        DENSE: whether the images are dense in channels_last, and the kernel may derive their strides from their sizes.
            The compiler then sees that a pixel's channels are neighbours at an aligned address, and loads several at a
            time. Only the form "few" asks for it.
    """

    HEAD: int
    TAIL: int
    WIDE: bool
    DENSE: bool = False


@jit
def share_of_split(split, splits, boxes):
    """Return the first box of this split and of the next."""
    split = split.to(tl.int64)
    return (split * boxes // splits).to(tl.int32), ((split + 1) * boxes // splits).to(tl.int32)
