"""Networks in the layout of the Hugging Face Hub: what is stored, comes back bit by bit, and is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import sdnet
import sdnet.hub
from sdnet.step_size import csc_layers
from sdnet.weights import model_facts, weights_bytes


def network(**options: Any) -> sdnet.SDNet:
    torch.manual_seed(0)
    options = {"width": 4, "image_size": 16, "stem": "cifar"} | options
    return sdnet.create_model("sdnet18_all", 3, **options).eval()


def bits(model: sdnet.SDNet) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as the trainer leaves it, of CIFAR in JPEG files."""
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    (data / "train" / "cat").mkdir(parents=True)
    (data / "train" / "cat" / "1.jpg").touch()
    sdnet.save_model(run / "last.safetensors", network(lam=0.2), facts={"val_top1": "50.0"})
    model = network()
    model.class_names = ("cat", "dog", "été")
    sdnet.save_model(run / "best.safetensors", model, model.class_names, {"val_top1": "81.25", "val_top5": "99.0"})
    (run / "recipe.json").write_text(json.dumps({"name": "cifar_sdnet18_all", "epochs": 2}))
    start = {"command": ["train/cifar.py", "--data", str(data)], "device": "NVIDIA H200", "device_type": "cuda"}
    start |= {"commit": "0123abcd", "dirty": False, "date": "2026-11-29", "packages": {"torch": "2.13.0"}}
    (run / "environment.json").write_text(json.dumps([start]))
    return run


def test_a_network_comes_back_bit_by_bit_with_its_options(tmp_path: Path) -> None:
    model = network(n_steps=3, solver="ista", learn_lam="no", shortcut=False, lam=0.2)
    sdnet.set_lambda(model, 0.3)
    sdnet.set_lambda(model, torch.rand(1, 4, 1, 1), layers="first")  # a value per atom of the stem
    csc_layers(model)["stages.0.0.conv1"].n_steps = 5
    model.class_names = ("cat", "dog", "été")
    sdnet.refresh_step_size(model, image_size=20)  # power vectors of another size than at construction
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["name"], config["width"], config["lam"], config["solver"]) == ("sdnet18_all", 4, 0.3, "ista")
    assert set(model.config) <= set(config)

    loaded = sdnet.SDNet.from_pretrained(tmp_path)
    assert bits(loaded) == bits(model)
    assert not loaded.training
    assert loaded.class_names == model.class_names
    for name, layer in csc_layers(loaded).items():
        assert layer.coding == csc_layers(model)[name].coding
        assert torch.equal(layer.lam, csc_layers(model)[name].lam)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))


def test_learned_lambdas_come_back(tmp_path: Path) -> None:
    model = network(learn_lam="atom")
    with torch.no_grad():
        for layer in csc_layers(model).values():
            assert layer.raw_lam is not None
            layer.raw_lam.add_(torch.rand_like(layer.raw_lam))
    model.save_pretrained(tmp_path)
    assert bits(sdnet.SDNet.from_pretrained(tmp_path)) == bits(model)


def test_options_can_be_changed_for_loading(tmp_path: Path) -> None:
    model = network()
    sdnet.set_lambda(model, 0.4, layers="first")
    model.save_pretrained(tmp_path)
    loaded = sdnet.SDNet.from_pretrained(tmp_path, lam=0.5, impl="reference")
    assert {(float(layer._exact_lam), layer.impl) for layer in csc_layers(loaded).values()} == {(0.5, "reference")}
    with pytest.raises(TypeError, match="lamda"):
        sdnet.SDNet.from_pretrained(tmp_path, lamda=0.5)


def test_the_card_has_scores_gpu_commit_citation_and_a_note_on_jpeg(run: Path, tmp_path: Path) -> None:
    sdnet.load_model(run).save_pretrained(tmp_path / "hub", run=run, dataset="CIFAR-3", note="Trained in a test.")
    card: Any = ModelCard.load(tmp_path / "hub" / "README.md")
    results = {(result.metric_name, result.metric_value) for result in card.data.eval_results or []}
    assert results == {("top-1 accuracy in %", 81.25), ("top-5 accuracy in %", 99.0)}
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "sdnet",
        "mit",
        "image-classification",
    )
    for text in (
        "NVIDIA H200",
        "0123abcd",
        "CIFAR-3",
        "JPEG",
        "dai2022revisiting",
        "Trained in a test.",
        "`width` | 4",
    ):
        assert text in card.text
    assert str(tmp_path) not in (tmp_path / "hub" / "README.md").read_text()


def test_the_card_has_the_scores_of_the_weights_that_are_saved(run: Path, tmp_path: Path) -> None:
    sdnet.load_model(run / "last.safetensors").save_pretrained(tmp_path / "hub", run=run)
    card: Any = ModelCard.load(tmp_path / "hub" / "README.md")
    assert [result.metric_value for result in card.data.eval_results or []] == [50.0]
    other = sdnet.load_model(run)
    sdnet.set_lambda(other, 0.5)  # the scores are of another lambda
    with pytest.raises(ValueError, match="none of its files holds the weights of the model with"):
        other.save_pretrained(tmp_path / "other", run=run)
    assert not (tmp_path / "other").exists()


def test_a_push_uploads_the_folder_in_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixin's own code up to the two calls of the network, which record what they are given."""
    uploaded: dict[str, Any] = {}

    def create_repo(_: HfApi, repo_id: str, **options: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(_: HfApi, *, folder_path: Path, **options: Any) -> str:
        uploaded.update(options, files=sorted(file.name for file in Path(folder_path).iterdir()))
        return "address of the commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert network().push_to_hub("me/net", commit_message="First", private=True) == "address of the commit"
    assert uploaded["files"] == ["README.md", "config.json", "model.safetensors"]
    assert (uploaded["repo_id"], uploaded["commit_message"]) == ("me/net", "First")


def test_what_cannot_be_rebuilt_is_refused(tmp_path: Path) -> None:
    model = network()
    model.linear = torch.nn.Linear(model.num_features, 7)
    with pytest.raises(ValueError, match=r"misshapen linear\.weight: \[7, 32\] given, \[3, 32\] in the network"):
        model.save_pretrained(tmp_path)
    model = network()
    sdnet.set_lambda(model, torch.ones(5))
    with pytest.raises(ValueError, match=r"lam of stem\.conv has a value per sample, \[5, 1, 1, 1\]"):
        model.save_pretrained(tmp_path)
    model = network()
    csc_layers(model)["stem.conv"].prox = torch.nn.functional.softshrink  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"stem\.conv has a prox"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_edited_configuration_is_refused(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"lam": 0.7}))
    with pytest.raises(ValueError, match=r"config.json' and the header of model.safetensors beside it differ in lam;"):
        sdnet.SDNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "cannot be read as JSON: Expecting property name"),
        (b"\xff", "cannot be read as JSON: 'utf-8' codec"),
        (b"[" * 100000, "cannot be read as JSON: maximum recursion depth"),
        (b"[]", "holds \\[\\]; it must hold a JSON object"),
    ],
)
def test_a_damaged_configuration_is_named(content: bytes, sentence: str, tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^'.*config\.json' {sentence}"):
        sdnet.SDNet.from_pretrained(tmp_path)


def test_what_is_no_folder_and_no_repository_is_refused_without_the_network(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), tmp_path / "absent", "a/b/c", "../up", ""):
        with pytest.raises(FileNotFoundError, match="there is no such folder, and repositories are named 'user/name'"):
            sdnet.SDNet.from_pretrained(name)
    wrong: Any = None
    with pytest.raises(ValueError, match=r"^pretrained_model_name_or_path is None; it must be a folder or a repo"):
        sdnet.SDNet.from_pretrained(wrong)


@pytest.mark.parametrize(
    "config",
    [
        {"pretrained": "elsewhere"},
        {"impl": "torch"},
        {"layers": {"stem.conv": {"impl": 1}}},
        {"layers": {"stem.conv": {"n_dict": 2}}},
    ],
)
def test_a_file_decides_no_more_than_the_network(config: dict[str, Any], tmp_path: Path) -> None:
    """`pretrained` in a file would read another file."""
    model = network()
    model.config |= config
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights_bytes(model.state_dict(), model_facts(model.config)))
    with pytest.raises(ValueError, match=r"has the option|has options for a layer"):
        sdnet.load_model(file)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = sdnet.hub.find_spec
    monkeypatch.setattr(sdnet.hub, "find_spec", lambda name: None if name == "huggingface_hub" else find(name))
    with pytest.raises(ImportError, match=r"huggingface_hub is not installed; .*pip install 'sdnet\[hub\]'\.$"):
        network().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="huggingface_hub is not installed"):
        sdnet.SDNet.from_pretrained(tmp_path)


def test_the_package_imports_huggingface_hub_when_it_is_asked() -> None:
    program = "import sdnet, sys; assert not {'huggingface_hub', 'safetensors', 'timm', 'onnx'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("recipe.json", '["a"]', "is malformed; it must hold a JSON object"),
        ("environment.json", '{"a": 1}', "is malformed; it must hold a list of JSON objects"),
        ("environment.json", '[{"packages": []}]', "is malformed; it must hold a list of JSON objects"),
        ("environment.json", "[", "cannot be read as JSON"),
    ],
)
def test_a_damaged_run_is_refused_before_anything_is_written(
    file: str, content: str, sentence: str, run: Path, tmp_path: Path
) -> None:
    model = sdnet.load_model(run)
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=f"^'{run / file}' {sentence}"):
        model.save_pretrained(tmp_path / "hub", run=run)
    assert not (tmp_path / "hub").exists()


def test_places_that_are_no_paths_are_named() -> None:
    model: Any = network()
    with pytest.raises(ValueError, match=r"^save_directory is 5; it must be the path of a folder\.$"):
        model.save_pretrained(5)
    with pytest.raises(ValueError, match=r"^run is 5; it must be the path of a run folder\.$"):
        model.push_to_hub("a/b", run=5)
