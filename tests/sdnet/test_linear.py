"""`CSCLinear`: the same problem for vectors, against scikit-learn, and what it shares with the layer for images."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import SparseCoder
from torch import Tensor, nn

import sdnet
from sdnet import CSCConv2d, CSCLinear


def layer(**options: Any) -> CSCLinear:
    torch.manual_seed(0)
    return CSCLinear(6, 10, **options)


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(5,), (5, 7)], ids=["[N, D]", "[N, T, D]"])
@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_codes_are_those_of_scikit_learn(shape: tuple[int, ...], nonnegative: bool) -> None:
    csc, x = layer(n_steps=3000, lam=0.2, nonnegative=nonnegative).double(), vectors(*shape).double()
    sdnet.refresh_step_size(csc)
    coder = SparseCoder(
        csc.weight.detach().flatten(1).numpy(),
        transform_algorithm="lasso_lars",
        transform_alpha=0.2,
        positive_code=nonnegative,
        transform_max_iter=10_000,
    )
    codes = csc(x).detach()
    assert codes.shape == (*shape, 10)
    assert codes.is_contiguous()
    assert 0.1 < (codes != 0).double().mean() < 0.9
    np.testing.assert_allclose(codes.flatten(0, -2), coder.transform(x.flatten(0, -2).numpy()), atol=1e-5)


def test_every_token_is_coded_by_itself() -> None:
    csc, x = layer(n_steps=4), vectors(3, 5)
    torch.testing.assert_close(csc(x), csc(x.flatten(0, 1)).view(3, 5, 10))
    torch.testing.assert_close(csc(x[:, 2]), csc(x)[:, 2])


def test_reconstruction_objective_and_diagnostics_are_their_formulas() -> None:
    csc, x = layer(n_dict=2, mu=0.3, lam=0.2), vectors(3, 5)
    codes = csc(x)
    atoms = csc.weight[:, :, 0, 0]
    torch.testing.assert_close(csc.reconstruct(codes), codes @ atoms)
    torch.testing.assert_close(csc.reconstruct(codes[:, 0]), codes[:, 0] @ atoms)
    squares = (torch.cat([x, x], dim=-1) - codes @ atoms).square().sum((1, 2))
    expected = 0.2 * codes.abs().sum((1, 2)) + 0.15 * codes.square().sum((1, 2)) + squares / 2
    torch.testing.assert_close(csc.objective(x, codes), expected)
    found = sdnet.diagnose(nn.Sequential(csc), x)["0"]
    torch.testing.assert_close(found.objective, expected)
    torch.testing.assert_close(found.residual, squares / 2)


def test_it_learns_with_attach_and_keeps_a_safe_step_size() -> None:
    csc, x = layer(n_steps=10, lam=0.05, nonnegative=False), vectors(64)
    optimizer = torch.optim.Adam(csc.parameters(), lr=0.05)
    sdnet.attach(csc, optimizer)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = csc.objective(x, csc(x)).mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
    torch.testing.assert_close(csc.weight.flatten(1).norm(dim=1), torch.ones(10))
    largest = np.linalg.norm(csc.weight.detach().flatten(1).numpy(), 2) ** 2
    assert csc.step_size.item() * largest == pytest.approx(0.9, abs=0.05)


def test_it_solves_with_a_tolerance_a_start_and_a_callback_in_its_own_shapes() -> None:
    csc, x = layer(lam=0.2), vectors(3, 5)
    seen: list[torch.Size] = []
    codes, n_steps = csc.solve(x, n_steps=2000, tolerance=1e-6, callback=lambda _, z: seen.append(z.shape))
    assert 2 < n_steps < 2000
    assert seen == [torch.Size([3, 5, 10])] * n_steps
    again = csc.solve(x, n_steps=50, tolerance=1e-4, z0=codes)
    assert again.n_steps == 1
    torch.testing.assert_close(again.codes, codes, rtol=1e-3, atol=1e-4)


def test_a_lambda_per_sample_holds_for_all_its_tokens() -> None:
    csc, x = layer(), vectors(2, 5)
    torch.testing.assert_close(csc(x, torch.tensor([0.1, 0.5]))[1], csc(x[1:], 0.5)[0])


def test_it_is_a_csc_layer_everywhere_else() -> None:
    model = nn.Sequential(layer(), nn.LayerNorm(10), nn.Linear(10, 2))
    assert isinstance(model[0], CSCConv2d)
    sdnet.set_lambda(model, 0.3)
    sdnet.set_impl(model, "reference")
    sdnet.refresh_step_size(model, vectors(2, 5))
    assert sdnet.step_margins(model)["0"] == pytest.approx(0.9, abs=1e-4)
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(copied(vectors(4)), model(vectors(4)))
    assert "in_features=6, out_features=10, lam=0.3, n_steps=2" in repr(model)
    assert torch.compile(model, backend="eager", fullgraph=True)(vectors(4)).shape == (4, 2)


def test_bad_arguments_get_one_sentence() -> None:
    csc = layer()
    with pytest.raises(
        ValueError, match=r"^x is of type Tensor and shape \[2, 5\]; it must be a tensor \[N, 6\] or \["
    ):
        csc(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"^x is of type Tensor and shape \[2, 6, 1, 1\]; it must be"):
        csc(torch.zeros(2, 6, 1, 1))
    with pytest.raises(ValueError, match=r"^codes is .* it must be a tensor \[N, 10\] or \[N, T, 10\]\.$"):
        csc.reconstruct(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"^z0 has shape \[2, 10\]; it must be that of the codes, \[2, 5, 10\]\.$"):
        csc.solve(vectors(2, 5), z0=torch.zeros(2, 10))
    with pytest.raises(ValueError, match=r"^codes is .* for x of shape \[2, 5, 6\] it must be a tensor \[2, 5, 10\]"):
        csc.objective(vectors(2, 5), torch.zeros(2, 7, 10))
    with pytest.raises(ValueError, match=r"^callback is 5; it must be a function, or None\.$"):
        csc.solve(vectors(2, 5), callback=5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^x is None; it must be a tensor \[N, 6\] or \["):
        csc.solve(None, z0=torch.zeros(2, 10))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^in_features is 0; it must be an int of at least 1\.$"):
        CSCLinear(0, 3)
    with pytest.raises(TypeError, match=r"^CSCLinear has no argument 'bias': codes have no bias"):
        CSCLinear(3, 3, bias=True)
    with pytest.raises(TypeError, match=r"^CSCLinear\.__init__ has no argument 'stride'"):
        CSCLinear(3, 3, stride=2)
