"""How measured times become a table, and how it is read. The measurement itself needs a GPU."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdnet.bench import __main__ as front
from sdnet.bench import measure_kernels, measure_paths
from sdnet.bench.isolation import Worker, WorkerError
from sdnet.bench.layer_shapes import LayerShape
from sdnet.bench.measure_paths import Candidate, Trial, candidates_of, fastest, merged, shape_of
from sdnet.bench.providers import BoundCall, Inputs, Workload, csc_by
from sdnet.kernels.triton_path import paths, tiles
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.paths import Entry

WORKLOAD = Workload("csc", LayerShape("", 64, 256, 3, 2, (9, 8)), 2, 2, "bf16", "channels_last", torch.device("cpu"))

TILES = tiles.by_rule(shape_of(WORKLOAD))
FUSED, CUDNN = Entry("fused", TILES), Entry("cudnn", TILES)
CANDIDATES = [Candidate("cudnn", CUDNN), Candidate("fused", FUSED)]


@pytest.mark.parametrize(
    ("times", "entry"),
    [
        ([{FUSED: 1.0, CUDNN: 2.0}], FUSED),
        ([{FUSED: 1.0, CUDNN: 2.0}, {FUSED: 4.0, CUDNN: 2.0}], CUDNN),
        ([{FUSED: 1.0, CUDNN: 2.0}, {CUDNN: 2.0}], CUDNN),
        ([{FUSED: 1.0}, {CUDNN: 2.0}], None),
        ([{}], None),
    ],
    ids=range(5),
)
def test_the_fastest_right_candidate_of_a_layer(times: list[dict[Entry, float]], entry: Entry | None) -> None:
    assert fastest(Trial("a", each) for each in times) == entry


def test_earlier_entries_stay_unless_measured_again() -> None:
    earlier = {"c": FUSED, "b": FUSED, "a": CUDNN}
    trials = [Trial("a", {FUSED: 1.0, CUDNN: 2.0}), Trial("b", {})]
    assert merged(earlier, trials) == {"a": FUSED, "c": FUSED}
    assert merged(earlier, []) == earlier


def test_the_written_table_decides_path_and_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MEASURED", tmp_path / "measured")
    monkeypatch.delenv("SDNET_TRITON_PATH", raising=False)
    shape, gpu = shape_of(WORKLOAD), "Some GPU of 2026"
    assert paths.choose_path(shape, "another GPU").name == "cudnn"
    other = Entry("fused", tiles.candidates(shape)[-1])
    assert other.tiles != TILES
    table = merged({}, [Trial(paths.key_of(shape), {other: 1.0, CUDNN: 1.1})])
    measure_paths.write(paths.file_of(gpu, paths.MEASURED), table)
    assert [file.name for file in paths.MEASURED.iterdir()] == ["Some_GPU_of_2026.json"]
    reason = f"the fused path was the faster one when measured on {gpu}"
    assert paths.choose_path(shape, gpu) == ("fused", other.tiles, reason)
    assert paths.choose_path(shape._replace(channels_last=False), gpu).name == "cudnn"


def test_candidates_are_both_paths_and_if_asked_other_tiles() -> None:
    assert candidates_of(WORKLOAD, all_tiles=False) == CANDIDATES
    candidates = candidates_of(WORKLOAD, all_tiles=True)
    assert [candidate.entry.tiles for candidate in candidates[1:]] == tiles.candidates(shape_of(WORKLOAD))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_shape_is_that_of_the_kernels(dtype: str, layout: str) -> None:
    workload = replace(WORKLOAD, dtype=dtype, layout=layout)
    weight = torch.empty(256, 64, 3, 3, dtype=measure_kernels.DTYPES[dtype], device="meta")
    with measure_kernels.timing.fp32_products(dtype == "tf32"):
        layer = Layer(weight, 2, (9, 8), (2, 2), (1, 1), measure_kernels.LAYOUTS[layout])
        assert shape_of(workload) == layer.shape


def test_default_workloads_are_all_layers_in_all_types_and_both_layouts() -> None:
    parser = argparse.ArgumentParser()
    measure_paths.add_arguments(parser)
    options = parser.parse_args([])
    workloads = list(measure_kernels.workloads(options, torch.device("cuda")))
    layers = {workload.layer.geometry for workload in workloads}
    assert {layer.size for layer in layers if layer.channels == 3} == {(224, 224), (32, 32)}
    assert len(workloads) == len(layers) * 6
    assert len({paths.key_of(shape_of(workload)) for workload in workloads}) == len(layers) * 4
    assert options.out == paths.MEASURED


def test_only_right_answers_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both candidates run PyTorch's loop, since the kernels cannot run here, one with a wrong answer."""
    layer = LayerShape("", 4, 8, 3, 1, (5, 6))
    workload = replace(WORKLOAD, layer=layer, dtype="fp32", layout="contiguous")

    def wrong(workload: Workload, inputs: Inputs) -> BoundCall:
        bound = csc_by("torch")(workload, inputs)
        return BoundCall(lambda: 1.1 * bound.run(), bound.leaves)

    providers = {"fused": wrong, "cudnn": csc_by("torch")}
    monkeypatch.setattr(measure_paths, "csc_by", lambda _, path: providers[json.loads(path)[0]])
    (times,) = measure_paths.measure(CANDIDATES, workload, 0.01)
    assert list(times) == [CUDNN]
    assert "fused refused: output is off by 0.1" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels support the call")
def test_a_path_that_cannot_run_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    (times,) = measure_paths.measure(CANDIDATES, WORKLOAD, 0.01)
    assert times == {}
    assert "fused unsupported: " in capsys.readouterr().out


@pytest.mark.parametrize(("announced", "times"), [("fused", {CUDNN: 2.0}), ("", {})])
def test_a_path_that_ends_its_process_counts_as_a_fault(
    announced: str, times: dict[Entry, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(candidates: list[Candidate], *_: object) -> Iterator[dict[Entry, float]]:
        if any(candidate.name == "fused" for candidate in candidates):
            raise WorkerError("its process ended by signal 11", announced)
        yield {candidate.entry: 2.0 for candidate in candidates}

    monkeypatch.setattr(measure_paths, "measure", measure)
    trial = measure_paths.trial_of(WORKLOAD, CANDIDATES, 0.01, Worker(isolated=False))
    assert trial == Trial(paths.key_of(shape_of(WORKLOAD)), times, faults=2 - len(times))


def test_an_interrupted_table_holds_the_layers_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial_of(workload: Workload, *_: object) -> Trial:
        if workload.dtype == "tf32":
            raise KeyboardInterrupt
        return Trial(paths.key_of(shape_of(workload)), {FUSED: 1.0, CUDNN: 2.0})

    monkeypatch.setattr(measure_paths, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(measure_paths, "device_name", lambda _: "Some GPU")
    monkeypatch.setattr(measure_paths, "candidates_of", lambda *_: CANDIDATES)
    monkeypatch.setattr(measure_paths, "trial_of", trial_of)
    assert front.main(["paths", "--layer", "64,64,3,1,8", "--dtype", "bf16", "tf32", "--out", str(tmp_path)]) == 130
    paths.table.cache_clear()
    assert paths.table("Some GPU", tmp_path) == {"64->64 3x3/1x1 @ 8x8 16-bit channels_last": FUSED}


def test_refusals_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        assert front.main(["paths", "--out", str(tmp_path)]) == 2
        assert "paths needs a GPU, and torch finds none" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert front.main(["paths", "--out", str(tmp_path)]) == 2
    assert "interpreted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_committed_tables_are_well_formed() -> None:
    for file in paths.MEASURED.glob("*.json"):
        table = paths.table(file.stem.replace("_", " "), paths.MEASURED)
        assert list(table) == sorted(table)
        assert {entry.path for entry in table.values()} <= {"fused", "cudnn"}
