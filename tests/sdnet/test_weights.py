"""Weights files: a network comes back from its file alone, and what is wrong with a file is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdnet
from sdnet.step_size import csc_layers
from sdnet.weights import model_facts, weights_bytes


@pytest.fixture
def model() -> sdnet.SDNet:
    options = {"width": 4, "image_size": (16, 24), "lam": 0.3, "n_steps": 3, "solver": "ista"}
    return sdnet.create_model("sdnet18_all", 3, stem="cifar", shortcut=False, **options).eval()


def test_a_network_comes_back_from_its_file_alone(model: sdnet.SDNet, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    sdnet.save_model(file, model, classes=["cat", "dog", "été"], facts={"val_top1": "80.0"})
    assert list(tmp_path.iterdir()) == [file]
    loaded = sdnet.load_model(file)
    assert loaded.config == model.config
    assert loaded.class_names == ("cat", "dog", "été")
    assert not loaded.training
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(loaded(x), model(x))
    sdnet.save_model(tmp_path / "again.safetensors", loaded)
    assert sdnet.read_weights(tmp_path / "again.safetensors").classes == ("cat", "dog", "été")
    sdnet.save_model(tmp_path / "again.safetensors", loaded, classes=())
    assert sdnet.read_weights(tmp_path / "again.safetensors").classes == ()
    weights = sdnet.read_weights(file)
    assert weights.facts == {"val_top1": "80.0"}
    assert weights.tensors.keys() == load_file(file).keys() == model.state_dict().keys()


def test_options_can_be_changed_when_a_network_is_loaded(model: sdnet.SDNet, tmp_path: Path) -> None:
    sdnet.save_model(tmp_path / "best.safetensors", model)
    loaded = sdnet.load_model(tmp_path, lam=0.5, impl="reference")  # the file in a folder
    layers = csc_layers(loaded).values()
    assert {(float(layer.lam), layer.impl) for layer in layers} == {(0.5, "reference")}
    assert loaded.class_names == ()


def test_equal_weights_give_equal_files(model: sdnet.SDNet) -> None:
    facts = {f"fact {number}": str(number) for number in range(20)}
    files = {weights_bytes(model.state_dict(), facts) for _ in range(5)}
    assert len(files) == 1


def test_a_file_that_cannot_be_used_is_named(model: sdnet.SDNet, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match=f"There is no weights file at '{file}'"):
        sdnet.load_model(file)
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, best\.safetensors, last\.safetensors"):
        sdnet.load_model(tmp_path)
    with pytest.raises(ValueError, match="path is 3; it must be the path of a weights file"):
        sdnet.load_model(3)  # pyright: ignore[reportArgumentType]
    sdnet.save_model(file, model)
    whole = file.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"x" * 200):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"'{file}' cannot be read as a weights file: "):
            sdnet.load_model(file)
    save_file(model.state_dict(), file)
    with pytest.raises(ValueError, match="does not say which network it belongs to"):
        sdnet.load_model(file)
    sdnet.save_model(file, model)
    with pytest.raises(ValueError, match=r"holds the weights of another network: misshapen linear\.weight: "):
        sdnet.load_model(file, width=8)
    with pytest.raises(ValueError, match=r"^classes has 2 names; the network has 3 classes\.$"):
        sdnet.save_model(file, model, classes=["cat", "dog"])


def test_a_file_says_the_options_that_the_layers_have_now(model: sdnet.SDNet, tmp_path: Path) -> None:
    sdnet.set_lambda(model, 0.7)
    for layer in csc_layers(model).values():
        layer.n_steps = 5
    sdnet.refresh_step_size(model, image_size=(12, 20))
    sdnet.save_model(tmp_path / "net.safetensors", model)
    x = torch.randn(2, 3, 12, 20)
    assert torch.equal(sdnet.load_model(tmp_path / "net.safetensors")(x), model(x))


def test_lambda_per_sample_is_refused(model: sdnet.SDNet, tmp_path: Path) -> None:
    sdnet.set_lambda(model, torch.rand(4))
    with pytest.raises(ValueError, match=r"lam of stem\.conv has a value per sample, \[4, 1, 1, 1\]; set a number"):
        sdnet.save_model(tmp_path / "net.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_of_save_model_are_refused(model: sdnet.SDNet, tmp_path: Path) -> None:
    save: Any = sdnet.save_model
    with pytest.raises(ValueError, match=r"path is SDNet\(.*; it must be the path of a file"):
        save(model, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"model is of type Linear; it must be a network of sdnet\.create_model"):
        save(tmp_path / "net.safetensors", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^classes is 'abc'; it must be a sequence of strings\.$"):
        save(tmp_path / "net.safetensors", model, "abc")
    with pytest.raises(ValueError, match=r"^classes holds 0; it must be a sequence of strings\.$"):
        save(tmp_path / "net.safetensors", model, range(3))
    with pytest.raises(ValueError, match=r"^classes is {.*}; it must be a sequence of strings\.$"):
        save(tmp_path / "net.safetensors", model, {"cat", "dog", "eel"})
    with pytest.raises(ValueError, match=r"^path is ''; it must be the path of a weights file or of its folder\.$"):
        sdnet.load_model("")
    with pytest.raises(ValueError, match=r"^facts is {'epoch': 3}; it must be a mapping of strings to strings\.$"):
        save(tmp_path / "net.safetensors", model, facts={"epoch": 3})
    with pytest.raises(ValueError, match=r"^model is on the meta device and has no values"):
        save(tmp_path / "net.safetensors", sdnet.create_model("resnet18", 3, stem="cifar", width=4).to("meta"))
    assert not list(tmp_path.iterdir())
    save(tmp_path / "net.safetensors", model, np.array(["cat", "dog", "eel"]))
    assert sdnet.read_weights(tmp_path / "net.safetensors").classes == ("cat", "dog", "eel")


def test_names_of_another_number_of_classes_are_refused(model: sdnet.SDNet, tmp_path: Path) -> None:
    facts = model_facts(model.config) | {"classes": '["cat"]'}
    (tmp_path / "net.safetensors").write_bytes(weights_bytes(model.state_dict(), facts))
    with pytest.raises(ValueError, match="has the names of 1 classes for a network of 3"):
        sdnet.load_model(tmp_path / "net.safetensors")


def test_arguments_that_create_model_does_not_take_are_those_of_the_call_or_of_the_file(
    model: sdnet.SDNet, tmp_path: Path
) -> None:
    file = tmp_path / "net.safetensors"
    sdnet.save_model(file, model)
    for name in ("foo", "pretrained"):
        with pytest.raises(
            TypeError, match=f"^load_model has no argument '{name}'; its arguments are path and those of"
        ):
            sdnet.load_model(file, **{name: "x"})
        facts = model_facts(model.config | {name: str(file)})
        (tmp_path / "other.safetensors").write_bytes(weights_bytes(model.state_dict(), facts))
        with pytest.raises(ValueError, match=f"another version of sdnet: it has the option {name}"):
            sdnet.load_model(tmp_path / "other.safetensors")


def test_a_place_that_weights_cannot_be_saved_to_is_named(model: sdnet.SDNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^path is '{tmp_path}', a folder; it must be the path of a file\.$"):
        sdnet.save_model(tmp_path, model)
    with pytest.raises(FileNotFoundError, match=r"^There is no folder '.*absent' for the file 'a\.safetensors'"):
        sdnet.save_model(tmp_path / "absent" / "a.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_header_that_describes_a_huge_network_costs_no_memory(model: sdnet.SDNet, tmp_path: Path) -> None:
    """Its last layers alone have hundreds of gigabytes: shapes are compared before memory is taken."""
    huge = {**model.config, "width": 2**12}
    (tmp_path / "huge.safetensors").write_bytes(weights_bytes(model.state_dict(), model_facts(huge)))
    with pytest.raises(ValueError, match="holds the weights of another network"):
        sdnet.load_model(tmp_path / "huge.safetensors")
    huge |= {"width": 2**30}
    (tmp_path / "huge.safetensors").write_bytes(weights_bytes(model.state_dict(), model_facts(huge)))
    with pytest.raises(ValueError, match=r"describes a network that is too large for any memory\.$"):
        sdnet.load_model(tmp_path / "huge.safetensors")


def test_tensors_and_names_of_another_type_are_refused(model: sdnet.SDNet, tmp_path: Path) -> None:
    file, state = tmp_path / "net.safetensors", model.state_dict()
    file.write_bytes(
        weights_bytes(state | {"linear.bias": torch.ones(3, dtype=torch.int32)}, model_facts(model.config))
    )
    with pytest.raises(ValueError, match=r"is damaged: linear.bias is torch.int32; the network has torch.float32\.$"):
        sdnet.load_model(file)
    for value in (-0.1, 0.0, float("nan")):
        broken = state | {"stem.conv.step_size": torch.tensor(value)}
        file.write_bytes(weights_bytes(broken, model_facts(model.config)))
        with pytest.raises(
            ValueError, match=r"is damaged: stem\.conv\.step_size is .*; it must be finite and above 0\."
        ):
            sdnet.load_model(file)
    file.write_bytes(weights_bytes(state, model_facts(model.config) | {"classes": "[1, 2, 3]"}))
    with pytest.raises(ValueError, match="its entry 'model' or 'classes' is malformed"):
        sdnet.load_model(file)


@pytest.mark.parametrize("lam", [["a"], [0.1, 0.2, 0.3, 0.4], [[[[0.1]]], [[[0.2]]]]])
def test_malformed_lambdas_of_single_layers_are_refused(lam: list[Any], model: sdnet.SDNet, tmp_path: Path) -> None:
    config = model.config | {"layers": {"stem.conv": {"lam": lam}}}
    (tmp_path / "net.safetensors").write_bytes(weights_bytes(model.state_dict(), model_facts(config)))
    with pytest.raises(ValueError, match="has malformed options of single layers"):
        sdnet.load_model(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"n_steps": "x"}, "': n_steps is 'x'; it must be an int of at least 1"),
        ({"stem": None}, "': stem is None; it must be one of imagenet, cifar"),
        ({"layers": {"stem.conv": {"lam": -1}}}, "', stem.conv: lam is -1; it must be a finite number"),
    ],
    ids=str,
)
def test_a_wrong_value_in_a_header_is_said_with_the_file(
    config: dict[str, Any], sentence: str, model: sdnet.SDNet, tmp_path: Path
) -> None:
    file = tmp_path / "net.safetensors"
    file.write_bytes(weights_bytes(model.state_dict(), model_facts(model.config | config)))
    with pytest.raises(ValueError, match=f"^'{file}{sentence}"):
        sdnet.load_model(file)
    with pytest.raises(ValueError, match=r"^width is 0; it must be an int of at least 1\.$"):
        sdnet.load_model(file, width=0, n_steps=2, stem="cifar")


def test_another_image_size_gives_step_sizes_for_it(model: sdnet.SDNet, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    sdnet.save_model(file, model)
    assert sdnet.load_model(file, image_size=None).config == model.config
    loaded = sdnet.load_model(file, image_size=32)
    assert loaded.config["image_size"] == [32, 32]
    assert csc_layers(loaded)["stem.conv"].power_vector.shape == (1, 3, 32, 32)
    assert all(abs(margin - 0.9) < 1e-3 for margin in sdnet.step_margins(loaded, image_size=32).values())
    sdnet.refresh_step_size(model, image_size=32)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-3, atol=1e-3)


def test_a_place_of_an_official_checkpoint_that_is_no_file_is_named(tmp_path: Path) -> None:
    model: Any = sdnet.create_model("sdnet18", 3, width=4, stem="cifar", image_size=8)
    for call in (sdnet.load_official_model, lambda path: sdnet.save_official_checkpoint(model, path)):
        with pytest.raises(ValueError, match=r"^path is 5; it must be the path of a file\.$"):
            call(5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=rf"^path is '{tmp_path}', a folder; it must be the path of a file\.$"):
        sdnet.save_official_checkpoint(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^There is no folder '.*absent' for the file 'a\.pth'\.$"):
        sdnet.save_official_checkpoint(model, tmp_path / "absent" / "a.pth")
    with pytest.raises(ValueError, match=r"^model is on the meta device and has no values"):
        sdnet.save_official_checkpoint(model.to("meta"), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
