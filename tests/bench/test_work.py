"""The counted work of launches, by hand."""

from pathlib import Path

import pytest
import triton.backends.nvidia.driver as nvidia

from sdnet.bench import __main__ as front
from sdnet.bench.cost import tile_shape
from sdnet.bench.layer_shapes import LayerShape, distinct_layers
from sdnet.bench.work import convolution_steps, efficiency, training_work, work_of
from sdnet.kernels.triton_path.candidates import candidates
from sdnet.kernels.triton_path.tiles import Product, by_rule

LARGE = LayerShape("", 64, 64, 3, 1, (56, 56))
SMALL = LayerShape("", 512, 512, 3, 1, (4, 4))


def test_bytes_from_l2_of_64_channels() -> None:
    """A program whose taps are all inside reads 9 blocks of 128 pixels and of 64 atoms, 64 channels each: 216 KiB."""
    shape = tile_shape(LARGE, 256, 2, "ieee", True, 90)
    tile = by_rule(shape).analysis
    steps = convolution_steps("analysis", LARGE, shape, tile)
    assert max(steps) == 9
    assert 9 * (128 + 64) * 64 * 2 == 216 * 1024
    work = work_of("analysis", LARGE, shape, tile)
    assert work.programs == 2 * 56 * 56
    assert work.l2_bytes == sum(steps) * 24 * 1024
    assert sum(steps) == 2 * (3 * 56 - 2) ** 2  # taps in the padding are left out


@pytest.mark.parametrize("product", ["analysis", "synthesis"])
@pytest.mark.parametrize("layer", distinct_layers(), ids=str)
def test_steps_by_descriptors_are_the_products_without_the_padding(layer: LayerShape, product: Product) -> None:
    shape = tile_shape(layer, 256, 2, "ieee", True, 90)
    tile = by_rule(shape).analysis if product == "analysis" else by_rule(shape).synthesis
    if tile.form != "descriptors":
        return
    steps = convolution_steps(product, layer, shape, tile)
    multiplied = sum(steps) * tile.images * tile.atoms * tile.channels
    assert multiplied == 256 * layer.products * layer.channels * layer.atoms


def test_a_stem_makes_all_phases_in_a_step_for_each_row_and_column_of_codes() -> None:
    """4 x 4 codes reach the 2 x 2 phases of a pixel through 7 x 7 taps of stride 2."""
    layer = LayerShape("", 3, 64, 7, 2, (224, 224))
    shape = tile_shape(layer, 256, 2, "ieee", True, 90)
    assert set(convolution_steps("synthesis", layer, shape, by_rule(shape).synthesis)) == {16}
    assert set(convolution_steps("analysis", layer, shape, by_rule(shape).analysis)) == {5}  # 147 pairs by 32


def test_the_tail_of_a_launch() -> None:
    assert efficiency([5] * 8, 4) == 1
    assert efficiency([5] * 5, 4) == 5 / 8
    assert efficiency([9, 1, 1], 2) == (9 + 3 + 2 * 4) / (2 * 12)
    assert efficiency([1, 1, 9], 2) == (9 + 3 + 2 * 4) / (2 * 16)  # the longest last


def test_small_grids_leave_a_gpu_idle() -> None:
    """64 programs of 4 x 4 pixels at 512 channels and batch 128 on 132 multiprocessors."""
    shape = tile_shape(SMALL, 128, 2, "ieee", True, 90)
    assert work_of("analysis", SMALL, shape, by_rule(shape).analysis).programs == 64
    assert work_of("analysis", SMALL, shape, by_rule(shape).analysis).busy < 0.3
    large = tile_shape(LARGE, 256, 2, "ieee", True, 90)
    assert work_of("analysis", LARGE, large, by_rule(large).analysis).busy > 0.9


def test_larger_tiles_and_kept_residuals_read_less_from_l2() -> None:
    layer = LayerShape("", 256, 256, 3, 1, (14, 14))
    shape = tile_shape(layer, 256, 2, "ieee", True, 90)
    rules = by_rule(shape)
    kept, again = (training_work(layer, shape, rules, keep, True).l2_bytes for keep in (True, False))
    least = min(training_work(layer, shape, tiles, True, True).l2_bytes for tiles in candidates(shape))
    assert least < kept < again
    assert 0.7 < least / kept < 0.9


def test_launches_of_another_version_of_triton_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver of Triton 3.6 has no such name."""
    monkeypatch.delattr(nvidia, "PyKernelArg")
    assert front.main(["counts", "--out", str(tmp_path)]) == 2
    assert "needs the launcher of Triton 3.7; Triton" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_counts_are_never_recorded_as_those_of_a_gpu(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert front.main(["counts", "--device", device, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"--device is {device}; counts runs nothing on a GPU, so it must be cpu.\n"
    assert not list(tmp_path.iterdir())
