"""Which path a layer runs on: what is asked for, what was measured, or the rule."""

import json
from pathlib import Path

import pytest

from sdnet.kernels.triton_path import paths
from sdnet.kernels.triton_path.paths import ChosenPath, Entry, choose_path, requested_path
from sdnet.kernels.triton_path.tiles import Shape, Tiles, by_rule

SHAPE = Shape(256, 64, 64, (56, 56), (56, 56), (3, 3), (1, 1), 2, "ieee", channels_last=True, arch=80)
HOPPER = SHAPE._replace(arch=90)
H100 = "NVIDIA H100"


def name_by_rule(shape: Shape) -> str:
    """The path without a table."""
    choice = choose_path(shape, None)
    assert "by rule" in choice.reason
    assert choice.tiles == by_rule(shape)
    return choice.name


def test_the_rule() -> None:
    assert name_by_rule(SHAPE) == "fused"
    assert name_by_rule(SHAPE._replace(atoms=256)) == "cudnn"
    assert name_by_rule(HOPPER._replace(atoms=256)) == "fused"
    assert name_by_rule(SHAPE._replace(itemsize=4)) == "cudnn"
    assert name_by_rule(SHAPE._replace(channels_last=False)) == "cudnn"
    assert name_by_rule(SHAPE._replace(channels=3, channels_last=False)) == "fused"


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """A table for one GPU, in which the layer is faster by cudnn; its tiles are not the rule's."""
    tiles = Tiles(*(tile._replace(stages=5) for tile in by_rule(HOPPER)))
    monkeypatch.setattr(paths, "MEASURED", tmp_path)
    row = json.loads(Entry("cudnn", tiles).encoded())
    paths.file_of(H100, tmp_path).write_text(json.dumps({paths.key_of(SHAPE): row}))
    return tiles


def test_what_was_measured_on_this_gpu_comes_before_the_rule(measured: Tiles) -> None:
    reason = f"the cudnn path was the faster one when measured on {H100}"
    assert choose_path(HOPPER, H100) == ChosenPath("cudnn", measured, reason)
    assert choose_path(HOPPER, "NVIDIA A100").name == "fused"
    assert choose_path(HOPPER, "NVIDIA A100").tiles == by_rule(HOPPER)


def test_measured_tiles_that_do_not_fit_the_batch_give_way_to_the_rule_s(measured: Tiles) -> None:
    small = HOPPER._replace(batch=64)  # a table does not tell batches apart, and its boxes have 128 images
    tiles = choose_path(small, H100).tiles
    assert tiles[:2] == by_rule(small)[:2]
    assert tiles.correlation == measured.correlation


def test_what_is_asked_for_comes_before_what_was_measured(measured: Tiles) -> None:
    assert choose_path(HOPPER, H100, "fused") == ChosenPath("fused", measured, "the caller asks for the fused path")
    given = Tiles(*(tile._replace(stages=2) for tile in by_rule(HOPPER)))
    choice = choose_path(HOPPER, H100, Entry("fused", given).encoded())
    assert choice[:2] == ("fused", given)
    assert choose_path(SHAPE, H100, Entry("fused", given).encoded()).tiles == by_rule(SHAPE)  # not on sm_80


def test_layers_of_another_precision_have_keys_of_their_own() -> None:
    exact, tf32 = (SHAPE._replace(itemsize=4, precision=precision) for precision in ("ieee", "tf32"))
    assert len({paths.key_of(each) for each in (SHAPE, exact, tf32)}) == 3


def test_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDNET_TRITON_PATH", raising=False)
    assert requested_path() == "auto"
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    assert requested_path() == "fused"
    monkeypatch.setenv("SDNET_TRITON_PATH", "quick")
    with pytest.raises(ValueError, match="SDNET_TRITON_PATH is 'quick'; it must be fused or cudnn"):
        requested_path()
