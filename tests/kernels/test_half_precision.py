"""The norm data term in 16-bit types, against fp64."""

import pytest
import torch
from torch import Tensor, nn

from sdnet.kernels import csc_encode


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_data_term_in_half_precision_is_that_of_double_precision(dtype: torch.dtype, impl: str) -> None:
    """The squares of a picture of 224 pixels overflow in fp16, and a blank picture has a residual of zero."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 3, 224, 224, generator=generator)
    x[1] = 0
    x[2] /= 1000
    weight = nn.functional.normalize(torch.randn(4, 27, generator=generator)).view(4, 3, 3, 3)
    x, weight = x.to(dtype), weight.to(dtype)

    def encode(x: Tensor, weight: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        codes = csc_encode(x, weight, 0.2, 1e-4, padding=1, nonnegative=False, data_term="norm", impl=impl)
        (gradient,) = torch.autograd.grad(codes.sum(), x)
        return codes.detach().double(), gradient.double()

    for found, expected in zip(encode(x, weight, impl), encode(x.double(), weight.double(), impl), strict=True):
        assert found.isfinite().all()
        for actual, wanted in zip(found, expected, strict=True):
            # Rounding moves some codes across the threshold, more of them in bf16.
            assert (actual - wanted).norm() <= (0.05 if dtype == torch.float16 else 0.1) * wanted.norm()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("step_size", "lam"), [(0.0, 1e5), (1e-6, 1e5), (1e-6, 1e30), (0.2, 1e5)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_lambda_beyond_fp16_gives_the_threshold_of_fp32(
    step_size: float, lam: float, per_sample: bool, impl: str
) -> None:
    """P(v) = max(v - step_size lam, 0), and only step_size lam has to be representable."""
    x = torch.full((2, 1, 4, 4), 6e4, dtype=torch.float16)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    given = torch.full((2,), lam) if per_sample else lam
    codes = csc_encode(x, weight, step_size, given, impl=impl, n_steps=1)
    expected = max(6e4 * step_size - step_size * lam, 0)
    torch.testing.assert_close(codes, torch.full_like(codes, expected), rtol=0, atol=max(1e-3, 1e-3 * expected))
