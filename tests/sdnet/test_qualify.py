"""What `sdnet.qualify` asks the qualification of kernels for, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sdnet
from sdnet.kernels.qualify import job, parent
from sdnet.kernels.qualify.key import Call, Flags, Update, machine_of
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, Store, Verdict
from sdnet.qualify import planned_calls, recorded_calls, update_of
from sdnet.step_size import csc_layers

CPU = torch.device("cpu")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The qualifications that were asked for, of a process that knows no verdict; each item gets the path "plain"."""
    calls: list[dict[str, Any]] = []

    def qualify(items: list[Call | Update], device: str, **options: Any) -> Outcome:
        calls.append({"items": items, "device": device, **options})
        return Outcome(
            machine_of(CPU), {item.key(Flags.now()): Verdict(PLAIN, "a reason") for item in items}, ("A note.",)
        )

    monkeypatch.setattr(parent, "qualify", qualify)
    monkeypatch.setattr(job, "STATE", job.State(Store(tmp_path)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return calls


def network() -> nn.Module:
    """Two equal layers and another one, on images of 8 x 8 pixels."""
    return nn.Sequential(
        sdnet.CSCConv2d(3, 8, 3, input_size=8),
        sdnet.CSCConv2d(8, 8, 3, input_size=8),
        sdnet.CSCConv2d(8, 8, 3, input_size=8),
        sdnet.CSCConv2d(8, 16, 1, stride=2, n_steps=3, solver="ista", nonnegative=False, mu=0.1, input_size=8),
    )


def test_each_kind_of_call_and_the_update_are_qualified_and_used(asked: list[dict[str, Any]]) -> None:
    model = network()
    before = [module.training for module in model.modules()]
    found = sdnet.qualify(model, torch.randn(4, 3, 8, 8), budget=60, memory=2, all_tiles=False, fresh=True)
    (request,) = asked
    assert request["device"] == "cpu"
    assert (request["budget"], request["memory_gib"], request["all_tiles"], request["fresh"]) == (60, 2, False, True)
    *calls, update = request["items"]
    assert calls[0] == Call(3, 8, (3, 3), (1, 1), (1, 1), (8, 8), 4, "float32", False)
    assert calls[1] == calls[2]
    assert calls[3] == Call(
        8, 16, (1, 1), (2, 2), (0, 0), (8, 8), 4, "float32", False, 3, "ista", "squared", False, True
    )
    assert isinstance(update, Update)
    assert len(update.layers) == 4
    assert list(found.verdicts) == ["0", "1", "2", "3"]
    assert all(verdict.path == PLAIN for (verdict,) in found.verdicts.values())
    assert "0: a reason, noted " in str(found)
    assert str(found).endswith("A note.")
    assert job.decide(calls[0], CPU).reason.startswith("a reason")
    assert job.decide(calls[0]._replace(batch=3), CPU).reason.startswith("a reason")  # the last batch
    assert [module.training for module in model.modules()] == before


def test_types_and_memory_formats_are_those_of_the_call() -> None:
    model = network().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with torch.autocast("cpu", torch.bfloat16):
        calls = recorded_calls(model, torch.randn(2, 3, 8, 8))
    assert {call.dtype for found in calls.values() for call in found} == {"bfloat16"}
    assert [call.channels_last for found in calls.values() for call in found] == [True] * 4
    sdnet.set_lambda(model, torch.full((2,), 0.1))
    assert all(
        call.lam_per_sample for found in recorded_calls(model, torch.randn(2, 3, 8, 8)).values() for call in found
    )


def test_calls_in_other_types_are_left_out_and_it_is_said(asked: list[dict[str, Any]]) -> None:
    found = sdnet.qualify(network().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert asked[0]["items"] == []
    assert found.verdicts["0"] == ()
    assert found.notes[-1] == (
        "Calls in float64 run on PyTorch: the Triton kernels compute in float16, bfloat16, float32."
    )


def test_layers_that_no_kernel_takes_are_left_out_and_it_is_said(asked: list[dict[str, Any]]) -> None:
    model: Any = network()
    model[0].lam = torch.full((1, 8, 1, 1), 0.1)
    model[3].prox, model[3].mu = lambda v, step_size, lam: v.relu(), 0.0
    found = sdnet.qualify(model, torch.randn(2, 3, 8, 8))
    assert len(asked[0]["items"]) == 3  # two layers, and the update of all
    assert [len(verdicts) for verdicts in found.verdicts.values()] == [0, 1, 1, 0]
    assert found.notes[-1] == "Without a verdict, on PyTorch: 0, 3, with a prox or a lambda per atom."
    assert [len(calls) for calls in planned_calls(model, 2, torch.float32, False).values()] == [0, 1, 1, 0]


def test_a_wrapped_model_is_asked_for_what_the_model_itself_is() -> None:
    model, batch = network(), torch.randn(2, 3, 8, 8)
    found = recorded_calls(nn.DataParallel(model), batch)
    assert list(found.values()) == list(recorded_calls(model, batch).values())


def test_the_plan_of_a_model_without_memory_is_what_it_will_be_asked_for() -> None:
    options: dict[str, Any] = {"num_classes": 4, "stem": "cifar", "image_size": 16, "width": 8}
    with torch.device("meta"):
        empty = sdnet.create_model("sdnet18", **options).to(memory_format=torch.channels_last)  # pyright: ignore
    model = sdnet.create_model("sdnet18", **options).to(memory_format=torch.channels_last)  # pyright: ignore
    planned = planned_calls(empty, 2, torch.float32, channels_last=True)
    assert planned == recorded_calls(model, torch.randn(2, 3, 16, 16))
    assert update_of(csc_layers(empty).values()) == update_of(csc_layers(model).values())


def test_atoms_that_two_layers_share_are_updated_once() -> None:
    """As `update_dictionaries` gives them to the Triton kernels, so that the verdict has the same key."""
    layers = [sdnet.CSCConv2d(3, 8, 3, input_size=8) for _ in range(3)]
    layers[2].weight = layers[0].weight
    assert update_of(layers) == update_of(layers[:2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": nn.Linear(2, 2)}, "model has no CSC layers; qualify needs at least one"),
        ({"example_batch": 32}, "example_batch is 32; it must be a tensor, a tuple or a dict of arguments"),
        ({"budget": -1}, "budget is -1; it must be a finite number of at least 0"),
        ({"memory": "much"}, "memory is 'much'; it must be a finite number"),
        ({"fresh": 1}, "fresh is 1; it must be True or False"),
        ({"memory": 0}, "memory is 0; it must be a number of GiB above 0"),
        ({"example_batch": ()}, r"example_batch is \(\); it must be a tensor, a tuple or a dict of arguments"),
        ({"example_batch": (8, 8)}, r"example_batch is \(8, 8\); it must be a tensor"),
        ({"example_batch": torch.randn(0, 3, 8, 8)}, "example_batch has no images"),
        ({"cache": 5}, "cache is 5; it must be the path of a folder, or None"),
        ({"say": None}, "say is None; it must be a function that takes a line"),
        ({"device": "gpu"}, "device is 'gpu'; it must be a device such as 'cuda' or 'cuda:1'"),
        ({"device": "meta"}, "device is 'meta'; it must be a GPU, or 'cpu' with Triton's interpreter"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    options: dict[str, Any], sentence: str, asked: list[dict[str, Any]]
) -> None:
    arguments = {"model": network(), "example_batch": torch.randn(2, 3, 8, 8)} | options
    with pytest.raises(ValueError, match=sentence):
        sdnet.qualify(**arguments)
    assert asked == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds no GPU"):
        sdnet.qualify(network(), torch.randn(2, 3, 8, 8), device="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NotImplementedError, match="qualify needs an NVIDIA GPU, and torch finds none"):
        sdnet.qualify(network(), torch.randn(2, 3, 8, 8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_says_so_too() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "sdnet.kernels.qualify"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.strip().endswith(
        "error: qualify needs an NVIDIA GPU, and torch finds none: without one PyTorch computes all."
    )


def test_a_failed_qualification_leaves_other_verdicts_alone(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        parent, "qualify", lambda *_, **__: Outcome(None, {}, ("The kernels could not be qualified: busy.",))
    )
    call = recorded_calls(network(), torch.randn(4, 3, 8, 8))["0"][0]
    job.STATE.store.add(machine_of(CPU), {call.key(Flags.now()): Verdict(TORCH, "from before")})
    found = sdnet.qualify(network(), torch.randn(4, 3, 8, 8))
    assert found.notes == ("The kernels could not be qualified: busy.",)
    assert found.verdicts["0"] == ()
    assert job.decide(call, CPU).reason.startswith("from before")
