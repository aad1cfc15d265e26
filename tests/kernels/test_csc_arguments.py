"""What `csc_encode` says to arguments that make no sense: one sentence with the argument, its value and the rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.kernels import csc_encode


def encode_with(**changed: Any) -> Callable[[], Tensor]:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 3, 8, 8),
        "weight": torch.ones(4, 3, 3, 3),
        "step_size": 0.1,
        "lam": 0.1,
    }
    return lambda: csc_encode(**{**arguments, **changed})


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
        ({"x": torch.ones(2, 3, 8, 2)}, r"x padded to \[8, 2\] is smaller than the atoms"),
        ({"step_size": -0.1}, "step_size is -0.1; it must be a finite number of at least 0"),
        ({"step_size": torch.ones(2)}, r"step_size has shape \[2\].*must be 0-d"),
        ({"lam": -0.1}, "lam is -0.1; it must be a finite number of at least 0"),
        ({"lam": float("nan")}, "lam is nan"),
        ({"lam": torch.ones(3)}, r"lam has shape \[3\].*must be 0-d, \[2\] or \[2, 1, 1, 1\]"),
        ({"lam": torch.ones(1, 4, 1, 1)}, r"lam has shape \[1, 4, 1, 1\]"),
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


def test_residuals_are_kept_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_KEEP_RESIDUALS", "yes")
    with pytest.raises(ValueError, match="SDNET_KEEP_RESIDUALS is 'yes'; it must be 1 or 0"):
        encode_with()()


def test_the_arguments_of_the_error_cases_are_sound_by_themselves() -> None:
    assert encode_with()().shape == (2, 4, 6, 6)
