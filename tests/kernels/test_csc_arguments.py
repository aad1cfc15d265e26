"""What `csc_encode` says to arguments that make no sense: one sentence with the argument, its value and the rule."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sdnet.kernels import arguments, csc, csc_encode, explain, step_size
from sdnet.kernels.reference import Pair


def encode_with(function: Callable[..., Any] = csc_encode, **changed: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 3, 8, 8),
        "weight": torch.ones(4, 3, 3, 3),
        "step_size": 0.1,
        "lam": 0.1,
    }
    return lambda: function(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"x": torch.ones(3, 8, 8)}, r"x has shape \[3, 8, 8\].*must be \[N, C, H, W\]"),
        ({"weight": torch.ones(4, 3, 3)}, r"weight \[4, 3, 3\].*\[K, n_dict C, kh, kw\]"),
        (
            {"weight": torch.ones(4, 2, 3, 3)},
            "x has 3 channels and n_dict is 1, but the atoms of weight have 2 channels",
        ),
        ({"n_dict": 2}, "n_dict is 2, but the atoms of weight have 3 channels; they must have n_dict times"),
        ({"n_dict": 0}, "n_dict is 0; it must be an int of at least 1"),
        ({"x": torch.ones(2, 3, 8, 8, dtype=torch.int64)}, "x is torch.int64.*floating-point"),
        ({"weight": torch.ones(4, 3, 3, 3, dtype=torch.float64)}, "x is torch.float32 and weight torch.float64"),
        ({"weight": torch.ones(4, 3, 3, 3, device="meta")}, "x is on cpu and weight on meta"),
        ({"x": torch.ones(2, 3, 8, 8).to_sparse()}, "x is of layout torch.sparse_coo; it must be a dense tensor"),
        ({"weight": torch.ones(4, 3, 3, 3).to_mkldnn()}, "weight is of layout torch._mkldnn; it must be a dense"),
        ({"weight": torch.ones(0, 3, 3, 3)}, r"weight has shape \[0, 3, 3, 3\]; it must hold at least one atom"),
        ({"x": torch.ones(2, 3, 8, 8).to(torch.float8_e4m3fn)}, "x is torch.float8_e4m3fn .* of 16, 32 or 64 bits"),
        ({"lam": torch.tensor(True)}, "lam is torch.bool; it must be real"),
        ({"step_size": torch.tensor(True)}, "step_size is torch.bool; it must be real"),
        ({"step_size": torch.ones((), device="meta")}, "step_size is on the meta device and has no value"),
        ({"lam": torch.ones(2).to_sparse()}, "lam is of layout torch.sparse_coo; it must be a dense tensor"),
        ({"lam": 10**400}, r"lam is 10+\.\.\.; it must be at most 3.40282e\+38, the largest of fp32"),
        ({"step_size": 1e300}, r"step_size is 1e\+300; it must be at most 3.40282e\+38"),
        ({"lam": torch.full((2,), 1e300, dtype=torch.float64)}, r"lam holds 1e\+300; its values must be finite"),
        ({"x": torch.ones(2, 3, 8, 2)}, r"x padded to \[8, 2\] is smaller than the atoms"),
        ({"x": torch.ones(2, 3, 0, 8), "padding": 2}, r"x has shape \[2, 3, 0, 8\]; its images must have at least one"),
        ({"step_size": -0.1}, "step_size is -0.1; it must be a finite number of at least 0"),
        ({"step_size": torch.ones(2)}, r"step_size has shape \[2\].*must be 0-d"),
        ({"lam": -0.1}, "lam is -0.1; it must be a finite number of at least 0"),
        ({"lam": float("nan")}, "lam is nan"),
        ({"lam": "0.1"}, "lam is '0.1'; it must be a finite number of at least 0"),
        ({"lam": None}, "lam is None; it must be a finite number of at least 0"),
        ({"lam": [0.1, 0.2]}, r"lam is \[0.1, 0.2\]; it must be a finite number of at least 0"),
        ({"lam": torch.tensor(-0.1)}, "lam holds -0.1; its values must be finite and at least 0"),
        ({"lam": torch.tensor([0.1, -2.0])}, "lam holds -2; its values must be finite and at least 0"),
        ({"lam": torch.tensor([0.1, float("inf")])}, "lam holds inf; its values must be finite and at least 0"),
        ({"lam": torch.tensor([float("nan"), 0.1])}, "lam holds nan; its values must be finite and at least 0"),
        ({"lam": torch.tensor(1j)}, "lam is torch.complex64; it must be real"),
        ({"step_size": torch.tensor(-1.0)}, "step_size holds -1; its values must be finite and at least 0"),
        ({"step_size": torch.tensor(float("nan"))}, "step_size holds nan; its values must be finite and at least 0"),
        ({"step_size": None}, "step_size is None; it must be a finite number of at least 0"),
        ({"step_size": True}, "step_size is True; it must be a finite number of at least 0"),
        ({"x": None}, r"x is of type NoneType; it must be a Tensor \[N, C, H, W\]"),
        ({"x": np.ones((2, 3, 8, 8))}, r"x is of type ndarray; it must be a Tensor \[N, C, H, W\]"),
        ({"weight": [1.0]}, r"weight is of type list; it must be a Tensor \[K, n_dict C, kh, kw\]"),
        ({"x": torch.ones(2, 3, 8, 8, dtype=torch.complex64)}, "x is torch.complex64.*floating-point"),
        ({"n_steps": 2.5}, "n_steps is 2.5; it must be an int of at least 1"),
        ({"nonnegative": "no"}, "nonnegative is 'no'; it must be True or False"),
        ({"keep_residuals": 1}, "keep_residuals is 1; it must be True or False"),
        ({"stride": 1.0}, "stride is 1.0; it must be an int or a pair of ints of at least 1"),
        ({"stride": True}, "stride is True; it must be an int or a pair of ints of at least 1"),
        ({"padding": "same"}, "padding is 'same'; it must be an int or a pair of ints of at least 0"),
        ({"padding": None}, "padding is None; it must be an int or a pair of ints of at least 0"),
        ({"lam": torch.ones(3)}, r"lam has shape \[3\].*must be 0-d, \[2\] or \[2, 1, 1, 1\]"),
        ({"lam": torch.ones(1, 5, 1, 1)}, r"lam has shape \[1, 5, 1, 1\].*\[1, 4, 1, 1\] per atom"),
        ({"lam": torch.ones(3, 4, 1, 1)}, r"lam has shape \[3, 4, 1, 1\].*or \[2, 4, 1, 1\]"),
        ({"lam": torch.ones(1, 1, 1, 1)}, r"lam has shape \[1, 1, 1, 1\]"),
        ({"z0": 0.0}, "z0 is 0.0; it must be a tensor of codes, or None"),
        ({"z0": torch.zeros(2, 4, 8, 8)}, r"z0 has shape \[2, 4, 8, 8\]; it must be that of the codes, \[2, 4, 6, 6\]"),
        (
            {"z0": torch.zeros(2, 4, 6, 6, dtype=torch.int64)},
            "z0 is torch.int64 on cpu; it must be of a floating-point",
        ),
        ({"tolerance": -1.0}, "tolerance is -1.0; it must be a finite number of at least 0"),
        ({"tolerance": "1e-3"}, "tolerance is '1e-3'; it must be a finite number of at least 0"),
        ({"callback": 3}, "callback is 3; it must be a function, or None"),
        ({"prox": "l0"}, "prox is 'l0'; it must be a function, or None"),
        ({"prox": torch.sub, "mu": 0.5}, "mu is 0.5 and prox is given; prox stands for the whole penalty"),
        ({"mu": -1.0}, "mu is -1.0; it must be a finite number of at least 0"),
        ({"n_steps": 0}, "n_steps is 0; it must be an int of at least 1"),
        ({"stride": 0}, "stride is 0; it must be an int or a pair of ints of at least 1"),
        ({"stride": (1, 2, 3)}, r"stride is \(1, 2, 3\); it must be an int or a pair"),
        ({"padding": (1, -1)}, r"padding is \(1, -1\); it must be an int or a pair of ints of at least 0"),
        ({"solver": "lista"}, "solver is 'lista'; it must be one of ista, fista, sdnet"),
        ({"data_term": "huber"}, "data_term is 'huber'; it must be one of squared, norm"),
        ({"impl": "cuda"}, "impl is 'cuda'; it must be one of auto, torch, reference, triton"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_get_one_sentence(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        encode_with(**changed)()
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=sentence) as explained:
        encode_with(explain, **changed)()
    assert str(explained.value) == str(caught.value)


def test_numpy_integers_are_accepted_where_ints_are() -> None:
    found = encode_with(
        stride=np.int64(2), padding=(np.int32(1), np.int8(1)), n_steps=np.int64(3), n_dict=np.uint8(1)
    )()
    torch.testing.assert_close(found, encode_with(stride=2, padding=1, n_steps=3)())


def test_explain_reads_the_values_that_csc_encode_does_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensors were on a GPU, whose values csc_encode does not read."""
    monkeypatch.setattr(arguments, "_has_values", lambda _: False)
    changed: dict[str, Any] = {"lam": torch.tensor([0.1, -0.5])}
    assert encode_with(**changed)().isfinite().all()
    with pytest.raises(ValueError, match="lam holds -0"):
        encode_with(explain, **changed)()


def test_a_trace_and_a_compiled_call_do_not_read_values() -> None:
    def call(lam: Tensor) -> Tensor:
        return csc_encode(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), 0.1, lam)

    lam = torch.tensor([0.1, 0.2])
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(lam), call(lam))
    torch.testing.assert_close(make_fx(call)(lam)(lam), call(lam))


@pytest.mark.parametrize(
    "lam", [torch.arange(12.0)[::4], torch.tensor([0.3]).expand(3), torch.ones(3, 2)[:, 1]], ids=str
)
def test_the_operator_gets_a_dense_lambda_per_sample(lam: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels read it as dense memory."""
    seen: list[Tensor] = []
    forward = csc.csc_operator
    monkeypatch.setattr(csc, "csc_operator", lambda *args: (seen.append(args[3]), forward(*args))[1])
    x = torch.ones(3, 3, 8, 8)
    torch.testing.assert_close(encode_with(x=x, lam=lam)(), encode_with(x=x, lam=lam.clone())())
    assert all(tensor.stride() == (1, 1, 1, 1) and tensor.shape == (3, 1, 1, 1) for tensor in seen)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"weight": [[1.0]]}, r"weight is .*; it must be a floating-point tensor \[K, n_dict C, kh, kw\]"),
        ({"weight": torch.ones(4, 3, 3)}, r"weight is torch.float32 \[4, 3, 3\]; it must be"),
        ({"weight": torch.ones(0, 3, 3, 3)}, r"weight is torch.float32 \[0, 3, 3, 3\]; it must be"),
        ({"weight": torch.ones(4, 3, 3, 3, device="meta")}, "weight is on the meta device and has no values"),
        (
            {"weight": torch.full((4, 3, 3, 3), 1e30)},
            r"weight holds values of up to 1e\+30; they must be at most 1e\+15",
        ),
        ({"tolerance": "1e-3"}, "tolerance is '1e-3'; it must be a finite number of at least 0"),
        ({"tolerance": float("nan")}, "tolerance is nan; it must be a finite number of at least 0"),
        ({"tolerance": 2}, "tolerance is 2; it must be a number of at least 0 and below 1"),
        ({"image_size": 0}, "image_size is 0; it must be an int or a pair of ints of at least 1"),
        ({"image_size": "32"}, "image_size is '32'; it must be an int or a pair of ints of at least 1"),
        ({"image_size": 2}, r"image_size is \[2, 2\] with padding \[0, 0\], too small for atoms of \[3, 3\]"),
        ({"stride": 0}, "stride is 0; it must be an int or a pair of ints of at least 1"),
        ({"weight": torch.full((4, 3, 3, 3), float("nan"))}, "weight holds NaN or infinite values"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_step_size_get_one_sentence(changed: dict[str, Any], sentence: str) -> None:
    arguments = {"weight": torch.ones(4, 3, 3, 3), "image_size": 8, **changed}
    with pytest.raises(ValueError, match=sentence):
        step_size(**arguments)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "image_size"), [((3, 3), 1, 1, (6, 5)), ((3, 2), (2, 1), (0, 1), (7, 6))]
)
def test_the_step_size_is_that_of_the_dense_matrix(
    kernel_size: Pair, stride: int | Pair, padding: int | Pair, image_size: Pair
) -> None:
    weight = torch.randn(4, 2, *kernel_size, generator=torch.Generator().manual_seed(0))
    images = torch.eye(2 * image_size[0] * image_size[1], dtype=torch.float64).view(-1, 2, *image_size)
    columns = torch.nn.functional.conv2d(images, weight.double(), stride=stride, padding=padding).flatten(1)
    expected = 0.9 / torch.linalg.matrix_norm(columns, 2) ** 2
    found = step_size(weight, image_size, stride, padding)
    assert found.ndim == 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_residuals_are_kept_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_KEEP_RESIDUALS", "yes")
    with pytest.raises(ValueError, match="SDNET_KEEP_RESIDUALS is 'yes'; it must be 1 or 0"):
        encode_with()()


def test_the_arguments_of_the_error_cases_are_sound_by_themselves() -> None:
    assert encode_with()().shape == (2, 4, 6, 6)


def test_a_step_size_of_inference_mode_lets_gradients_pass() -> None:
    weight = torch.ones(4, 3, 3, 3, requires_grad=True)
    with torch.inference_mode():
        step = step_size(weight, 8)
    codes = csc_encode(torch.ones(2, 3, 8, 8), weight, step, 0.1)
    codes.sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
