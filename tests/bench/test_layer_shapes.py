"""The layer shapes that are measured and compiled are those of the published networks."""

from sdnet.bench.layer_shapes import LayerShape, csc_layers, distinct, distinct_layers

IMAGENET_18 = """
3->64 7x7/2 @ 224x224, 64->64 3x3/2 @ 112x112, 64->64 3x3/1 @ 56x56, 64->128 3x3/2 @ 56x56, 128->128 3x3/1 @ 28x28,
128->256 3x3/2 @ 28x28, 256->256 3x3/1 @ 14x14, 256->512 3x3/2 @ 14x14, 512->512 3x3/1 @ 7x7
"""
CIFAR_18 = """
3->64 3x3/1 @ 32x32, 64->64 3x3/1 @ 32x32, 64->128 3x3/2 @ 32x32, 128->128 3x3/1 @ 16x16, 128->256 3x3/2 @ 16x16,
256->256 3x3/1 @ 8x8, 256->512 3x3/2 @ 8x8, 512->512 3x3/1 @ 4x4
"""


def shapes(text: str) -> list[str]:
    return text.strip().replace("\n", " ").split(", ")


def test_shapes_of_sdnet18_all_by_hand() -> None:
    assert [str(layer) for layer in distinct(csc_layers("sdnet18_all", 224))] == shapes(IMAGENET_18)
    assert [str(layer) for layer in distinct(csc_layers("sdnet18_all", 32))] == shapes(CIFAR_18)
    assert len(csc_layers("sdnet18_all", 224)) == 18
    assert len(csc_layers("sdnet34_all", 32)) == 33


def test_sdnet18_has_one_csc_layer() -> None:
    assert csc_layers("sdnet18", 32) == (LayerShape("stem.conv", 3, 64, 3, 1, (32, 32)),)


def test_distinct_layers_hold_both_image_sizes() -> None:
    found = [str(layer) for layer in distinct_layers()]
    assert set(found) >= {*shapes(CIFAR_18), *shapes(IMAGENET_18)}
    assert len({layer.geometry for layer in distinct_layers()}) == len(found)
