"""`CSCConv2d`: what it computes, what it keeps, and what it leaves alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdnet import CSCConv2d
from sdnet.bench.official import DictConv2d, OfficialConfig
from sdnet.kernels import csc_encode
from sdnet.kernels.coding import Coding


def images(batch: int = 2, channels: int = 3, size: tuple[int, int] = (9, 8)) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def layer(seed: int = 0, **options: Any) -> CSCConv2d:
    """A small layer; its input size is 9x8 unless told."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "input_size": (9, 8)}
    return CSCConv2d(**arguments | options)


def bits(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def largest_eigenvalue(csc: CSCConv2d, size: tuple[int, int]) -> float:
    """Of A'A on inputs of `size`, by a dense SVD in fp64."""
    channels = csc.weight.shape[1]
    basis = torch.eye(channels * size[0] * size[1], dtype=torch.float64).view(-1, channels, *size)
    matrix = F.conv2d(basis, csc.weight.detach().double(), stride=csc.stride, padding=csc.padding).flatten(1)
    return torch.linalg.matrix_norm(matrix, 2).item() ** 2


def test_forward_is_the_operator_with_the_layers_own_state() -> None:
    csc = layer(stride=(2, 1), padding=(0, 1), n_steps=3, lam=0.2, mu=0.3, nonnegative=False, solver="ista", n_dict=2)
    x = images()
    codes = csc(x)
    expected = csc_encode(
        x,
        csc.weight,
        csc.step_size,
        0.2,
        stride=(2, 1),
        padding=(0, 1),
        n_steps=3,
        mu=0.3,
        nonnegative=False,
        solver="ista",
        n_dict=2,
    )
    torch.testing.assert_close(codes, expected, rtol=0, atol=0)
    assert 0.1 < (codes != 0).float().mean() < 0.99
    norm = layer(data_term="norm", n_steps=2)
    expected = csc_encode(x, norm.weight, norm.step_size, 0.1, padding=1, data_term="norm")
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=0)


def test_the_default_padding_keeps_the_size() -> None:
    assert layer(kernel_size=(5, 3))(images()).shape == (2, 8, 9, 8)
    assert layer(kernel_size=(5, 3), padding=0)(images()).shape == (2, 8, 5, 6)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"n_dict": 2, "kernel_size": 5}, {"out_channels": 64}], ids=str)
def test_a_fresh_layer_has_unit_atoms_and_a_safe_step(options: dict[str, Any]) -> None:
    csc = layer(**options)
    norms = csc.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert 0.9 <= csc.step_size.item() * largest_eigenvalue(csc, (9, 8)) < 1.05
    assert csc.power_vector.shape == (1, csc.coding.n_dict * 3, 9, 8)
    assert csc.power_vector.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_changes_nothing(training: bool) -> None:
    csc = layer().train(training)
    csc.weight.data *= 1.3  # off the unit sphere: a forward that projects would show
    before, codes = bits(csc), csc(images())
    codes.sum().backward()
    assert bits(csc) == before
    torch.testing.assert_close(csc(images()), codes, rtol=0, atol=0)


def test_a_new_power_vector_does_not_depend_on_the_global_seed_or_change_it() -> None:
    one, other = layer(seed=1), layer(seed=2)
    assert not torch.equal(one.weight, other.weight)
    state = torch.get_rng_state()
    one.reset_power_vector()
    other.reset_power_vector()
    assert torch.equal(one.power_vector, other.power_vector)
    assert torch.equal(torch.get_rng_state(), state)
    one.reset_power_vector((5, 4))
    assert one.power_vector.shape == (1, 3, 5, 4)


@pytest.mark.parametrize("input_size", [(9, 8), 16], ids=["same grid", "another grid"])
def test_the_state_dict_carries_every_bit_to_another_layer(input_size: int | tuple[int, int]) -> None:
    saved, fresh = layer(seed=1), layer(seed=2, input_size=input_size)
    saved.weight.data *= 1.1  # loading must not project
    assert list(saved.state_dict()) == ["weight", "step_size", "power_vector"]
    assert bits(fresh) != bits(saved)
    fresh.load_state_dict(saved.state_dict())
    assert bits(fresh) == bits(saved)
    torch.testing.assert_close(fresh(images()), saved(images()), rtol=0, atol=0)


@pytest.mark.parametrize(("stride", "size"), [(1, (9, 8)), (2, (9, 8)), (2, (10, 7)), (3, (9, 10)), ((2, 1), (8, 8))])
def test_reconstruct_is_the_adjoint_on_any_input_size(stride: int | tuple[int, int], size: tuple[int, int]) -> None:
    """<A z, x> = <z, A'x>."""
    csc = layer(stride=stride, n_dict=2)
    x = images(channels=6, size=size)
    correlations = F.conv2d(x, csc.weight, stride=csc.stride, padding=csc.padding)
    codes = torch.randn_like(correlations)
    pixels = csc.reconstruct(codes, size)
    assert pixels.shape == x.shape
    torch.testing.assert_close((pixels * x).sum(), (codes * correlations).sum(), rtol=1e-4, atol=1e-3)


def test_reconstruct_takes_the_stride_times_the_codes_size_by_default() -> None:
    assert layer(stride=2).reconstruct(torch.randn(2, 8, 4, 5)).shape == (2, 3, 8, 10)
    assert layer().reconstruct(torch.randn(2, 8, 4, 5)).shape == (2, 3, 4, 5)


def test_reconstruct_names_the_possible_sizes() -> None:
    with pytest.raises(ValueError, match=r"size is \[12, 10\]; .* stand for inputs of \[7, 9\] to \[8, 10\]"):
        layer(stride=2).reconstruct(torch.randn(2, 8, 4, 5), (12, 10))


@pytest.mark.parametrize("data_term", ["squared", "norm"])
def test_the_objective_is_its_formula_sample_by_sample(data_term: str) -> None:
    csc = layer(stride=2, lam=0.2, mu=0.5, n_dict=2, data_term=data_term)
    x = images()
    codes = csc(x)
    error = torch.cat([x, x], dim=1) - csc.reconstruct(codes, (9, 8))
    for lam in (torch.tensor(0.2), torch.tensor([0.3, 0.6])):
        csc.lam = lam
        expected = []
        for n in range(2):
            squares = error[n].square().sum()
            data = squares / 2 if data_term == "squared" else squares.sqrt()
            weight = lam if lam.ndim == 0 else lam[n]
            expected.append(weight * codes[n].abs().sum() + 0.25 * codes[n].square().sum() + data)
        torch.testing.assert_close(csc.objective(x, codes), torch.stack(expected))


def test_more_steps_lower_the_objective() -> None:
    x, csc = images(), layer(solver="ista")
    values = []
    for n_steps in (1, 2, 5, 20):
        csc.coding = Coding(n_steps)
        values.append(csc.objective(x, csc(x)).sum().item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (7, 2)])
def test_adaptive_lambda_scales_with_the_number_of_pixels_per_code(kernel_size: int, stride: int) -> None:
    csc = layer(out_channels=64, kernel_size=kernel_size, stride=stride, input_size=32, adaptive_lam=True)
    assert csc.lam.item() == pytest.approx(0.1 * 3 / 64 * stride**2)

    official = DictConv2d(3, 64, kernel_size, stride, OfficialConfig(adaptive_lambda=True))
    official.load_state_dict({"weight": csc.weight, "step_size": csc.step_size})
    x = images(size=(32, 32))
    torch.testing.assert_close(csc(x), official(x), rtol=1e-4, atol=1e-6)


def gradients(csc: CSCConv2d, loss: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, csc.weight)
    assert gradient.abs().max() > 0
    return gradient


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    csc, x = layer(), images().requires_grad_()
    plain = torch.autograd.grad(csc(x).square().sum(), (x, csc.weight))
    recomputed = checkpoint(csc, x, use_reentrant=False)
    assert isinstance(recomputed, Tensor)
    for actual, expected in zip(torch.autograd.grad(recomputed.square().sum(), (x, csc.weight)), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_two_forwards_before_one_backward_give_the_sum_of_the_gradients() -> None:
    csc, one, other = layer(), images(), images().flip(0) * 2
    apart = gradients(csc, csc(one).square().sum()) + gradients(csc, csc(other).square().sum())
    first, second = csc(one), csc(other)
    torch.testing.assert_close(gradients(csc, first.square().sum() + second.square().sum()), apart)


def test_the_objective_takes_lambda_under_vmap_and_in_a_compiled_function() -> None:
    csc, x, lam = layer(), images(), torch.tensor([0.1, 0.3])
    codes = csc(x).detach()
    expected = csc.objective(x, codes, lam)
    each = torch.func.vmap(lambda a, z, of: csc.objective(a[None], z[None], of)[0])(x, codes, lam)
    torch.testing.assert_close(each, expected)
    compiled = torch.compile(csc.objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, codes, lam), expected)
