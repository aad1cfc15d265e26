"""Operators of convolutional sparse coding. `csc_encode` is the public door; `explain` says what stands behind it."""

from sdnet.kernels.csc import csc_encode, explain

__all__ = ["csc_encode", "explain"]
