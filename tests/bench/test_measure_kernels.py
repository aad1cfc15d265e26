"""A wrong answer is refused and not timed, whatever is wrong with it."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.bench import __main__ as front
from sdnet.bench import environment, measure_kernels
from sdnet.bench.isolation import LostError
from sdnet.bench.layer_shapes import LayerShape
from sdnet.bench.ledger import Ledger, Row, read
from sdnet.bench.measure_kernels import OPERATORS
from sdnet.bench.operators import Bound, Case, Inputs, Provider, csc_by
from sdnet.bench.roofline import least_work
from sdnet.train.errors import UserError

LAYER = "4,8,3,2,8"


def spoilt(spoil: Callable[[Tensor], Tensor]) -> Provider:
    """The reference with its codes, or through `GradientOnly` their gradients, changed."""

    def bind(case: Case, inputs: Inputs) -> Bound:
        right = csc_by("reference")(case, inputs)
        return Bound(lambda: spoil(right.run()), right.leaves)

    return bind


class GradientOnly(torch.autograd.Function):
    """The right codes with a gradient that is 10 % too large."""

    @staticmethod
    def forward(ctx, codes):
        return codes.clone()

    @staticmethod
    def backward(ctx, *grads):
        return 1.1 * grads[0]


def unsupported(case: Case, inputs: Inputs) -> Bound:
    raise NotImplementedError("not this shape.")


def crash(_: Tensor) -> Tensor:
    raise RuntimeError("misaligned address\nand more")


PLANTED: dict[str, tuple[Provider, str, str]] = {
    "right": (csc_by("torch"), "ok", ""),
    "off": (spoilt(lambda codes: 1.001 * codes), "refused", "output is off by 0.001"),
    "gradient": (spoilt(GradientOnly.apply), "refused", "d_x is off by 0.1"),
    "nan": (spoilt(lambda codes: codes / 0), "refused", "output is off by inf"),
    "shape": (spoilt(lambda codes: codes[:1]), "refused", "RuntimeError"),
    "crash": (spoilt(crash), "refused", "RuntimeError: misaligned address"),
    "absent": (unsupported, "unsupported", "not this shape."),
}


def kernels(out: Path, *arguments: str) -> tuple[int, list[Row]]:
    status = front.main(["kernels", "--seconds", "0.01", "--batch", "2", "--out", str(out), *arguments])
    return status, [row for _, row in read(out)]


@pytest.fixture(scope="module", autouse=True)
def cheap_ceilings() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(measure_kernels, "measure_ceilings", lambda *_: measure_kernels.Ceilings(10, 0.1))
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
    assert "REFUSED gradient backward" in capsys.readouterr().out


@pytest.mark.parametrize(("n_steps", "dtype"), [("1", "fp32"), ("3", "bf16")])
def test_our_providers_and_the_official_one_are_right(tmp_path: Path, n_steps: str, dtype: str) -> None:
    """Whatever of them can run here: Triton only where there is a GPU."""
    providers = ["--provider", "triton", "cudnn", "torch", "reference", "official"]
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
    cases = list(measure_kernels.cases(options, torch.device("cpu")))
    assert [str(case.layer.geometry) for case in cases[:2]] == ["3->64 3x3/1 @ 32x32", "64->64 3x3/1 @ 32x32"]
    assert len({case.layer.geometry for case in cases}) == len(cases) == 8


def test_the_usual_batch_is_that_of_the_picture_and_not_of_the_layer() -> None:
    parser = argparse.ArgumentParser()
    measure_kernels.add_arguments(parser)
    options = parser.parse_args(["--operator", "csc", "--layout", "contiguous"])
    sizes: dict[int, set[int]] = {}
    for case in measure_kernels.cases(options, torch.device("cuda")):
        sizes.setdefault(case.batch, set()).add(case.layer.size[0])
    assert sizes == {256: {224, 112, 56, 28, 14, 7}, 512: {32, 16, 8, 4}}


class Fragile:
    """A workshop whose child is lost with "b" in a mode, or with nobody in particular; "c" is refused."""

    def __init__(self, fatal: str, culprit: str = "b") -> None:
        self.fatal, self.culprit = fatal, culprit

    def run(
        self, work: Callable, case: Case, names: list[str], modes: list[str], *_: object
    ) -> Iterator[dict[str, Any]]:
        yield from ({"provider": "c", "mode": mode, "status": "refused", "reason": "off"} for mode in modes)
        for mode in modes:
            if mode == self.fatal and "b" in names:
                raise LostError("it raised AcceleratorError: an illegal memory access", self.culprit)
            times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
            yield from ({"provider": name, "mode": mode, "time_ms": times} for name in names if name != "c")


@pytest.mark.parametrize("fatal", ["forward", "both"])
def test_a_provider_that_breaks_the_device_costs_its_own_rows_alone(tmp_path: Path, fatal: str) -> None:
    case = Case("csc", LayerShape("", 4, 8, 3, 2, (8, 8)), 2, 2, "fp32", "contiguous", torch.device("cpu"))
    modes, ledger = ("forward", "backward", "both"), Ledger(tmp_path, "kernels", environment.describe(case.device))
    workshop: Any = Fragile(fatal)
    ceilings = measure_kernels.Ceilings(10, 0.1)
    measure_kernels.measure_survivors(case, "abc", modes, ceilings, ledger, 0.01, workshop)
    found = {(row.provider, row.mode): row.status for row in ledger.rows}
    assert len(found) == len(ledger.rows) == 9
    lost = modes[modes.index(fatal) :]
    assert found == {(name, mode): "ok" for name in "ab" for mode in modes if name == "a" or mode not in lost} | {
        (name, mode): "refused" for name in "bc" for mode in modes if name == "c" or mode in lost
    }
    assert all("illegal memory access" in row.reason for row in ledger.rows if row.provider == "b" and row.reason)


def test_a_loss_that_nobody_is_to_blame_for_ends_the_case(tmp_path: Path) -> None:
    case = Case("csc", LayerShape("", 4, 8, 3, 2, (8, 8)), 2, 2, "fp32", "contiguous", torch.device("cpu"))
    ledger = Ledger(tmp_path, "kernels", environment.describe(case.device))
    workshop: Any = Fragile("backward", culprit="")
    ceilings = measure_kernels.Ceilings(10, 0.1)
    measure_kernels.measure_survivors(case, "abc", ("forward", "backward"), ceilings, ledger, 0.01, workshop)
    found = {(row.provider, row.mode): row.status for row in ledger.rows}
    assert len(found) == len(ledger.rows) == 6
    assert {pair for pair, status in found.items() if status == "ok"} == {("a", "forward"), ("b", "forward")}


def test_budget_skips_and_says_so(tmp_path: Path) -> None:
    status, rows = kernels(tmp_path, "--operator", "csc", "--layer", LAYER, "--budget", "0", "--mode", "forward")
    assert status == 0
    assert {(row.status, row.reason) for row in rows} == {("skipped", "the budget of 0 seconds was spent")}


def test_least_work_of_a_layer_counted_by_hand() -> None:
    """Two steps, forward: x to z, (z, x) to r, (z, r) to z', and the dictionary three times.

    Of the 5 x 3 pairs of a row and a tap 2 meet padding, and so in the other direction.
    """
    case = Case("csc", LayerShape("", 8, 8, 3, 1, (5, 5)), 2, 2, "bf16", "channels_last", torch.device("cpu"))
    codes, weight, flops = 2 * 8 * 25, 8 * 8 * 9, 2 * 2 * 8 * 8 * 13**2
    assert least_work(case, "forward") == (3 * flops, 2 * (8 * codes + 3 * weight))
    forward, backward, both = (least_work(case, mode) for mode in ("forward", "backward", "both"))
    assert forward
    assert backward
    assert backward.flops == 2 * forward.flops
    assert both == (forward.flops + backward.flops, forward.bytes + backward.bytes)
    assert least_work(replace(case, operator="encode"), "forward") == (flops, 2 * (3 * codes + weight))
    assert least_work(replace(case, operator="power_iteration"), "forward") is None


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="interpreted"):
        environment.choose_device("auto")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layer", "4,8,3"], "not five positive numbers"),
        (["--provider", "cublas"], "must be one of compile, cudnn, official"),
        (["--device", "cuda"], "torch sees no GPU"),
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
