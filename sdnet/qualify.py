"""`qualify`: determine which kernels are right and faster for the layers of a model on this machine."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from sdnet.examples import Example, checked_example
from sdnet.kernels import checks
from sdnet.kernels.dictionaries import is_dense
from sdnet.kernels.dispatch import DTYPES, obstacle_of
from sdnet.kernels.operators import memory_format_of
from sdnet.kernels.qualify import agreement, job, parent
from sdnet.kernels.qualify.key import Call, Flags, Update, machine_of
from sdnet.kernels.qualify.parent import BUDGET, Outcome
from sdnet.kernels.qualify.verdicts import Store, Verdict
from sdnet.kernels.reference import Pair
from sdnet.kernels.torch_path import Problem
from sdnet.layers import CSCConv2d
from sdnet.recorder import Recorder, recorded
from sdnet.step_size import csc_layers, input_sizes
from sdnet.stored_weight import is_plain


@dataclass(frozen=True)
class Qualification:
    """The result of `qualify`. `print` shows one line per verdict.

    Attributes:
        verdicts: the verdicts of each layer by its name, one for each kind of call in the example.
        update: the verdict of the update of the dictionaries; None if the Triton kernels do not take them.
        notes: sentences about what could not be done.
    """

    verdicts: dict[str, tuple[Verdict, ...]]
    update: Verdict | None = None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{name}: {verdict}" for name, found in self.verdicts.items() for verdict in found]
        lines += [f"update of the dictionaries: {self.update}"] if self.update else []
        return "\n".join([*lines, *self.notes])


def qualify(
    model: nn.Module,
    example_batch: Example,
    *,
    device: torch.device | str | None = None,
    fresh: bool = False,
    budget: float = BUDGET,
    memory: float | None = None,
    all_tiles: bool = True,
    cache: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> Qualification:
    """Determine which kernels are right and faster for the CSC layers of a model on this machine, and use them.

    For each distinct layer, type, memory format and batch class a child process compares every candidate with PyTorch
    in fp32, times the right ones, and stores a verdict in the user's cache folder. Layers that have a verdict are
    skipped. From then on `impl="auto"` follows the verdicts, in this process and in later ones; without a verdict it
    takes cuDNN's convolutions. A candidate that is wrong, crashes or takes too long is never taken.

    The calls of the layers are recorded in one forward pass in evaluation mode. Call `qualify` with the types and the
    memory format of the training, for instance under `torch.autocast`, and after the flags of PyTorch (tf32,
    `cudnn.benchmark`) are set: verdicts depend on them. If the GPU takes only one process at a time, call it before
    anything else uses the GPU, with the model and the batch still on the CPU. Under torch.distributed call it in
    every process: rank 0 qualifies, and all use its verdicts if their machines are alike.

    Args:
        model: a network with CSC layers.
        example_batch: a full batch that the model takes: a tensor, a tuple of its positional or a dict of its keyword
            arguments.
        device: where the kernels will run; None for the model's device, or the GPU if the model is on a CPU.
        fresh: whether layers that have a verdict are qualified again.
        budget: the seconds after which the qualification ends. Layers that are left run on PyTorch, and come first the
            next time.
        memory: the largest amount of GPU memory that the child process uses, in GiB; None for all that is free.
        all_tiles: whether to try other tiles than those of the rules too, which takes several times as long.
        cache: the folder of the verdicts; None for the one that the environment variable SDNET_CACHE names, else
            `sdnet` in XDG_CACHE_HOME or `~/.cache`.
        say: called with each line of progress.

    Returns:
        The verdicts.

    Raises:
        ValueError: an argument has a wrong type or value, or the model has no CSC layers.
        NotImplementedError: the Triton kernels cannot run on the device.

    Example:
        >>> model = sdnet.create_model("sdnet18", num_classes=10, stem="cifar").to(memory_format=torch.channels_last)
        >>> with torch.autocast("cuda", torch.bfloat16):
        ...     print(sdnet.qualify(model.cuda(), torch.randn(256, 3, 32, 32, device="cuda")))
    """
    layers = csc_layers(model)
    if not layers:
        raise ValueError("model has no CSC layers; qualify needs at least one.")
    checked_example("example_batch", example_batch)
    fresh, all_tiles = checks.flag("fresh", fresh), checks.flag("all_tiles", all_tiles)
    budget = checks.number("budget", budget)
    if memory is not None and checks.number("memory", memory) == 0:
        raise ValueError("memory is 0; it must be a number of GiB above 0, or None for all that is free.")
    if not (cache is None or isinstance(cache, (str, os.PathLike))):
        raise ValueError(f"cache is {checks.shown(cache)}; it must be the path of a folder, or None.")
    if not callable(say):
        raise ValueError(f"say is {checks.shown(say)}; it must be a function that takes a line.")
    target = target_device(model, device)
    calls = recorded_calls(model, example_batch)
    if any(call.batch == 0 for found in calls.values() for call in found):
        raise ValueError("example_batch has no images; qualify needs a full batch.")
    update = update_of(layers.values())
    items: list[Call | Update] = [call for found in calls.values() for call in found]
    known_types = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    others = sorted({item.dtype for item in items if isinstance(item, Call) and item.dtype not in known_types})
    items = [item for item in items if isinstance(item, Call) and item.dtype in known_types]
    items += [update] if update else []
    own_notes = []
    if alone := [
        name or "the layer" for name, layer in layers.items() if by_pytorch_alone(layer, layer.forward_lambda())
    ]:
        own_notes.append(f"Without a verdict, on PyTorch: {', '.join(alone)}, with a prox or a lambda per atom.")
    if others:
        own_notes.append(
            f"Calls in {', '.join(others)} run on PyTorch: the Triton kernels compute in {', '.join(known_types)}."
        )
    options = {"fresh": fresh, "budget": budget, "memory_gib": memory, "all_tiles": all_tiles, "say": say}
    outcome = agreed_outcome(items, target, Store(cache), budget, options)
    table, flags = outcome.table, Flags.now()
    return Qualification(
        {
            name: tuple(table[call.key(flags)] for call in found if call.key(flags) in table)
            for name, found in calls.items()
        },
        table.get(update.key(flags)) if update else None,
        (*outcome.notes, *own_notes),
    )


def agreed_outcome(
    items: Sequence[Call | Update], device: torch.device, store: Store, budget: float, options: dict[str, Any]
) -> Outcome:
    """Qualify, in rank 0 of a job of several processes, and use the verdicts in all of them."""

    def run() -> Outcome:
        return parent.qualify(items, str(device), store=store, **options)

    several = job.ranks() > 1
    if several:
        from torch.distributed.distributed_c10d import _get_default_store

        rank, shared = distributed.get_rank(), agreement.next_store(_get_default_store())
        outcome = agreement.agreed(shared, rank, job.ranks(), run, lambda: machine_of(device), budget)
    else:
        outcome = run()
    if outcome.machine is not None or several:
        calls = [item for item in items if isinstance(item, Call)]
        job.use_table(
            outcome.table,
            outcome.machine or machine_of(device),
            calls,
            why_none=" ".join(outcome.notes),
            of_job=several,
        )
    return outcome


def target_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return the device to qualify for.

    Raises:
        ValueError: there is no such device.
        NotImplementedError: the Triton kernels cannot run on it.
    """
    if device is None:
        own = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        device = own if own.type == "cuda" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device is {checks.shown(device)}; it must be a device such as 'cuda' or 'cuda:1'."
        ) from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {checks.shown(device)}, but torch finds no GPU.")
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if target.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        found = "torch finds none" if not torch.cuda.is_available() else f"the device is {target.type}"
        raise NotImplementedError(f"qualify needs an NVIDIA GPU, and {found}: without one PyTorch computes all.")
    if target.type not in ("cuda", "cpu"):  # Triton's interpreter runs on a CPU
        raise ValueError(f"device is {checks.shown(device)}; it must be a GPU, or 'cpu' with Triton's interpreter.")
    if target.type == "cuda" and target.index >= torch.cuda.device_count():
        raise ValueError(f"device is {checks.shown(device)}, but torch finds {torch.cuda.device_count()} GPUs.")
    if obstacle := obstacle_of(target, torch.float32):
        raise NotImplementedError(f"There is nothing to qualify: {obstacle}.")
    return target


class CallRecorder(Recorder):
    """Keeps how a layer is called."""

    def __init__(self, layer: CSCConv2d) -> None:
        super().__init__()
        self.layer, self.calls = layer, dict[Call, None]()

    def keep(self, x: Tensor, codes: Tensor, lam: float | Tensor) -> None:
        """Note the call."""
        if by_pytorch_alone(self.layer, lam):
            return
        layout = memory_format_of(x, self.layer.weight)
        per_sample = isinstance(lam, Tensor) and lam.ndim > 0
        size = (x.shape[2], x.shape[3])
        self.calls[call_of(self.layer, size, len(x), codes.dtype, layout == torch.channels_last, per_sample)] = None


def by_pytorch_alone(layer: CSCConv2d, lam: float | Tensor) -> bool:
    """Return whether no Triton kernel takes a call: with a `prox`, or with a lambda per atom."""
    return layer.prox is not None or (isinstance(lam, Tensor) and lam.ndim == 4 and lam.shape[1] > 1)


def call_of(
    layer: CSCConv2d, size: Pair, batch: int, dtype: torch.dtype, channels_last: bool, lam_per_sample: bool = False
) -> Call:
    """Return a call of a layer as the verdicts name it."""
    x = torch.empty(batch, 1, *size, dtype=dtype, device="meta")
    lam = torch.empty((batch, 1, 1, 1) if lam_per_sample else (), device="meta")
    problem = Problem(layer.step_size, lam, layer.coding, layer.stride, layer.padding)
    return Call.of(x, layer.weight, problem, torch.channels_last if channels_last else torch.contiguous_format)


def recorded_calls(model: nn.Module, example: Example) -> dict[str, tuple[Call, ...]]:
    """Return the calls of each CSC layer in one forward in evaluation mode."""
    recorders = {name: CallRecorder(layer) for name, layer in csc_layers(model).items()}
    with recorded({recorder.layer: recorder for recorder in recorders.values()}):
        input_sizes(model, example)
    return {name: tuple(recorder.calls) for name, recorder in recorders.items()}


def planned_calls(model: nn.Module, batch: int, dtype: torch.dtype, channels_last: bool) -> dict[str, tuple[Call, ...]]:
    """Return the calls of each CSC layer on images of the size that its step size is for.

    The model may be on the meta device.
    """
    found = {}
    for name, layer in csc_layers(model).items():
        size = (layer.power_vector.shape[2], layer.power_vector.shape[3])
        call = call_of(layer, size, batch, dtype, channels_last)
        found[name] = () if by_pytorch_alone(layer, layer.forward_lambda()) else (call,)
    return found


def update_of(layers: Iterable[CSCConv2d]) -> Update | None:
    """Return the update of the dictionaries that an optimizer trains; None if the Triton kernels do not take them."""
    plain = [layer for layer in layers if is_plain(layer)]
    first = {id(layer.weight): layer for layer in reversed(plain)}  # of the layers that share their atoms
    states = [layer.dictionary for layer in plain if first[id(layer.weight)] is layer]
    tensors = [tensor for state in states for tensor in (state.weight, state.power_vector)]
    if not states or any(tensor.dtype != torch.float32 or not is_dense(tensor) for tensor in tensors):
        return None
    return Update.of(states)
