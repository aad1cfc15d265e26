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
from sdnet.robustness.model import first_layer
from sdnet.robustness.rules import residual_of
from sdnet.train.data.normalisation import NORMS


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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training pictures and one test picture of each of 4 classes."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for name, i in ((name, i) for name in "abcd" for i in range(count)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def swept(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["robustness", "--device", "cpu", *command]) == 0, capfd.readouterr().err


def refused(command: list[Any], message: str, capfd: pytest.CaptureFixture[str], name: str = "robustness") -> None:
    assert main([name, "--device", "cpu", *map(str, command)]) == 2
    shown = capfd.readouterr().err
    assert message in shown, shown
    assert shown.count("\n") == 1, "one sentence"


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
    checkpoint: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
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
    assert "holds a network without CSC layers in its stem, so it has no lambda" in capfd.readouterr().err
    refused(
        ["--checkpoint", file, "--data", "/nowhere", "--k", 1], "--k is for networks with a CSC", capfd, "adversaries"
    )


def test_a_checkpoint_is_attacked(
    checkpoint: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["adversaries", "--checkpoint", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out")]
    command += ["--device", "cpu", "--pictures", "4", "--linf", "2", "--l2", "--steps", "2", "--restarts", "1"]
    assert main([*command, "--autoattack", "0", "--k", "1.5"]) == 0, capfd.readouterr().err
    values = json.loads((tmp_path / "out" / "attacks.json").read_text())["values"]
    assert values["PGD-2, Linf 2/255"] <= values["clean"]
    assert values["check: two forwards are equal"] is True
    text = (tmp_path / "out" / "attacks.md").read_text()
    assert "| PGD-2, Linf 2/255 |" in text
    assert "of 4 test pictures, AutoAttack of the first 0 of them" in text


def test_pixels_are_normalised_as_in_the_training_not_by_the_stem(
    checkpoint: Path, cifar_c: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, file = sdnet.load_model(checkpoint), tmp_path / "model.safetensors"
    sdnet.save_model(file, model, facts={"program": "imagenet"})
    command = ["--checkpoint", str(file), "--published", str(cifar_c), "--out", str(tmp_path)]
    swept([*command, "--severities", "3", "--lambdas", "0.4"], capfd)
    values = json.loads((tmp_path / "results.json").read_text())["values"]
    images, _ = sdnet.robustness.read_cifar_c(cifar_c, "fog", 3)
    x = PixelModel(model, *NORMS["imagenet"]).normalise(images)
    expected = float(residual_of(first_layer(model), x, 0.4).detach().mean())
    assert values["fog 3, lambda 0.4"]["residual"] == pytest.approx(expected, rel=1e-4)
    refused(["--checkpoint", file, "--data", tmp_path], "holds one of ImageNet", capfd, "adversaries")


def test_folders_of_pictures_give_what_arrays_of_the_same_pictures_give(
    checkpoint: Path, cifar_c: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for severity in range(1, 6):
        images, labels = sdnet.robustness.read_cifar_c(cifar_c, "fog", severity)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            place = tmp_path / "ImageNet-C" / "fog" / str(severity) / "abcd"[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    values: list[dict[str, Any]] = []
    for folder in (cifar_c, tmp_path / "ImageNet-C"):
        command = ["--checkpoint", str(checkpoint), "--published", str(folder), "--out", str(tmp_path / folder.name)]
        swept([*command, "--severities", "3", "--lambdas", "0.4"], capfd)
        values.append(json.loads((tmp_path / folder.name / "results.json").read_text())["values"])
    arrays, folders = (value["fog 3, lambda 0.4"] for value in values)
    assert folders == pytest.approx(arrays, rel=1e-5)


def test_another_set_of_the_same_name_does_not_take_over_stored_results(
    checkpoint: Path, cifar_c: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--severities", "1", "--lambdas", "0.1"]
    swept([*command, "--published", str(cifar_c)], capfd)
    swept([*command, "--published", str(cifar_c), "--severities", "1", "1", "2"], capfd)
    other = tmp_path / cifar_c.name
    other.mkdir()
    np.save(other / "fog.npy", 255 - np.load(cifar_c / "fog.npy"))
    np.save(other / "labels.npy", np.load(cifar_c / "labels.npy"))
    refused([*command, "--published", other], "results.json was measured with another fog than that in", capfd)


def test_what_a_published_set_lacks_is_said_before_any_work(
    checkpoint: Path, cifar_c: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures, many, named = tmp_path / "folders", tmp_path / "many", tmp_path / "named.safetensors"
    for severity in (1, 2):
        for name in "abcd":
            place = pictures / "fog" / str(severity) / name
            place.mkdir(parents=True)
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(place / "0.png")
    many.mkdir()
    np.save(many / "fog.npy", np.zeros((200, 4, 4, 3), np.uint8))
    np.save(many / "labels.npy", np.tile(np.arange(40) % 3, 5))
    sdnet.save_model(named, sdnet.create_model("sdnet18", 4, stem="cifar", width=2), ["a", "b", "c", "x"])
    out, model = tmp_path / "out", ["--checkpoint", checkpoint]
    cases: list[tuple[list[Any], str]] = [
        ([*model, "--published", pictures, "--severities", 2, 3], "There is no folder"),
        (["--checkpoint", named, "--published", pictures, "--severities", 2], "a class d where the network has x."),
        ([*model, "--published", many], "has the labels 0 to 2 alone; the network has classes 0 to 3."),
        ([*model, "--published", cifar_c, "--pictures", 7], "--pictures is 7; there are 6."),
        ([*model, "--published", cifar_c, "--holdout", 5], "--holdout is 5; it is for --data"),
        ([*model, "--published", cifar_c, "--scale", "official"], "--scale is official; it is for --data"),
    ]
    for words, message in cases:
        refused([*words, "--out", out], message, capfd)
    assert not (out / "results.json").exists()


def test_a_network_that_learned_a_lambda_per_atom_is_swept(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    sdnet.save_model(file, sdnet.create_model("sdnet18", 4, stem="cifar", width=2, learn_lam="atom"))
    command = ["--checkpoint", str(file), "--data", str(data), "--out", str(tmp_path / "out"), "--noises", "shot"]
    swept([*command, "--severities", "5", "--lambdas", "0.4", "0", "--layers", "first"], capfd)
    assert "| noise, severity | 0 | 0.4 |" in (tmp_path / "out" / "table.md").read_text()
    refused([*command, "--lambdas", 0, "--layers", "all"], "--lambdas has 0: lam is 0; a lambda that is learned", capfd)


def test_the_held_out_pictures_are_those_of_the_run(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "last.safetensors"
    facts = {"recipe": json.dumps({"holdout": 4})}
    sdnet.save_model(file, sdnet.create_model("sdnet18", 4, stem="cifar", width=2), facts=facts)
    command = ["--checkpoint", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out"), "--noises", "shot"]
    command += ["--severities", "1", "--lambdas", "0.1"]
    refused([*command, "--holdout", 3], "--holdout is 3; the run held out 4 training pictures", capfd)
    refused([*command, "--weights", "best"], "holds last.safetensors and no best.safetensors", capfd)
    refused([*command, "--holdout", 4, "--pictures", 5], "The number of held-out pictures is 5; there are 4", capfd)
    refused([*command, "--pictures", 5], "--pictures is 5; there are 4 pictures.", capfd)
    swept([*command, "--holdout", "4"], capfd)


def test_autoattack_needs_four_classes_and_says_so_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    sdnet.save_model(file, sdnet.create_model("sdnet18", 3, stem="cifar", width=2))
    command = ["--checkpoint", file, "--data", "/nowhere", "--out", tmp_path / "out"]
    refused(
        command, "AutoAttack needs 4 classes at least; the network has 3: pass --autoattack 0.", capfd, "adversaries"
    )
