"""`triton.jit` and `tl.constexpr` as a type checker can take them: calls and constants of kernels are beyond it."""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

jit: Any = triton.jit

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr
