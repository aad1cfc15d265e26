"""The reproduction runs from training to cards, goes on after an interruption, and refuses what it cannot use."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdnet
from sdnet.bench.__main__ import main
from sdnet.bench.reproduce import cards
from sdnet.bench.reproduce.scales import SCALES, Cell, Scale
from sdnet.bench.robustness.attack_runs import AttackOptions
from sdnet.bench.robustness.rule_table import TableOptions
from sdnet.bench.robustness.stored import StoredResults, pack, unpack
from sdnet.train.errors import UserError

MICRO = Scale(
    "tiny",
    width=2,
    epochs=1,
    holdout=4,
    per_class=(33, 2),
    table=TableOptions(test=6, held=4, severities=(5,), lambdas=(0.1, 0.5), alone=2, alone_severities=(5,)),
    attacks=AttackOptions(
        pictures=4,
        linf=(2,),
        l2=(0.25,),
        steps=2,
        restarts=1,
        autoattack=2,
        queries=20,
        autoattack_linf=(1,),
        autoattack_l2=(),
    ),
    cells=(Cell("sdnet18", 0, table=True, attacks=True, weights=True),),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 32 x 32 pictures: noise from dark to bright."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 33), ("test", 2)):
        for name, low in (("a", 0), ("b", 40), ("c", 80), ("d", 120)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.png")
    return root


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "tiny", MICRO)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return


def test_one_command_trains_evaluates_and_writes_a_card_and_goes_on(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "--scale", "tiny", "--data", str(pictures), "--out", str(tmp_path / "out")]
    command += [
        "--weights",
        str(tmp_path / "weights"),
        "--cards",
        str(tmp_path / "cards"),
        "--device",
        "cpu",
        "--note",
        "pictures of noise",
    ]
    assert main(command) == 0, capfd.readouterr().out
    (card,) = cards.read_cards(tmp_path / "cards")
    assert (card["network"], card["seed"], card["note"]) == ("sdnet18", 0, "pictures of noise")
    assert card["recipe"]["width"] == 2
    assert card["recipe"]["holdout"] == 4
    assert len(unpack(card["right"], 8)) == card["test_pictures"] == 8
    values = card["table"]["values"]
    for row in ("training", "a", "b", "c", "oracle", "BN", "b + BN"):
        assert {f"{row}, clean", f"{row}, speckle 5"} <= set(values)
    assert {"batch 1, BN, clean", "batch 1, b + BN, shot 5", "rule a", "rule b"} <= set(values)
    assert set(card["attacks"]) == {"training", "b"}
    attacked = card["attacks"]["b"]["values"]
    assert {"clean", "PGD-2, Linf 2/255", "PGD-2, L2 0.25", "AutoAttack, Linf 1/255"} <= set(attacked)
    assert attacked["check: two forwards are equal"] is True

    model = sdnet.create_model("sdnet18", width=2, pretrained=tmp_path / "weights" / "tiny_sdnet18")
    assert model.class_names == ("a", "b", "c", "d")

    # Every value is taken from its file now, and a missing one is measured again to the same value.
    rules = tmp_path / "out" / "tiny" / "runs" / "sdnet18-seed0" / "evaluation" / "rules.json"
    stored = json.loads(rules.read_text())
    removed = {name: stored["values"].pop(name) for name in ("b, impulse 5", "batch 1, BN, clean")}
    rules.write_text(json.dumps(stored))
    capfd.readouterr()
    assert main(command) == 0
    assert "sdnet18-seed0: training\n" not in capfd.readouterr().out
    assert {name: json.loads(rules.read_text())["values"][name] for name in removed} == removed

    stored["conditions"]["weights"] = "of another run"
    rules.write_text(json.dumps(stored))
    assert main(command) == 2
    assert "rules.json was measured with another weights" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--only", "vgg-seed0"], "--only is vgg-seed0; it must be among sdnet18-seed0"),
        (["--data", "/nowhere"], "/nowhere has no folder train; scale tiny needs train/<class>/ and test/<class>/"),
    ],
)
def test_bad_options_are_refused(
    pictures: Path, tmp_path: Path, extra: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "--scale", "tiny", "--data", str(pictures), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--cards", str(tmp_path), *extra]) == 2
    assert message in capfd.readouterr().err


def test_a_network_that_is_not_trained_is_not_evaluated(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "--scale", "tiny", "--data", str(pictures), "--out", str(tmp_path), "--device", "cpu"]
    command += ["--cards", str(tmp_path), "--weights", str(tmp_path / "weights"), "--stage", "evaluate"]
    assert main(command) == 0
    assert "sdnet18-seed0: not trained to the end, so it is not evaluated" in capfd.readouterr().out
    (tmp_path / "file").touch()
    assert main([*command, "--weights", str(tmp_path / "file")]) == 2
    assert "file cannot be written to" in capfd.readouterr().err


def test_another_data_set_does_not_mix_with_the_pictures_of_an_earlier_call(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other, more = tmp_path / "other", tmp_path / "more"
    shutil.copytree(pictures, other)
    shutil.copytree(pictures, more)
    Image.new("RGB", (32, 32)).save(other / "train" / "a" / "00.png")
    (more / "test" / "d" / "01.png").rename(more / "test" / "d" / "02.png")
    command = ["reproduce", "--scale", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--cards", str(tmp_path / "c"), "--weights", str(tmp_path / "w"), "--stage", "evaluate", "--data"]
    for _ in range(2):
        assert main([*command, str(pictures)]) == 0
    assert main([*command, str(other)]) == 2
    assert "00.png is another picture than" in capfd.readouterr().err
    assert main([*command, str(more)]) == 2
    assert "01.png is of another --data than" in capfd.readouterr().err


def test_the_interval_of_paired_differences_is_students() -> None:
    centre, half = cards.interval([1.0, 2.0, 3.0])
    assert centre == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="differences holds 1 values; an interval needs 2 to 10"):
        cards.interval([1.0])


def test_flags_are_packed_without_loss() -> None:
    flags = [True, False, False, True, True, False, True]
    assert pack(flags) == "9a"
    assert unpack("9a", 7) == flags


def test_stored_results_are_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> list[int]:
        calls.append(1)
        return [1, 2]

    for _ in range(2):
        assert StoredResults(tmp_path / "r.json", {"size": (1, 2)}).get("x", compute) == [1, 2]
    assert len(calls) == 1
    with pytest.raises(UserError, match="was measured with another size; choose another --out"):
        StoredResults(tmp_path / "r.json", {"size": (1, 3)})
    with pytest.raises(UserError, match="'y' is nan, which is not finite: the network has diverged"):
        StoredResults(tmp_path / "r.json", {"size": (1, 2)}).get("y", lambda: float("nan"))
    (tmp_path / "r.json").write_text("{")
    damaged: Any = pytest.raises(UserError, match=r"r\.json is damaged")
    with damaged:
        StoredResults(tmp_path / "r.json", {})
