"""Results that are kept in a JSON file as they come, so that a long evaluation can be interrupted and go on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sdnet.files import write_text
from sdnet.train.errors import UserError

Value = TypeVar("Value")


class StoredResults:
    """Values by name, each computed once; the file is written after each.

    Args:
        path: the file; a new one is made with the first value.
        conditions: what all values depend on, such as the digest of the weights; a file that was written under other
            conditions is refused.

    Raises:
        UserError: the file is damaged, or was written under other conditions.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self.path, self.conditions = path, json.loads(json.dumps(dict(conditions)))
        self.values: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, self.values = dict(stored["conditions"]), dict(stored["values"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it to measure again.") from error
        names = sorted(set(before) | set(self.conditions))
        if changed := [name for name in names if before.get(name) != self.conditions.get(name)]:
            raise UserError(
                f"{path} was measured with another {', '.join(changed)}; choose another --out, or remove the file."
            )

    def get(self, name: str, compute: Callable[[], Value]) -> Value:
        """Return a value, computed and written now if the file lacks it. JSON must be able to write it.

        Raises:
            UserError: a number of it is not finite.
        """
        if name not in self.values:
            value = compute()
            try:
                self.values[name] = json.loads(json.dumps(value, allow_nan=False))
            except ValueError as error:
                raise UserError(f"'{name}' is {value}, which is not finite: the network has diverged.") from error
            text = json.dumps({"conditions": self.conditions, "values": self.values}, indent=0) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, text)
        return self.values[name]


def pack(flags: list[bool]) -> str:
    """Return flags as a string of hexadecimal digits, 4 flags each."""
    padded = flags + [False] * (-len(flags) % 4)
    return "".join(f"{sum(8 >> i for i in range(4) if padded[at + i]):x}" for at in range(0, len(padded), 4))


def unpack(text: str, count: int) -> list[bool]:
    """Return the `count` flags that `pack` was given."""
    return [bool(int(digit, 16) & (8 >> i)) for digit in text for i in range(4)][:count]
