"""Checkpoints of the official SDNet release (Delay-Xili/SDNet), read without executing what they pickle."""

import re
from collections.abc import Callable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdnet.configuration import configuration
from sdnet.files import checked_file, checked_path, write_atomically
from sdnet.kernels import checks
from sdnet.models import VARIANTS, SDNet, create_model
from sdnet.step_size import converge_power_vectors

UNIT_NORM_TOLERANCE = 1e-5
"""Atoms closer to unit norm than this are copied unchanged: to normalise twice would change their last bits."""

_RENAMES = (
    (r"^stem\.conv\.", r"layer0.0.dn."),
    (r"^stem\.norm\.", r"layer0.1."),
    (r"^stem\.pool\.", r"layer0.2.dn."),
    (r"^stages\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"\.norm(\d)\.", r".bn\1."),
)


def load_official_checkpoint(model: nn.Module, path: str | PathLike[str]) -> None:
    """Copy a checkpoint of the official SDNet code into a model of the same architecture.

    The function reads `model_best.pth.tar`, which is a state dict, and `checkpoint.pth.tar`, which has one under
    "state_dict", with or without the prefix `module.` of `nn.DataParallel`. The stored step sizes are kept. Atoms whose
    norm differs from 1 by more than `UNIT_NORM_TOLERANCE` are projected onto the unit sphere. The official files hold
    no power vectors, so these are converged on the loaded dictionaries, which does not change the step sizes.

    lambda, mu, the number of steps and the data term are in the official configuration file, not in the checkpoint:
    give them to `create_model`.

    Args:
        model: a network of `sdnet.create_model`.
        path: the checkpoint. Nothing in it is executed.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is no checkpoint, cannot be read without executing code, is of another architecture (the
            message names every missing, unexpected and misshapen key) or holds values that are not finite; or `model`
            is no network, or is on the meta device. `model` is unchanged.

    Example:
        >>> model = sdnet.create_model("sdnet18", num_classes=10, stem="cifar", solver="sdnet")
        >>> sdnet.load_official_checkpoint(model, "model_best.pth.tar")
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {checks.shown(model)}; it must be a network of sdnet.create_model.")
    source = checked_path(path)
    state = _state_dict(_read(source), source)
    target = model.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError('model is on the meta device; give it memory first, with model.to_empty(device="cpu").')
    names = _official_names(target)
    _check(state, target, names, source)
    for official, ours in names.items():
        value = state[official].reshape(target[ours].shape)
        target[ours].copy_(_on_unit_sphere(value) if _is_dictionary(ours, target) else value)
    converge_power_vectors(model)


def load_official_model(path: str | PathLike[str], **changes: Any) -> SDNet:
    """Build the network that a checkpoint of the official SDNet code belongs to, and load the checkpoint.

    The architecture follows from the file. The options of the coding are not in it; they are those of the published
    networks unless `changes` gives others: lam 0.1, two steps, mu 0.

    Args:
        path: the checkpoint, as for `load_official_checkpoint`. Nothing in it is executed.
        **changes: arguments of `create_model`, such as `lam`. The step sizes are those of the file for any
            `image_size`; `sdnet.refresh_step_size` computes them for another one.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is no checkpoint of an official SDNet.
        TypeError: `changes` holds an argument that `create_model` does not have.

    Example:
        >>> model = sdnet.load_official_model("model_best.pth.tar")
    """
    source = checked_path(path)
    model = create_model(**(official_arguments(_state_dict(_read(source), source), source) | changes))
    load_official_checkpoint(model, source)
    return model.eval()


def save_official_checkpoint(model: SDNet, path: str | PathLike[str]) -> None:
    """Write a network as a checkpoint of the official SDNet code, as its `model_best.pth.tar`.

    The file is a state dict with the keys and shapes of the official code, and `load_official_checkpoint` reads every
    tensor of it back bit by bit, as long as the atoms have unit norm and the network is in fp32. Power vectors, lambda
    and the other options of the coding have no place in it: the official code takes lambda from its configuration file.

    Args:
        model: a network of `create_model` that the official code has: `sdnet18`, `sdnet34`, or one of their `_all`
            variants, for images of 3 channels, with a classifier, and with a lambda that is not learned.
        path: the file.

    Raises:
        ValueError: the official code does not have this network.

    Example:
        >>> sdnet.save_official_checkpoint(model, "model_best.pth.tar")
    """
    file = checked_file(path)
    name, own = configuration(model)["name"], model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("model is on the meta device and has no values; give it memory and load it first.")
    state = {official: own[ours].cpu().clone() for official, ours in _official_names(own).items()}
    if any(parameter.endswith(".raw_lam") for parameter, _ in model.named_parameters()):
        raise ValueError("model learns its lambda; the official code has no learned lambda.")
    try:
        arguments = official_arguments(state, file)
    except ValueError:
        arguments = {"name": None}
    if arguments["name"] != name or model.in_channels != 3:
        raise ValueError(
            f"model is {name} with {model.in_channels} input channels and {model.num_classes} classes; the official "
            "code has SDNet-18 and SDNet-34, and their _all variants, for 3 channels and with a classifier."
        )
    write_atomically(file, lambda temporary: torch.save(state, temporary))


def official_arguments(state: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Return the arguments of `create_model` for the network of an official state dict.

    Raises:
        ValueError: it is of no network that `create_model` builds.
    """
    places = {match.groups() for key in state if (match := re.match(r"layer([1-4])\.(?:layers\.)?(\d+)\.", key))}
    blocks = tuple(sum(stage == number for stage, _ in places) for number in "1234")
    stem, linear = state.get("layer0.0.dn.weight"), state.get("linear.weight")
    csc_blocks = any(".layers." in key for key in state)
    names = [name for name, v in VARIANTS.items() if v.csc_stem and v.csc_blocks == csc_blocks and v.blocks == blocks]
    if not names or stem is None or stem.ndim != 4 or linear is None or linear.ndim != 2:
        raise ValueError(
            f"'{source}' is no checkpoint of an official SDNet-18 or SDNet-34: it has {blocks} blocks, and "
            f"{'no ' if stem is None else ''}layer0.0.dn.weight."
        )
    return {
        "name": names[0],
        "num_classes": linear.shape[0],
        "stem": "imagenet" if stem.shape[2] == 7 else "cifar",
        "width": stem.shape[0],
        "shortcut": any(".shortcut." in key for key in state),
        "n_dict": max(1, stem.shape[1] // 3),
        "solver": "sdnet",
    }


class _Ignored:
    """A placeholder for a NumPy scalar or dtype in a checkpoint. It accepts any state and stores nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_NUMPY_SCALARS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, name) for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
]


def _read(source: Path) -> object:
    """Return the content of the file: tensors and plain containers only, NumPy scalars as `_Ignored`."""
    if not source.is_file():
        raise FileNotFoundError(f"There is no checkpoint file at '{fspath(source)}'.")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors on a damaged or foreign file
        raise ValueError(
            f"'{source}' cannot be read as a checkpoint of tensors and plain numbers, and nothing in it was executed: "
            f"{_refusal(error)}"
        ) from error


def _refusal(error: Exception) -> str:
    """Return why torch could not read a file. Its own messages are kept where they name the cause."""
    message = str(error)
    if refused := re.search(r"GLOBAL (\S+)", message):
        return f"it refers to {refused[1]}."
    if isinstance(error, EOFError):
        return "it ends too early."
    if isinstance(error, (RuntimeError, OSError)) and message:
        return f"{message.splitlines()[0].rstrip('.')}."
    return "it is no file of torch.save, or a damaged one."


def _state_dict(content: object, source: Path) -> dict[str, Tensor]:
    """Return the state dict in the content of a file, with keys without `module.`."""
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not (isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise ValueError(f"'{source}' holds no state dict: neither is it one nor has it one under 'state_dict'.")
    for key, value in content.items():
        if (
            value.is_nested
            or value.layout != torch.strided
            or value.is_meta
            or value.is_quantized
            or value.is_complex()
        ):
            raise ValueError(f"'{source}' holds {key}, which is not a dense tensor of real numbers.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _official_names(target: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {official name: our name} of every entry of our state dict that the official code has too."""
    all_layers = any(re.search(r"^stages\..*\.step_size$", key) for key in target)
    names = {}
    for ours in target:
        if ours.endswith((".power_vector", ".raw_lam")):
            continue
        official = ours
        for pattern, replacement in _RENAMES:
            official = re.sub(pattern, replacement, official)
        if all_layers:
            official = re.sub(r"^(layer[1-4])\.", r"\1.layers.", official)
            official = re.sub(r"\.(conv[12])\.", r".\1.dn.", official)
        names[official] = ours
    return names


def _check(state: Mapping[str, Tensor], target: Mapping[str, Tensor], names: Mapping[str, str], source: Path) -> None:
    """Raise a ValueError that names everything that prevents `state` from being loaded."""
    channels, width = (tensors.get(key) for tensors, key in ((state, "layer0.1.weight"), (target, "stem.norm.weight")))
    if channels is not None and width is not None and channels.shape != width.shape:
        raise ValueError(
            f"'{source}' is of a network of width {channels.numel()}, the model is of width {width.numel()}: make the "
            f"model with create_model(..., width={channels.numel()})."
        )
    faults = [f"missing {official} (here {ours})" for official, ours in names.items() if official not in state]
    faults += [f"unexpected {key}" for key in state if key not in names]
    for official, ours in names.items():
        if official not in state:
            continue
        theirs, shape = state[official].shape, target[ours].shape
        scalars = theirs.numel() == shape.numel() == 1
        if theirs != shape and not scalars:
            faults.append(f"misshapen {official}: {list(theirs)} in the file, {list(shape)} in the model (here {ours})")
    if faults:
        raise ValueError(f"'{source}' is of another architecture than the model: {'; '.join(faults)}.")
    broken = [
        f"{official} (here {ours})"
        for official, ours in names.items()
        if not state[official].isfinite().all() or (ours.endswith(".step_size") and not (state[official] > 0).all())
    ]
    if broken:
        raise ValueError(
            f"'{source}' holds values that are not finite, or a step size that is not above 0: {', '.join(broken)}."
        )


def _is_dictionary(ours: str, target: Mapping[str, Tensor]) -> bool:
    """Return whether an entry is the weight of a CSC layer, which has a step size beside it."""
    return ours.endswith(".weight") and f"{ours.removesuffix('weight')}step_size" in target


def _on_unit_sphere(weight: Tensor) -> Tensor:
    """Return the atoms [K, C, kh, kw], those whose norm differs from 1 by more than the tolerance normalised."""
    norm = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
    off = (norm - 1).abs() > UNIT_NORM_TOLERANCE
    return torch.where(off, weight / norm.clamp_min(1e-12), weight)
