"""The examples of the documentation, run whole."""

import os
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib as mpl
import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.mark.slow
def test_the_dictionary_of_a_photograph_denoises_it_as_well_as_that_of_scikit_learn() -> None:
    with patch.dict(os.environ), mpl.rc_context({"backend": "agg"}):  # a library that it imports sets a variable
        found: dict[str, Any] = runpy.run_path(str(EXAMPLES / "plot_denoise.py"))
    assert found["difference"] < 1e-3, "codes over one dictionary"
    assert found["ours"] == pytest.approx(found["theirs"], rel=0.05), "the objective of the learned dictionaries"
    assert found["best"] == pytest.approx(found["sklearn_best"], abs=0.5), "dB"
    assert found["best"] > found["psnr"](found["noisy"]) + 4
    assert found["curve"].index(found["best"]) not in (0, len(found["curve"]) - 1), "lambda has an optimum"
