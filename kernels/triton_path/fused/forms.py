"""The three forms in which a program reads its operands, behind one interface.

    analysis(images, dictionary, box, sizes, layer, tile)           A' of images at a box of codes, [BM, BN] in fp32
    synthesis(codes, dictionary, box, phase, sizes, layer, tile)    A of codes at a box of a phase, [BM, BN] in fp32
    load_codes(codes, box, elements, tile)                          a box of codes, [BM, BN] in fp32
    store_codes(codes, value, box, elements, tile)                  writes a box of codes, returns it as rounded

The form is a compile-time choice of the tile (see `tiles`):

  * `pointers`: any strides, sizes and types. One loop runs over taps and blocks of channels.
  * `few_channels`, "few": for stems. Taps and channels are one axis, for a tap of three channels is not worth a block.
  * `descriptors`: from sm_90 on, for 16-bit channels_last tensors. Boxes go by TMA from memory to shared memory, and
    taps in the padding are left out.
"""

import triton.language as tl

from sdnet.kernels.triton_path.fused import descriptors, few_channels, pointers
from sdnet.kernels.triton_path.jit import constexpr, jit


@jit
def analysis(images, dictionary, box, sizes, layer: constexpr, tile: constexpr):
    """Return A' of images [N, C, H, W] at a box of the codes' pixels, [BM, BN] in fp32."""
    if tile.form == "descriptors":
        total = descriptors.analysis(images, dictionary, box, sizes, layer, tile)
    elif tile.form == "few":
        total = few_channels.analysis(images, dictionary, box, sizes, layer, tile)
    else:
        total = pointers.analysis(images, dictionary, box, sizes, layer, tile)
    return total


@jit
def synthesis(codes, dictionary, box, phase, sizes, layer: constexpr, tile: constexpr):
    """Return A of codes [N, K, h, w] at a box of one phase of the image, [BM, BN] in fp32.

    The form "few" makes all phases at once: its columns are (phase, channel) pairs.
    """
    if tile.form == "descriptors":
        total = descriptors.synthesis(codes, dictionary, box, phase, sizes, layer, tile)
    elif tile.form == "few":
        total = few_channels.synthesis(codes, dictionary, box, phase, sizes, layer, tile)
    else:
        total = pointers.synthesis(codes, dictionary, box, phase, sizes, layer, tile)
    return total


@jit
def load_codes(codes, box, elements, tile: constexpr):
    """Return a box of codes, [BM, BN] in fp32, zeros where there are no elements."""
    if tile.form == "descriptors":
        value = descriptors.load_codes(codes, box, elements, tile)
    else:
        value = pointers.load_codes(codes, box, elements, tile)
    return value.to(tl.float32)


@jit
def store_codes(codes, value, box, elements, tile: constexpr):
    """Write [BM, BN] into a box of codes; return what it was rounded to, in fp32."""
    if tile.form == "descriptors":
        rounded = descriptors.store_codes(codes, value, box, elements, tile)
    else:
        rounded = pointers.store_codes(codes, value, box, elements, tile)
    return rounded.to(tl.float32)
