"""`kernels`: operators on the layer shapes of a model. Every provider is checked against fp64 before it is timed.

For each operator, shape and mode (forward, backward with the forward's results at hand, both), the providers are timed
in turns. A provider with a wrong answer is not timed: its rows have the status "refused", and the exit status is 1. On
a GPU each operator and shape runs in a child process, so that a provider that breaks the GPU's context loses its own
rows alone.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._functorch import config as compiled_backward

from sdnet.bench import accuracy, isolation, step_providers
from sdnet.bench.common_options import add_common_options, add_setting_options, at_least, open_ledger, seconds
from sdnet.bench.isolation import Loss, Worker, WorkerError, survivors
from sdnet.bench.layer_shapes import LayerShape, csc_layers, csc_models, distinct
from sdnet.bench.ledger import Ledger, print_outcome
from sdnet.bench.providers import (
    CSC,
    DTYPES,
    LAYOUTS,
    NOT_CAPTURABLE,
    BoundCall,
    Operator,
    Provider,
    Workload,
    forget_compiled,
    layer_inputs,
)
from sdnet.bench.roofline import Ceilings, least_work, measure_ceilings
from sdnet.bench.tables import kernels_table
from sdnet.kernels.qualify import timing
from sdnet.kernels.qualify.compare import errors_of as relative_errors
from sdnet.train.errors import UserError

OPERATORS = {"csc": CSC} | {
    name: Operator(layer_inputs, ("forward",), providers) for name, providers in step_providers.PROVIDERS.items()
}
SECONDS_PER_MODE = {"cpu": 3.0, "cuda": 0.6}
PATIENCE = 100.0
"""Seconds of silence after which a provider counts as hanging: compiling for one shape takes tens of seconds."""


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose layers, batch, types and memory formats."""
    models = csc_models()
    parser.add_argument("--model", choices=models, default="sdnet18_all", help="whose layers; default sdnet18_all")
    add_setting_options(parser, "bf16")
    parser.add_argument("--layer", nargs="+", metavar="C,K,k,S,H", help="shapes, as 64,64,3,1,32; default the model's")
    parser.add_argument("--limit", type=at_least(1), help="take only the first distinct shapes of each image size")
    parser.add_argument("--batch", type=at_least(1), help="default 256 at 224 px and 512 at 32 px, on a CPU 8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shape_options(parser)
    parser.add_argument("--n-steps", type=at_least(1), nargs="+", default=[2], help="default 2")
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="default all")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help="default all; `reference` is always checked")
    parser.add_argument("--mode", nargs="+", choices=("forward", "backward", "both"), help="default all")
    parser.add_argument("--seconds", type=seconds, help="of timing per shape and mode, all providers together")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for; return 1 if an answer was wrong, else 0."""
    chosen = {name: chosen_providers(OPERATORS[name], options.provider) for name in options.operator}
    modes = {name: [m for m in OPERATORS[name].modes if not options.mode or m in options.mode] for name in chosen}
    if not any(chosen[name] and modes[name] for name in chosen):
        raise UserError(f"{', '.join(chosen)} cannot be measured with these values of --provider and --mode.")
    device, ledger = open_ledger(options, "kernels")
    if device.type == "cpu":
        print("No GPU: these are times of a CPU, which say nothing about a GPU.")
    deadline = time.perf_counter() + options.budget
    ceilings: dict[str, Ceilings] = {}
    with Worker(isolated=device.type == "cuda", patience=PATIENCE) as worker:
        for workload in workloads(options, device):
            providers = list(chosen[workload.operator])
            if workload.dtype not in ceilings:
                try:
                    (ceilings[workload.dtype],) = worker.run(ceilings_of, device, workload.dtype)
                except WorkerError as error:
                    raise UserError(f"A copy and a matrix product could not be timed on {device}: {error}.") from error
                print(f"Ceilings in {workload.dtype}: {show(ceilings[workload.dtype])}", flush=True)
            if time.perf_counter() > deadline:
                reason = f"the budget of {options.budget:.0f} seconds was spent"
                add_without_time(ledger, workload, providers, modes[workload.operator], "skipped", reason)
                continue
            limits = (modes[workload.operator], ceilings[workload.dtype], options.seconds)
            measure_all(workload, providers, *limits, ledger, worker)
    print("\n" + kernels_table(ledger.rows) + "\n")
    return print_outcome(ledger)


def workloads(options: argparse.Namespace, device: torch.device) -> Iterator[Workload]:
    """Yield the workloads of a command line, of distinct shapes."""
    on_gpu = device.type == "cuda"
    for layout in options.layout or (list(LAYOUTS)[::-1] if on_gpu else ["contiguous"]):
        for dtype in options.dtype or (["bf16"] if on_gpu else ["fp32"]):
            for operator in options.operator:
                for layer, usual in layers(options, on_gpu):
                    for n_steps in options.n_steps if operator == "csc" else [2]:
                        yield Workload(operator, layer, options.batch or usual, n_steps, dtype, layout, device)


def layers(options: argparse.Namespace, on_gpu: bool) -> list[tuple[LayerShape, int]]:
    """Return the given shapes, or the distinct ones of the chosen model, each with its default batch.

    Raises:
        UserError: Shapes are given, and options that choose those of a model too.
    """
    usual = 256 if on_gpu else 8
    if options.layer:
        if options.image_size or options.limit:
            raise UserError("--layer gives the shapes; --image-size and --limit are for those of a model.")
        return [(parse_layer(text), usual) for text in options.layer]
    found: list[tuple[LayerShape, int]] = []
    for image_size in options.image_size or ([224, 32] if on_gpu else [32]):
        batch = 512 if on_gpu and image_size <= 32 else usual
        layers = distinct(csc_layers(options.model, image_size, options.width))
        found += [(layer, batch) for layer in layers[: options.limit]]
    return found


def parse_layer(text: str) -> LayerShape:
    """Return the shape that C,K,k,S,H stands for.

    Raises:
        UserError: The text is not five positive numbers.
    """
    try:
        channels, atoms, kernel_size, stride, size = (int(part) for part in text.split(","))
        if min(channels, atoms, kernel_size, stride, size) < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--layer {text} is not five positive numbers C,K,k,S,H such as 64,64,3,1,32.") from None
    return LayerShape("given", channels, atoms, kernel_size, stride, (size, size))


def chosen_providers(operator: Operator, names: Sequence[str] | None) -> dict[str, Provider]:
    """Return the operator's providers of these names; all of them for no names.

    Raises:
        UserError: No operator has a provider of one of these names.
    """
    known = {name for other in OPERATORS.values() for name in other.providers}
    if unknown := sorted(set(names or ()) - known):
        raise UserError(f"--provider {' '.join(unknown)} is unknown; it must be one of {', '.join(sorted(known))}.")
    return {name: provider for name, provider in operator.providers.items() if not names or name in names}


def ceilings_of(device: torch.device, dtype: str) -> Iterator[Ceilings]:
    """Yield the ceilings of a device in a type."""
    with timing.fp32_products(dtype == "tf32"):
        yield measure_ceilings(device, DTYPES[dtype])


def measure_all(
    workload: Workload,
    providers: Sequence[str],
    modes: Sequence[str],
    ceilings: Ceilings,
    limit: float | None,
    ledger: Ledger,
    worker: Worker,
) -> None:
    """Add a row for each provider and mode; a provider that ends its process is refused."""
    missing = list(itertools.product(providers, modes))
    for found in survivors(worker, measure_providers, providers, workload, modes, ceilings, limit):
        if isinstance(found, Loss):
            lost = [pair for pair in missing if pair[0] in found.items]
            for name, mode in lost:
                add_without_time(ledger, workload, [name], [mode], "refused", found.reason)
            missing = [pair for pair in missing if pair not in lost]
        elif (found["provider"], found["mode"]) in missing:
            missing.remove((found["provider"], found["mode"]))
            row = ledger.add(**found, **facts_of(workload))
            words = f"{workload.layout} {row.mode:8} {row.provider:10} {row.time_ms or row.status}"
            print(f"{workload.operator} {workload.layer.geometry} {words}", flush=True)


def measure_providers(
    providers: Sequence[str], workload: Workload, modes: Sequence[str], ceilings: Ceilings, limit: float | None
) -> Iterator[dict[str, Any]]:
    """Check the providers, time the right ones in turns, and yield the contents of each row."""
    operator = OPERATORS[workload.operator]
    # By default a compiled backward pass frees its inputs, which a repeated call needs again.
    with (
        timing.fp32_products(workload.dtype == "tf32"),
        timing.measuring_stream(workload.device),
        compiled_backward.patch(donated_buffer=False),
    ):
        right, found_errors = {}, {}
        for name, (status, reason, found) in verdicts(workload, operator, operator.named(providers)).items():
            if status == "ok":
                right[name], found_errors[name] = operator.providers[name], found
            else:
                yield from ({"provider": name, "mode": mode, "status": status, "reason": reason} for mode in modes)
        for mode in modes:
            for name, (measured, timer, memory) in time_mode(workload, operator, right, mode, limit).items():
                yield {
                    "provider": name,
                    "mode": mode,
                    "time_ms": measured._asdict(),
                    "memory_mib": memory,
                    "metrics": metrics_of(workload, mode, measured, ceilings, found_errors[name]),
                    "settings": {"timer": timer},
                }
    forget_compiled()


def metrics_of(
    workload: Workload, mode: str, measured: timing.Timing, ceilings: Ceilings, errors: dict[str, float]
) -> dict[str, float]:
    """Return the errors, the ceilings, and rates and the roofline where the work is counted."""
    metrics = {f"error_{answer}": error for answer, error in errors.items()} | ceilings._asdict()
    if (work := least_work(workload, mode)) is not None:
        metrics["gb_s"] = work.bytes / measured.p50 / 1e6
        metrics["tflop_s"] = work.flops / measured.p50 / 1e9
        metrics["roofline_ms"] = ceilings.shortest_ms(work.flops, work.bytes)
        metrics |= work._asdict()
    return metrics


def verdicts(
    workload: Workload, operator: Operator, providers: dict[str, Provider]
) -> dict[str, tuple[str, str, dict[str, float]]]:
    """Return the status, reason and errors of every provider."""
    isolation.announce("reference")
    inputs = operator.inputs(workload, 0)
    truth = accuracy.oracle(operator, workload, inputs)

    def errors_of(provider: Provider) -> dict[str, float]:
        return relative_errors(accuracy.answers(provider(workload, inputs), inputs["grad"], operator.modes), truth)

    baseline = errors_of(operator.providers["reference"])
    result: dict[str, tuple[str, str, dict[str, float]]] = {}
    for name, provider in providers.items():
        isolation.announce(name)
        try:
            found = baseline if name == "reference" else errors_of(provider)
        except NotImplementedError as error:
            result[name] = ("unsupported", str(error), {})
            continue
        except Exception as error:
            # The other providers can still be timed if the device works.
            isolation.wait_for(workload.device)
            result[name] = ("refused", isolation.one_line(error), {})
            continue
        reason = accuracy.objection(found, baseline, workload.dtype)
        result[name] = ("refused" if reason else "ok", reason, found)
    isolation.announce("")
    return result


def time_mode(
    workload: Workload, operator: Operator, providers: dict[str, Provider], mode: str, limit: float | None
) -> dict[str, tuple[timing.Timing, str, float | None]]:
    """Return the timing, the timer and the peak memory of each provider."""
    inputs = [operator.inputs(workload, 0)]
    size = sum(inputs[0][name].numel() * inputs[0][name].element_size() for name in ("x", "grad"))
    copies = timing.copies_past_cache(size, workload.device)
    inputs += [operator.inputs(workload, seed) for seed in range(1, copies)]
    calls, memories = {}, {}
    for name, provider in providers.items():
        isolation.announce(name)
        calls[name] = [make_call(provider(workload, copy), copy["grad"], mode) for copy in inputs]
        calls[name][0]()
        memories[name] = timing.peak_memory(calls[name][0], workload.device)
    samplers, timers = samplers_of(calls, workload.device)
    measured = timing.interleave(samplers, SECONDS_PER_MODE[workload.device.type] if limit is None else limit)
    return {name: (measured[name], timers[name], memories[name]) for name in providers}


def samplers_of(
    calls: Mapping[str, Sequence[timing.Call]], device: torch.device
) -> tuple[dict[str, timing.Sampler], dict[str, str]]:
    """Return a sampler of each provider, and its name.

    If a provider cannot be captured that should be, all are timed with their launches, so that their ratios hold.
    """
    samplers: dict[str, timing.Sampler] = {}
    timers: dict[str, str] = {}
    for captured in (True, False):
        for name, each in calls.items():
            isolation.announce(name)
            sampler, timers[name] = timing.make_sampler(each, device, captured and name not in NOT_CAPTURABLE)
            samplers[name] = isolation.announced(name, sampler)
        if len({timer for name, timer in timers.items() if name not in NOT_CAPTURABLE}) < 2:
            break
    return samplers, timers


def make_call(bound: BoundCall, grad: torch.Tensor, mode: str) -> timing.Call:
    """Return the call to time: the output alone, its gradients alone, or both."""
    if mode == "forward":
        return torch.no_grad()(bound.run)
    if mode == "both":

        def both() -> Any:
            output = bound.run()
            return torch.autograd.grad(output, bound.leaves, grad.to(output.dtype))

        return both
    output = bound.run()
    grad = grad.to(output.dtype)
    return lambda: torch.autograd.grad(output, bound.leaves, grad, retain_graph=True)


def add_without_time(
    ledger: Ledger, workload: Workload, providers: Iterable[str], modes: Sequence[str], status: str, reason: str
) -> None:
    """Add rows that say why there is no measurement."""
    for name, mode in itertools.product(providers, modes):
        ledger.add(name, mode, status=status, reason=reason, **facts_of(workload))


def facts_of(workload: Workload) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    return {"shape": workload.describe(), "dtype": workload.dtype, "layout": workload.layout}


def show(ceilings: Ceilings) -> str:
    """Return both ceilings as text."""
    return f"copy {ceilings.copy_gb_s:.4g} GB/s, matrix product {ceilings.gemm_tflop_s:.4g} TFLOP/s"
