"""PGD finds the adversary that is known in closed form."""

import pytest
import torch
from torch import Tensor, nn

from sdnet.robustness import pgd
from sdnet.robustness.attacks import Norm


class TwoClasses(nn.Module):
    """A linear model of two classes with logits (0, w.x)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def model() -> TwoClasses:
    return TwoClasses(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_the_adversary_of_a_linear_model_is_found(model: TwoClasses, norm: Norm, random_start: bool) -> None:
    images = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    labels, eps = torch.tensor([0, 1]), 0.05
    towards = model.weight.sign() if norm == "linf" else model.weight / model.weight.norm()
    expected = images + eps * torch.stack([towards, -towards])
    found = pgd(model, images, labels, eps, norm=norm, steps=40, step_size=eps, random_start=random_start, generator=0)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert model.weight.grad is None


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_distance_and_the_range_are_kept(model: TwoClasses, norm: Norm) -> None:
    images = torch.rand(8, 3, 4, 4, dtype=torch.float64)
    found = pgd(model, images, torch.zeros(8, dtype=torch.long), 0.1, norm=norm, steps=3, restarts=2, generator=0)
    offset = (found - images).flatten(1)
    size = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    assert float(size.max()) <= 0.1 + 1e-9
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_a_point_that_is_misclassified_is_kept(model: TwoClasses) -> None:
    """Steps of 0 from the images: those that are wrong at once come back, the others come back with no change too."""
    images = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    found = pgd(model, images, torch.zeros(4, dtype=torch.long), 0.1, steps=2, step_size=0.0, random_start=False)
    assert found.equal(images)


def test_a_seed_gives_the_same_adversary_again(model: TwoClasses) -> None:
    images, labels = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    first, second = (pgd(model, images, labels, 0.1, steps=1, generator=7) for _ in range(2))
    assert first.equal(second)


def test_bad_input_is_refused_in_one_sentence(model: TwoClasses) -> None:
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"labels is .*\[1\]; it must hold 2 integers"):
        pgd(model, images, labels[:1], 0.1)
    with pytest.raises(ValueError, match="eps is -1; it must be a finite number of at least 0"):
        pgd(model, images, labels, -1)
    with pytest.raises(ValueError, match=r"images has values outside bounds, \[0.0, 1.0\]"):
        pgd(model, 2 * images + 1, labels, 0.1)
    with pytest.raises(ValueError, match="norm is 'l1'; it must be one of linf, l2"):
        pgd(model, images, labels, 0.1, norm="l1")  # type: ignore[arg-type]
