"""The tables and plots of the documents are those of the ledger."""

from pathlib import Path
from typing import Any

import pytest

from sdnet.bench import __main__ as front
from sdnet.bench import report
from sdnet.bench.ledger import RESULTS, Ledger, read
from sdnet.train.errors import UserError

TEXT = "Before.\n\n<!-- bench:{} -->\nstale\n<!-- /bench -->\n\nAfter.\n"


def environment(device: str, date: str) -> dict[str, Any]:
    return {
        "device": device,
        "device_type": "cuda",
        "driver": "580.1",
        "cuda": "13.0",
        "threads": 4,
        "packages": {"torch": "2.11.0", "triton": None},
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "python -m sdnet.bench train",
        "date": date,
    }


def time_of(p50: float) -> dict[str, float]:
    return {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50, "samples": 9}


def add_training(folder: Path, device: str, date: str, times: dict[str, float], **size: Any) -> None:
    ledger = Ledger(folder, "train", environment(device, date))
    for model, p50 in times.items():
        shape = {"batch": 64, "image_size": 32, "stem": "cifar", "n_steps": 2} | size
        metrics = {"images_per_second": 1e3 * shape["batch"] / p50, "forward_ms": p50 / 4, "backward_ms": 3 * p50 / 4}
        ledger.add(model, "step", shape, dtype="bf16", layout="channels_last", time_ms=time_of(p50), metrics=metrics)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two GPUs; on the first an older run with other figures; kernels with a refused and an unsupported provider."""
    folder = tmp_path / "results"
    add_training(folder, "GPU A", "2026-01-01T10:00:00+00:00", {"resnet18": 100.0, "sdnet18_all": 123.0})
    add_training(folder, "GPU A", "2026-01-02T10:00:00+00:00", {"resnet18": 10.0, "sdnet18_all": 25.0})
    add_training(folder, "GPU B", "2026-01-01T11:00:00+00:00", {"sdnet18_all": 64.0})
    ledger = Ledger(folder, "kernels", environment("GPU A", "2026-01-02T12:00:00+00:00"))
    shape = {"operator": "csc", "layer": "64->64 3x3/1 @ 56x56", "batch": 8, "n_steps": 2}
    metrics = {"roofline_ms": 1.0, "flops": 4e9, "bytes": 2e6, "tflop_s": 2.0, "copy_gb_s": 1e3, "gemm_tflop_s": 4.0}
    for provider, p50 in {"fused": 2.0, "cudnn": 2.5, "reference": 5.0, "compile": 3.0}.items():
        ledger.add(provider, "both", shape, time_ms=time_of(p50), metrics=metrics, memory_mib=10 * p50)
    ledger.add("official", "both", shape, status="refused", reason="wrong")
    return folder


def test_table_of_the_newest_run(results: Path, tmp_path: Path) -> None:
    document = tmp_path / "docs" / "page.md"
    found = list(read(results))
    text = report.filled(TEXT.format("train device=GPU_A"), found, document, tmp_path)
    assert "Not measured yet." in text
    text = report.filled(TEXT.format("train dtype=bf16"), found, document, tmp_path)
    assert text.startswith("Before.\n\n<!-- bench:train dtype=bf16 -->\n| model, setting |")
    assert text.endswith("<!-- /bench -->\n\nAfter.\n")
    assert "stale" not in text
    lines = [line for line in text.splitlines() if line.startswith("| sdnet18_all")]
    assert len(lines) == 2
    assert lines[0].endswith("| 2560 [2327–2844] | 0.40× | 0% | 0% | 25% | 75% | 0% |")
    assert lines[1].endswith("| 1000 [909–1111] | 0% | 0% | 25% | 75% | 0% |")
    assert "520" not in text
    assert "<sub>GPU A, driver 580.1, torch 2.11.0, 2026-01-02, [run 2026-01-02T10:00:00+00:00-" in text
    assert "(../results/train_gpu-a_2026-01-02.jsonl)</sub>" in text
    assert "(../results/train_gpu-b_2026-01-01.jsonl)</sub>" in text


def test_the_faster_path_against_the_faster_baseline(results: Path, tmp_path: Path) -> None:
    text = report.filled(TEXT.format("kernels"), list(read(results)), tmp_path / "page.md", tmp_path)
    assert "| 2 [1.8–2.2] | 2.5 [2.25–2.75] | 5 [4.5–5.5] | 3 [2.7–3.3] | 1.50× | 50% | 33% | 20 | 30 |" in text
    assert "Not timed: official (1 refused)." in text
    assert "geometric mean over 1 shapes: 1.50×" in text


def test_margins_of_a_training_run_are_those_of_all_its_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "margins", environment("GPU A", "2026-01-05T10:00:00+00:00"))
    shape, settings = (
        {"batch": 4, "image_size": 32, "width": 16, "n_steps": 2},
        {"optimizer": "Adam", "lr": 0.01, "seed": 0},
    )
    for first, margins in ((1, [1.5, 0.9]), (3, [1.1, 1.0])):
        steps = {"first_step": first, "last_step": first + 1, "largest_margin_by_step": margins}
        metrics = {"step_ms": 100.0}
        ledger.add("sdnet18", "step", shape, time_ms=time_of(2.0), metrics=metrics, settings=settings | steps)
    late = settings | {"first_step": 5, "last_step": 5}
    ledger.add("sdnet18", "step", shape, settings=late, status="refused", reason="the loss became NaN")
    text = report.filled(TEXT.format("margins"), list(read(tmp_path)), tmp_path / "page.md", tmp_path)
    assert "| sdnet18, width 16, batch 4, Adam, 0.01, seed 0 | 4, refused at 5 | 1.50 | 1.10 | 2 | 1 | 2.0 |" in text


@pytest.mark.parametrize("view", report.PLOTS)
def test_plots_are_drawn_where_there_is_something_to_draw(results: Path, tmp_path: Path, view: str) -> None:
    add_training(results, "GPU A", "2026-01-03T10:00:00+00:00", {"sdnet18": 10.0}, batch=64)
    found = list(read(results))
    varied = {"plot-batch": {"batch": 128}, "plot-n-steps": {"n_steps": 4}}
    if view in varied:
        date = "2026-01-04T10:00:00+00:00"
        ledger = Ledger(results, "train", environment("GPU A", date))
        for size in ({}, varied[view]):
            shape = {"batch": 64, "image_size": 32, "stem": "cifar", "n_steps": 2} | size
            ledger.add("sdnet18", "step", shape, time_ms=time_of(9.0), metrics={"images_per_second": 7.0})
        assert report.NOTHING in report.filled(TEXT.format(view), found, tmp_path / "p.md", tmp_path)
        found = list(read(results))
    elif view == "plot-training":
        found = [(path, row) for path, row in found if row.run < "2026-01-03"]
    text = report.filled(TEXT.format(view), found, tmp_path / "page.md", tmp_path / "pictures")
    (picture, *_) = (tmp_path / "pictures").glob("*.png")
    assert f"](pictures/{picture.name})" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_writes_and_checks(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    document = tmp_path / "page.md"
    document.write_text(TEXT.format("train"))
    arguments = ["report", "--results", str(results), "--document", str(document), "--pictures", str(tmp_path / "p")]
    assert front.main([*arguments, "--check"]) == 1
    assert document.read_text() == TEXT.format("train")
    assert front.main(arguments) == 0
    assert front.main([*arguments, "--check"]) == 0
    assert "Not what the ledger holds" in capsys.readouterr().out
    whole = tmp_path / "whole.md"
    assert front.main([*arguments, "--whole", str(whole)]) == 0
    assert whole.read_text().count("\n## ") == 4


@pytest.mark.parametrize(("mark", "sentence"), [("speed", "must be one of kernels"), ("train dtype", "are name=value")])
def test_wrong_marks_get_a_sentence(tmp_path: Path, mark: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        report.filled(TEXT.format(mark), [], tmp_path / "page.md", tmp_path)


@pytest.mark.parametrize(
    "text", ["<!-- bench:train -->\nkept\n", "<!-- bench:train -->\nkept\n" + TEXT.format("train")]
)
def test_a_mark_that_is_not_closed_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is not closed"):
        report.filled(text, [], tmp_path / "page.md", tmp_path)


def test_missing_files_get_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert front.main(["report", "--results", str(tmp_path / "nothing")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    assert front.main(["report", "--results", str(tmp_path), "--document", str(tmp_path / "page.md")]) == 2
    assert "which is not a file" in capsys.readouterr().err
    assert front.main(["report", "--results", str(tmp_path), "--whole", str(tmp_path / "no" / "page.md")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_the_committed_document_is_that_of_the_committed_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = report.DOCUMENT.read_text()
    assert report.filled(text, list(read(RESULTS)), report.DOCUMENT, report.PICTURES, dry=True) == text


def test_cards_are_those_of_the_results_that_are_given(tmp_path: Path) -> None:
    """The checkout holds cards of the scale small, the other folder none."""
    document = tmp_path / "page.md"
    document.write_text("<!-- bench:cards-rules scale=small -->\n<!-- /bench -->\n")
    assert front.main(["report", "--document", str(document), "--results", str(tmp_path)]) == 0
    assert report.NOTHING in document.read_text()
    assert front.main(["report", "--document", str(document)]) == 0
    assert report.NOTHING not in document.read_text()
