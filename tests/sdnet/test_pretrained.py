"""`create_model(..., pretrained=...)` gives the network of a file, and refuses another one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sdnet
from sdnet import pretrained


@pytest.fixture(scope="module")
def original() -> sdnet.SDNet:
    torch.manual_seed(0)
    return sdnet.create_model("sdnet18", 7, stem="cifar", width=2, lam=0.2, image_size=16, n_steps=3).eval()


@pytest.fixture(scope="module")
def folder(original: sdnet.SDNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("weights") / "small"
    place.mkdir()
    sdnet.save_model(place / "model.safetensors", original)
    return place


def test_a_path_gives_the_network_of_the_file(original: sdnet.SDNet, folder: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    for path in (folder, str(folder / "model.safetensors")):
        model = sdnet.create_model("sdnet18", width=2, pretrained=path)
        assert not model.training
        assert model.config == original.config
        assert model(images).equal(original(images))


def test_lambda_and_options_of_the_coding_can_be_changed(folder: Path) -> None:
    model = sdnet.create_model("sdnet18", 7, stem="cifar", width=2, pretrained=folder, lam=0.4, n_steps=1)
    layer: Any = model.stem.conv
    assert float(layer.lam) == pytest.approx(0.4)
    assert layer.n_steps == 1


def test_defaults_that_are_given_count_as_given(folder: Path) -> None:
    """The file has lambda 0.2 and 7 classes of small images; the defaults are 0.1, 1000 and the ImageNet stem."""
    model = sdnet.create_model("sdnet18", width=2, pretrained=folder, lam=0.1, n_steps=2, image_size=(16, 16))
    layer: Any = model.stem.conv
    assert float(layer.lam) == pytest.approx(0.1)
    assert layer.n_steps == 2
    layer = sdnet.create_model("sdnet18", width=2, pretrained=folder, image_size=None).stem.conv
    assert float(layer.lam) == pytest.approx(0.2)
    given: list[dict[str, Any]] = [{"num_classes": 1000}, {"stem": "imagenet"}, {"in_channels": 1}, {"image_size": 32}]
    for arguments in given:
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is .*; the network in .* has"):
            sdnet.create_model("sdnet18", width=2, pretrained=folder, **arguments)


def test_a_name_is_a_folder_of_the_checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", folder.parent)
    assert sdnet.list_pretrained() == ["small"]
    assert sdnet.create_model("sdnet18", width=2, pretrained="small").config["num_classes"] == 7


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f: sdnet.create_model("sdnet18", pretrained=f),
            ValueError,
            r"width is 64; the network in .* has width 2",
        ),
        (lambda f: sdnet.create_model("sdnet34", width=2, pretrained=f), ValueError, "has name 'sdnet18'"),
        (lambda f: sdnet.create_model("sdnet18", 5, width=2, pretrained=f), ValueError, "num_classes is 5; .* 7"),
        (lambda f: sdnet.create_model("sdnet18", width=2, pretrained=3), ValueError, "it must be a path or a name"),  # type: ignore[arg-type]
        (lambda f: sdnet.create_model("sdnet18", width=2, pretrained="x"), FileNotFoundError, "the names are"),
    ],
)
def test_another_network_is_refused_in_one_sentence(
    folder: Path, call: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(folder)
