"""`kernels`: operators over the layer shapes of a model, every provider checked against fp64 before it is timed.

For each operator, shape and mode (forward, backward with the forward's results at hand, both) the providers are timed
in turns. A wrong answer is not timed: its row says refused, and the exit status is 1. On a GPU cases run in a process
apart, so that a provider that breaks the device loses its own rows and nobody else's.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch import config as compiled_backward

from sdnet.bench import accuracy, isolation, step_operators, timing
from sdnet.bench.ceilings import Ceilings, measure_ceilings
from sdnet.bench.common_options import add_common_options, open_ledger
from sdnet.bench.isolation import LostError, Workshop
from sdnet.bench.layer_shapes import LayerShape, csc_layers, csc_models, distinct
from sdnet.bench.ledger import Ledger, refused
from sdnet.bench.operators import (
    CSC,
    DTYPES,
    LAYOUTS,
    NOT_CAPTURABLE,
    Bound,
    Case,
    Operator,
    Provider,
    forget_compiled,
    layer_inputs,
)
from sdnet.bench.roofline import least_work
from sdnet.bench.tables import kernels_table
from sdnet.train.errors import UserError

OPERATORS = {"csc": CSC} | {
    name: Operator(layer_inputs, ("forward",), providers) for name, providers in step_operators.PROVIDERS.items()
}
SECONDS_PER_MODE = {"cpu": 3.0, "cuda": 0.6}
PATIENCE = 100.0
"""Seconds without a word after which a provider counts as hanging: compiling for one shape takes tens of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=csc_models(), default="sdnet18_all", help="whose layers; default sdnet18_all"
    )
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels; default 224 and 32, on a CPU 32")
    parser.add_argument(
        "--layer", nargs="+", metavar="C,K,k,S,H", help="given shapes instead of a model's: 64,64,3,1,32"
    )
    parser.add_argument("--limit", type=int, help="only so many distinct shapes of each image size, the first ones")
    parser.add_argument("--batch", type=int, help="default 256 at 224 px and 512 at 32 px, on a CPU 8")
    parser.add_argument("--n-steps", type=int, nargs="+", default=[2], help="default 2")
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="default all")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help="default all; `reference` is always checked")
    parser.add_argument("--mode", nargs="+", choices=("forward", "backward", "both"), help="default all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default bf16, on a CPU fp32")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default both, on a CPU contiguous")
    parser.add_argument("--seconds", type=float, help="of timing per shape and mode, all providers together")
    parser.add_argument(
        "--budget", type=float, help="seconds after which the remaining shapes are skipped, and said so"
    )
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for; 1 if an answer was wrong, else 0."""
    device, ledger = open_ledger(options, "kernels")
    if device.type == "cpu":
        print("No GPU: torch's providers on the CPU. These times say nothing about a GPU.")
    deadline = time.perf_counter() + (float("inf") if options.budget is None else options.budget)
    ceilings: dict[str, Ceilings] = {}
    with Workshop(apart=device.type == "cuda", patience=PATIENCE) as workshop:
        for case in cases(options, device):
            providers = chosen_providers(OPERATORS[case.operator], options.provider)
            modes = [mode for mode in OPERATORS[case.operator].modes if not options.mode or mode in options.mode]
            if case.dtype not in ceilings:
                (ceilings[case.dtype],) = workshop.run(ceilings_of, device, case.dtype)
                print(f"Ceilings in {case.dtype}: {show(ceilings[case.dtype])}", flush=True)
            if time.perf_counter() > deadline:
                skip(case, providers, modes, ledger, f"the budget of {options.budget:.0f} seconds was spent")
                continue
            measure_survivors(case, providers, modes, ceilings[case.dtype], ledger, options.seconds, workshop)
    print("\n" + kernels_table(ledger.rows))
    print(f"\n{len(ledger.rows)} rows in {ledger.path}")
    wrong = refused(ledger.rows)
    for row in wrong:
        print(f"REFUSED {row.provider} {row.mode} {dict(row.shape)} {row.dtype} {row.layout}: {row.reason}")
    return 1 if wrong else 0


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The cases of a command line, distinct shapes only."""
    on_gpu = device.type == "cuda"
    for layout in options.layout or (list(LAYOUTS)[::-1] if on_gpu else ["contiguous"]):
        for dtype in options.dtype or (["bf16"] if on_gpu else ["fp32"]):
            for operator in options.operator:
                for layer, usual in layers(options, on_gpu):
                    for n_steps in options.n_steps if operator == "csc" else [2]:
                        yield Case(operator, layer, options.batch or usual, n_steps, dtype, layout, device)


def layers(options: argparse.Namespace, on_gpu: bool) -> list[tuple[LayerShape, int]]:
    """The distinct shapes of the chosen model, or the given ones, each with its usual batch.

    Raises:
        UserError: a given shape is not five positive numbers.
    """
    usual = 256 if on_gpu else 8
    if options.layer:
        return [(parse_layer(text), usual) for text in options.layer]
    found: list[tuple[LayerShape, int]] = []
    for image_size in options.image_size or ([224, 32] if on_gpu else [32]):
        batch = 512 if on_gpu and image_size <= 32 else usual
        found += [(layer, batch) for layer in distinct(csc_layers(options.model, image_size))[: options.limit]]
    return found


def parse_layer(text: str) -> LayerShape:
    """The shape that C,K,k,S,H stands for."""
    try:
        channels, atoms, kernel_size, stride, size = (int(part) for part in text.split(","))
        if min(channels, atoms, kernel_size, stride, size) < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--layer {text} is not five positive numbers C,K,k,S,H such as 64,64,3,1,32.") from None
    return LayerShape("given", channels, atoms, kernel_size, stride, (size, size))


def chosen_providers(operator: Operator, names: Sequence[str] | None) -> dict[str, Provider]:
    """The operator's providers of these names, all without names.

    Raises:
        UserError: nobody has one of the names.
    """
    known = {name for other in OPERATORS.values() for name in other.providers}
    if unknown := sorted(set(names or ()) - known):
        raise UserError(f"--provider {' '.join(unknown)} is unknown; it must be one of {', '.join(sorted(known))}.")
    return {name: provider for name, provider in operator.providers.items() if not names or name in names}


def ceilings_of(device: torch.device, dtype: str) -> Iterator[Ceilings]:
    """The device's ceilings in a type."""
    with timing.fp32_products(dtype == "tf32"):
        yield measure_ceilings(device, DTYPES[dtype])


def measure_survivors(
    case: Case,
    names: Iterable[str],
    modes: Sequence[str],
    ceilings: Ceilings,
    ledger: Ledger,
    seconds: float | None,
    workshop: Workshop,
) -> None:
    """A row for each provider and mode. Whoever brings a process apart down is refused; the others go on without it."""
    facts = {"shape": case.describe(), "dtype": case.dtype, "layout": case.layout}
    left = list(names)
    missing = {(name, mode) for name in left for mode in modes}
    while left and missing:
        try:
            still = [mode for mode in modes if any((name, mode) in missing for name in left)]
            for values in workshop.run(measure_case, case, left, still, ceilings, seconds):
                if (values["provider"], values["mode"]) in missing:
                    row = ledger.add(**values, **facts)
                    missing.remove((row.provider, row.mode))
                    words = f"{case.layout} {row.mode:8} {row.provider:10} {row.time_ms or row.status}"
                    print(f"{case.operator} {case.layer.geometry} {words}", flush=True)
            return
        except LostError as lost:
            culprits = [lost.tried] if lost.tried in left else left
            for name, mode in (pair for pair in itertools.product(culprits, modes) if pair in missing):
                ledger.add(name, mode, status="refused", reason=f"its process was lost: {lost}", **facts)
            print(f"{case.operator} {case.layer.geometry} {case.layout} lost {' '.join(culprits)}: {lost}", flush=True)
            missing = {pair for pair in missing if pair[0] not in culprits}
            left = [name for name in left if name not in culprits]


def measure_case(
    case: Case, names: Sequence[str], modes: Sequence[str], ceilings: Ceilings, seconds: float | None
) -> Iterator[dict[str, Any]]:
    """Check the named providers, time those that are right in turns; what a row holds for each provider and mode."""
    operator = OPERATORS[case.operator]
    providers = {name: operator.providers[name] for name in names}
    # A compiled backward frees what it was given, unless told that "backward" will call it again.
    with (
        timing.fp32_products(case.dtype == "tf32"),
        timing.measuring_stream(case.device),
        compiled_backward.patch(donated_buffer=False),
    ):
        right, found_errors = {}, {}
        for name, (status, reason, found) in verdicts(case, operator, providers).items():
            if status == "ok":
                right[name], found_errors[name] = providers[name], found
            else:
                yield from ({"provider": name, "mode": mode, "status": status, "reason": reason} for mode in modes)
        for mode in modes:
            for name, (measured, timer, memory) in time_mode(case, operator, right, mode, seconds).items():
                work = least_work(case, mode)
                metrics = {f"error_{answer}": error for answer, error in found_errors[name].items()}
                metrics |= {"copy_gb_s": ceilings.copy_gb_s, "gemm_tflop_s": ceilings.gemm_tflop_s}
                if work is not None:
                    metrics |= {
                        "gb_s": work.bytes / measured.p50 / 1e6,
                        "tflop_s": work.flops / measured.p50 / 1e9,
                        "roofline_ms": ceilings.shortest_ms(work.flops, work.bytes),
                        "flops": work.flops,
                        "bytes": work.bytes,
                    }
                yield {
                    "provider": name,
                    "mode": mode,
                    "time_ms": measured._asdict(),
                    "memory_mib": memory,
                    "metrics": metrics,
                    "settings": {"timer": timer},
                }
    forget_compiled()


def verdicts(
    case: Case, operator: Operator, providers: dict[str, Provider]
) -> dict[str, tuple[str, str, dict[str, float]]]:
    """Status, reason and errors of every provider on this case."""
    isolation.trying("reference")
    inputs = operator.inputs(case, 0)
    truth = accuracy.oracle(operator, case, inputs)

    def errors_of(provider: Provider) -> dict[str, float]:
        return accuracy.errors(accuracy.answers(provider(case, inputs), inputs["grad"], operator.modes), truth)

    yardstick = errors_of(operator.providers["reference"])
    result: dict[str, tuple[str, str, dict[str, float]]] = {}
    for name, provider in providers.items():
        isolation.trying(name)
        try:
            found = yardstick if name == "reference" else errors_of(provider)
        except NotImplementedError as error:
            result[name] = ("unsupported", str(error), {})
            continue
        except Exception as error:
            # A provider that crashes gave no right answer; the others are still worth their time, if they can run.
            isolation.check_context(case.device)
            result[name] = ("refused", isolation.told(error), {})
            continue
        reason = accuracy.objection(found, yardstick, case.dtype)
        result[name] = ("refused" if reason else "ok", reason, found)
    isolation.trying("")
    return result


def time_mode(
    case: Case, operator: Operator, providers: dict[str, Provider], mode: str, seconds: float | None
) -> dict[str, tuple[timing.Timing, str, float | None]]:
    """Timing, timer and peak memory by provider."""
    inputs = [operator.inputs(case, 0)]
    size = sum(inputs[0][name].numel() * inputs[0][name].element_size() for name in ("x", "grad"))
    inputs += [operator.inputs(case, seed) for seed in range(1, timing.copies_past_cache(size, case.device))]
    samplers, timers, memories = {}, {}, {}
    for name, provider in providers.items():
        isolation.trying(name)
        calls = [make_call(provider(case, copy), copy["grad"], mode) for copy in inputs]
        calls[0]()
        memories[name] = timing.peak_memory(calls[0], case.device)
        samplers[name], timers[name] = timing.make_sampler(calls, case.device, name not in NOT_CAPTURABLE)
    samplers = {name: isolation.naming(name, sampler) for name, sampler in samplers.items()}
    measured = timing.interleave(samplers, seconds or SECONDS_PER_MODE[case.device.type])
    return {name: (measured[name], timers[name], memories[name]) for name in providers}


def make_call(bound: Bound, grad: torch.Tensor, mode: str) -> timing.Call:
    """What is timed: the output alone, its gradients alone, or both."""
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


def skip(case: Case, providers: dict[str, Provider], modes: Sequence[str], ledger: Ledger, reason: str) -> None:
    """Rows that say why there is no measurement."""
    for name in providers:
        for mode in modes:
            facts = {"shape": case.describe(), "dtype": case.dtype, "layout": case.layout}
            ledger.add(name, mode, status="skipped", reason=reason, **facts)


def show(ceilings: Ceilings) -> str:
    """Both ceilings as text."""
    return f"copy {ceilings.copy_gb_s:.4g} GB/s, matrix product {ceilings.gemm_tflop_s:.4g} TFLOP/s"
