"""`kernels` refuses and does not time wrong answers, crashes and lost processes."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.bench import __main__ as front
from sdnet.bench import measure_kernels
from sdnet.bench.common_options import choose_device
from sdnet.bench.isolation import Worker, WorkerError
from sdnet.bench.layer_shapes import LayerShape
from sdnet.bench.ledger import Ledger, Row, read
from sdnet.bench.measure_kernels import OPERATORS
from sdnet.bench.providers import BoundCall, Inputs, Provider, Workload, csc_by
from sdnet.bench.roofline import Ceilings, least_work
from sdnet.kernels.qualify import timing
from sdnet.train.environment import describe_environment
from sdnet.train.errors import UserError

LAYER = "4,8,3,2,8"
CEILINGS = Ceilings(10, 0.1)


def changed(change: Callable[[Tensor], Tensor]) -> Provider:
    """Return the reference with a change of its codes or, through `GradientOnly`, of their gradients."""

    def bind(workload: Workload, inputs: Inputs) -> BoundCall:
        right = csc_by("reference")(workload, inputs)
        return BoundCall(lambda: change(right.run()), right.leaves)

    return bind


class GradientOnly(torch.autograd.Function):
    """The identity with a gradient that is 10 % too large."""

    @staticmethod
    def forward(ctx, codes):
        return codes.clone()

    @staticmethod
    def backward(ctx, *grads):
        return 1.1 * grads[0]


def unsupported(workload: Workload, inputs: Inputs) -> BoundCall:
    raise NotImplementedError("not this shape.")


def crash(_: Tensor) -> Tensor:
    raise RuntimeError("misaligned address\nand more")


PLANTED: dict[str, tuple[Provider, str, str]] = {
    "right": (csc_by("torch"), "ok", ""),
    "off": (changed(lambda codes: 1.001 * codes), "refused", "output is off by 0.001"),
    "gradient": (changed(GradientOnly.apply), "refused", "d_x is off by 0.1"),
    "nan": (changed(lambda codes: codes / 0), "refused", "output is off by inf"),
    "shape": (changed(lambda codes: codes[:1]), "refused", "RuntimeError"),
    "crash": (changed(crash), "refused", "RuntimeError: misaligned address"),
    "absent": (unsupported, "unsupported", "not this shape."),
}


def kernels(out: Path, *arguments: str) -> tuple[int, list[Row]]:
    status = front.main(["kernels", "--seconds", "0.01", "--batch", "2", "--out", str(out), *arguments])
    return status, [row for _, row in read(out)]


@pytest.fixture(scope="module", autouse=True)
def cheap_ceilings() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(measure_kernels, "measure_ceilings", lambda *_: CEILINGS)
    yield
    patch.undo()


def test_planted_wrong_answers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    providers = {"reference": csc_by("reference")} | {name: provider for name, (provider, _, _) in PLANTED.items()}
    monkeypatch.setitem(OPERATORS, "csc", replace(OPERATORS["csc"], providers=providers))
    status, rows = kernels(tmp_path, "--operator", "csc", "--layer", LAYER, "--mode", "backward")
    assert status == 1
    assert len(rows) == len(providers)
    for row in rows:
        _, expected, reason = PLANTED.get(row.provider, (None, "ok", ""))
        assert (row.status, row.time_ms is None) == (expected, expected != "ok")
        assert reason in row.reason
    assert "gradient refused: d_x is off by 0.1" in capsys.readouterr().out


@pytest.mark.parametrize(("n_steps", "dtype"), [("1", "fp32"), ("3", "bf16")])
def test_all_providers_agree_with_the_oracle(tmp_path: Path, n_steps: str, dtype: str) -> None:
    """The Triton paths run only where there is a GPU."""
    providers = ["--provider", "fused", "cudnn", "torch", "reference", "official"]
    layout = ["--layout", "channels_last" if n_steps == "3" else "contiguous"]
    status, rows = kernels(
        tmp_path, "--layer", LAYER, "4,4,3,1,6", "--n-steps", n_steps, "--dtype", dtype, *providers, *layout
    )
    assert status == 0
    assert {row.provider for row in rows if row.status == "ok"} >= {"torch", "reference", "official"}
    assert all(row.status != "refused" for row in rows)
    csc = [row for row in rows if row.shape["operator"] == "csc" and row.status == "ok"]
    assert all(row.metrics["roofline_ms"] > 0 and row.metrics["error_output"] < 0.2 for row in csc)


def test_shapes_of_a_model_are_distinct() -> None:
    parser = argparse.ArgumentParser()
    measure_kernels.add_arguments(parser)
    options = parser.parse_args(["--model", "sdnet18_all", "--operator", "csc"])
    workloads = list(measure_kernels.workloads(options, torch.device("cpu")))
    assert [str(workload.layer.geometry) for workload in workloads[:2]] == [
        "3->64 3x3/1 @ 32x32",
        "64->64 3x3/1 @ 32x32",
    ]
    assert len({workload.layer.geometry for workload in workloads}) == len(workloads) == 8


def test_the_default_batch_depends_on_the_image_size_of_the_model() -> None:
    parser = argparse.ArgumentParser()
    measure_kernels.add_arguments(parser)
    options = parser.parse_args(["--operator", "csc", "--layout", "contiguous"])
    sizes: dict[int, set[int]] = {}
    for workload in measure_kernels.workloads(options, torch.device("cuda")):
        sizes.setdefault(workload.batch, set()).add(workload.layer.size[0])
    assert sizes == {256: {224, 112, 56, 28, 14, 7}, 512: {32, 16, 8, 4}}


def small_workload() -> Workload:
    return Workload("csc", LayerShape("", 4, 8, 3, 2, (8, 8)), 2, 2, "fp32", "contiguous", torch.device("cpu"))


def statuses_after_loss(
    out: Path, monkeypatch: pytest.MonkeyPatch, modes: tuple[str, ...], fatal: str, announced: str
) -> dict[tuple[str, str], str]:
    """Return the statuses of a, b and c by mode; the process is lost in a mode as long as b runs, and c is refused."""

    def measure(names: list[str], workload: Workload, modes: tuple[str, ...], *_: object) -> Iterator[dict[str, Any]]:
        yield from ({"provider": "c", "mode": mode, "status": "refused", "reason": "off"} for mode in modes)
        for mode in modes:
            if mode == fatal and "b" in names:
                raise WorkerError("it raised AcceleratorError: an illegal memory access", announced)
            times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
            yield from ({"provider": name, "mode": mode, "time_ms": times} for name in names if name != "c")

    monkeypatch.setattr(measure_kernels, "measure_providers", measure)
    facts = describe_environment(torch.device("cpu")) | {"command": ""}
    ledger = Ledger(out, "kernels", facts)
    measure_kernels.measure_all(small_workload(), "abc", modes, CEILINGS, 0.01, ledger, Worker(isolated=False))
    found = {(row.provider, row.mode): row.status for row in ledger.rows}
    assert len(found) == len(ledger.rows) == 3 * len(modes)
    assert all("illegal memory access" in row.reason for row in ledger.rows if row.provider == "b" and row.reason)
    return found


@pytest.mark.parametrize("fatal", ["forward", "both"])
def test_a_provider_that_ends_its_process_loses_its_own_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: str
) -> None:
    modes = ("forward", "backward", "both")
    found = statuses_after_loss(tmp_path, monkeypatch, modes, fatal, announced="b")
    lost = modes[modes.index(fatal) :]
    assert found == {
        (name, mode): "refused" if name == "c" or (name == "b" and mode in lost) else "ok"
        for name in "abc"
        for mode in modes
    }


def test_a_process_lost_without_an_announced_provider_ends_the_workload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = statuses_after_loss(tmp_path, monkeypatch, ("forward", "backward"), "backward", announced="")
    assert {pair for pair, status in found.items() if status == "ok"} == {("a", "forward"), ("b", "forward")}


def test_budget_skips_and_says_so(tmp_path: Path) -> None:
    status, rows = kernels(tmp_path, "--operator", "csc", "--layer", LAYER, "--budget", "0", "--mode", "forward")
    assert status == 0
    assert {(row.status, row.reason) for row in rows} == {("skipped", "the budget of 0 seconds was spent")}


def test_least_work_of_a_layer_counted_by_hand() -> None:
    """Two steps, forward: x to z, (z, x) to r, (z, r) to z', and the dictionary three times.

    In each direction 2 of the 5 x 3 pairs of a row and a tap lie in the padding.
    """
    layer = LayerShape("", 8, 8, 3, 1, (5, 5))
    workload = Workload("csc", layer, 2, 2, "bf16", "channels_last", torch.device("cpu"))
    codes, weight, flops = 2 * 8 * 25, 8 * 8 * 9, 2 * 2 * 8 * 8 * 13**2
    assert least_work(workload, "forward") == (3 * flops, 2 * (8 * codes + 3 * weight))
    forward, backward, both = (least_work(workload, mode) for mode in ("forward", "backward", "both"))
    assert forward
    assert backward
    assert backward.flops == 2 * forward.flops
    assert both == (forward.flops + backward.flops, forward.bytes + backward.bytes)
    assert least_work(replace(workload, operator="encode"), "forward") == (flops, 2 * (3 * codes + weight))
    assert least_work(replace(workload, operator="power_iteration"), "forward") is None


def test_a_call_that_cannot_be_captured_has_all_timed_with_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio of a replayed graph and of launched calls would have no meaning."""

    def make_sampler(calls: list[str], _: torch.device, capturable: bool) -> tuple[Callable[[], float], str]:
        return lambda: 1.0, "graph" if capturable and calls != ["bad"] else "events"

    monkeypatch.setattr(timing, "make_sampler", make_sampler)
    calls: Any = {"fused": ["good"], "compile": ["good"], "official": ["bad"]}
    cuda = torch.device("cuda")
    assert measure_kernels.samplers_of(calls, cuda)[1] == {"fused": "graph", "compile": "graph", "official": "events"}
    calls["compile"] = ["bad"]
    assert set(measure_kernels.samplers_of(calls, cuda)[1].values()) == {"events"}


def test_a_device_that_cannot_be_timed_gets_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> Ceilings:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(measure_kernels, "measure_ceilings", full)
    assert kernels(tmp_path, "--layer", LAYER, "--device", "cpu") == (2, [])
    assert "could not be timed on cpu: it raised OutOfMemoryError: CUDA out of memory." in capsys.readouterr().err


@pytest.mark.parametrize(("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_a_number(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device`, which the children of `paths` call, refuses a device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(name) == torch.device("cuda", number)
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cuda"))


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="interpreted"):
        choose_device("auto")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layer", "4,8,3"], "not five positive numbers"),
        (["--layer", LAYER, "--limit", "2"], "--layer gives the shapes; --image-size and --limit are for those of a"),
        (["--provider", "cublas"], "must be one of compile, cudnn, fused, official"),
        (["--device", "cpu", "--dtype", "fp32", "tf32"], "--dtype is tf32, which needs a GPU"),
        (["--device", "cuda"], "--device is cuda, but torch finds no GPU."),
        (["--device", "cuda9"], "--device is cuda9; it must be auto, cpu, cuda or cuda:N."),
        (["--device", "mps"], "--device is mps; it must be auto, cpu, cuda or cuda:N."),
        (["--operator", "encode", "--mode", "backward"], "encode cannot be measured"),
        (["--operator", "encode", "--provider", "official"], "encode cannot be measured"),
    ],
)
def test_bad_arguments_get_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], sentence: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, rows = kernels(tmp_path, *arguments)
    assert (status, rows) == (2, [])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch", "0"], "0 is not an integer of at least 1"),
        (["--n-steps", "2.5"], "2.5 is not an integer of at least 1"),
        (["--limit", "-1"], "-1 is not an integer of at least 1"),
        (["--seconds", "-3"], "-3 is not a number of seconds of at least 0"),
        (["--budget", "nan"], "nan is not a number of seconds of at least 0"),
    ],
)
def test_numbers_out_of_range_get_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as status:
        front.main(["kernels", "--out", str(tmp_path), *arguments])
    assert status.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert front.main(["kernels", "--layer", LAYER, "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_an_interruption_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_kernels, "measure_all", interrupted)
    assert front.main(["kernels", "--layer", LAYER, "--out", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().err
