"""Networks from run folders and weights files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import sdnet
from sdnet.train.build import create_model
from sdnet.train.errors import UserError
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder
from sdnet.weights import load_tensors, read_weights, weights_file


def load_run(path: Path, weights: str, classes: int, device: torch.device) -> tuple[sdnet.SDNet, Recipe]:
    """Build the network of a run folder and load its weights.

    Args:
        path: the run folder.
        weights: "last" or "best".
        classes: the number of classes of the data.
        device: the device of the network.

    Returns:
        The network in evaluation mode, and its recipe.

    Raises:
        UserError: the folder holds no run with such weights, or they do not fit the recipe or the classes.
    """
    recipe = RunFolder(path).recipe()
    file = path / f"{weights}.safetensors"
    if not file.is_file():
        raise UserError(f"{path} holds no {file.name}.")
    model = create_model(recipe, classes)
    try:
        load_tensors(model, load_file(file), file)
    except ValueError as error:
        raise UserError(str(error)) from error
    return placed(model, device, recipe.channels_last), recipe


def load_checkpoint(path: Path, weights: str, device: torch.device) -> sdnet.SDNet:
    """Build the network of a weights file, or of a run folder or a folder of the hub, and load its weights.

    Args:
        path: the file or the folder.
        weights: "last" or "best", for a run folder.
        device: the device of the network.

    Returns:
        The network in evaluation mode, in the channels-last memory format.

    Raises:
        UserError: there is no such file, it does not say its network, it holds weights of another one, or the network
            does not classify images of three channels.
    """
    try:
        file = file_of(path, weights)
        if not read_weights(file).model and file == path / f"{weights}.safetensors":  # written by an older version
            return load_run(path, weights, load_file(file)["linear.bias"].shape[0], device)[0]
        model = sdnet.load_model(file)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise UserError(str(error)) from error
    if not model.num_classes:
        raise UserError(f"{path} holds a network without a classifier, so it has no accuracy.")
    if model.in_channels != 3:
        raise UserError(f"{path} holds a network for images of {model.in_channels} channels; it must take 3.")
    return placed(model, device, channels_last=True)


def file_of(path: Path, weights: str) -> Path:
    """Return the weights file that `load_checkpoint` reads.

    Raises:
        FileNotFoundError: there is none, or the run folder has the other one alone.
    """
    of_run = path / f"{weights}.safetensors"
    if of_run.is_file():
        return of_run
    found = weights_file(path)
    if found != path and found.stem in ("last", "best"):
        raise FileNotFoundError(f"{path} holds {found.name} and no {of_run.name}; choose it by --weights {found.stem}.")
    return found


def held_out_by(file: Path) -> int | None:
    """Return how many training pictures the run of a weights file held out, None if the file does not say it."""
    try:
        recipe = json.loads(read_weights(file).facts.get("recipe", "{}"))
    except ValueError:
        return None
    return recipe.get("holdout") if isinstance(recipe, dict) else None


def placed(model: sdnet.SDNet, device: torch.device, channels_last: bool) -> sdnet.SDNet:
    """Return a network on a device, in evaluation mode."""
    model = model.to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return model.eval()
