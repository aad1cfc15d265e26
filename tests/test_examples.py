"""The examples of the documentation, run whole."""

import os
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib as mpl
import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def run(name: str) -> dict[str, Any]:
    """Run an example without a display and return its names."""
    with patch.dict(os.environ), mpl.rc_context({"backend": "agg"}):  # a library that it imports sets a variable
        return runpy.run_path(str(EXAMPLES / name))


def test_the_rule_finds_more_of_the_noisy_cats_and_as_many_of_the_others() -> None:
    found = run("plot_robust.py")
    training = {title: curve[0] for title, curve in found["curves"].items()}
    assert found["by_rule"]["severity 3"] > training["severity 3"] + 0.1
    assert found["by_rule"]["severity 5"] > training["severity 5"] + 0.1
    assert found["by_rule"]["no noise"] == pytest.approx(training["no noise"], abs=0.02)


def test_the_picture_from_the_first_codes_is_nearest_to_the_photograph() -> None:
    errors = [float(found.error) for found in run("plot_inversion.py")["inversions"].values()]
    assert len(errors) == 17
    assert errors[0] == min(errors) < 0.8


@pytest.mark.slow
def test_the_dictionary_of_a_photograph_denoises_it_as_well_as_that_of_scikit_learn() -> None:
    found = run("plot_denoise.py")
    assert found["difference"] < 1e-3, "codes over one dictionary"
    assert found["ours"] == pytest.approx(found["theirs"], rel=0.05), "the objective of the learned dictionaries"
    assert found["best"] == pytest.approx(found["sklearn_best"], abs=0.5), "dB"
    assert found["best"] > found["psnr"](found["noisy"]) + 4
    assert found["curve"].index(found["best"]) not in (0, len(found["curve"]) - 1), "lambda has an optimum"
