"""Loaders are measured on real pictures, and ratios are those of the rows."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdnet.bench import __main__ as front
from sdnet.bench import measure_loading, tables
from sdnet.bench.ledger import Row, read
from sdnet.train.prepare import prepare

CLASSES = ("cat", "dog")


def write_tree(root: Path, width: int, height: int, count: int) -> Path:
    """An ImageFolder tree of noise, `count` pictures a class."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root


def load_row(provider: str, data: str, ms: float, cpu: float, **changes: Any) -> Row:
    shape = {"batch": 100, "image_size": 224, "threads": 2, "images": 1000} | changes
    metrics = {"images_per_second": 1e5 / ms, "cpu_ms_per_image": cpu}
    settings = {"source": "shards" if data == "shards" else "folder", "data": data}
    times = {"p20": ms, "p50": ms, "p80": ms, "samples": 3}
    return Row("load", provider, "load", shape, time_ms=times, metrics=metrics, settings=settings, run="r")


def test_folder_its_shards_and_pictures_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree = write_tree(tmp_path / "tree", 90, 70, 6)
    prepare(tree, tmp_path / "shards", size=40, say=lambda _: None)
    small = write_tree(tmp_path / "small", 32, 32, 8)
    sources = [f"originals={tree}", str(tmp_path / "shards"), f"tiny={small}"]
    arguments = ["--data", *sources, "--threads", "1", "--batch", "4", "--images", "16", "--image-size", "32"]
    assert front.main(["load", *arguments, "--rounds", "2", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    rows = {(row.settings["data"], row.provider): row for _, row in read(tmp_path / "out")}
    pairs = {(data, loader) for data in ("originals", "shards") for loader in ("dali_cpu", "dali_gpu", "pil")}
    assert set(rows) == pairs | {("tiny", "resident")}
    assert {data: row.settings["source"] for (data, _), row in rows.items()} == {
        "originals": "folder",
        "shards": "shards",
        "tiny": "resident",
    }
    assert {loader for (_, loader), row in rows.items() if row.status != "ok"} == {"dali_gpu"}
    for row in rows.values():
        if row.status == "ok":
            assert row.metrics["images_per_second"] > 0
            assert row.metrics["cpu_ms_per_image"] > 0
    assert rows["originals", "pil"].shape["images"] == 24
    assert rows["tiny", "resident"].shape["images"] == 16
    assert "dali_cpu on shards, 1 thread, 32 px" in capsys.readouterr().out


def test_the_cpu_time_of_workers_is_counted(tmp_path: Path) -> None:
    source = measure_loading.open_source(str(write_tree(tmp_path, 200, 200, 20)), 160)
    load = measure_loading.LoadRequest(source, 16, 32, 1, torch.device("cpu"))
    batches = measure_loading.pil(load)
    measure_loading.measure_epoch(batches, load)
    here = resource.getrusage(resource.RUSAGE_SELF)
    before, own = measure_loading.processor_seconds(), here.ru_utime + here.ru_stime
    measure_loading.measure_epoch(batches, load)
    here = resource.getrusage(resource.RUSAGE_SELF)
    spent, mine = measure_loading.processor_seconds() - before, here.ru_utime + here.ru_stime - own
    assert spent > mine + 0.03


def test_ratios_on_known_figures() -> None:
    rows = [
        load_row("dali_cpu", "originals", 50.0, 1.0),
        load_row("pil", "originals", 75.0, 2.0),
        load_row("dali_cpu", "shards", 20.0, 0.25),
        load_row("pil", "shards", 30.0, 0.5, threads=1),
    ]
    by_name = {(row.provider, row.settings["data"]): row for row in rows}
    original, shards = by_name["dali_cpu", "originals"], by_name["dali_cpu", "shards"]
    assert tables.load_ratios(original, tables.pil_of(original, rows)) == pytest.approx((1.5, 2.0))
    assert tables.load_ratios(shards, tables.folder_of(shards, rows)) == pytest.approx((2.5, 4.0))
    assert tables.pil_of(shards, rows) is None  # with other threads
    lines = tables.loading_table(rows).splitlines()
    assert lines[0].endswith("| × PIL | × PIL per CPU-s | × folder | × folder per CPU-s |")
    assert lines[2].startswith("| dali_cpu on originals, 2 threads, 224 px | 2000 [2000–2000] | 1 |")
    assert lines[2].endswith("| 1.50× | 2.00× | 1.00× | 1.00× |")
    assert lines[4].endswith("| – | – | 2.50× | 4.00× |")


def test_loading_speed_is_compared_with_training_speed() -> None:
    facts = {"device": "CPU"}
    rows = [load_row("dali_cpu", "shards", 20.0, 0.25), load_row("pil", "originals", 75.0, 2.0)]
    shape = {"batch": 10, "image_size": 224, "stem": "imagenet", "n_steps": 2}
    model = Row("train", "sdnet18", "step", shape, "fp32", metrics={"images_per_second": 500.0}, environment=facts)
    loads = [replace(row, environment=facts) for row in rows]
    (line,) = tables.loading_and_training(loads, [model])
    assert line.endswith("trains on 500 images/s; dali_cpu on shards loads 10.00 times as many.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nothing"], "The data folder nothing does not exist."),
        (["--data", "same=tree", "same=tree"], "--data needs different labels"),
        (["--data", "tree", "--loader", "resident"], "None of the loaders resident can read tree."),
        (["--data", "small", "--batch", "8"], "--batch is 8; small has 4 pictures."),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], sentence: str
) -> None:
    write_tree(tmp_path / "tree", 40, 40, 1)
    write_tree(tmp_path / "small", 32, 32, 2)
    monkeypatch.chdir(tmp_path)
    assert front.main(["load", *arguments, "--out", "out"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "side=40", 40, 40, 1)
    monkeypatch.chdir(tmp_path)
    assert [measure_loading.open_source(text, 4).label for text in ("side=40", "large=side=40")] == ["side=40", "large"]
