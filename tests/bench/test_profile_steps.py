"""`profile` counts what makes the host wait, and attributes the time of a step to its operators."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.profiler import profile, record_function

from sdnet.bench import __main__ as front
from sdnet.bench.ledger import read
from sdnet.bench.profile_steps import STEP, counts, operator_times, recipe_of

CPU = torch.device("cpu")


def test_reads_within_the_steps_are_counted() -> None:
    value = torch.ones(())
    with profile() as profiler:
        for _ in range(2):
            with record_function(STEP):
                for _ in range(3):
                    value.item()
        value.item()
    assert counts(profiler.events() or [], 2, CPU) == {"host_reads": 3.0}


def test_operator_times_leave_out_the_step_itself() -> None:
    a = torch.randn(200, 200)
    with profile() as profiler, record_function(STEP):
        torch.mm(a, a)
    times = operator_times(profiler.key_averages(), 1, CPU)
    assert f"ms:{STEP}" not in times
    assert 0 < times["ms:aten::mm"] <= times["operators_ms"]


def test_the_network_is_made_for_the_images_that_it_gets() -> None:
    for size, resize in ((None, 72), (32, 72), (96, 96)):
        recipe = recipe_of(Namespace(recipe="demo", image_size=size))
        assert (recipe.image_size, recipe.eval_resize) == (size or 64, resize)


def test_options_with_which_no_step_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--recipe", "demo", "--image-size", "8", "--batch", "1"]
    assert front.main(["profile", *sizes, "--traces", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("The recipe demo cannot train with these options: Expected more than 1")


def test_a_recipe_is_profiled(tmp_path: Path) -> None:
    sizes = ["--recipe", "demo", "--image-size", "32", "--batch", "2", "--steps", "1"]
    assert front.main(["profile", *sizes, "--traces", str(tmp_path), "--out", str(tmp_path)]) == 0
    ((_, row),) = read(tmp_path)
    assert (row.provider, row.mode, row.shape["batch"], row.shape["image_size"]) == ("demo", "step", 2, 32)
    assert row.metrics["ms:aten::convolution_backward"] > 0
    assert row.time_ms is not None
    assert row.time_ms["samples"] == 1
    assert json.loads((tmp_path / "demo.json").read_text())["traceEvents"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
