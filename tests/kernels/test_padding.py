"""The path "padded": images of few channels get channels of zeros, which no result shows."""

import pytest
import torch
from torch import Tensor

from sdnet.kernels.qualify.candidates import candidates_of
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.tiles import Shape

from .test_triton_path import RISKS, PathCase, assert_near_reference

pytestmark = pytest.mark.usefixtures("exact", "poisoned")

PADDED = {
    "a stem": RISKS["a stem"],
    "a stem that keeps the residual, signed codes": PathCase(
        3, 20, (7, 7), (2, 2), (18, 15), keep_residuals=True, nonnegative=False, n_steps=3, mu=0.5
    ),
    "a contiguous stem": RISKS["a contiguous stem"],
    "one channel, in half precision": PathCase(channels=1, atoms=16, keep_residuals=True, half=True),
    "five channels": PathCase(channels=5, keep_residuals=True, data_term="norm", per_sample=True),
}


@pytest.mark.parametrize("name", PADDED)
def test_channels_of_zeros_change_no_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "padded")
    case = PADDED[name]
    made: list[int] = []
    empty_images = Layer.empty_images

    def noted(layer: Layer) -> Tensor:
        made.append(layer.weight.shape[1])
        return empty_images(layer)

    monkeypatch.setattr(Layer, "empty_images", noted)
    assert_near_reference(case)
    assert set(made) == {8 if case.channels == 5 else 4}
    for first, second in zip(*(case.results(case.dtype, "triton") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_several_dictionaries_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them has channels of its own, and the images would need zeros between them."""
    case = PathCase(channels=3, n_dict=2, keep_residuals=True)
    found = []
    for path in ("fused", "padded"):
        monkeypatch.setenv("SDNET_TRITON_PATH", path)
        found.append(case.results(torch.float32, "triton"))
    for fused, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, fused)


def test_stems_in_channels_last_have_padded_candidates_and_no_other_layer() -> None:
    stem = Shape(256, 3, 64, (32, 32), (32, 32), (3, 3), (1, 1), 2, "ieee", channels_last=True, arch=90)
    names = [candidate.name for candidate in candidates_of(stem, all_tiles=False)]
    assert names == ["torch", "plain", "cudnn with Triton's correlation", "fused", "padded"]
    every = candidates_of(stem, all_tiles=True)
    assert len({candidate.path for candidate in every}) == len(every)
    assert sum(candidate.name.startswith("padded, ") for candidate in every) >= 2
    assert all(candidate.is_ours for candidate in every[3:])
    others = [stem._replace(channels=4), stem._replace(channels=64), stem._replace(channels_last=False)]
    found = [candidates_of(shape, all_tiles=True) for shape in others]
    found.append(candidates_of(stem, all_tiles=True, may_pad=False))
    assert not any("padded" in candidate.path for each in found for candidate in each)
