"""Settings that a resumed run changes: `--override NAME=VALUE`."""

import json
from collections.abc import Sequence
from typing import Any, get_origin

from sdnet.train.errors import UserError
from sdnet.train.recipes import Recipe
from sdnet.train.settings import type_hints

FIXED = {
    **dict.fromkeys(
        ("model", "stem", "width", "shortcut", "learn_lam", "n_dict", "image_size"), "it decides what is trained"
    ),
    **dict.fromkeys(("batch", "accumulate", "holdout"), "it decides how many steps an epoch has"),
    **dict.fromkeys(("optimizer", "decay_norms", "decay_atoms"), "the stored state of the optimizer would not fit"),
    **dict.fromkeys(("seed", "extras"), "the order and the augmentation of the running epoch depend on it"),
    **dict.fromkeys(("name", "init_from"), "it concerns the beginning of a run"),
    "freeze": "the stored state of the optimizer would not fit",
}
"""The settings that a run keeps, and why."""


def read_overrides(words: Sequence[str] | None) -> dict[str, Any]:
    """Return the settings in the words `NAME=VALUE`.

    A value is written as in JSON, or as on the command line: `lr=0.01`, `nesterov=true`, `milestones=30,60`.

    Raises:
        UserError: A word is not of this form, or names no setting that a resumed run can change.
    """
    names = Recipe().to_json()
    values: dict[str, Any] = {}
    for word in words or ():
        name, sign, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            raise UserError(f"--override is {word!r}; it must be NAME=VALUE.")
        if name not in names:
            raise UserError(f"--override is {word!r}; there is no setting {name}.")
        if name in FIXED:
            raise UserError(f"--override is {word!r}; {name} cannot change within a run: {FIXED[name]}.")
        values[name] = _read(name, text.strip())
    return values


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return a recipe with changed settings.

    Raises:
        UserError: A value is not allowed.
    """
    try:
        changed = recipe.with_settings(changes)
    except UserError as error:
        raise UserError(f"--override: {error}") from error
    if recipe.learn_lam != "no" and changed.lam != recipe.lam:
        raise UserError("--override: lam cannot change in a run that learns lambda; its values are among the weights.")
    if recipe.ema and not changed.ema:
        raise UserError("--override: ema cannot become 0; the files of the averaged weights would grow stale.")
    return changed


def _read(name: str, text: str) -> Any:
    hint: Any = type_hints(Recipe).get(name)
    if get_origin(hint) is tuple:
        text = f"[{text.strip('[]()')}]"
    elif hint is bool and text.lower() in ("true", "false"):
        text = text.lower()
    elif hint is str:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value
