"""What a call takes under "auto", and what happens when its kernels fail in the user's process.

Triton's interpreter stands for a GPU: `encode` takes "auto" for tensors on a CPU too.
"""

import subprocess
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from inspect import signature
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from sdnet.kernels import csc, csc_encode, dictionaries, dispatch, explain, step_sizes
from sdnet.kernels.dispatch import Choice
from sdnet.kernels.qualify import job, quarantine
from sdnet.kernels.qualify.compare import dictionaries_of
from sdnet.kernels.qualify.key import Call, Flags, Update, digest
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, UPDATE, Trial, Verdict
from sdnet.kernels.triton_path import loop
from sdnet.kernels.triton_path.paths import Entry
from sdnet.kernels.triton_path.tiles import by_rule

from .conftest import CALL, CPU

FLAGS = Flags.now()
TILES = by_rule(job.shape_of(CALL, FLAGS, 0))
FUSED = Entry("fused", TILES).encoded()
THREE_DAYS_AGO = (datetime.now(UTC) - timedelta(days=3, hours=1)).isoformat()
TRIALS = (Trial("fused", FUSED, launched_ms=2.0),)
VERDICT = Verdict(FUSED, "fused was right and 1.50 times as fast as plain", 2, THREE_DAYS_AGO, TRIALS)


@pytest.fixture
def on_gpu(state: job.State, monkeypatch: pytest.MonkeyPatch) -> job.State:
    """Calls of the operator take "auto" as on a GPU."""
    monkeypatch.setattr(csc, "choose", lambda *_: Choice("auto", "auto takes what has been qualified on this GPU"))
    return state


def arguments(batch: int = 2) -> tuple[Tensor, Tensor, float, float]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    weight = torch.randn(8, 6, 1, 1, generator=generator)
    step_sizes.project_atoms(weight)
    return x, weight, 0.2, 0.1


def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the path of each forward pass by Triton."""
    asked: list[str] = []
    forward = loop.forward

    def noted(*args: Any) -> Any:
        asked.append(signature(forward).bind(*args).arguments["asked"])
        return forward(*args)

    monkeypatch.setattr(loop, "forward", noted)
    return asked


def test_without_a_verdict_cudnn_convolves_and_it_is_said_once(
    on_gpu: job.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = taken(monkeypatch)
    with pytest.warns(UserWarning, match="have not been qualified on this GPU"):
        codes = csc_encode(*arguments())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        csc_encode(*arguments(batch=3))
    assert asked == [PLAIN, PLAIN]
    torch.testing.assert_close(codes, csc_encode(*arguments(), impl="reference"))


def test_a_verdict_of_the_cache_folder_is_taken_and_explained(
    on_gpu: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.store.add(machine, {CALL.key(FLAGS): VERDICT})
    asked = taken(monkeypatch)
    x, weight, *rest = arguments()
    leaves = x.requires_grad_(), weight.requires_grad_()
    codes = csc_encode(*leaves, *rest)
    assert asked == [FUSED]
    found = torch.autograd.grad(codes.sum(), leaves)
    expected = torch.autograd.grad(csc_encode(*leaves, *rest, impl="reference").sum(), leaves)
    torch.testing.assert_close(found, expected)
    sentence = explain(*leaves, *rest)
    assert sentence.startswith("triton: auto takes what has been qualified on this GPU: fused was right and 1.50 times")
    assert "measured 3 days ago [fused 2.000 ms]; the fused path; A' in tiles of few" in sentence


def test_a_verdict_for_pytorch_is_taken_and_explained(
    on_gpu: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.store.add(machine, {CALL.key(FLAGS): Verdict(TORCH, "fused ended its process by signal 11 (SIGSEGV)", 2)})
    asked = taken(monkeypatch)
    csc_encode(*arguments())
    assert asked == []
    assert explain(*arguments()).startswith(
        "torch: auto takes what has been qualified on this GPU: fused ended its process by signal 11 (SIGSEGV), noted"
    )


def test_a_smaller_batch_takes_the_verdict_of_the_full_one_once_that_was_seen(
    state: job.State, machine: dict[str, object]
) -> None:
    full, last, larger = CALL._replace(batch=64), CALL._replace(batch=17), CALL._replace(batch=65)
    state.store.add(machine, {full.key(FLAGS): VERDICT})
    with pytest.warns(UserWarning, match="have not been qualified"):
        assert job.decide(last, CPU).path == PLAIN  # a small batch of its own, say in a service
    assert job.decide(full, CPU).path == FUSED
    assert job.decide(last, CPU).path == FUSED
    assert job.decide(larger, CPU).path == PLAIN


def test_the_calls_of_a_job_are_seen_from_the_start(state: job.State, machine: dict[str, object]) -> None:
    full = CALL._replace(batch=64)
    job.use_table({full.key(FLAGS): VERDICT}, machine, [full])
    assert job.decide(CALL._replace(batch=17), CPU).path == FUSED


def test_tiles_that_do_not_fit_a_batch_are_not_exchanged_for_others(
    state: job.State, machine: dict[str, object]
) -> None:
    described = TILES._replace(analysis=TILES.analysis._replace(form="descriptors"))
    verdict = Verdict(Entry("fused", described).encoded(), "fused was quicker", 64)
    full = CALL._replace(batch=64)
    job.use_table({full.key(FLAGS): verdict}, machine, [full])
    decision = job.decide(full, CPU)
    assert decision.path == PLAIN
    assert "the tiles of the verdict for a batch of 64 do not fit this batch" in decision.reason


def test_the_table_of_a_job_takes_the_place_of_the_cache(state: job.State, machine: dict[str, object]) -> None:
    state.store.add(machine, {CALL.key(FLAGS): VERDICT})
    job.use_table({}, machine, why_none="the GPUs of the ranks differ")
    decision = job.decide(CALL, CPU)
    assert decision.path == PLAIN
    assert decision.reason.startswith("the GPUs of the ranks differ, so cuDNN's convolutions")


def test_other_flags_have_no_verdict(
    state: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({CALL.key(FLAGS): VERDICT}, machine)
    assert job.decide(CALL, CPU).path == FUSED
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert job.decide(CALL, CPU).path == PLAIN


OUT_OF_RESOURCES = "out of resource: shared memory, Required: 300000, Hardware limit: 232448"
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable."


def failing(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), RuntimeError(OUT_OF_RESOURCES)])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_kernel_that_does_not_compile_is_quarantined_and_pytorch_computes(
    which: str, error: Exception, on_gpu: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({CALL.key(FLAGS): VERDICT}, machine)
    monkeypatch.setattr(loop, which, failing(error))
    x, weight, *rest = arguments()
    leaves = x.requires_grad_(), weight.requires_grad_()
    with pytest.warns(UserWarning, match="PyTorch computes the layer 6->8 1x1 .* from now on") as caught:
        found = torch.autograd.grad(csc_encode(*leaves, *rest).sum(), leaves)
    assert len(caught) == 1
    expected = torch.autograd.grad(csc_encode(*leaves, *rest, impl="reference").sum(), leaves)
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        csc_encode(*leaves, *rest)
    assert "its kernels failed to compile (RuntimeError: " in explain(*leaves, *rest)
    assert job.decide(CALL._replace(stride=(2, 2)), CPU).impl == "triton"  # other keys go on


def test_outofresources_of_triton_itself_is_recognised() -> None:
    from triton.runtime.errors import OutOfResources

    assert quarantine.kind_of(OutOfResources(300000, 232448, "shared memory")) == "key"


@pytest.mark.parametrize(
    "error",
    [RuntimeError(NO_COMPILER), subprocess.CalledProcessError(1, ["gcc", "main.c"])],
    ids=["none", "no headers"],
)
def test_without_a_c_compiler_no_kernel_of_triton_is_used_any_more(
    error: Exception, on_gpu: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({CALL.key(FLAGS): VERDICT}, machine)
    monkeypatch.setattr(loop, "forward", failing(error))
    with pytest.warns(UserWarning, match="PyTorch computes all Triton kernels from now on"):
        csc_encode(*arguments())
    x = torch.zeros(1, 2, 5, 5)
    obstacle = dispatch.obstacle_to_triton(x, torch.zeros(3, 2, 3, 3))
    assert obstacle is not None
    assert obstacle.startswith("Triton cannot compile here (")
    with pytest.raises(NotImplementedError, match="the argument impl is 'triton', but Triton cannot compile here"):
        dispatch.choose("triton", x, torch.zeros(3, 2, 3, 3))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ValueError("a fault of ours")])
def test_other_errors_are_raised(
    error: Exception, on_gpu: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({CALL.key(FLAGS): VERDICT}, machine)
    monkeypatch.setattr(loop, "forward", failing(error))
    with pytest.raises(type(error), match=str(error)):
        csc_encode(*arguments())
    assert not quarantine.KEYS


def test_an_illegal_access_is_recorded_and_raised_again(
    on_gpu: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({CALL.key(FLAGS): VERDICT}, machine)
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    monkeypatch.setattr(loop, "forward", failing(error))
    with pytest.raises(RuntimeError, match="an illegal memory access") as caught:
        csc_encode(*arguments())
    assert caught.value is error
    recorded = on_gpu.store.load(machine)[CALL.key(FLAGS)]  # for the next process
    assert recorded.path == TORCH
    assert "may have broken the GPU's context" in recorded.reason


def test_while_a_graph_is_captured_pytorch_does_not_take_over(
    on_gpu: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({CALL.key(FLAGS): VERDICT}, machine)
    monkeypatch.setattr(quarantine, "capturing", lambda _: True)
    monkeypatch.setattr(loop, "forward", failing(RuntimeError("PassManager::run failed")))
    with pytest.raises(RuntimeError, match="failed while a CUDA graph was captured, where PyTorch cannot take over"):
        csc_encode(*arguments())
    assert not quarantine.KEYS


def test_impl_triton_needs_no_verdict_and_always_raises(
    state: job.State, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({CALL.key(FLAGS): Verdict(TORCH, "fused was wrong")}, machine)
    monkeypatch.setattr(loop, "forward", failing(RuntimeError("PassManager::run failed")))
    with pytest.raises(RuntimeError, match="PassManager"):
        csc_encode(*arguments(), impl="triton")
    assert explain(*arguments(), impl="triton").startswith("triton: the argument impl asks for it")


UPDATED = Update(tuple(sorted([(3, 8, (1, 1), (1, 1), (0, 0), (4, 4), False, False)])))


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The updates that the Triton kernels are given; dictionaries on a CPU are taken for such on a GPU."""
    counts: list[int] = []
    monkeypatch.setattr(dictionaries, "fits", lambda dictionary: dispatch.obstacle_of(CPU, torch.float32) is None)
    monkeypatch.setattr(dictionaries, "update_by_triton", lambda group, iterations: counts.append(len(group)))
    return counts


@pytest.mark.parametrize(
    ("verdict", "impl", "variable", "expected"),
    [
        (None, "auto", None, []),
        (UPDATE, "auto", None, [1]),
        (TORCH, "auto", None, []),
        (UPDATE, "torch", None, []),
        (UPDATE, "reference", None, []),
        (UPDATE, "auto", "torch", []),
        (TORCH, "triton", None, [1]),
        (None, "auto", "triton", [1]),
    ],
)
def test_an_update_needs_a_verdict_and_heeds_impl_and_the_environment(
    verdict: str | None,
    impl: str,
    variable: str | None,
    expected: list[int],
    state: job.State,
    machine: dict[str, object],
    by_triton: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SDNET_IMPL", raising=False)
    if variable:
        monkeypatch.setenv("SDNET_IMPL", variable)
    job.use_table({UPDATED.key(FLAGS): Verdict(verdict, "a reason")} if verdict else {}, machine)
    state_of_layer = dictionaries_of(UPDATED, CPU)
    dictionaries.update_dictionaries(state_of_layer, impls=[impl])
    assert by_triton == expected
    if not expected:
        torch.testing.assert_close(state_of_layer[0].weight.norm(dim=1), torch.ones(8, 1, 1))


def test_atoms_that_two_layers_share_are_projected_by_triton_once(by_triton: list[int]) -> None:
    """Two programs that project the same atoms at the same time would divide them by their norm twice."""
    first, other = (dictionaries_of(UPDATED, CPU)[0] for _ in range(2))
    shared = first._replace(step_size=first.step_size.clone())
    (expected,) = dictionaries_of(UPDATED, CPU)
    step_sizes.update_dictionary(expected)
    dictionaries.update_dictionaries([first, shared, other], impls=["triton"] * 3)
    assert by_triton == [2]
    assert torch.equal(shared.weight, expected.weight)
    assert torch.equal(shared.step_size, expected.step_size)


def test_an_obstacle_keeps_the_update_off_triton_too(
    state: job.State, machine: dict[str, object], by_triton: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({UPDATED.key(FLAGS): Verdict(UPDATE, "a reason")}, machine)
    quarantine.OBSTACLES.append("Triton cannot compile here (no C compiler)")
    dictionaries.update_dictionaries(dictionaries_of(UPDATED, CPU), impls=["triton"])
    assert by_triton == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_that_fails_is_pytorch_s_in_one_process_and_ends_a_job_of_several(
    ranks: int, state: job.State, machine: dict[str, object], by_triton: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.use_table({UPDATED.key(FLAGS): Verdict(UPDATE, "a reason")}, machine)
    monkeypatch.setattr(job, "ranks", lambda: ranks)
    monkeypatch.setattr(dictionaries, "update_by_triton", failing(RuntimeError("PassManager::run failed")))
    found, expected = dictionaries_of(UPDATED, CPU), dictionaries_of(UPDATED, CPU)
    if ranks == 2:
        with pytest.raises(RuntimeError, match="failed in one of several processes"):
            dictionaries.update_dictionaries(found)
        return
    with pytest.warns(UserWarning, match="PyTorch computes the update of the dictionaries from now on"):
        dictionaries.update_dictionaries(found)
    step_sizes.update_dictionary(expected[0])
    assert torch.equal(found[0].step_size, expected[0].step_size)


def test_processes_that_have_not_agreed_update_by_pytorch(
    state: job.State, machine: dict[str, object], by_triton: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    state.store.add(machine, {UPDATED.key(FLAGS): Verdict(UPDATE, "a reason")})
    monkeypatch.setattr(job, "ranks", lambda: 2)
    qualified, reason, _ = job.decide_update(dictionaries_of(UPDATED, CPU), CPU)
    assert not qualified
    assert reason == "the 2 processes of the job have not agreed on a table of verdicts"
    monkeypatch.setattr(job, "ranks", lambda: 1)
    assert job.decide_update(dictionaries_of(UPDATED, CPU), CPU)[0]


def test_a_call_describes_itself(machine: dict[str, object]) -> None:
    assert Call.decoded(CALL.encoded()) == CALL
    assert Update.decoded(UPDATED.encoded()) == UPDATED
    assert len(digest(machine)) == 16
