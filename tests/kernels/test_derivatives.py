"""Derivatives of `csc_encode` beyond one backward pass: torch.func, forward mode, batched and higher gradients.

The right values are those of the reference in fp64, which autograd differentiates by its own rules, and of finite
differences.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hvp, jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import sdnet
from sdnet.kernels import csc_encode, explain

Encode = Callable[[Tensor], Tensor]

GENERATOR = torch.Generator().manual_seed(0)
X, TANGENT = torch.randn(2, 2, 2, 5, 5, dtype=torch.float64, generator=GENERATOR)
WEIGHT = torch.nn.functional.normalize(torch.randn(4, 18, dtype=torch.float64, generator=GENERATOR)).view(4, 2, 3, 3)


def encode(x: Tensor, weight: Tensor = WEIGHT, lam: Tensor | float = 0.1, impl: str = "auto", **options: Any) -> Tensor:
    return csc_encode(x, weight, 0.15, lam, padding=1, impl=impl, n_steps=3, **options)


def smooth(encode: Encode) -> Encode:
    """A scalar whose second derivative is not zero almost everywhere, as that of the codes themselves is."""
    return lambda x: encode(x).pow(3).sum()


def forward_mode(encode: Encode, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        codes = encode(forward_ad.make_dual(x, tangent))
        found = forward_ad.unpack_dual(codes).tangent
    assert found is not None
    return found


def forward_mode_without_gradients(encode: Encode, x: Tensor, tangent: Tensor) -> Tensor:
    with torch.no_grad():
        return forward_mode(encode, x, tangent)


def batched_gradients(encode: Encode, x: Tensor, tangent: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    codes = encode(x)
    grads = torch.stack([torch.ones_like(codes), codes.detach()])
    return torch.autograd.grad(codes, x, grads, is_grads_batched=True)[0]


def double_backward(encode: Encode, x: Tensor, tangent: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(encode)(x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


DERIVATIVES: dict[str, Callable[[Encode, Tensor, Tensor], Any]] = {
    "func.jvp": lambda f, x, t: jvp(f, (x,), (t,))[1],
    "func.vjp": lambda f, x, t: vjp(f, x)[1](f(x))[0],
    "func.grad": lambda f, x, t: grad(lambda y: f(y).square().sum())(x),
    "func.jacfwd": lambda f, x, t: jacfwd(f)(x),
    "func.jacrev": lambda f, x, t: jacrev(f)(x),
    "func.hessian": lambda f, x, t: hessian(smooth(f))(x[:1]),
    "func.vmap": lambda f, x, t: vmap(f)(torch.stack([x, t])),
    "vmap of grad": lambda f, x, t: vmap(grad(lambda y: f(y).square().sum()))(torch.stack([x, t])),
    "functional.jacobian": lambda f, x, t: jacobian(f, x),
    "functional.jacobian, vectorized": lambda f, x, t: jacobian(f, x, vectorize=True),
    "functional.jacobian, forward": lambda f, x, t: jacobian(f, x, strategy="forward-mode", vectorize=True),
    "functional.hvp": lambda f, x, t: hvp(smooth(f), x, t)[1],
    "forward mode": forward_mode,
    "forward mode without gradients": forward_mode_without_gradients,
    "batched gradients": batched_gradients,
    "double backward": double_backward,
}


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_equals_that_of_the_reference(name: str, impl: str) -> None:
    derivative = DERIVATIVES[name]
    found = derivative(lambda x: encode(x, impl=impl), X, TANGENT)
    expected = derivative(lambda x: encode(x, impl="reference"), X, TANGENT)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("argument", ["x", "weight", "lam"])
def test_the_forward_mode_derivative_is_the_finite_difference(argument: str) -> None:
    arguments: dict[str, Any] = {"x": X, "weight": WEIGHT, "lam": torch.tensor(0.1, dtype=torch.float64)}
    tangent = torch.randn(arguments[argument].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def along(step: float | Tensor) -> Tensor:
        return encode(**{**arguments, argument: arguments[argument] + step * tangent})

    with forward_ad.dual_level():
        step = forward_ad.make_dual(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
        found = forward_ad.unpack_dual(along(step)).tangent
    assert found is not None
    difference = (along(1e-6) - along(-1e-6)) / 2e-6
    torch.testing.assert_close(found, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("data_term", ["squared", "norm"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_gradient_penalty_reaches_dictionary_and_lambda(per_sample: bool, data_term: str) -> None:
    found = []
    for impl in ("torch", "reference"):
        x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        lam = torch.full((2,) if per_sample else (), 0.1, dtype=torch.float64, requires_grad=True)
        codes = encode(x, weight, lam, impl, mu=0.3, data_term=data_term)
        (gradient,) = torch.autograd.grad(codes.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), (x, weight, lam)))
    for actual, expected in zip(*found, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_dictionary_used_twice_gets_each_derivative_once() -> None:
    """The second call's input depends on the dictionary: its derivative must not be counted in both calls."""
    square = WEIGHT[:2].clone()
    found = []
    for impl in ("torch", "reference"):
        weight = square.clone().requires_grad_()
        codes = encode(encode(X, weight, 0.01, impl), weight, 0.01, impl)
        (gradient,) = torch.autograd.grad(codes.pow(3).sum(), weight, create_graph=True)
        found.append((gradient.detach(), torch.autograd.grad(gradient.square().sum(), weight)[0]))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_per_sample_gradients_of_a_network() -> None:
    """Vmapped gradients of all parameters, as differential privacy and influence functions take them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        sdnet.CSCConv2d(2, 4, 3, input_size=5, lam=0.02), torch.nn.Flatten(), torch.nn.Linear(100, 3)
    ).double()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for n, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][n], parameter.grad)


@pytest.mark.parametrize("name", ["func.jvp", "func.grad", "func.vmap", "forward mode"])
def test_the_triton_kernels_refuse_what_they_have_no_rule_for(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"is 'triton', but its kernels have no rule for .*; use impl='ref"):
        DERIVATIVES[name](lambda x: encode(x.float(), WEIGHT.float(), impl="triton"), X, TANGENT)


def test_explain_says_that_the_reference_is_taken() -> None:
    told: list[str] = []

    def told_by(x: Tensor) -> Tensor:
        told.append(explain(x, WEIGHT, 0.15, 0.1, padding=1))
        return encode(x)

    vmap(told_by)(X[None])
    forward_mode(told_by, X, TANGENT)
    assert told == [
        "reference: only the reference has a rule for the transforms of torch.func.",
        "reference: only the reference has a rule for forward-mode derivatives.",
    ]


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_compiled_transform_equals_the_eager_one(transform: str) -> None:
    torch.compiler.reset()
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "grad": grad(lambda x: encode(x).square().sum()),
        "vmap": lambda x: vmap(encode)(torch.stack([x, TANGENT])),
        "jvp": lambda x: jvp(encode, (x[:1],), (TANGENT[:1],))[1],
    }
    compiled = torch.compile(calls[transform], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), calls[transform](X), rtol=1e-10, atol=1e-12)


def test_a_call_with_constants_within_a_transform() -> None:
    weight = WEIGHT.clone().requires_grad_()
    expected = encode(X, weight)
    derivative = jvp(lambda scale: encode(X, weight) * scale, (torch.ones(()),), (torch.full((), 2.0),))[1]
    torch.testing.assert_close(derivative, 2 * expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vmap(lambda scale: encode(X, weight) * scale)(torch.ones(1))[0], expected)


@pytest.fixture(scope="module")
def exported() -> Callable[[Tensor], Tensor]:
    layer = sdnet.CSCConv2d(2, 4, 3, input_size=5, dtype=torch.float64)
    return torch.export.export(layer, (X,)).module()


REFUSED_IN_EXPORTS: dict[str, str] = {
    "func.jvp": "the transforms of torch.func",
    "func.grad": "the transforms of torch.func",
    "func.jacrev": "the transforms of torch.func",
    "forward mode": "forward-mode derivatives",
    "forward mode without gradients": "forward-mode derivatives",
}


@pytest.mark.parametrize("name", REFUSED_IN_EXPORTS)
def test_an_exported_layer_refuses_what_its_operator_has_no_rule_for(name: str, exported: Encode) -> None:
    with pytest.raises(
        NotImplementedError, match=rf'no rule for {REFUSED_IN_EXPORTS[name]}; .* after sdnet.set_impl\(model, "refe'
    ):
        DERIVATIVES[name](exported, X, TANGENT)


@pytest.mark.parametrize("name", ["func.vmap", "double backward", "batched gradients"])
def test_other_derivatives_of_an_exported_layer_are_right(name: str, exported: Any) -> None:
    layer = sdnet.CSCConv2d(2, 4, 3, input_size=5, dtype=torch.float64, impl="reference")
    layer.load_state_dict(exported.state_dict(), strict=False)
    layer.step_size.copy_(exported.step_size)
    found, expected = (DERIVATIVES[name](encode, X, TANGENT) for encode in (exported, layer))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["batched gradients", "func.jvp", "func.grad"])
def test_derivatives_of_a_compiled_function_are_right_or_refused(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(encode, backend="aot_eager")
    if name == "batched gradients":
        with pytest.raises(NotImplementedError, match="no rule for batched gradients"):
            DERIVATIVES[name](compiled, X, TANGENT)
    else:
        found, expected = (DERIVATIVES[name](function, X, TANGENT) for function in (compiled, encode))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_no_gradient_reaches_the_step_size(impl: str) -> None:
    step_size = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
    codes = csc_encode(X, WEIGHT, step_size, 0.1, padding=1, impl=impl)
    assert not codes.requires_grad
