"""Which Triton path a layer runs on: what is asked for, or the rule."""

import pytest

from sdnet.kernels.triton_path.paths import ChosenPath, Entry, choose_path, requested_path
from sdnet.kernels.triton_path.tiles import Shape, Tiles, by_rule

SHAPE = Shape(256, 64, 64, (56, 56), (56, 56), (3, 3), (1, 1), 2, "ieee", channels_last=True, arch=80)
HOPPER = SHAPE._replace(arch=90)
ENCODED = Entry("fused", by_rule(HOPPER)).encoded()


def name_by_rule(shape: Shape) -> str:
    """The path that nobody asked for."""
    choice = choose_path(shape)
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


def test_what_is_asked_for_comes_before_the_rule() -> None:
    rules = by_rule(HOPPER)
    assert choose_path(HOPPER, "cudnn") == ChosenPath("cudnn", rules, "the caller asks for the cudnn path")
    plain = choose_path(HOPPER, "plain")
    assert (plain.name, plain.tiles, plain.correlation) == ("cudnn", rules, False)
    given = Tiles(*(tile._replace(stages=2) for tile in rules))
    choice = choose_path(HOPPER, Entry("fused", given).encoded())
    assert choice[:2] == ("fused", given)
    assert choice.correlation


def test_padded_fills_up_few_channels_to_a_multiple_of_4_and_leaves_others() -> None:
    padded = {channels: SHAPE._replace(channels=channels).padded.channels for channels in (1, 3, 4, 5, 8, 9, 64)}
    assert padded == {1: 4, 3: 4, 4: 4, 5: 8, 8: 8, 9: 9, 64: 64}
    stem = SHAPE._replace(channels=3)
    assert choose_path(stem, "padded")[:2] == ("padded", by_rule(SHAPE._replace(channels=4)))
    given = Entry("padded", Tiles(*(tile._replace(stages=2) for tile in by_rule(stem.padded))))
    assert choose_path(stem, given.encoded()).tiles == given.tiles == given.fitted(stem)
    assert choose_path(HOPPER, "padded").tiles == by_rule(HOPPER)


def test_given_tiles_that_a_layer_cannot_run_with_give_way_to_the_rule_s() -> None:
    given = Entry("fused", Tiles(*(tile._replace(stages=2) for tile in by_rule(HOPPER)))).encoded()
    assert choose_path(SHAPE, given).tiles == by_rule(SHAPE)  # no descriptors on sm_80


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fused",
        "[]",
        '["fused"]',
        '["fused", {}, {}, {}]',
        '["quick"' + ENCODED[8:],
        ENCODED.replace('"stages": 3', '"stages": -3'),
    ],
    ids=range(7),
)
def test_an_entry_that_describes_no_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="describes no path with its tiles"):
        Entry.decoded(text)
    assert Entry.decoded(ENCODED).encoded() == ENCODED


def test_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDNET_TRITON_PATH", raising=False)
    assert requested_path() == "auto"
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    assert requested_path() == "fused"
    monkeypatch.setenv("SDNET_TRITON_PATH", "quick")
    with pytest.raises(ValueError, match="SDNET_TRITON_PATH is 'quick'; it must be fused, padded or cudnn"):
        requested_path()
