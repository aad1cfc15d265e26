"""What becomes of measured times, and who reads it. The measurement itself needs a GPU."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdnet.bench import __main__ as front
from sdnet.bench import measure_kernels, measure_paths
from sdnet.bench.measure_paths import Trial, merged, quicker, shape_of
from sdnet.bench.operators import Bound, Case, Inputs, csc_by
from sdnet.kernels.fused import tiles
from sdnet.kernels.shapes import LayerShape

CASE = Case("csc", LayerShape("", 64, 256, 3, 2, (9, 8)), 2, 2, "bf16", "channels_last", torch.device("cpu"))


@pytest.mark.parametrize(
    ("times", "path"),
    [
        ([{"fused": 1.0, "pointwise": 2.0}], "fused"),
        ([{"fused": 1.0, "pointwise": 2.0}, {"fused": 4.0, "pointwise": 2.0}], "pointwise"),
        ([{"fused": 1.0, "pointwise": 2.0}, {"pointwise": 2.0}], "pointwise"),
        ([{"fused": 1.0}, {"pointwise": 2.0}], None),
        ([{}], None),
    ],
)
def test_the_quicker_right_path_of_a_layer(times: list[dict[str, float]], path: str | None) -> None:
    assert quicker(Trial("a", each) for each in times) == path


def test_earlier_entries_stay_unless_measured_anew() -> None:
    earlier = {"c": "fused", "b": "fused", "a": "pointwise"}
    trials = [Trial("a", {"fused": 1.0, "pointwise": 2.0}), Trial("b", {})]
    assert merged(earlier, trials) == {"a": "fused", "c": "fused"}
    assert merged(earlier, []) == earlier


def test_what_is_written_decides_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "measured")
    monkeypatch.delenv("SDNET_STEPS", raising=False)
    shape, gpu = shape_of(CASE), "Some GPU of 2026"
    assert not tiles.path_of(shape, "another GPU").fused
    table = merged({}, [Trial(tiles.key_of(shape), {"fused": 1.0, "pointwise": 1.1})])
    measure_paths.write(tiles.file_of(gpu, tiles.MEASURED), table)
    assert [file.name for file in tiles.MEASURED.iterdir()] == ["Some_GPU_of_2026.json"]
    assert tiles.path_of(shape, gpu) == (True, f"fused steps were the quicker ones when measured on {gpu}")
    assert not tiles.path_of(shape._replace(channels_last=False), gpu).fused


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_case_is_the_layer_that_the_kernels_will_see(dtype: str, layout: str) -> None:
    convolution = pytest.importorskip("sdnet.kernels.fused.convolution")
    case = replace(CASE, dtype=dtype, layout=layout)
    weight = torch.empty(256, 64, 3, 3, dtype=measure_kernels.DTYPES[dtype], device="meta")
    with measure_kernels.timing.fp32_products(dtype == "tf32"):
        layer = convolution.Layer(weight, 2, (9, 8), (2, 2), (1, 1), measure_kernels.LAYOUTS[layout])
        assert shape_of(case) == layer.shape()


def test_default_cases_are_all_layers_in_all_types_and_both_layouts() -> None:
    parser = argparse.ArgumentParser()
    measure_paths.add_arguments(parser)
    options = parser.parse_args([])
    cases = list(measure_kernels.cases(options, torch.device("cuda")))
    layers = {case.layer.geometry for case in cases}
    assert {layer.size for layer in layers if layer.channels == 3} == {(224, 224), (32, 32)}
    assert len(cases) == len(layers) * 6
    assert len({tiles.key_of(shape_of(case)) for case in cases}) == len(layers) * 4
    assert options.out == tiles.MEASURED


def test_only_right_answers_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With torch's loop in the place of the kernels, which cannot run here, and with a wrong answer in one's place."""
    case = replace(CASE, layer=LayerShape("", 4, 8, 3, 1, (5, 6)), dtype="fp32", layout="contiguous")

    def wrong(case: Case, inputs: Inputs) -> Bound:
        bound = csc_by("torch")(case, inputs)
        return Bound(lambda: 1.1 * bound.run(), bound.leaves)

    monkeypatch.setattr(measure_paths, "on_path", {"fused": wrong, "pointwise": csc_by("torch")}.__getitem__)
    trial = measure_paths.measure(case, seconds=0.01)
    assert trial.key == "4->8 3x3/1x1 @ 5x6 ieee contiguous"
    assert list(trial.times) == ["pointwise"]
    assert "fused refused: output is off by 0.1" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels support the call")
def test_a_path_that_cannot_run_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with measure_paths.steps_as_they_were():
        assert measure_paths.measure(CASE, seconds=0.01).times == {}
    assert "fused unsupported: " in capsys.readouterr().out


def test_forced_steps_end_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("pointwise", None):
        if before is None:
            monkeypatch.delenv("SDNET_STEPS", raising=False)
        else:
            monkeypatch.setenv("SDNET_STEPS", before)
        with measure_paths.steps_as_they_were():
            os.environ["SDNET_STEPS"] = "fused"
        assert os.environ.get("SDNET_STEPS") == before


def test_refusals_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        assert front.main(["paths", "--out", str(tmp_path)]) == 2
        assert "paths needs a GPU, and torch sees none" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert front.main(["paths", "--out", str(tmp_path)]) == 2
    assert "interpreted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_committed_tables_are_well_formed() -> None:
    for file in tiles.MEASURED.glob("*.json"):
        table = json.loads(file.read_text())
        assert list(table) == sorted(table)
        assert set(table.values()) <= set(measure_paths.PATHS)
