"""Checks of arguments. Each returns the value in its plain Python type, or raises one sentence that names the argument.

They are shared by the operator, the layer and the models, so that one fault has one message.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

LONGEST = 60
"""The most characters of a value that an error shows."""

LARGEST_INTEGER = 2**31 - 1
"""The largest integer argument: convolutions take their geometry as integers of 32 bits."""

LARGEST_NUMBER = 3.4028234663852886e38
"""The largest number argument: the largest number of fp32."""


def shown(value: Any) -> str:
    """Return a value for an error, in one short line: arrays and tensors by their shape, others by their repr."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape):
        return f"of type {type(value).__name__} and shape {list(shape)}"
    line = " ".join(repr(value).split())
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."


def integer(name: str, value: Any, least: int) -> int:
    """Return `value` as an int of at least `least`. NumPy integers are accepted; bools and floats are not.

    Raises:
        ValueError: `value` is not such an integer.
    """
    if isinstance(value, bool) or not isinstance(value, (int, Integral)) or value < least:
        raise ValueError(f"{name} is {shown(value)}; it must be an int of at least {least}.")
    if int(value) > LARGEST_INTEGER:
        raise ValueError(f"{name} is {shown(value)}; it must be at most {LARGEST_INTEGER}.")
    return int(value)


def is_finite(value: Any) -> bool:
    """Return whether `value` is a number that fp32 can hold, of either sign; bools, strings and tensors are not."""
    real: Any = value  # an int can be too large for a float, but compares with one
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool) and abs(real) <= LARGEST_NUMBER


def number(name: str, value: Any, otherwise: str = "") -> float:
    """Return `value` as a finite float of at least 0. NumPy numbers are accepted; bools, strings and tensors are not.

    Args:
        name: the name of the argument.
        value: what was given.
        otherwise: what is allowed in place of a number, for the error, such as ", or None".

    Raises:
        ValueError: `value` is not such a number.
    """
    real: Any = value  # an int can be too large for a float, but compares with one
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)) or not 0 <= real < float("inf"):
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number of at least 0{otherwise}.")
    if real > LARGEST_NUMBER:
        raise ValueError(f"{name} is {shown(value)}; it must be at most {LARGEST_NUMBER:.6g}, the largest of fp32.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return `value` as a bool. NumPy bools are accepted.

    Raises:
        ValueError: `value` is no bool.
    """
    if not isinstance(value, bool) and (str(getattr(value, "dtype", None)) != "bool" or value.shape):
        raise ValueError(f"{name} is {shown(value)}; it must be True or False.")
    return bool(value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """Return `value`, one of the strings in `allowed`.

    Raises:
        ValueError: `value` is not among them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}.")
    return value


def sequence(name: str, value: Any, content: str = "numbers") -> list[Any]:
    """Return `value`, a list, tuple, range, array or tensor, or another iterable, as a list.

    Args:
        name: the name of the argument.
        value: what was given.
        content: what it holds, for the error.

    Raises:
        ValueError: `value` is a string, a set or a dict, or cannot be iterated over.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (str, bytes, bytearray, set, frozenset, dict)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {shown(value)}; it must be a sequence of {content}.")
    return list(value)


def numbers(name: str, value: Any) -> list[float]:
    """Return `value`, a sequence as `sequence` takes it, as finite floats of at least 0.

    Raises:
        ValueError: it is no sequence of such numbers.
    """
    return [number(name, entry) for entry in sequence(name, value)]


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return `value`, an int or a (vertical, horizontal) pair of ints of at least `least`, as a pair.

    A pair may be an array or a tensor too.

    Raises:
        ValueError: `value` is neither.
    """
    listed = value.tolist() if hasattr(value, "tolist") and len(value.shape) else value
    is_pair = isinstance(listed, Sequence) and not isinstance(listed, (str, bytes, bytearray))
    values: tuple[Any, ...] = tuple(listed) if is_pair else (value, value)
    if len(values) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, Integral)) or n < least for n in values):
        raise ValueError(f"{name} is {shown(value)}; it must be an int or a pair of ints of at least {least}.")
    if max(map(int, values)) > LARGEST_INTEGER:
        raise ValueError(f"{name} is {shown(value)}; it must be at most {LARGEST_INTEGER}.")
    return int(values[0]), int(values[1])
