"""The configuration of a network as a dictionary that JSON can store, and networks from such dictionaries.

A configuration has the arguments of `create_model`, without `impl` and `pretrained`, which belong to a machine. Where
single layers have had another lambda or another option of the coding assigned, its entry "layers" has these by the
name of the layer.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdnet.kernels.coding import CODING_FIELDS
from sdnet.layers import CSCConv2d
from sdnet.models import SDNet, create_model
from sdnet.step_size import csc_layers

LAYERS = "layers"
OF_A_MACHINE = ("impl", "pretrained")
"""Arguments of `create_model` that no file may give: a file must not decide what else is read."""

OPTIONS = ("lam", *(name for name in CODING_FIELDS if name != "n_dict"))
"""What "layers" can give for a layer: all options but the one that determines the shape of its weight."""


def configuration(model: SDNet) -> dict[str, Any]:
    """Return the arguments of `create_model` for a network as it is now, with lambdas that were set later.

    Raises:
        ValueError: the network cannot be built from arguments: it was not built by `create_model`, its layers were
            replaced, its pooling was left out, a layer has a `prox`, or a lambda has a value per sample.
    """
    if not isinstance(model, SDNet) or not model.config:
        raise ValueError(f"model is {type(model).__name__}; it must be a network of sdnet.create_model.")
    if getattr(model, "global_pool", "avg") != "avg":  # of sdnet.timm
        raise ValueError("model has no pooling (global_pool is ''), which a file cannot say; store its state_dict().")
    config = dict(model.config)
    layers = {name: _options_of(name, layer) for name, layer in csc_layers(model).items()}
    for key in OPTIONS:  # the network has the value that most layers have
        counts = Counter(options[key] for options in layers.values() if not isinstance(options.get(key, []), list))
        config |= {key: counts.most_common(1)[0][0]} if counts else {}
    with torch.device("meta"):
        rebuilt = build(config, "model")
    if differences := differences_of(model.state_dict(), rebuilt.state_dict()):
        raise ValueError(
            f"model was changed after sdnet.create_model, so that its arguments do not build it again: "
            f"{differences}; store its state_dict() in place of it."
        )
    others = {
        name: {key: value for key, value in options.items() if value != config[key]} for name, options in layers.items()
    }
    others = {name: options for name, options in others.items() if options}
    return config | ({LAYERS: others} if others else {})


def _options_of(name: str, layer: CSCConv2d) -> dict[str, Any]:
    """Return lambda, unless it is learned, and the options of the coding of a layer."""
    if layer.prox is not None:
        raise ValueError(f"{name} has a prox, which is a function and cannot be stored; set it to None.")
    options: dict[str, Any] = {key: value for key, value in vars(layer.coding).items() if key in OPTIONS}
    lam = layer._exact_lam
    if isinstance(lam, Tensor) and lam.ndim and lam.shape[0] != 1:
        raise ValueError(f"lam of {name} has a value per sample, {list(lam.shape)}; set a number or one per atom.")
    if layer.learn_lam == "no":
        options["lam"] = lam.tolist() if isinstance(lam, Tensor) else lam
    return options


def build(config: Mapping[str, Any], source: str, **changes: Any) -> SDNet:
    """Return the network of a configuration, with random weights.

    Args:
        config: the configuration, which may come from a file.
        source: what has the configuration, for error messages.
        **changes: arguments of `create_model` that replace those of the configuration, in single layers too.

    Raises:
        ValueError: the configuration has an argument that `create_model` does not take from a file, or a wrong value.
        TypeError: `changes` has an argument that `create_model` does not have.
    """
    known = set(inspect.signature(create_model).parameters) | set(CODING_FIELDS)
    arguments = {key: value for key, value in config.items() if key != LAYERS}
    if unknown := sorted(set(arguments) - (known - set(OF_A_MACHINE) - {"coding"})):
        raise ValueError(f"{source} belongs to a network of another version of sdnet: it has the option {unknown[0]}.")
    if "name" not in arguments:
        raise ValueError(f"{source} does not say the name of its network.")
    with _naming(source, changes):
        model = create_model(**(arguments | changes))
    layers, found = config.get(LAYERS, {}), csc_layers(model)
    if not isinstance(layers, dict) or not all(isinstance(options, dict) for options in layers.values()):
        raise ValueError(f"{source} has malformed options of single layers.")
    for name, options in layers.items():
        if name not in found or (unknown := set(options) - set(OPTIONS)):
            raise ValueError(f"{source} has options for a layer that its network does not have: {name} {options}.")
        given = {key: _tensor(value, source) if isinstance(value, list) else value for key, value in options.items()}
        with _naming(f"{source}, {name}", {}):
            for key, value in given.items():
                if key not in changes:
                    setattr(found[name], key, value)
    return model


@contextmanager
def _naming(source: str, changes: Mapping[str, Any]) -> Iterator[None]:
    """Put what has the configuration in front of errors, but not of those of an argument in `changes`."""
    try:
        yield
    except ValueError as error:
        if str(error).partition(" ")[0] in changes:
            raise
        raise ValueError(f"{source}: {error}") from error


def _tensor(values: list[Any], source: str) -> Tensor:
    """Return the values of a lambda per atom as a tensor [1, K, 1, 1], or raise a ValueError."""
    try:
        tensor = torch.tensor(values, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError):
        tensor = torch.empty(0)
    if tensor.ndim != 4 or (tensor.shape[0], *tensor.shape[2:]) != (1, 1, 1):
        raise ValueError(f"{source} has malformed options of single layers.")
    return tensor


def differences_of(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return in which names and shapes a state dict differs from that of a network; empty if in none.

    Power vectors may have another height and width: those of the images that step sizes were estimated for.
    """
    faults = [f"missing {name}" for name in own if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in own]
    for name in given:
        if name in own:
            theirs, ours = given[name].shape, own[name].shape
            compared = slice(2) if name.endswith("power_vector") and len(theirs) == len(ours) else slice(None)
            if theirs[compared] != ours[compared]:
                faults.append(f"misshapen {name}: {list(theirs)} given, {list(ours)} in the network")
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
