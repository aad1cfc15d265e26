"""What becomes of measured times, and who reads it. The measurement itself needs a GPU."""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.bench import __main__ as front
from sdnet.bench import environment, measure_kernels, measure_paths
from sdnet.bench.isolation import LostError
from sdnet.bench.layer_shapes import LayerShape
from sdnet.bench.measure_paths import Trial, merged, quickest, shape_of, ways_of
from sdnet.bench.operators import Bound, Case, Inputs, csc_by
from sdnet.kernels.triton_path import paths, tiles
from sdnet.kernels.triton_path.paths import Entry

CASE = Case("csc", LayerShape("", 64, 256, 3, 2, (9, 8)), 2, 2, "bf16", "channels_last", torch.device("cpu"))


TILES = tiles.by_rule(shape_of(CASE))
FUSED, CUDNN = Entry("fused", TILES), Entry("cudnn", TILES)
WAYS = {"cudnn": CUDNN, "fused": FUSED}


@pytest.mark.parametrize(
    ("times", "way"),
    [
        ([{FUSED: 1.0, CUDNN: 2.0}], FUSED),
        ([{FUSED: 1.0, CUDNN: 2.0}, {FUSED: 4.0, CUDNN: 2.0}], CUDNN),
        ([{FUSED: 1.0, CUDNN: 2.0}, {CUDNN: 2.0}], CUDNN),
        ([{FUSED: 1.0}, {CUDNN: 2.0}], None),
        ([{}], None),
    ],
    ids=range(5),
)
def test_the_quickest_right_way_of_a_layer(times: list[dict[Entry, float]], way: Entry | None) -> None:
    assert quickest(Trial("a", each) for each in times) == way


def test_earlier_entries_stay_unless_measured_anew() -> None:
    earlier = {"c": FUSED, "b": FUSED, "a": CUDNN}
    trials = [Trial("a", {FUSED: 1.0, CUDNN: 2.0}), Trial("b", {})]
    assert merged(earlier, trials) == {"a": FUSED, "c": FUSED}
    assert merged(earlier, []) == earlier


def test_what_is_written_decides_steps_and_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MEASURED", tmp_path / "measured")
    monkeypatch.delenv("SDNET_TRITON_PATH", raising=False)
    shape, gpu = shape_of(CASE), "Some GPU of 2026"
    assert not paths.path_of(shape, "another GPU").fused
    other = Entry("fused", tiles.candidates(shape)[-1])
    assert other.tiles != TILES
    table = merged({}, [Trial(paths.key_of(shape), {other: 1.0, CUDNN: 1.1})])
    measure_paths.write(paths.file_of(gpu, paths.MEASURED), table)
    assert [file.name for file in paths.MEASURED.iterdir()] == ["Some_GPU_of_2026.json"]
    assert paths.path_of(shape, gpu) == (True, f"fused steps were the quicker ones when measured on {gpu}")
    assert paths.tiles_of(shape, gpu) == other.tiles
    assert not paths.path_of(shape._replace(channels_last=False), gpu).fused


def test_ways_are_both_paths_and_if_asked_other_tiles() -> None:
    assert ways_of(CASE, all_tiles=False) == {"cudnn": CUDNN, "fused": FUSED}
    ways = ways_of(CASE, all_tiles=True)
    assert [way.tiles for way in list(ways.values())[1:]] == tiles.candidates(shape_of(CASE))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_case_is_the_layer_that_the_kernels_will_see(dtype: str, layout: str) -> None:
    fused = pytest.importorskip("sdnet.kernels.triton_path.fused")
    case = replace(CASE, dtype=dtype, layout=layout)
    weight = torch.empty(256, 64, 3, 3, dtype=measure_kernels.DTYPES[dtype], device="meta")
    with measure_kernels.timing.fp32_products(dtype == "tf32"):
        layer = fused.Layer(weight, 2, (9, 8), (2, 2), (1, 1), measure_kernels.LAYOUTS[layout])
        assert shape_of(case) == layer.shape


def test_default_cases_are_all_layers_in_all_types_and_both_layouts() -> None:
    parser = argparse.ArgumentParser()
    measure_paths.add_arguments(parser)
    options = parser.parse_args([])
    cases = list(measure_kernels.cases(options, torch.device("cuda")))
    layers = {case.layer.geometry for case in cases}
    assert {layer.size for layer in layers if layer.channels == 3} == {(224, 224), (32, 32)}
    assert len(cases) == len(layers) * 6
    assert len({paths.key_of(shape_of(case)) for case in cases}) == len(layers) * 4
    assert options.out == paths.MEASURED


def test_only_right_answers_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With torch's loop in the place of the kernels, which cannot run here, and with a wrong answer in one's place."""
    case = replace(CASE, layer=LayerShape("", 4, 8, 3, 1, (5, 6)), dtype="fp32", layout="contiguous")

    def wrong(case: Case, inputs: Inputs) -> Bound:
        bound = csc_by("torch")(case, inputs)
        return Bound(lambda: 1.1 * bound.run(), bound.leaves)

    providers = {"fused": wrong, "cudnn": csc_by("torch")}
    monkeypatch.setattr(measure_paths, "by_entry", lambda way, _: providers[way.steps])
    (trial,) = measure_paths.measure(case, WAYS, seconds=0.01)
    assert trial.key == "4->8 3x3/1x1 @ 5x6 ieee contiguous"
    assert list(trial.times) == [CUDNN]
    assert "fused refused: output is off by 0.1" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels support the call")
def test_a_path_that_cannot_run_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    (trial,) = measure_paths.measure(CASE, WAYS, seconds=0.01)
    assert trial.times == {}
    assert "fused unsupported: " in capsys.readouterr().out


class Fragile:
    """A workshop whose child does not survive the fused path, nor anything if `hopeless`."""

    def __init__(self, hopeless: bool = False) -> None:
        self.hopeless = hopeless

    def run(self, work: Callable, case: Case, ways: dict[str, Entry], seconds: float) -> Iterator[Trial]:
        if self.hopeless:
            raise LostError("its process ended by signal 11", "")
        if "fused" in ways:
            raise LostError("it raised AcceleratorError: an illegal memory access", "fused")
        yield Trial("a", dict.fromkeys(ways.values(), 2.0))


def test_a_path_that_breaks_the_device_leaves_the_other_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    workshop: Any = Fragile()
    assert measure_paths.survivors(CASE, WAYS, 0.01, workshop) == Trial("a", {CUDNN: 2.0}, faults=1)
    assert "lost fused: it raised AcceleratorError" in capsys.readouterr().out
    workshop.hopeless = True
    assert measure_paths.survivors(CASE, WAYS, 0.01, workshop) == (paths.key_of(shape_of(CASE)), {}, 2)


def test_the_table_holds_what_was_measured_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial_of(case: Case, *_: object) -> Trial:
        if case.dtype == "tf32":
            raise KeyboardInterrupt
        return Trial(paths.key_of(shape_of(case)), {FUSED: 1.0, CUDNN: 2.0})

    monkeypatch.setattr(environment, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(environment, "device_name", lambda _: "Some GPU")
    monkeypatch.setattr(measure_paths, "ways_of", lambda *_: WAYS)
    monkeypatch.setattr(measure_paths, "survivors", trial_of)
    with pytest.raises(KeyboardInterrupt):
        front.main(["paths", "--layer", "64,64,3,1,8", "--dtype", "bf16", "tf32", "--out", str(tmp_path)])
    paths.table.cache_clear()
    assert paths.table("Some GPU", tmp_path) == {"64->64 3x3/1x1 @ 8x8 16-bit channels_last": FUSED}


def test_nothing_else_decides_while_ways_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = paths.MEASURED
    for before in ("cudnn", None):
        if before is None:
            monkeypatch.delenv("SDNET_TRITON_PATH", raising=False)
        else:
            monkeypatch.setenv("SDNET_TRITON_PATH", before)
        with measure_paths.choices_as_they_were():
            assert "SDNET_TRITON_PATH" not in os.environ
            paths.MEASURED = Path()
        assert os.environ.get("SDNET_TRITON_PATH") == before
        assert measured == paths.MEASURED


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
    for file in paths.MEASURED.glob("*.json"):
        table = paths.table(file.stem.replace("_", " "), paths.MEASURED)
        assert list(table) == sorted(table)
        assert {way.steps for way in table.values()} <= {"fused", "cudnn"}
