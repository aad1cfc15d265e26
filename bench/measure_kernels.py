"""`kernels`: operators over the layer shapes of a model, every provider checked against fp64 before it is timed.

For each operator, shape and mode (forward, backward with the forward's results at hand, both) the providers are timed
in turns. A wrong answer is not timed: its row says refused, and the exit status is 1.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._functorch import config as compiled_backward

from sdnet.bench import accuracy, step_operators, timing
from sdnet.bench.ceilings import Ceilings, measure_ceilings
from sdnet.bench.common_options import add_common_options, open_ledger
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
from sdnet.kernels.shapes import LayerShape, csc_layers
from sdnet.train.errors import UserError

OPERATORS = {"csc": CSC} | {
    name: Operator(layer_inputs, ("forward",), providers) for name, providers in step_operators.PROVIDERS.items()
}
DEPTHS = {"sdnet18": (18, False), "sdnet18_all": (18, True), "sdnet34": (34, False), "sdnet34_all": (34, True)}
SECONDS_PER_MODE = {"cpu": 3.0, "cuda": 0.6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=DEPTHS, default="sdnet18_all", help="whose layers; default sdnet18_all")
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
    for case in cases(options, device):
        with timing.fp32_products(case.dtype == "tf32"):
            if case.dtype not in ceilings:
                ceilings[case.dtype] = measure_ceilings(device, DTYPES[case.dtype])
                print(f"Ceilings in {case.dtype}: {show(ceilings[case.dtype])}")
            operator = OPERATORS[case.operator]
            providers = chosen_providers(operator, options.provider)
            modes = [mode for mode in operator.modes if not options.mode or mode in options.mode]
            if time.perf_counter() > deadline:
                skip(case, providers, modes, ledger, f"the budget of {options.budget:.0f} seconds was spent")
                continue
            measure_case(case, operator, providers, modes, ceilings[case.dtype], ledger, options.seconds)
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
                for layer in layers(options, on_gpu):
                    usual = (512 if layer.size[0] <= 32 and options.layer is None else 256) if on_gpu else 8
                    for n_steps in options.n_steps if operator == "csc" else [2]:
                        yield Case(operator, layer, options.batch or usual, n_steps, dtype, layout, device)


def layers(options: argparse.Namespace, on_gpu: bool) -> list[LayerShape]:
    """The distinct shapes of the chosen model, or the given ones.

    Raises:
        UserError: a given shape is not five positive numbers.
    """
    if options.layer:
        return [parse_layer(text) for text in options.layer]
    depth, every = DEPTHS[options.model]
    found: list[LayerShape] = []
    for image_size in options.image_size or ([224, 32] if on_gpu else [32]):
        distinct = {layer.geometry: layer for layer in csc_layers(depth, image_size, every)}
        found += list(distinct.values())[: options.limit]
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


def measure_case(
    case: Case,
    operator: Operator,
    providers: dict[str, Provider],
    modes: Sequence[str],
    ceilings: Ceilings,
    ledger: Ledger,
    seconds: float | None = None,
) -> None:
    """Check every provider, time those that are right in turns, add a row for each provider and mode."""
    facts = {"shape": case.describe(), "dtype": case.dtype, "layout": case.layout}
    # A compiled backward frees what it was given, unless told that "backward" will call it again.
    with timing.measuring_stream(case.device), compiled_backward.patch(donated_buffer=False):
        right, found_errors = [], {}
        for name, (status, reason, found) in verdicts(case, operator, providers).items():
            if status == "ok":
                right.append(name)
                found_errors[name] = found
                continue
            for mode in modes:
                ledger.add(name, mode, status=status, reason=reason, **facts)
        for mode in modes:
            timed = time_mode(case, operator, {name: providers[name] for name in right}, mode, seconds)
            for name, (measured, timer, memory) in timed.items():
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
                settings = {"timer": timer}
                times = measured._asdict()
                row = ledger.add(
                    name, mode, time_ms=times, memory_mib=memory, metrics=metrics, settings=settings, **facts
                )
                print(
                    f"{case.operator} {case.layer.geometry} {case.layout} {mode:8} {name:10} {row.time_ms}", flush=True
                )
    forget_compiled()


def verdicts(
    case: Case, operator: Operator, providers: dict[str, Provider]
) -> dict[str, tuple[str, str, dict[str, float]]]:
    """Status, reason and errors of every provider on this case."""
    inputs = operator.inputs(case, 0)
    truth = accuracy.oracle(operator, case, inputs)

    def errors_of(provider: Provider) -> dict[str, float]:
        return accuracy.errors(accuracy.answers(provider(case, inputs), inputs["grad"], operator.modes), truth)

    yardstick = errors_of(operator.providers["reference"])
    result: dict[str, tuple[str, str, dict[str, float]]] = {}
    for name, provider in providers.items():
        try:
            found = errors_of(provider)
        except NotImplementedError as error:
            result[name] = ("unsupported", str(error), {})
            continue
        except Exception as error:
            # A provider that crashes gave no right answer; the others are still worth their time.
            result[name] = ("refused", f"it raised {type(error).__name__}: {str(error).splitlines()[0]}", {})
            continue
        reason = accuracy.objection(found, yardstick, case.dtype)
        result[name] = ("refused" if reason else "ok", reason, found)
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
        calls = [make_call(provider(case, copy), copy["grad"], mode) for copy in inputs]
        calls[0]()
        memories[name] = timing.peak_memory(calls[0], case.device)
        samplers[name], timers[name] = timing.make_sampler(calls, case.device, name not in NOT_CAPTURABLE)
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
