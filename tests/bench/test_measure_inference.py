"""`infer` writes a row for each model and form, with the ratio to ResNet-18 in the same form."""

from pathlib import Path

import pytest
import torch

from sdnet.bench import measure_inference
from sdnet.bench.__main__ import main
from sdnet.bench.ledger import Row, read
from sdnet.bench.tables import inference_table
from sdnet.kernels.qualify.key import Flags


def row(model: str, form: str, milliseconds: float) -> Row:
    """A row of 128 images that took so long."""
    times = {"p20": milliseconds, "p50": milliseconds, "p80": milliseconds, "samples": 3}
    shape = {"batch": 128, "image_size": 32, "width": 64, "stem": "cifar"}
    return Row("inference", model, "inference", shape, "fp32", time_ms=times, settings={"form": form}, run="1")


def test_the_table_compares_with_resnet18_in_the_same_form() -> None:
    rows = [row("resnet18", "eager", 1000), row("resnet18", "pt2", 500), row("sdnet18", "pt2", 1000)]
    assert inference_table(rows).splitlines()[2:] == [
        "| resnet18, width 64, 32 px, batch 128, fp32, eager | 128 [128–128] | 1.00× |",
        "| resnet18, width 64, 32 px, batch 128, fp32, pt2 | 256 [256–256] | 1.00× |",
        "| sdnet18, width 64, 32 px, batch 128, fp32, pt2 | 128 [128–128] | 0.50× |",
    ]


def test_every_model_and_form_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = ["infer", "--model", "resnet18", "sdnet18", "--width", "4", "--batch", "2", "--seconds", "0"]
    assert main([*command, "--turns", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = [found for _, found in read(tmp_path)]
    assert [(found.provider, found.settings["form"]) for found in rows] == [
        (model, form) for model in ("resnet18", "sdnet18") for form in ("eager", "pt2")
    ]
    assert all(found.status == "ok" and found.metrics["images_per_second"] > 0 for found in rows)


def test_rows_in_fp32_are_computed_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default PyTorch computes convolutions of fp32 in TF32 on a GPU."""
    seen: list[Flags] = []
    monkeypatch.setattr(measure_inference, "call_of", lambda *_: lambda: seen.append(Flags.now()))
    command = ["infer", "--model", "resnet18", "--form", "eager", "--width", "2", "--seconds", "0", "--device", "cpu"]
    assert Flags.now().convolutions == "tf32"
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert {(flags.convolutions, flags.products) for flags in seen} == {("ieee", "ieee")}


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_onnxruntime_is_measured_on_the_cpu_alone(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["infer", "--form", "onnx", "--device", device]) == 2
    assert capsys.readouterr().err == f"--device is {device}; --form onnx runs on the CPU alone: pass --device cpu.\n"
