"""What `paths` asks of the qualification, and what it makes of its verdicts. The measurement itself needs a GPU."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.bench import __main__ as front
from sdnet.bench import measure_kernels, measure_paths
from sdnet.bench.layer_shapes import LayerShape
from sdnet.bench.measure_paths import call_of, flags_of
from sdnet.bench.providers import Workload
from sdnet.kernels.qualify import parent
from sdnet.kernels.qualify.job import shape_of
from sdnet.kernels.qualify.key import Call, Flags, machine_of
from sdnet.kernels.qualify.verdicts import TORCH, Store, Table, Trial, Verdict
from sdnet.kernels.triton_path.layer import Layer

WORKLOAD = Workload("csc", LayerShape("", 64, 256, 3, 2, (9, 8)), 2, 2, "bf16", "channels_last", torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_call_is_that_of_the_operator(dtype: str, layout: str) -> None:
    call = call_of(replace(WORKLOAD, dtype=dtype, layout=layout))
    weight = torch.empty(256, 64, 3, 3, dtype=measure_kernels.DTYPES[dtype], device="meta")
    with measure_kernels.timing.fp32_products(dtype == "tf32"):
        layer = Layer(weight, 2, (9, 8), (2, 2), (1, 1), measure_kernels.LAYOUTS[layout])
        assert shape_of(call, flags_of(dtype), arch=0) == layer.shape


def test_default_workloads_are_all_layers_in_all_types_and_both_layouts() -> None:
    parser = argparse.ArgumentParser()
    measure_paths.add_arguments(parser)
    options = parser.parse_args([])
    workloads = list(measure_kernels.workloads(options, torch.device("cuda")))
    layers = {workload.layer.geometry for workload in workloads}
    assert {layer.size for layer in layers if layer.channels == 3} == {(224, 224), (32, 32)}
    assert len(workloads) == len(layers) * 6
    assert len({call_of(workload).key(flags_of(workload.dtype)) for workload in workloads}) == len(workloads)
    assert options.out is None


@pytest.mark.parametrize(("fault", "status"), [("", 0), ("codes is off by 1, allowed is 0.02", 1)])
def test_every_type_is_qualified_with_its_flags(
    fault: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[Call], Flags, dict[str, Any]]] = []

    def qualify(calls: Sequence[Call], device: str, *, flags: Flags, store: Store, **options: Any) -> parent.Outcome:
        asked.append((list(calls), flags, options))
        verdict = Verdict(TORCH, "a reason", trials=(Trial("torch", TORCH), Trial("fused", "[]", fault)))
        return parent.Outcome(machine_of(torch.device("cpu")), Table({calls[0].key(flags): verdict}))

    monkeypatch.setattr(parent, "qualify", qualify)
    monkeypatch.setattr(measure_paths, "choose_device", lambda _: torch.device("cuda"))
    command = ["paths", "--layer", "64,64,3,1,8", "--dtype", "bf16", "tf32", "fp32", "--tiles", "--budget", "60"]
    assert front.main([*command, "--out", str(tmp_path)]) == status
    assert [calls[0].dtype for calls, _, _ in asked] == ["bfloat16", "float32", "float32"]
    assert [flags.convolutions for _, flags, _ in asked[1:]] == ["tf32", "ieee"]
    assert all(options["fresh"] and options["all_tiles"] and options["budget"] <= 60 for _, _, options in asked)


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
