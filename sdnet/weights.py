"""Weights files: a safetensors file whose header says which network the weights belong to.

The header has these entries, each a string:

| entry | content |
|:--|:--|
| `model` | the arguments of `create_model`, as JSON, as the layers have them now: see `sdnet.configuration` |
| `classes` | the names of the classes, as a JSON list, if they are known |
| others | anything else that is worth knowing; a training run adds `recipe`, `epoch`, `step` and its scores |

Nothing in such a file is executed. `read_weights` and `load_model` need the package safetensors, writing does too.
"""

import inspect
import json
import struct
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdnet.configuration import LAYERS, build, configuration, differences_of
from sdnet.files import checked_file, checked_path, write_atomically
from sdnet.kernels import checks
from sdnet.models import SDNet, create_model
from sdnet.step_size import csc_layers, refresh_step_size

IN_A_FOLDER = ("model.safetensors", "best.safetensors", "last.safetensors")
"""The files that `load_model` looks for in a folder: of the hub, and of a training run."""


class Weights(NamedTuple):
    """The content of a weights file.

    Attributes:
        model: the arguments of `create_model`; empty if the file does not say them.
        classes: the names of the classes; empty if the file does not say them.
        facts: the other entries of the header.
        tensors: the state dict.
    """

    model: dict[str, Any]
    classes: tuple[str, ...]
    facts: dict[str, str]
    tensors: dict[str, Tensor]


def load_model(path: str | PathLike[str], **changes: Any) -> SDNet:
    """Build the network of a weights file and load its weights.

    Args:
        path: a weights file, or a folder with `model.safetensors`, `best.safetensors` or `last.safetensors`, of which
            the first is taken: the run folder of a training, or a folder of the hub.
        **changes: arguments of `create_model` that replace those of the file, such as `lam` or `impl`. With another
            `image_size` the step sizes are computed again; None keeps that of the file.

    Returns:
        The network in evaluation mode, on the CPU, in the default type of torch whatever that of the file. Its
        attribute `class_names` has the names of the classes, empty if the file does not say them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, does not say its network, or holds weights of another one.
        TypeError: `create_model` has no such argument as one of `changes`.

    Example:
        >>> model = sdnet.load_model("runs/demo")
        >>> model.class_names[model(image).argmax()]
    """
    allowed = [name for name in inspect.signature(create_model).parameters if name != "pretrained"]
    if unknown := [name for name in changes if name not in allowed]:
        raise TypeError(
            f"load_model has no argument {unknown[0]!r}; its arguments are path and those of create_model: "
            f"{', '.join(allowed)}."
        )
    changes = {name: value for name, value in changes.items() if not (name == "image_size" and value is None)}
    file = weights_file(path)
    weights = read_weights(file)
    if not weights.model:
        raise ValueError(f"'{file}' does not say which network it belongs to: its header has no entry 'model'.")
    learned = weights.model.get("learn_lam", "no")
    if learned not in ("no", changes.get("learn_lam", learned)):
        raise ValueError(
            f"learn_lam is {checks.shown(changes['learn_lam'])}; '{file}' holds a lambda that is learned per "
            f"{learned}, and it must be the same."
        )
    plain = {name: value for name, value in weights.model.items() if name != LAYERS}
    try:
        with torch.device("meta"):  # a header may describe a network of any size
            twin = build(plain, f"'{file}'", **changes)
    except RuntimeError as error:
        raise ValueError(f"'{file}' describes a network that is too large for any memory.") from error
    check_tensors(twin, weights.tensors, file)
    model = build(weights.model, f"'{file}'", **changes)
    if weights.classes and len(weights.classes) != model.config["num_classes"]:
        raise ValueError(
            f"'{file}' has the names of {len(weights.classes)} classes for a network of {model.config['num_classes']}."
        )
    load_tensors(model, weights.tensors, file)
    if "image_size" in changes and model.config["image_size"] != weights.model.get("image_size"):
        refresh_step_size(model, image_size=changes["image_size"])  # the file has step sizes for other images
    if "lam" in changes:  # the file has the lambda that was learned
        for layer in csc_layers(model).values():
            layer.reset_learned_lambda()
    model.class_names = weights.classes
    return model.eval()


def load_tensors(model: SDNet, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy a state dict into a model. A learned lambda that it lacks stays as it is.

    Raises:
        ValueError: it belongs to another model; the model is unchanged.
    """
    model.load_state_dict(check_tensors(model, tensors, file))


def check_tensors(model: SDNet, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the state dict with which to load `tensors`.

    Raises:
        ValueError: they belong to another model.
    """
    own = model.state_dict()
    found = {name: tensor for name, tensor in own.items() if name.endswith(".raw_lam")} | dict(tensors)
    if differences := differences_of(found, own):
        raise ValueError(f"'{file}' holds the weights of another network: {differences}.")
    for name, tensor in found.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise ValueError(f"'{file}' is damaged: {name} is {tensor.dtype}; the network has {own[name].dtype}.")
        if name.endswith(".step_size") and not 0 < float(tensor) < float("inf"):
            raise ValueError(f"'{file}' is damaged: {name} is {float(tensor):.6g}; it must be finite and above 0.")
    return found


def read_weights(path: str | PathLike[str]) -> Weights:
    """Return the content of a weights file, or of the weights file in a folder.

    Args:
        path: the file or the folder, as for `load_model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no safetensors file.
        ImportError: the package safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as content:
            facts = dict(content.metadata() or {})
            tensors = {name: content.get_tensor(name) for name in sorted(content.keys())}
        model, classes = json.loads(facts.pop("model", "{}")), json.loads(facts.pop("classes", "[]"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"'{file}' cannot be read as a weights file: {error}.") from error
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not isinstance(model, dict) or not names:
        raise ValueError(f"'{file}' cannot be read as a weights file: its entry 'model' or 'classes' is malformed.")
    return Weights(model, tuple(classes), facts, tensors)


def save_model(
    path: str | PathLike[str],
    model: SDNet,
    classes: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the weights of a network of `create_model` to a file that `load_model` reads.

    The file contains lambda and the options of the coding as the layers have them now.

    Args:
        path: the file.
        model: the network.
        classes: the names of the classes; None for those of the network, `model.class_names`.
        facts: more entries of the header.

    Raises:
        ValueError: an argument has a wrong type, `classes` does not have a name for each class, or the network
            cannot be built from arguments, see `sdnet.configuration.configuration`.
        FileNotFoundError: the folder of the file does not exist.

    Example:
        >>> sdnet.save_model("pets.safetensors", model, classes=["cat", "dog"])
    """
    file = checked_file(path)
    model = getattr(model, "_orig_mod", model)  # of a compiled network
    if not isinstance(model, SDNet):
        raise ValueError(f"model is of type {type(model).__name__}; it must be a network of sdnet.create_model.")
    facts, state = {} if facts is None else facts, model.state_dict()
    names = model.class_names if classes is None else classes
    if not isinstance(facts, Mapping) or not all(isinstance(text, str) for pair in facts.items() for text in pair):
        raise ValueError(f"facts is {checks.shown(facts)}; it must be a mapping of strings to strings.")
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("model is on the meta device and has no values; give it memory and load it first.")
    content = weights_bytes(state, {**facts, **model_facts(configuration(model), names)})
    write_atomically(file, lambda temporary: temporary.write_bytes(content))


def model_facts(config: Mapping[str, Any], classes: Sequence[str] = ()) -> dict[str, str]:
    """Return the entries of the header that say which network the weights belong to.

    Args:
        config: the arguments of `create_model`.
        classes: the names of the classes, none if they are not known.

    Raises:
        ValueError: there are names, but not one for each class, or they are no strings.
    """
    classes = checks.sequence("classes", classes, "strings")
    if wrong := [name for name in classes if not isinstance(name, str)]:
        raise ValueError(f"classes holds {checks.shown(wrong[0])}; it must be a sequence of strings.")
    if classes and len(classes) != config["num_classes"]:
        raise ValueError(f"classes has {len(classes)} names; the network has {config['num_classes']} classes.")
    facts = {"model": json.dumps(dict(config))}
    return facts | ({"classes": json.dumps(list(classes))} if classes else {})


def weights_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Return a safetensors file; equal tensors and facts give equal bytes."""
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=dict(facts))
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])  # safetensors writes its entries in a random order
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def weights_file(path: str | PathLike[str]) -> Path:
    """Return the weights file that a path means.

    Raises:
        FileNotFoundError: there is none.
        ValueError: `path` is no path.
    """
    place = checked_path(path, of="a weights file or of its folder")
    if place.is_file():
        return place
    if not place.is_dir():
        raise FileNotFoundError(f"There is no weights file at '{place}'.")
    found = [place / name for name in IN_A_FOLDER if (place / name).is_file()]
    if not found:
        raise FileNotFoundError(f"There is no weights file in '{place}': none of {', '.join(IN_A_FOLDER)}.")
    return found[0]
