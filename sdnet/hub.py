"""Networks on the Hugging Face Hub: what `SDNet.save_pretrained`, `from_pretrained` and `push_to_hub` do.

A folder of the hub has three files:

| file | content |
|:--|:--|
| `config.json` | the arguments of `create_model`, with every option, lambda and width, and the names of the classes |
| `model.safetensors` | the weights and all state, in the format of `sdnet.weights` |
| `README.md` | the model card, with the scores of a training run if one is given |

The package huggingface_hub is imported when one of the functions is called. Nothing in the files is executed.
"""

import json
import os
import re
import warnings
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from sdnet.cards import card_text, metadata, scores_of, training_lines
from sdnet.configuration import configuration, differences_of
from sdnet.files import checked_path, write_text
from sdnet.kernels import checks
from sdnet.models import SDNet
from sdnet.weights import load_model, read_weights, save_model

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CLASSES = "class_names"
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""The name of a repository: "user/name", or "name" alone."""


def adapter() -> Any:
    """Return a class of huggingface_hub's mixin that saves an `SDNet`.

    Raises:
        ImportError: huggingface_hub or safetensors is not installed.
    """
    check_packages()
    from huggingface_hub import ModelCard, ModelHubMixin

    class Adapter(ModelHubMixin, library_name="sdnet", license="mit"):
        """What the mixin needs to save the network `model`."""

        def __init__(self, model: SDNet) -> None:
            self.model = model
            self._hub_mixin_config = config_of(model)

        def _save_pretrained(self, save_directory: Path) -> None:
            save_model(save_directory / WEIGHTS, self.model)
            write_text(save_directory / CONFIG, json.dumps(self._hub_mixin_config, indent=2) + "\n")
            if (save_directory / CARD).exists():
                warnings.warn(f"'{save_directory / CARD}' exists and was kept as it is.", stacklevel=4)

        def generate_model_card(self, *_: Any, **facts: Any) -> ModelCard:
            return ModelCard(f"---\n{metadata(self.model, **facts).to_yaml()}\n---\n\n{card_text(self.model, **facts)}")

    return Adapter


def check_packages() -> None:
    """Raise an ImportError if huggingface_hub or safetensors is not installed."""
    if missing := [name for name in ("huggingface_hub", "safetensors") if find_spec(name) is None]:
        raise ImportError(f"{missing[0]} is not installed; the hub needs it: pip install 'sdnet[hub]'.")


def load_pretrained(name: str | PathLike[str], changes: dict[str, Any], **options: Any) -> SDNet:
    """Build the network of a folder, or of a repository of the hub, see `SDNet.from_pretrained`.

    Args:
        name: the folder or the repository.
        changes: arguments of `create_model` that replace those of the file.
        **options: options of `huggingface_hub.snapshot_download`.
    """
    check_packages()
    from huggingface_hub import snapshot_download

    if not isinstance(name, (str, PathLike)):
        raise ValueError(
            f"pretrained_model_name_or_path is {checks.shown(name)}; it must be a folder or a repository 'user/name'."
        )
    folder = os.fspath(name)
    if not os.path.isdir(folder):
        if isinstance(name, PathLike) or not REPOSITORY.fullmatch(name):
            raise FileNotFoundError(
                f"pretrained_model_name_or_path is {folder!r}: there is no such folder, and repositories are named "
                "'user/name'."
            )
        folder = snapshot_download(folder, allow_patterns=[CONFIG, WEIGHTS], **options)
    return load_folder(Path(folder), changes)


def config_of(model: SDNet) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {**configuration(model), CLASSES: list(model.class_names)}


def load_folder(folder: Path, changes: dict[str, Any]) -> SDNet:
    """Build the network of a folder of the hub.

    Raises:
        FileNotFoundError: the folder has no weights file.
        ValueError: `config.json` does not belong to the weights.
    """
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"There is no {WEIGHTS} in '{folder}'.")
    if (folder / CONFIG).is_file():
        weights = read_weights(folder / WEIGHTS)
        try:
            written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{folder / CONFIG}' cannot be read as JSON: {error}.") from error
        stored = {**weights.model, CLASSES: list(weights.classes)}
        if not isinstance(written, dict):
            raise ValueError(f"'{folder / CONFIG}' holds {checks.shown(written)}; it must hold a JSON object.")
        if written != stored:
            keys = sorted(key for key in {*written, *stored} if written.get(key) != stored.get(key))
            raise ValueError(
                f"'{folder / CONFIG}' and the header of {WEIGHTS} beside it differ in {', '.join(keys)}; give other "
                "options to from_pretrained in place of editing the file."
            )
    return load_model(folder / WEIGHTS, **changes)


def facts_of(
    model: SDNet, run: str | PathLike[str] | None, dataset: str | None, note: str | None, license: str | None
) -> dict[str, Any]:
    """Check the facts for a model card before anything is written.

    Raises:
        FileNotFoundError: there is no run folder `run`.
        ValueError: a fact is no text, or no weights file of the run holds the weights of the model.
    """
    for name, value in (("dataset", dataset), ("note", note), ("license", license)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {checks.shown(value)}; it must be a text.")
    facts: dict[str, Any] = {"dataset": dataset, "note": note, "license": license or "mit", "run": None, "scores": {}}
    if run is None:
        return facts
    folder = checked_path(run, "run", "a run folder")
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"run is '{folder}', which is no run folder: it has no recipe.json.")
    training_lines(folder)  # refuses damaged files before anything is written
    state, config = model.state_dict(), configuration(model)
    for file in sorted(folder.glob("*.safetensors")):
        weights = read_weights(file)
        same_options = weights.model in ({}, config)
        if (
            same_options
            and not differences_of(weights.tensors, state)
            and all(torch.equal(state[name].cpu(), tensor) for name, tensor in weights.tensors.items())
        ):
            return facts | {"run": folder, "scores": scores_of(weights.facts)}
    raise ValueError(f"run is '{folder}', but none of its files holds the weights of the model with its options.")
