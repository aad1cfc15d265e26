"""The arguments of `nn.Conv2d` that a CSC layer does not take."""

from collections.abc import Iterable

CONVOLUTION_ONLY = {
    "bias": "codes have no bias, because the shrinkage defines what a code of zero means; "
    "leave it out, and add a bias after the layer if you need one",
    "groups": "every atom spans all input channels; use one layer per group of channels instead",
    "dilation": "the atoms are dense, and the step size is estimated for dense atoms; use a larger kernel_size instead",
    "padding_mode": "the input is padded with zeros, the only padding whose adjoint is a transposed convolution; "
    "pad the input before the layer instead",
}
"""Arguments of `nn.Conv2d` that `CSCConv2d` does not take, and why."""


def refuse_convolution_only(layer: str, options: Iterable[str]) -> None:
    """Raise a TypeError if `options` has an argument that only convolutions have."""
    for name in options:
        if name in CONVOLUTION_ONLY:
            raise TypeError(f"{layer} has no argument {name!r}: {CONVOLUTION_ONLY[name]}.")
