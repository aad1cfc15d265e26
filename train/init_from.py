"""The beginning of a run from trained weights, and the parts of a model that keep them."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

import sdnet
from sdnet.configuration import differences_of
from sdnet.kernels.coding import Coding
from sdnet.official import load_official_model
from sdnet.train.errors import UserError
from sdnet.train.recipes import Recipe
from sdnet.weights import weights_file

CLASSIFIER = ("linear.weight", "linear.bias")
FROM_THE_WEIGHTS = (".step_size", ".power_vector")
"""The state of CSC layers that follows from the dictionaries and the size of the images."""


class Initial(NamedTuple):
    """Trained weights.

    Attributes:
        file: Where they come from.
        tensors: The state dict.
        classes: The names of the classes, empty if they are not known.
        config: The arguments of `create_model` of the network that they belong to.
    """

    file: Path
    tensors: dict[str, Tensor]
    classes: tuple[str, ...]
    config: Mapping[str, Any]


def read_initial(recipe: Recipe) -> Initial | None:
    """Return the weights that a recipe begins with; None for random ones.

    `--init-from` may name a weights file of ours, a run folder, a folder of the hub, or an official checkpoint.

    Raises:
        UserError: There are no such weights, or the file is damaged.
    """
    if not recipe.init_from:
        return None
    path = Path(recipe.init_from)
    try:
        if path.is_dir() or path.suffix == ".safetensors":
            weights = sdnet.read_weights(path)
            return Initial(weights_file(path), weights.tensors, weights.classes, weights.model)
        model = load_official_model(path)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"init_from is {recipe.init_from!r}: {error}") from error
    return Initial(path, model.state_dict(), (), model.config)


def initialise(model: sdnet.SDNet, initial: Initial, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Copy trained weights into a model, all but those of a classifier for other classes, and converge step sizes.

    Args:
        model: The model.
        initial: The weights.
        classes: The names of the classes of the model.

    Returns:
        Sentences for the user.

    Raises:
        UserError: The weights belong to a model of another form.
    """
    own = model.state_dict()
    known = initial.classes == classes if initial.classes else True
    same_head = known and all(
        name in initial.tensors and initial.tensors[name].shape == own[name].shape for name in CLASSIFIER
    )
    left = {name for name in own if name.endswith(FROM_THE_WEIGHTS)} | (set() if same_head else set(CLASSIFIER))
    left |= {name for name in own if name.endswith(".raw_lam") and name not in initial.tensors}  # begins with lam
    taken = {name: tensor for name, tensor in initial.tensors.items() if name not in left}
    if differences := differences_of(taken | {name: own[name] for name in left}, own):
        raise UserError(f"init_from is '{initial.file}', which holds weights of another model: {differences}.")
    for name, tensor in taken.items():
        own[name].copy_(tensor)
    try:
        sdnet.refresh_step_size(model)
    except ValueError as error:
        raise UserError(f"init_from is '{initial.file}': {error}") from error
    classifier = "the classifier too" if same_head else "the classifier is new, because the classes differ"
    notes = (f"The run begins with the weights of {initial.file}, {classifier}.",)
    learned = any(name.endswith(".raw_lam") for name in taken)
    names = [*(item.name for item in fields(Coding)), *([] if learned else ["lam"])]
    theirs, here = initial.config, model.config
    if others := [
        f"{name} {theirs[name]}, not {here[name]}" for name in names if theirs.get(name, here[name]) != here[name]
    ]:
        notes += (f"These weights were trained with another coding: {'; '.join(others)}.",)
    return notes


def freeze(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Exclude parts of a model from the training and return them.

    Args:
        model: The model.
        names: Names of modules: `stem`, `stages.0`, `stages.1.0.conv1`, ...

    Raises:
        UserError: There is no such part, or nothing is left to train.
    """
    parts = dict(model.named_modules())
    for name in names:
        if not name or name not in parts:
            some = ", ".join(part for part in parts if part.count(".") <= 1 and part)
            raise UserError(f"freeze is {name!r}; it must name a part of the model, such as {some}.")
        parts[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze is {' '.join(names)}, which leaves nothing to train.")
    return [parts[name] for name in names]
