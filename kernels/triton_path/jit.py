"""`triton.jit` and `tl.constexpr` as a type checker can take them: calls and constants of kernels are beyond it."""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

jit: Any = triton.jit

jit_of_batch: Any = triton.jit(do_not_specialize=["N", "groups", "boxes", "splits"])
"""`jit` for kernels that are compiled once for all batches.

Triton compiles a kernel again where an integer becomes 1 or a multiple of 16, or ceases to be one. The last batch of an
epoch, which has fewer images, would then be compiled for.
"""

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr
