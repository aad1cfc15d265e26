"""What the kernels know of a layer: compile-time constants in one `Geometry`, sizes at run time in one `Sizes`.

Both are arguments of the kernels: `Geometry` and a `tiles.Tile` are one `tl.constexpr` each, whose fields the code of a
kernel reads by name. A field is a plain Python number there, so a name that a block's shape is made of is bound again:
`BM: tl.constexpr = tile.pixels`. `Sizes` is a tuple of numbers, each specialised as a single argument would be.
"""

from typing import NamedTuple

from torch import Tensor

from sdnet.kernels.reference import Pair


class Geometry(NamedTuple):
    """A dictionary [K, C, KH, KW] with stride (SH, SW) and padding (PH, PW), as the code of a kernel reads it.

    Attributes:
        C: channels of the images.
        K: number of atoms.
        KH: height of the atoms.
        KW: width of the atoms.
        SH: vertical stride.
        SW: horizontal stride.
        PH: vertical padding.
        PW: horizontal padding.
        LAST: whether tensors are channels_last, else contiguous.
        PRECISION: "tf32" or "ieee", the products of fp32 tensors.
    """

    C: int
    K: int
    KH: int
    KW: int
    SH: int
    SW: int
    PH: int
    PW: int
    LAST: bool
    PRECISION: str

    @staticmethod
    def of(weight: Tensor, stride: Pair, padding: Pair, channels_last: bool, precision: str) -> "Geometry":
        """Return the geometry of a dictionary [K, C, KH, KW]."""
        atoms, channels, height, width = weight.shape
        return Geometry(channels, atoms, height, width, *stride, *padding, channels_last, precision)

    @property
    def taps(self) -> int:
        """The number of taps of an atom."""
        return self.KH * self.KW


class Sizes(NamedTuple):
    """The sizes of images and codes, for which a convolution is not compiled again.

    The number of images is an argument of its own: see `jit.jit_of_batch`.

    Attributes:
        H: height of the images.
        W: width of the images.
        h: height of the codes.
        w: width of the codes.
        taps: the number of taps once more. The compiler unrolls a loop of known length, at twice the registers.
    """

    H: int
    W: int
    h: int
    w: int
    taps: int
