"""Which implementation a call takes, and why.

"torch" is the fast loop of `unrolled` behind a custom operator, "reference" the undecorated maths of `reference`, for
torch.export and for autograd through the loop. The environment variable SDNET_IMPL overrides "auto".
"""

import os
from typing import Literal, NamedTuple, get_args

Impl = Literal["auto", "torch", "reference", "triton"]
IMPLEMENTATIONS = get_args(Impl)
ENVIRONMENT_VARIABLE = "SDNET_IMPL"


class Choice(NamedTuple):
    """An implementation and the sentence that gives the reason for it."""

    impl: Literal["torch", "reference", "triton"]
    reason: str


def choose(impl: str) -> Choice:
    """The implementation that `impl` comes down to. ValueError for an unknown one, NotImplementedError for triton."""
    asked_by = "the argument impl"
    if impl == "auto" and ENVIRONMENT_VARIABLE in os.environ:
        impl, asked_by = os.environ[ENVIRONMENT_VARIABLE], f"the environment variable {ENVIRONMENT_VARIABLE}"
    match impl:
        case "auto":
            return Choice("torch", "auto takes the torch path: there are no Triton kernels yet")
        case "torch" | "reference":
            return Choice(impl, f"{asked_by} asks for it")
        case "triton":
            raise NotImplementedError("impl='triton' is not there yet; use impl='auto' or impl='torch'.")
        case _:
            raise ValueError(f"{asked_by} is {impl!r}; it must be one of {', '.join(IMPLEMENTATIONS)}.")
