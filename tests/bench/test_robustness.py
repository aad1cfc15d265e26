"""The sweep over lambda measures what a direct computation gives, for noise made here and for published sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdnet
from sdnet.bench.__main__ import main
from sdnet.bench.robustness.pictures import PIXEL_MEAN, PIXEL_STD
from sdnet.robustness import PixelModel, RobustModel, accuracy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    sdnet.save_model(file, sdnet.create_model("sdnet18", 4, stem="cifar", width=2))
    return file


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def cifar_c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("CIFAR-10-C"), np.random.default_rng(0)
    np.save(folder / "fog.npy", generator.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(6) % 4, 5))
    return folder


def swept(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["robustness", "--device", "cpu", *command]) == 0, capfd.readouterr().err


def test_a_published_set_is_swept(
    checkpoint: Path, cifar_c: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint", str(checkpoint), "--published", str(cifar_c), "--out", str(tmp_path)]
    swept([*command, "--severities", "2", "4", "--lambdas", "0.1", "0.8"], capfd)
    values: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())["values"]
    images, labels = sdnet.robustness.read_cifar_c(cifar_c, "fog", 4)
    model = sdnet.load_model(checkpoint)
    direct = accuracy(PixelModel(RobustModel(model, 0.8), PIXEL_MEAN, PIXEL_STD).eval(), images / 255, labels)
    assert values["fog 4, lambda 0.8"]["accuracy"] == pytest.approx(direct, abs=1e-4)
    assert 0 < values["fog 4, lambda 0.1"]["sparsity"] < values["fog 4, lambda 0.8"]["sparsity"] < 1
    assert values["fog 4, lambda 0.1"]["residual"] < values["fog 4, lambda 0.8"]["residual"]
    assert "| fog 2 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_noise_on_pictures_is_swept_over_all_layers(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, generator = tmp_path / "data", np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "abcd":
            (data / split / name).mkdir(parents=True)
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / split / name / "0.png")
    out = tmp_path / "out"
    command = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--layers", "all"]
    swept([*command, "--noises", "impulse", "--severities", "9", "--scale", "official", "--lambdas", "0.2"], capfd)
    values = json.loads((out / "results.json").read_text())["values"]
    assert {"clean, lambda 0.2", "impulse 9, lambda 0.2"} <= set(values)
    assert (out / "pictures.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "One of --data and --published is needed, and not both."),
        (["--published", "/nowhere"], "There is no folder /nowhere."),
        (["--data", "/nowhere", "--noises", "rain"], "--noises has rain; they must be among gaussian, shot"),
        (["--data", "/nowhere", "--severities", "6"], "--severities has 6; gaussian of scale cifar10-c has 5."),
    ],
)
def test_bad_options_are_refused(
    checkpoint: Path, tmp_path: Path, extra: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["robustness", "--device", "cpu", "--checkpoint", str(checkpoint), "--out", str(tmp_path), *extra]
    assert main(command) == 2
    assert message in capfd.readouterr().err


def test_a_network_of_other_pictures_or_classes_is_refused(
    checkpoint: Path, cifar_c: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    three = tmp_path / "three"
    for folder in (three / split / name for split in ("train", "test") for name in "abc"):
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "fog.npy", np.load(cifar_c / "fog.npy"))
    np.save(tmp_path / "c" / "labels.npy", np.full(30, 7))
    networks: list[tuple[dict[str, Any], str]] = [
        ({"num_classes": 0}, "holds a network without a classifier, so it has no accuracy."),
        ({"num_classes": 4, "in_channels": 1}, "holds a network for images of 1 channels; it must take 3."),
    ]
    cases = [(["--published", cifar_c, "--checkpoint", tmp_path / f"{n}"], s) for n, (_, s) in enumerate(networks)]
    for number, (arguments, _) in enumerate(networks):
        (tmp_path / f"{number}").mkdir()
        model = sdnet.create_model("sdnet18", stem="cifar", width=2, **arguments)
        sdnet.save_model(tmp_path / f"{number}" / "model.safetensors", model)
    cases += [
        (["--data", three, "--checkpoint", checkpoint], f"The pictures in {three} have 3 classes; the network has 4."),
        (
            ["--published", tmp_path / "c", "--checkpoint", checkpoint],
            "has the label 7; the network has classes 0 to 3.",
        ),
    ]
    for words, sentence in cases:
        assert main(["robustness", "--device", "cpu", "--out", str(tmp_path / "out"), *map(str, words)]) == 2
        assert sentence in capfd.readouterr().err


def test_a_network_without_lambda_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    sdnet.save_model(file, sdnet.create_model("resnet18", 4, stem="cifar", width=2))
    command = ["robustness", "--device", "cpu", "--checkpoint", str(file), "--out", str(tmp_path)]
    assert main([*command, "--published", "/nowhere"]) == 2
    assert "holds a network without CSC layers, so it has no lambda" in capfd.readouterr().err


def test_a_checkpoint_is_attacked(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, generator = tmp_path / "data", np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "abcd":
            (data / split / name).mkdir(parents=True)
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / split / name / "0.png")
    command = ["adversaries", "--checkpoint", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out")]
    command += ["--device", "cpu", "--pictures", "4", "--linf", "2", "--l2", "--steps", "2", "--restarts", "1"]
    assert main([*command, "--autoattack", "0", "--k", "1.5"]) == 0, capfd.readouterr().err
    values = json.loads((tmp_path / "out" / "attacks.json").read_text())["values"]
    assert values["PGD-2, Linf 2/255"] <= values["clean"]
    assert values["check: two forwards are equal"] is True
    assert "| PGD-2, Linf 2/255 |" in (tmp_path / "out" / "attacks.md").read_text()
