"""The operator of convolutional sparse coding, `csc_encode`; which implementation it takes, and its step size."""

from sdnet.kernels.csc import csc_encode, explain, step_size

__all__ = ["csc_encode", "explain", "step_size"]
