"""`margins` measures step size times largest eigenvalue after every optimizer step, and writes rows as it goes."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from sdnet.bench import __main__ as front
from sdnet.bench import measure_margins
from sdnet.bench.ledger import read


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four training pictures of 16 x 16 pixels."""
    generator = np.random.default_rng(0)
    for split, name, number in itertools.product(("train", "val"), ("a", "b"), range(2)):
        file = tmp_path / "pictures" / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def test_networks_are_made_for_the_size_of_the_pictures(pictures: Path, tmp_path: Path) -> None:
    arguments = ["--task", "sdnet18", "--width", "2", "--seed", "0", "--steps", "2", "--data", str(pictures)]
    assert front.main(["margins", *arguments, "--batch", "4", "--lr", "0.001", "--out", str(tmp_path / "out")]) == 0
    ((_, row),) = read(tmp_path / "out")
    assert row.shape["image_size"] == 16
    assert row.settings["largest_margin_by_step"] == pytest.approx([0.9] * 2, abs=0.05)


def test_more_pictures_than_there_are_do_not_make_a_batch(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert front.main(["margins", "--data", str(pictures), "--batch", "4", "8", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"--batch is 8; the training set in {pictures} has 4 pictures.\n"


def test_a_row_holds_the_margins_of_its_steps(tmp_path: Path) -> None:
    arguments = ["--task", "dictionary", "--adam-lr", "1e-3", "--seed", "0", "--steps", "3", "--every", "2"]
    assert front.main(["margins", *arguments, "--out", str(tmp_path)]) == 0
    first, second = (row for _, row in read(tmp_path))
    assert [(row.settings["first_step"], row.settings["last_step"]) for row in (first, second)] == [(1, 2), (3, 3)]
    for row, steps in ((first, 2), (second, 1)):
        margins = row.settings["largest_margin_by_step"]
        assert len(margins) == len(row.settings["loss_by_step"]) == steps
        assert margins == pytest.approx([0.9] * steps, abs=0.05)
        assert row.metrics["largest_margin"] == pytest.approx(max(margins), abs=1e-4)
        assert row.metrics["steps_above_1"] == row.metrics["steps_above_4/3"] == 0
        assert row.time_ms is not None
        assert row.time_ms["samples"] == steps
        assert row.time_ms["p50"] < row.metrics["step_ms"]


def test_the_update_is_timed_until_the_device_has_done_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the device that takes 50 ms stands for an update that a GPU is still computing."""
    monkeypatch.setattr(measure_margins, "wait_for", lambda _: time.sleep(0.05))
    arguments = ["--task", "dictionary", "--adam-lr", "1e-3", "--seed", "0", "--steps", "1", "--out", str(tmp_path)]
    assert front.main(["margins", *arguments]) == 0
    ((_, row),) = read(tmp_path)
    assert row.time_ms is not None
    assert row.time_ms["p50"] >= 50
    assert row.metrics["step_ms"] >= 100


def test_the_steps_before_a_divergence_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = measure_margins.DictionaryLearning.losses

    def diverging(task: measure_margins.DictionaryLearning) -> Iterator[Tensor]:
        yield from (loss * float("inf") if step == 3 else loss for step, loss in enumerate(losses(task), 1))

    monkeypatch.setattr(measure_margins.DictionaryLearning, "losses", diverging)
    arguments = ["--task", "dictionary", "--adam-lr", "1e-3", "--seed", "0", "--steps", "9", "--out", str(tmp_path)]
    assert front.main(["margins", *arguments]) == 0
    rows = [row for _, row in read(tmp_path)]
    assert [(row.status, row.settings["first_step"], row.settings["last_step"]) for row in rows] == [
        ("ok", 1, 2),
        ("refused", 3, 3),
    ]


def test_networks_need_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["margins", "--task", "sdnet18", "--out", str(tmp_path)]) == 2
    assert "--data is missing: sdnet18 learns from pictures." in capsys.readouterr().err


def test_missing_pictures_are_named_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert front.main(["margins", "--data", str(missing), "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert f"The data folder {missing} does not exist." in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))
