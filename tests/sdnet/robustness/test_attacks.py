"""PGD finds the adversary that is known in closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdnet.robustness import pgd
from sdnet.robustness.attacks import Norm, direction


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


def test_the_search_takes_gradients_where_the_caller_takes_none(model: TwoClasses) -> None:
    images, labels = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0, 1])
    expected = pgd(model, images, labels, 0.1, steps=3, generator=1)
    assert not expected.equal(images)
    with torch.no_grad():
        assert pgd(model, images, labels, 0.1, steps=3, generator=1).equal(expected)
    with torch.inference_mode():
        assert pgd(model, images.clone(), labels.clone(), 0.1, steps=3, generator=1).equal(expected)


def test_labels_of_any_integer_type_are_taken(model: TwoClasses) -> None:
    images, labels = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    found = [pgd(model, images, labels.to(kind), 0.1, steps=1, generator=0) for kind in (torch.int64, torch.int32)]
    assert found[0].equal(found[1])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-25), (torch.float32, 1e30), (torch.float16, 1e-4)])
def test_the_l2_direction_of_small_and_large_gradients_has_length_one(dtype: torch.dtype, scale: float) -> None:
    gradient = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2) * scale
    assert direction(gradient.to(dtype), "l2").flatten().tolist() == pytest.approx([0.6, -0.8], rel=1e-3)
    assert direction(torch.zeros(1, 1, 1, 2, dtype=dtype), "l2").flatten().tolist() == [0, 0]


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
    with pytest.raises(ValueError, match=r"images is torch.uint8; it must be floating point"):
        pgd(model, images.byte(), labels, 0.1)
    with pytest.raises(ValueError, match=r"labels is torch.bool; it must hold 2 integers"):
        pgd(model, images, labels.bool(), 0.1)
    bad_bounds: list[Any] = [None, (1, 0), 1.0, "ab", (0.0, float("nan"))]
    for bounds in bad_bounds:
        with pytest.raises(ValueError, match=r"bounds is .*; it must be two numbers, the first below the second"):
            pgd(model, images, labels, 0.1, bounds=bounds)
