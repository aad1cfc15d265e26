"""Dataclass fields that are settings: each has a group and a sentence for `--help`, and a range of allowed values."""

from dataclasses import Field, field, fields
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sdnet.kernels import checks
from sdnet.train.errors import UserError


def setting(default: Any, group: str, text: str, least: int = 0, most: float | None = None) -> Any:
    """Return a dataclass field that `sdnet.train.cli` turns into a command-line option.

    Args:
        default: The value that the field has by default.
        group: The heading under which `--help` lists the option.
        text: The sentence that `--help` shows beside the option.
        least: The smallest allowed value of an integer; other numbers are at least 0.
        most: The largest allowed value of a number.
    """
    return field(default=default, metadata={"group": group, "help": text, "least": least, "most": most})


def settings_of(kind: type) -> list[Field[Any]]:
    """Return the fields of a dataclass that are settings."""
    return [item for item in fields(kind) if "group" in item.metadata]


@cache
def type_hints(kind: type) -> dict[str, Any]:
    """Return the resolved annotations of a dataclass."""
    return get_type_hints(kind)


def check_settings(instance: Any) -> None:
    """Check the type and the range of every setting of a dataclass instance.

    Raises:
        UserError: A value has the wrong type, is none of the choices, or is out of range.
    """
    kind = type(instance)
    for item in settings_of(kind):
        value, most = getattr(instance, item.name), item.metadata["most"]
        too_large = most is not None and type(value) in (int, float) and most < value < float("inf")
        if too_large:
            raise UserError(f"{item.name} is {value!r}; it must be at most {most}.")
        if most is not None and type(value) is int:
            value = min(value, checks.LARGEST_INTEGER)  # `checks` has a bound of its own, and a seed may be larger
        try:
            _check(item.name, value, type_hints(kind)[item.name], item.metadata["least"])
        except ValueError as error:
            raise UserError(str(error)) from error


def _check(name: str, value: Any, hint: Any, least: int) -> None:
    """Raise a ValueError if a value is not of a type, or a number below `least`."""
    if get_origin(hint) is UnionType:
        if value is not None:
            _check(name, value, get_args(hint)[0], least)
    elif get_origin(hint) is Literal:
        checks.choice(name, value, get_args(hint))
    elif get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} is {value!r}; it must be a list.")
        for element in value:
            _check(name, element, get_args(hint)[0], least)
    elif hint is int:
        checks.integer(name, value, least)
    elif hint is float:
        checks.number(name, value)
    elif hint is bool:
        checks.flag(name, value)
    elif not isinstance(value, hint):
        raise ValueError(f"{name} is {value!r}; it must be a {hint.__name__}.")
