"""The path "padded": images of few channels get channels of zeros, which no result shows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdnet.kernels.qualify.candidates import candidates_of
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.tiles import Shape

from .cases import DEVICE
from .test_triton_path import PathCase, assert_near_reference

pytestmark = pytest.mark.usefixtures("exact", "poisoned")

STEM = PathCase(3, 16, (5, 5), (2, 2), (9, 7))

PADDED = {
    "a stem that keeps the residual": replace(STEM, keep_residuals=True),
    "signed codes of three steps": replace(STEM, kernel_size=(3, 3), nonnegative=False, n_steps=3, mu=0.5),
    "a contiguous stem": replace(STEM, channels_last=False),
    "two channels, in half precision": replace(STEM, channels=2, half=True, keep_residuals=True),
    "five channels": replace(STEM, channels=5, kernel_size=(3, 3), data_term="norm", per_sample=True),
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


def test_the_residual_is_kept_without_the_zeros() -> None:
    x, weight, lam = (leaf.detach() for leaf in STEM.leaves())
    step_size = torch.tensor(STEM.step_size, device=DEVICE)
    kept = torch.ops.sdnet.csc_forward(x, weight, step_size, lam, *STEM.options, "triton", "padded", True, True)
    assert [tensor.shape[1] for tensor in kept] == [3, 16, 16]
    assert kept[0].is_contiguous(memory_format=torch.channels_last)


def test_the_same_padded_call_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "padded")
    for first, second in zip(*(STEM.results(STEM.dtype, "triton") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_several_dictionaries_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them has channels of its own, and the images would need zeros between them."""
    case = replace(STEM, kernel_size=(3, 3), n_dict=2, keep_residuals=True)
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
