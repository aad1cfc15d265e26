"""The rules for tiles: which form, which box, and that the programs of a launch cover the layer."""

from math import prod

import pytest

from sdnet.bench.layer_shapes import LayerShape, distinct_layers
from sdnet.kernels.reference import Pair
from sdnet.kernels.triton_path import grids, tiles
from sdnet.kernels.triton_path.candidates import candidates
from sdnet.kernels.triton_path.tiles import Shape, by_rule, ceil_div, shared_bytes

SHAPE = Shape(256, 64, 64, (56, 56), (56, 56), (3, 3), (1, 1), 2, "ieee", channels_last=True, arch=90)


def shape_of(layer: LayerShape, arch: int) -> Shape:
    """The layer in bf16, channels_last, batch 256."""
    kernel_size, stride = ((n, n) for n in (layer.kernel_size, layer.stride))
    return Shape(
        256, layer.channels, layer.atoms, layer.size, layer.codes_size, kernel_size, stride, 2, "ieee", True, arch
    )


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((56, 56), (2, 8, 8)),
        ((28, 28), (8, 4, 4)),
        ((14, 14), (32, 2, 2)),
        ((7, 7), (128, 1, 1)),
        ((32, 32), (1, 8, 16)),
    ],
    ids=str,
)
def test_compact_boxes_waste_nothing_where_they_need_not(size: Pair, box: tuple[int, int, int]) -> None:
    assert tiles.box_of(128, 256, size, 2**20, "compact") == box
    assert all(n % side == 0 for n, side in zip((256, *size), box, strict=True))


def test_boxes_of_many_images_and_of_long_rows() -> None:
    assert tiles.box_of(64, 256, (56, 56), 64, "images") == (64, 1, 1)
    assert tiles.box_of(64, 256, (56, 56), 64, "rows") == (1, 1, 64)
    assert tiles.box_of(64, 5, (8, 8), 64, "images")[0] <= 8


def test_a_box_stays_within_32_bits() -> None:
    assert tiles.box_of(128, 256, (7, 7), 4, "compact")[0] <= 4
    assert SHAPE._replace(batch=2, image_size=(4096, 4096), codes_size=(4096, 4096)).most_images == 1


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("layer", distinct_layers(), ids=str)
def test_programs_cover_every_layer(layer: LayerShape, arch: int) -> None:
    shape = shape_of(layer, arch)
    for chosen in candidates(shape):
        analysis, synthesis, correlation = chosen
        assert chosen.fitted(shape) == chosen
        [programs] = grids.analysis_programs(shape, analysis)
        assert programs * analysis.pixels * analysis.atoms >= 256 * prod(layer.codes_size) * layer.atoms
        programs, phases = grids.synthesis_programs(shape, synthesis)
        assert programs * phases * synthesis.pixels * synthesis.channels >= 256 * prod(layer.size) * layer.channels
        blocks = grids.correlation_blocks(shape, correlation)
        elements = blocks * correlation.atoms * correlation.channels * correlation.taps
        assert elements >= layer.atoms * layer.channels * layer.kernel_size**2
        assert grids.boxes(correlation, 256, shape.codes_size) * correlation.pixels >= 256 * prod(layer.codes_size)


def test_descriptors_are_chosen_only_for_layouts_they_can_read() -> None:
    shape = SHAPE._replace(atoms=256)
    assert {tile.form for tile in by_rule(shape)} == {"descriptors"}
    assert [shape._replace(batch=batch).described_images for batch in (64, 127, 128, 192)] == [64, 64, 128, 64]
    for name, value in {"arch": 80, "channels": 12, "atoms": 20, "itemsize": 4, "channels_last": False}.items():
        other = shape._replace(**{name: value})
        assert not other.describable
        assert {tile.form for tile in by_rule(other)} == {"pointers"}
        assert by_rule(shape).fitted(other) == by_rule(other)
    assert {tile.form for tile in by_rule(shape._replace(aligned=False))} == {"pointers"}
    assert {tile.form for tile in by_rule(shape._replace(channels=8))} == {"few"}
    huge = shape._replace(image_size=(2048, 2048), codes_size=(2048, 2048))
    assert huge.described_images == 0  # 64 images have 2^31 elements


def test_only_descriptors_make_several_taps_of_the_correlation_at_a_time() -> None:
    """Other forms would leave the taps after the first unwritten."""
    chosen = by_rule(SHAPE._replace(arch=80))
    several = chosen._replace(correlation=chosen.correlation._replace(taps=3))
    assert by_rule(SHAPE).correlation.taps == 3
    assert several.fitted(SHAPE).correlation == by_rule(SHAPE).correlation
    assert several.fitted(SHAPE._replace(arch=80)) == chosen


def test_candidates_of_large_layers_hold_the_larger_tiles() -> None:
    shape = SHAPE._replace(channels=256, atoms=256, image_size=(14, 14), codes_size=(14, 14))
    found = candidates(shape)
    blocks = {(tiles.analysis.images, tiles.analysis.atoms, tiles.analysis.warps) for tiles in found}
    assert blocks >= {(128, 128, 4), (128, 256, 8), (256, 128, 8)}
    correlations = {(tile.atoms, tile.channels, tile.taps) for _, _, tile in found}
    assert correlations >= {(128, 128, 1), (128, 256, 1), (128, 128, 3)}
    assert not any(tiles.analysis.swapped for tiles in found)


def test_candidates_of_64_channels_hold_swapped_products() -> None:
    swapped = [tiles for tiles in candidates(SHAPE) if tiles.analysis.swapped]
    assert {tiles.analysis.images for tiles in swapped} == {128, 256}
    assert all(tiles.synthesis.swapped for tiles in swapped)


def test_candidates_do_not_ask_for_more_than_a_gpu_has() -> None:
    """Neither shared memory, nor, for tiles larger than the rules', a program for each multiprocessor."""
    shape = SHAPE._replace(channels=512, atoms=512, image_size=(4, 4), codes_size=(4, 4))
    described = [found.analysis.images for found in candidates(shape) if found.analysis.form == "descriptors"]
    assert set(described) == {128, 64}  # of 256 images there would be 16 pixels x 4 programs
    for arch, most in ((90, 227), (120, 99)):
        for found in candidates(SHAPE._replace(channels=256, atoms=256, arch=arch)):
            for tile, product in zip(found, ("analysis", "synthesis", "correlation"), strict=True):
                assert tile.form != "descriptors" or shared_bytes(product, tile, 2) < most * 1024


def test_a_partial_batch_runs_with_the_tiles_of_the_full_one() -> None:
    for chosen in candidates(SHAPE):
        for batch in (1, 16, 80):
            assert chosen.fitted(SHAPE._replace(batch=batch)) == chosen


def test_the_correlation_takes_descriptors_from_32_images_on() -> None:
    forms = {batch: by_rule(SHAPE._replace(batch=batch)).correlation.form for batch in (8, 31, 32, 64)}
    assert forms == {8: "pointers", 31: "pointers", 32: "descriptors", 64: "descriptors"}
    assert {by_rule(SHAPE._replace(batch=batch)).correlation.images for batch in (64, 256)} == {64}


def test_up_to_8_channels_are_few_in_all_three_products() -> None:
    for channels, form in ((1, "few"), (3, "few"), (8, "few"), (9, "pointers"), (16, "descriptors")):
        assert {tile.form for tile in by_rule(SHAPE._replace(channels=channels))} == {form}


@pytest.mark.parametrize("layer", distinct_layers(), ids=str)
def test_the_splits_of_every_layer_keep_a_large_gpu_busy(layer: LayerShape) -> None:
    processors, shape = 132, shape_of(layer, 90)
    tile = by_rule(shape).correlation
    blocks, boxes = grids.correlation_blocks(shape, tile), grids.boxes(tile, 256, shape.codes_size)
    splits = grids.splits_of(blocks, boxes, processors)
    rounds = blocks * splits / processors
    assert tile.form == ("few" if layer.channels < 8 else "descriptors")
    assert splits <= boxes
    assert rounds / ceil_div(blocks * splits, processors) >= 0.75
    assert splits * layer.atoms * layer.channels * layer.kernel_size**2 * 4 <= 64 * 2**20  # bytes of partial sums
