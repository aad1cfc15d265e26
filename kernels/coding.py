"""The options of a sparse coding, written once: `Coding`.

A `Coding` says which problem is solved and how, apart from the dictionary and its geometry (weight, stride, padding),
the step size and lambda. It goes unchanged from a recipe to the model, the layer, the operator and the reference.

Users pass its fields as keyword arguments of `csc_encode`, `CSCConv2d` and `create_model`; `takes_coding` puts the
fields into the signatures of these functions, and `coding_of` makes a `Coding` of such keyword arguments.

An `Iteration` holds what a single call adds to it and what is no plain value: the codes to start from, the tolerance to
stop at, a callback and a proximal operator.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

from sdnet.kernels import checks

Solver = Literal["ista", "fista", "sdnet"]
DataTerm = Literal["squared", "norm"]

Callback = Callable[[int, Tensor], object]
"""Called as callback(step, codes) after each step, 1, 2, ...; what it returns is ignored."""

Prox = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Called as prox(v, step_size, lam); returns argmin_z step_size penalty(z) + 1/2 |z - v|^2, of the shape of v."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Coding:
    """Which sparse coding problem is solved, and with which method.

    Attributes:
        n_steps: the number of unrolled proximal gradient steps, at least 1.
        mu: the weight of 1/2 |z|^2 in the objective, at least 0.
        nonnegative: whether codes are restricted to z >= 0.
        solver: the method. "ista" is proximal gradient descent. "fista" takes the gradient at the extrapolated point
            (Beck and Teboulle, 2009). "sdnet" is the official loop: the same extrapolation, with the gradient at the
            last codes. The three agree up to two steps.
        data_term: "squared" for 1/2 |x - A z|^2. "norm" is the official option SQUARE_NOISE: False: from the second
            step on, the residual of each sample is multiplied by 1/2 / |x - A z|, and no gradient flows through the
            norm.
        n_dict: the number of reconstructions of one code, each compared with the whole input (the official
            EXPANSION_FACTOR), at least 1.

    Raises:
        ValueError: a field has a wrong type or value.
    """

    n_steps: int = 2
    mu: float = 0.0
    nonnegative: bool = True
    solver: Solver = "fista"
    data_term: DataTerm = "squared"
    n_dict: int = 1

    def __post_init__(self) -> None:
        checked = {
            "n_steps": checks.integer("n_steps", self.n_steps, least=1),
            "mu": checks.number("mu", self.mu),
            "nonnegative": checks.flag("nonnegative", self.nonnegative),
            "solver": checks.choice("solver", self.solver, get_args(Solver)),
            "data_term": checks.choice("data_term", self.data_term, get_args(DataTerm)),
            "n_dict": checks.integer("n_dict", self.n_dict, least=1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def values(self) -> tuple[Any, ...]:
        """Return the values of the fields, in their order."""
        return tuple(getattr(self, name) for name in CODING_FIELDS)


@dataclass(frozen=True, eq=False)
class Iteration:
    """How a single call iterates, beyond what its `Coding` says.

    Attributes:
        z0: the codes that the first step starts from; None for zero.
        tolerance: stop as soon as |z_{k+1} - z_k| <= tolerance |z_{k+1}| for every sample; None to run all steps.
        callback: called with the number of the step and the codes after each step.
        prox: takes the place of the proximal operator P, for other penalties than lam |z|_1 + mu/2 |z|^2.

    Raises:
        ValueError: a field has a wrong type or value.
    """

    z0: Tensor | None = None
    tolerance: float | None = None
    callback: Callback | None = None
    prox: Prox | None = None

    def __post_init__(self) -> None:
        if self.z0 is not None and not isinstance(self.z0, Tensor):
            raise ValueError(f"z0 is {checks.shown(self.z0)}; it must be a tensor of codes, or None.")
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", checks.number("tolerance", self.tolerance))
        for name, value in (("callback", self.callback), ("prox", self.prox)):
            if value is not None and not callable(value):
                raise ValueError(f"{name} is {checks.shown(value)}; it must be a function, or None.")

    @property
    def given(self) -> str | None:
        """The names of the fields that are not None, None if all are."""
        return ", ".join(name for name, value in vars(self).items() if value is not None) or None

    def check_fits(self, coding: Coding, codes: tuple[int, ...], x: Tensor) -> None:
        """Check these options against a call.

        Args:
            coding: the options of the call.
            codes: the shape of its codes.
            x: its input.

        Raises:
            ValueError: z0 has another shape, type or device, or prox and mu are both given.
        """
        if self.z0 is not None:
            if tuple(self.z0.shape) != codes:
                raise ValueError(f"z0 has shape {list(self.z0.shape)}; it must be that of the codes, {list(codes)}.")
            if not self.z0.is_floating_point() or self.z0.device != x.device:
                raise ValueError(
                    f"z0 is {self.z0.dtype} on {self.z0.device}; it must be of a floating-point type on {x.device}."
                )
        self.check_penalty(coding)

    def check_penalty(self, coding: Coding) -> None:
        """Raise a ValueError if prox and mu are both given."""
        if self.prox is not None and coding.mu:
            raise ValueError(
                f"mu is {coding.mu} and prox is given; prox stands for the whole penalty, so mu must be 0."
            )


PLAIN_ITERATION = Iteration()
"""From zero, all steps, with the proximal operator of the coding."""

CODING_FIELDS = tuple(field.name for field in fields(Coding))
"""The names of the options, in the order of the dataclass."""


def takes_coding(function: Function) -> Function:
    """Show the fields of `Coding` in the signature of a function that takes them as `**coding`.

    The function itself is returned: `help` and `inspect.signature` read `__signature__`.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Coding)
    ]
    function.__signature__ = signature.replace(parameters=own + added)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def coding_of(function: Callable[..., Any], options: Mapping[str, Any]) -> Coding:
    """Return the `Coding` of the keyword arguments that a function decorated by `takes_coding` was given.

    Raises:
        TypeError: the function has no such argument.
        ValueError: an option has a wrong type or value.
    """
    for name in options:
        if name not in CODING_FIELDS:
            allowed = ", ".join(p for p in inspect.signature(function).parameters if p != "self")
            raise TypeError(f"{function.__qualname__} has no argument {name!r}; its arguments are {allowed}.")
    return Coding(**options)
