"""Operators of convolutional sparse coding. `csc_encode` is the public door."""

from sdnet.kernels.csc import csc_encode

__all__ = ["csc_encode"]
