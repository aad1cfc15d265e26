"""Runs that begin with trained weights, and frozen parts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sdnet
from sdnet.step_size import csc_layers
from sdnet.train.build import make_model
from sdnet.train.data.dali import open_pictures
from sdnet.train.errors import UserError
from sdnet.train.init_from import freeze, initialise, read_initial
from sdnet.train.job import Job
from sdnet.train.recipes import Recipe, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

RECIPE = replace(demo(), epochs=1, batch=5, width=4, image_size=32, eval_resize=36, lr=0.01)


def trained(classes: int = 3, image_size: int = 48, model: str = "sdnet18") -> sdnet.SDNet:
    """Weights from another image size, as if trained: every tensor differs from a fresh one."""
    torch.manual_seed(1)
    network = sdnet.create_model(model, classes, width=4, image_size=image_size)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.1)
    sdnet.project(network)
    return network


def begun(
    source: sdnet.SDNet, folder: Path, classes: tuple[str, ...], names: tuple[str, ...]
) -> tuple[sdnet.SDNet, str]:
    sdnet.save_model(folder / "best.safetensors", source, names)
    recipe = replace(RECIPE, init_from=str(folder))
    model = make_model(recipe, len(classes), torch.device("cpu"))
    initial = read_initial(recipe)
    assert initial
    (note,) = initialise(model, initial, classes)
    assert not initialise(model, initial._replace(config={}), classes)[1:], "not known: nothing is said"
    other = initial._replace(config={**initial.config, "lam": 0.3, "n_steps": 4})
    assert initialise(model, other, classes)[1].endswith("another coding: n_steps 4, not 2; lam 0.3, not 0.1.")
    return model, note


@pytest.mark.parametrize(
    ("names", "classes", "same_head"),
    [
        (("a", "b", "c"), ("a", "b", "c"), True),
        ((), ("a", "b", "c"), True),  # not known: the number of classes decides
        (("a", "b", "c"), ("a", "b", "d"), False),
        (("a", "b", "c"), ("a", "b"), False),
    ],
)
def test_all_weights_are_taken_but_a_classifier_for_other_classes(
    tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...], same_head: bool
) -> None:
    source = trained()
    model, note = begun(source, tmp_path, classes, names)
    ours, theirs = model.state_dict(), source.state_dict()
    fresh = make_model(RECIPE, len(classes), torch.device("cpu")).state_dict()
    for name, value in ours.items():
        if name.endswith((".step_size", ".power_vector")):
            continue
        taken = same_head or not name.startswith("linear.")
        assert torch.equal(value, (theirs if taken else fresh)[name]), name
    assert sdnet.step_margins(model) == pytest.approx({"stem.conv": 0.9}, rel=1e-3)  # for images of this size
    assert ("the classifier is new" in note) != same_head


def test_what_cannot_be_taken_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^init_from is '.*best.safetensors', which holds weights of another model: "):
        begun(trained(model="sdnet18_all"), tmp_path, ("a", "b", "c"), ())
    for name, sentence in (
        ("absent.safetensors", "There is no weights file at"),
        ("absent.pth.tar", "There is no checkpoint file at"),
        ("text.safetensors", "cannot be read as a weights file"),
        ("text.pth.tar", "cannot be read as a checkpoint"),
        ("folder", "There is no weights file in"),
    ):
        path = tmp_path / name
        if "text" in name:
            path.write_text("text")
        if name == "folder":
            path.mkdir()
        with pytest.raises(UserError, match=f"^init_from is '{path}': .*{sentence}"):
            read_initial(replace(RECIPE, init_from=str(path)))


def test_an_official_checkpoint_is_a_beginning(tmp_path: Path) -> None:
    from sdnet.bench.official import OfficialConfig, OfficialSDNet

    torch.manual_seed(2)
    official = OfficialSDNet(OfficialConfig(depth=18, all_layers=False, num_classes=7, stem="cifar"))
    torch.save({"state_dict": official.state_dict()}, tmp_path / "model_best.pth.tar")
    recipe = replace(RECIPE, stem="cifar", width=64, init_from=str(tmp_path / "model_best.pth.tar"))
    initial = read_initial(recipe)
    assert initial
    model = make_model(recipe, 3, torch.device("cpu"))
    note, coding = initialise(model, initial, ("a", "b", "c"))
    assert "the classifier is new" in note
    assert coding == "These weights were trained with another coding: solver sdnet, not fista."
    key = "stages.0.0.conv1.weight"
    assert torch.equal(model.state_dict()[key], official.state_dict()["layer1.0.conv1.weight"])


def test_a_learned_lambda_begins_with_that_of_the_recipe_or_of_the_weights(tmp_path: Path) -> None:
    recipe = replace(RECIPE, lam=0.2, learn_lam="layer", init_from=str(tmp_path))
    for source, expected in (({}, 0.2), ({"learn_lam": "layer", "lam": 0.3}, 0.3)):
        network = sdnet.create_model("sdnet18", 2, width=4, image_size=32, **source)
        sdnet.save_model(tmp_path / "best.safetensors", network)
        model, initial = make_model(recipe, 2, torch.device("cpu")), read_initial(recipe)
        assert initial
        initialise(model, initial, ("a", "b"))
        assert float(csc_layers(model)["stem.conv"].lam.detach()) == pytest.approx(expected)


def test_unknown_parts_and_nothing_to_train_are_refused() -> None:
    model = trained()
    with pytest.raises(UserError, match=r"^freeze is 'stemm'; it must name a part of the model, such as stem, "):
        freeze(model, ("stemm",))
    with pytest.raises(UserError, match=r"^freeze is stem stages linear, which leaves nothing to train\.$"):
        freeze(model, ("stem", "stages", "linear"))


def test_a_run_begins_with_another_and_keeps_frozen_parts(make_tree: MakeTree, tmp_path: Path) -> None:
    """The second data set has two classes, the first three."""
    first = tmp_path / "first"
    run(make_tree([6, 5, 5], [2, 2, 2]), first, RECIPE)
    recipe = replace(RECIPE, init_from=str(first), freeze=("stem", "stages.0"), lr=0.1)
    run(without_third_class(tmp_path / "pictures"), tmp_path / "second", recipe)
    before, after = load_file(first / "best.safetensors"), load_file(tmp_path / "second" / "last.safetensors")
    frozen = {name for name in after if name.startswith(("stem.", "stages.0."))}
    kept = {
        name for name in after if after[name].shape == before[name].shape and torch.equal(after[name], before[name])
    }
    assert frozen <= kept | {"stem.conv.step_size", "stem.conv.power_vector"}
    assert not {name for name in kept if name.endswith("weight")} - frozen
    assert RunFolder(tmp_path / "second").recipe() == recipe


def without_third_class(data: Path) -> Path:
    for split in ("train", "val"):
        for file in (data / split / "class 02").iterdir():
            file.unlink()
        (data / split / "class 02").rmdir()
    return data


def run(data: Path, folder: Path, recipe: Recipe) -> None:
    Trainer(Job(recipe, data, RunFolder(folder), threads=1), open_pictures).train()
