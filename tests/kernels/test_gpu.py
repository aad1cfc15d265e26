"""On a GPU: the Triton kernels compiled, where bf16, tf32, races, graphs and large tensors are real.

Run with `pytest -m gpu`, in several processes if there is pytest-xdist: most of the time goes into compiling.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.bench.layer_shapes import LayerShape, distinct_layers

from .cases import Case
from .exactness import FLOOR, TF32_FLOOR, assert_as_exact_as_torch
from .gpu_memory import memory_for_one

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels, not interpreted ones"
    ),
]

DTYPES = pytest.mark.parametrize("dtype", list(FLOOR), ids=lambda dtype: str(dtype).removeprefix("torch."))

CASES = [
    Case(),
    Case(channels_last=False),
    Case(channels=48, atoms=136, stride=(2, 2)),
    Case(channels=17, atoms=21, stride=(3, 2), kernel_size=(5, 4)),
    Case(channels=3, kernel_size=(7, 7), stride=(2, 2), size=(37, 50)),
    Case(channels=3, kernel_size=(7, 7), stride=(2, 2), size=(37, 50), channels_last=False),
    Case(n_steps=4, solver="fista", mu=0.5, nonnegative=False),
    Case(n_steps=4, solver="sdnet", data_term="norm", n_dict=2),
    Case(n_steps=3, solver="ista", batch=1),
    Case(atoms=72, size=(9, 8), batch=70, n_steps=4, solver="fista", mu=0.5, nonnegative=False),
    Case(atoms=136, size=(9, 8), batch=128, stride=(2, 2), n_steps=4, solver="sdnet", data_term="norm", n_dict=2),
]
"""The last two have the batches that descriptors want."""

BATCH = 128
"""From here on all layers run with the tiles of any larger batch; half of what training takes, for fp64 has to fit."""


@pytest.fixture(autouse=True)
def _working_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test its work is done and its memory free, for the tests beside it.

    A kernel that breaks the context breaks what comes after it in its process. One of pytest-xdist's ends here, which
    blames this test, and another goes on with the next.
    """
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        capture: Any = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"{request.node.nodeid}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("steps", ["fused", "cudnn"])
@pytest.mark.parametrize("precision", ["ieee"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
@DTYPES
def test_as_exact_as_torch(
    case: Case, dtype: torch.dtype, precision: str, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    assert_as_exact_as_torch(case, dtype)


@pytest.mark.parametrize("precision", ["tf32"], indirect=True)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_tf32_as_exact_as_torch_s(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    # In dL/dlam, a sum of both signs, the rounding of thousands of products all but cancels: by chance.
    assert_as_exact_as_torch(case, torch.float32, lam_floor=2e-5, floor=TF32_FLOOR)


@pytest.mark.parametrize("precision", ["ieee"], indirect=True)
@pytest.mark.parametrize("case", [case for case in CASES if case.channels == 3], ids=str)
@DTYPES
def test_padded_stems_are_as_exact_as_torch(
    case: Case, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "padded")
    assert_as_exact_as_torch(case, dtype)


@pytest.mark.parametrize("layer", distinct_layers(), ids=str)
def test_every_layer_in_bf16(layer: LayerShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    large = max(layer.size) > 56  # some GB of tensors in fp64
    with memory_for_one() if large else nullcontext():
        assert_as_exact_as_torch(Case.of(layer, BATCH), torch.bfloat16)


def test_auto_takes_triton() -> None:
    case = Case()
    assert torch.equal(case.results(torch.bfloat16, "auto")[0], case.results(torch.bfloat16, "triton")[0])


def test_the_same_call_gives_the_same_bits() -> None:
    case = Case(batch=64)
    first, second = (case.results(torch.bfloat16, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("steps", ["fused", "cudnn"])
def test_a_training_step_in_a_cuda_graph(steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    case = Case(batch=64)
    leaves = case.leaves(torch.bfloat16)

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        codes = case.encode(*leaves)
        codes.float().square().sum().backward()
        return codes

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = run()
    fresh = torch.randn_like(leaves[0])
    with torch.no_grad():
        leaves[0].copy_(fresh)
    graph.replay()
    replayed = [tensor.detach().clone() for tensor in (codes, *(leaf.grad for leaf in leaves)) if tensor is not None]
    eager = [run(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    assert len(replayed) == 4
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_nothing_waits_for_the_device() -> None:
    case = Case(batch=64)
    expected, *_ = case.results(torch.bfloat16, "triton")
    leaves, grad = case.leaves(torch.bfloat16), case.grad(expected)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.encode(*leaves).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_tensors_past_two_to_the_31_elements(
    channels: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last samples of a large batch come out as they do alone: as many as a box of descriptors has images."""
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    with memory_for_one():
        if torch.cuda.mem_get_info()[0] < 16 * 2**30:
            pytest.skip("needs 16 GB of free memory")
        encode_past_two_to_the_31_elements(channels, channels_last)


def encode_past_two_to_the_31_elements(channels: int, channels_last: bool) -> None:
    batch, size = 2**31 // (64 * 128 * 128) + 8, (128, 128)
    case = Case(channels=channels, kernel_size=(1, 1), size=size, batch=1, channels_last=channels_last)
    _, weight, lam = (leaf.detach() for leaf in case.leaves(torch.bfloat16))
    x = torch.empty(batch, channels, *size, dtype=torch.bfloat16, device="cuda", memory_format=case.layout).normal_()
    codes = case.encode(x, weight, lam)
    assert codes.numel() > 2**31
    alone = case.encode(x[-64:].contiguous(memory_format=case.layout), weight, lam)
    assert torch.equal(codes[-64:], alone)


def test_compiled_with_inductor() -> None:
    case = Case()
    expected = case.results(torch.bfloat16, "triton")
    leaves = case.leaves(torch.bfloat16)

    def encode(x: Tensor, weight: Tensor, lam: Tensor) -> Tensor:
        return case.encode(x, weight, lam)

    codes = torch.compile(encode, fullgraph=True)(*leaves)
    codes.backward(case.grad(codes))
    for a, b in zip([codes.detach(), *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)
