"""Which implementation a call takes, and what it says of itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdnet.kernels import csc_encode, dispatch, explain
from sdnet.kernels.dispatch import ENVIRONMENT_VARIABLE, choose

X, WEIGHT = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


class OnGPU:
    """What `choose` asks of a tensor, answered as a tensor on a GPU would."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, like: Tensor) -> None:
        self.dtype, self.shape = like.dtype, like.shape


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """An x that claims to lie on a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    x: object = OnGPU(X)
    return x  # pyright: ignore[reportReturnType]


def test_auto_takes_the_torch_path_on_a_cpu_and_gives_the_reason() -> None:
    assert choose("auto", X, WEIGHT) == ("torch", "auto takes the torch path for tensors on cpu")


def test_auto_takes_what_has_been_qualified_on_a_gpu(on_gpu: Tensor) -> None:
    assert choose("auto", on_gpu, WEIGHT) == ("auto", "auto takes what has been qualified on this GPU")


def test_auto_falls_back_on_a_gpu_and_says_so_once(on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_is_installed", lambda _: False)
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="auto takes the torch path: Triton is not installed") as caught:
        choices = [choose("auto", on_gpu, WEIGHT) for _ in range(2)]
    assert [choice.impl for choice in choices] == ["torch", "torch"]
    assert len(caught) == 1


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_an_implementation_asked_for_is_taken(impl: str) -> None:
    choice = choose(impl, X, WEIGHT)
    assert choice.impl == impl
    assert choice.reason == "the argument impl asks for it"


def test_the_environment_overrides_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    choice = choose("auto", X, WEIGHT)
    assert choice.impl == "reference"
    assert ENVIRONMENT_VARIABLE in choice.reason


def test_the_environment_does_not_override_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose("torch", X, WEIGHT).impl == "torch"


def test_an_unknown_implementation_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="the argument impl is 'cuda'; it must be one of auto, torch, reference, triton"
    ):
        choose("cuda", X, WEIGHT)


def test_an_unknown_implementation_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"the environment variable {ENVIRONMENT_VARIABLE} is 'cuda'"):
        choose("auto", X, WEIGHT)


@pytest.mark.parametrize(
    ("x", "weight", "interpreted", "sentence"),
    [
        (X, WEIGHT, "0", "x is on cpu: its kernels need a CUDA device, or TRITON_INTERPRET=1 in the environment"),
        (X.double(), WEIGHT.double(), "1", "its kernels compute in float16, bfloat16, float32, not in float64"),
        (X.bfloat16(), WEIGHT.bfloat16(), "1", "Triton's interpreter gets bfloat16 wrong"),
        (torch.zeros(1, 2, 20, 20), torch.zeros(3, 2, 17, 1), "1", "atoms are 17x1, and its kernels reach 16x16"),
        (
            torch.zeros(1, 1, 1, 1).expand(1, 2, 2**15, 2**15),
            WEIGHT,
            "1",
            "a sample has more than the 1073741824",
        ),
    ],
    ids=["cpu", "fp64", "bf16", "large atoms", "large sample"],
)
def test_triton_says_what_it_cannot_do(
    x: Tensor, weight: Tensor, interpreted: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(NotImplementedError, match=f"the argument impl is 'triton', but {sentence}"):
        choose("triton", x, weight)


def test_triton_refuses_codes_that_padding_makes_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", X, WEIGHT, padding=(100, 100)).impl == "triton"
    with pytest.raises(NotImplementedError, match="a sample has more than the 1073741824 elements"):
        choose("triton", X, WEIGHT, padding=(10000, 10000))


def test_a_call_that_triton_cannot_do_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NotImplementedError, match="x is on cpu"):
        csc_encode(X, WEIGHT, 0.1, 0.1, impl="triton")


@pytest.mark.parametrize("call", [csc_encode, explain], ids=["csc_encode", "explain"])
def test_the_error_names_who_asked(call: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(NotImplementedError, match=r"^the environment variable SDNET_IMPL is 'triton', but x is on cpu"):
        call(X, WEIGHT, 0.1, 0.1)
    with pytest.raises(NotImplementedError, match=r"^the argument impl is 'triton', but x is on cpu"):
        call(X, WEIGHT, 0.1, 0.1, impl="triton")


def test_the_choice_of_the_forward_pass_is_that_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that changes between the two has no effect, nor has one that is wrong by then."""
    weight = WEIGHT.clone().requires_grad_()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    codes = csc_encode(X + 1, weight, 0.1, 0.01)
    for name in (ENVIRONMENT_VARIABLE, "SDNET_TRITON_PATH", "SDNET_KEEP_RESIDUALS"):
        monkeypatch.setenv(name, "nonsense")
    (found,) = torch.autograd.grad(codes.sum(), weight)
    (expected,) = torch.autograd.grad(
        csc_encode(X + 1, weight, 0.1, 0.01, impl="reference", keep_residuals=True).sum(), weight
    )
    torch.testing.assert_close(found, expected)


def test_a_compiled_call_keeps_the_choice_of_its_trace() -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(lambda x: csc_encode(x, WEIGHT, 0.1, 0.1), backend=note, fullgraph=True)
    torch.testing.assert_close(compiled(X + 1), csc_encode(X + 1, WEIGHT, 0.1, 0.1))
    assert "'torch'" in graphs[0]


def test_explain_names_the_implementation_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(X, WEIGHT, 0.1, 0.1) == "torch: auto takes the torch path for tensors on cpu."
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    expected = "triton: the argument impl asks for it; SDNET_TRITON_PATH asks for the fused path; A' in tiles of few "
    assert explain(X, WEIGHT, 0.1, 0.1, impl="triton").startswith(expected)
    monkeypatch.delenv("SDNET_TRITON_PATH")
    wide = WEIGHT.half().repeat(1, 9, 1, 1)
    assert "the cudnn path, by rule" in explain(X.half(), wide, 0.1, 0.1, n_dict=9, impl="triton")


def test_explain_refuses_what_csc_encode_refuses() -> None:
    with pytest.raises(ValueError, match="n_steps is 0"):
        explain(X, WEIGHT, 0.1, 0.1, n_steps=0)


def test_an_amd_or_an_old_gpu_is_an_obstacle_to_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the update of the dictionaries too, which asks the same function."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    obstacle = dispatch.obstacle_of(gpu, torch.float32)
    assert obstacle == "its kernels need compute capability 8.0, and Tesla T4 has less"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert dispatch.obstacle_of(gpu, torch.float32) == "its kernels are for NVIDIA GPUs, and this is an AMD one"
