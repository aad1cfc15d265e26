"""`sdnet.train.evaluate`: the accuracy that a run reported, official files, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import sdnet
from sdnet.bench.official import OfficialConfig, OfficialSDNet
from sdnet.train.data.cifar import open_small_pictures, read_small_pictures
from sdnet.train.data.dali import open_pictures
from sdnet.train.data.resident import MEAN, STD
from sdnet.train.evaluate import main
from sdnet.train.job import Job
from sdnet.train.recipes import cifar_sdnet18, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]


@pytest.fixture(scope="module")
def photographs(write_tree: WriteTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data") / "photographs", [8, 8], [3, 4])


@pytest.fixture(scope="module")
def small(photographs: Path) -> Path:
    """The same photographs at 16 x 16 pixels."""
    root = photographs.parent / "small"
    for file in photographs.rglob("*.jpg"):
        copy = (root / file.relative_to(photographs)).with_suffix(".png")
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.resize((16, 16)).save(copy)
    return root


@pytest.fixture(scope="module")
def run(photographs: Path) -> Path:
    """A run of train/imagenet.py with averaged weights."""
    folder = photographs.parent / "run"
    recipe = replace(demo(), width=4, epochs=1, batch=4, image_size=32, eval_resize=36, lr=0.01, ema=0.5)
    Trainer(Job(recipe, photographs, RunFolder(folder), threads=1), open_pictures).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def small_run(small: Path) -> Path:
    """A run of train/cifar.py."""
    folder = small.parent / "small run"
    recipe = replace(cifar_sdnet18(), width=4, epochs=1, batch=4, image_size=16, eval_resize=16, model="sdnet18_all")
    Trainer(Job(recipe, small, RunFolder(folder), threads=1), open_small_pictures).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *options: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    main([str(option) for option in options])
    return json.loads(capsys.readouterr().out)


def refusal(*options: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(option) for option in options])
    return str(caught.value.code)


def test_weights_of_a_run_have_the_scores_that_it_reported(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = RunFolder(run).metrics()[-1]
    for checkpoint, prefix in ((run, ""), (run / "last.safetensors", ""), (run / "last_ema.safetensors", "ema_")):
        result = evaluated(capsys, "--checkpoint", checkpoint, "--data", photographs, "--threads", "1")
        assert result["top1"] == line[f"{prefix}val_top1"]
        assert result["loss"] == pytest.approx(line[f"{prefix}val_loss"], rel=1e-6)
        assert result["images"] == 7
        assert result["top1_correct"] == round(result["top1"] * 7 / 100)
        assert result["layers"]["stem.conv"]["step_margin"] == pytest.approx(0.9, rel=1e-3)


def test_layers_are_described_by_their_means_over_all_images(
    small_run: Path, small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Against one batch of all images, by the plain model."""
    out = tmp_path / "result.json"
    result = evaluated(capsys, "--checkpoint", small_run, "--data", small, "--batch", "3", "--out", out)
    assert json.loads(out.read_text()) == result
    model = sdnet.load_model(small_run)
    val = read_small_pictures(small).val
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = (torch.from_numpy(val.images).float() - mean) / std
    with torch.no_grad():
        expected = sdnet.diagnose(model, images)
        top1 = (model(images).argmax(1) == torch.from_numpy(val.labels)).sum()
    assert result["top1_correct"] == top1
    assert list(result["layers"]) == list(expected)
    for name, layer in expected.items():
        assert result["layers"][name]["sparsity"] == pytest.approx(float(layer.sparsity.mean()), abs=1e-3)
        assert result["layers"][name]["relative_residual"] == pytest.approx(
            float(layer.relative_residual.mean()), rel=1e-3
        )
    assert not evaluated(capsys, "--checkpoint", small_run, "--data", small, "--no-layers")["layers"]


def test_settings_of_the_training_alone_do_not_hinder_and_outputs_must_be_finite(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with safe_open(run / "last.safetensors", "pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    recipe = json.loads(header["recipe"]) | {"first_image_size": 32, "extras": "trivial"}
    save_file(tensors, tmp_path / "grown.safetensors", header | {"recipe": json.dumps(recipe)})
    data = ("--data", photographs, "--threads", "1", "--no-layers")
    (photographs / "val" / ".hidden").touch()
    main([str(word) for word in ("--checkpoint", tmp_path / "grown.safetensors", *data, "--image-size", "24")])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 7
    assert f"1 entries in {photographs / 'val'} are not used" in printed.err
    (photographs / "val" / ".hidden").unlink()
    tensors["linear.bias"][0] = float("nan")
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken, header)
    assert refusal("--checkpoint", broken, *data) == (
        f"error: The network in {broken} gives outputs that are infinite or NaN: it has no accuracy."
    )


@pytest.mark.slow
def test_two_processes_count_every_image_once(small_run: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", small_run, "--data", small, "--batch", "4"]
    alone = evaluated(capsys, *options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "sdnet.train.evaluate", *map(str, options)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["processes"] == 2
    for name in ("images", "top1_correct", "top5_correct"):
        assert together[name] == alone[name]
    for name, layer in alone["layers"].items():
        assert together["layers"][name] == pytest.approx(layer, rel=1e-5)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = OfficialSDNet(OfficialConfig(num_classes=2)).eval()
    for layer in network.dict_layers():
        layer.normalize_weight()
    file = tmp_path / "model_best.pth.tar"
    torch.save(network.state_dict(), file)
    return file


def test_an_official_file_is_evaluated_by_one_command(
    official: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--checkpoint", official, "--data", small, "--image-size", "16", "--eval-resize", "16")
    result = evaluated(capsys, *options, "--lam", "0.2")
    assert (result["model"]["name"], result["model"]["stem"], result["model"]["solver"]) == (
        "sdnet18",
        "cifar",
        "sdnet",
    )
    assert (result["model"]["num_classes"], result["model"]["lam"], result["images"]) == (2, 0.2, 7)


def test_a_file_of_save_model_is_evaluated_as_the_run_was_that_it_comes_from(
    small_run: Path, small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The file has no recipe: the network tells the image size, and --program how images are read."""
    file = tmp_path / "plain.safetensors"
    sdnet.save_model(file, sdnet.load_model(small_run))
    plain = evaluated(capsys, "--checkpoint", file, "--data", small, "--program", "cifar", "--batch", "4")
    wanted = evaluated(capsys, "--checkpoint", small_run, "--data", small)
    assert {**plain, "checkpoint": ""} == {**wanted, "checkpoint": ""}


def test_what_cannot_be_evaluated_is_said_in_one_sentence(
    run: Path, small_run: Path, photographs: Path, official: Path, write_tree: WriteTree, tmp_path: Path
) -> None:
    data = ("--data", photographs)
    nothing = tmp_path / "nothing"
    assert refusal("--checkpoint", nothing, *data) == f"error: There is no weights file at '{nothing}'."
    assert refusal("--checkpoint", "official", *data).startswith("error: --checkpoint is official; download model_best")
    damaged = tmp_path / "last.safetensors"
    damaged.write_bytes((run / "last.safetensors").read_bytes()[:1000])
    assert refusal("--checkpoint", damaged, *data).startswith(f"error: '{damaged}' cannot be read as a weights file")
    sdnet_file = tmp_path / "plain.safetensors"
    from sdnet.weights import save_model

    save_model(sdnet_file, sdnet.create_model("resnet18", 2, width=4))
    assert refusal("--checkpoint", sdnet_file, *data) == (
        f"error: {sdnet_file} does not say how its images were read: pass --program imagenet or --program cifar."
    )
    save_model(sdnet_file, sdnet.create_model("resnet18", 2, width=4, image_size=(32, 48)))
    assert refusal("--checkpoint", sdnet_file, *data, "--program", "imagenet") == (
        "error: The network is for images of 32x48 pixels; only square ones can be evaluated."
    )
    three = write_tree(tmp_path / "three", [2, 2, 2], [1, 1, 1])
    assert refusal("--checkpoint", run, "--data", three) == (
        f"error: {three} has 3 classes, the network in {run / 'best.safetensors'} has 2."
    )
    renamed = write_tree(tmp_path / "renamed", [2, 2], [1, 1])
    for split in ("train", "val"):
        (renamed / split / "class 01").rename(renamed / split / "other")
    assert refusal("--checkpoint", run, "--data", renamed) == (
        f"error: {renamed} has a class other where the weights in {run / 'best.safetensors'} have class 01."
    )
    assert refusal("--checkpoint", run, *data, "--image-size", "64") == (
        "error: eval_resize is 36, less than image_size, 64."
    )
    assert refusal("--checkpoint", run, *data, "--lam", "-1").startswith("error: lam is -1.0; it must be a")
    assert refusal("--checkpoint", run, *data, "--out", nothing / "x.json") == (
        f"error: --out is {nothing / 'x.json'}; its folder does not exist."
    )
    assert refusal("--checkpoint", run, *data, "--out", tmp_path) == (
        f"error: --out is {tmp_path}, a folder; it must be the path of a file."
    )
    assert refusal("--checkpoint", "", *data) == (
        "error: --checkpoint is empty; it must be a path, such as . for the working folder."
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        said = refusal("--checkpoint", run, *data, "--impl", "triton")
    assert said.startswith("error: the argument impl is 'triton', but x is on cpu")
