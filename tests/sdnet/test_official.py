"""Official checkpoints: what is read, what is refused, and that a refusal leaves the model alone."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdnet
from sdnet.bench.official import OfficialConfig, OfficialSDNet
from sdnet.kernels import step_sizes
from sdnet.official import load_official_checkpoint, official_arguments

StateDict = dict[str, Tensor]


@pytest.fixture(scope="module")
def official() -> StateDict:
    """The state dict of an official sdnet18 for ten classes, atoms of unit norm, and a step of its own."""
    torch.manual_seed(0)
    network = OfficialSDNet(OfficialConfig())
    layer = network.dict_layers()[0]
    layer.normalize_weight()
    layer.step_size.fill_(0.123)
    return network.state_dict()


@pytest.fixture
def model() -> nn.Module:
    return sdnet.create_model("sdnet18", num_classes=10, stem="cifar", image_size=8)


@pytest.fixture
def path(tmp_path: Path) -> Any:
    """Where a test may write a checkpoint, which is gone afterwards."""
    path = tmp_path / "checkpoint.pth.tar"
    yield path
    path.unlink(missing_ok=True)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def assert_holds(model: nn.Module, official: StateDict) -> None:
    ours = model.state_dict()
    for name, theirs in {
        "stem.conv.weight": "layer0.0.dn.weight",
        "stem.conv.step_size": "layer0.0.dn.step_size",
        "stem.norm.running_var": "layer0.1.running_var",
        "stages.0.1.conv2.weight": "layer1.1.conv2.weight",
        "stages.3.0.norm1.weight": "layer4.0.bn1.weight",
        "stages.2.0.shortcut.0.weight": "layer3.0.shortcut.0.weight",
        "linear.bias": "linear.bias",
    }.items():
        assert torch.equal(ours[name], official[theirs]), name


def training_state(state: StateDict) -> dict[str, Any]:
    """What the official training script saves beside the weights."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "epoch": 7,
        "model": "sdnet18",
        "state_dict": state,
        "perf": np.float64(93.5),
        "loss": np.float32(0.25),
        "optimizer": optimizer,
    }


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [dict, training_state], ids=["model_best", "checkpoint"])
def test_reads_either_file_with_and_without_the_prefix(
    wrap: Callable[[StateDict], dict[str, Any]], prefix: str, official: StateDict, model: nn.Module, path: Path
) -> None:
    torch.save(wrap({prefix + name: tensor for name, tensor in official.items()}), path)
    load_official_checkpoint(model, path)
    assert_holds(model, official)


def test_numpy_scalars_are_what_torch_alone_refuses(official: StateDict, path: Path) -> None:
    torch.save(training_state(official), path)
    with pytest.raises(pickle.UnpicklingError, match="scalar"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["numpy1", "numpy2"])
def test_reads_numpy_scalars_of_either_numpy_in_the_old_file_format(
    module: bytes, official: StateDict, model: nn.Module, path: Path
) -> None:
    torch.save(training_state(official), path, _use_new_zipfile_serialization=False)
    pickled = path.read_bytes()
    assert b"numpy._core.multiarray" in pickled
    path.write_bytes(pickled.replace(b"numpy._core.multiarray", module))
    load_official_checkpoint(model, path)
    assert_holds(model, official)


def test_the_numpy_names_are_allowed_only_while_reading(official: StateDict, model: nn.Module, path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    torch.save(training_state(official), path)
    load_official_checkpoint(model, path)
    assert set(torch.serialization.get_safe_globals()) == set(before)


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_executes_code_is_refused_unexecuted(
    new_format: bool, official: StateDict, model: nn.Module, path: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    content = {"state_dict": official, "perf": Hostile(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    before = bits(model)
    with pytest.raises(ValueError, match=r"nothing in it was executed: it refers to \w+\.mkdir") as caught:
        load_official_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert not trace.exists()
    assert bits(model) == before

    torch.load(path, weights_only=False)
    assert trace.exists(), "the pickle was harmless"


def test_a_missing_file_is_named(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at '.*absent\.pth\.tar'"):
        load_official_checkpoint(model, tmp_path / "absent.pth.tar")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        load_official_checkpoint(model, tmp_path)


def cut_short(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "cut short": cut_short,
    "plain pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
}


@pytest.mark.parametrize("write", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_checkpoint_gets_one_sentence(
    write: Callable[[Path], Any], model: nn.Module, path: Path
) -> None:
    write(path)
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint|holds no state dict") as caught:
        load_official_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it ends too early."),
        (b"junk, junk, junk", "it is no file of torch.save, or a damaged one."),
        (b"<html>not found</html>", "it is no file of torch.save, or a damaged one."),
        (pickle.dumps(Path("x"), protocol=2), "it refers to pathlib.PosixPath."),
    ],
)
def test_the_reason_why_a_file_is_no_checkpoint_says_what_it_is(
    content: bytes, reason: str, model: nn.Module, path: Path
) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"and nothing in it was executed: {re.escape(reason)}$"):
        load_official_checkpoint(model, path)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")],
    ids=["sparse", "complex", "meta"],
)
def test_tensors_without_real_values_are_refused(
    tensor: Tensor, official: StateDict, model: nn.Module, path: Path
) -> None:
    torch.save({**official, "linear.bias": tensor}, path)
    with pytest.raises(ValueError, match=rf"^'{path}' holds linear\.bias, which is not a dense tensor of real numbers"):
        load_official_checkpoint(model, path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": "b"}}], ids=str)
def test_a_file_without_a_state_dict_is_refused(content: Any, model: nn.Module, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_official_checkpoint(model, path)


def test_every_key_that_does_not_fit_is_named_and_nothing_is_loaded(
    official: StateDict, model: nn.Module, path: Path
) -> None:
    state = dict(official)
    del state["layer0.0.dn.step_size"], state["layer3.1.bn2.running_mean"]
    state["layer5.0.conv1.weight"] = torch.zeros(1)
    state["linear.weight"] = torch.zeros(100, 512)
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    torch.save(state, path)
    before = bits(model)
    with pytest.raises(ValueError, match="another architecture") as caught:
        load_official_checkpoint(model, path)
    for fault in (
        "missing layer0.0.dn.step_size (here stem.conv.step_size)",
        "missing layer3.1.bn2.running_mean (here stages.2.1.norm2.running_mean)",
        "unexpected layer5.0.conv1.weight",
        "misshapen linear.weight: [100, 512] in the file, [10, 512] in the model",
        "misshapen layer1.0.conv1.weight: [64, 64, 5, 5] in the file, [64, 64, 3, 3] in the model",
    ):
        assert fault in str(caught.value)
    assert bits(model) == before


@pytest.mark.parametrize(
    ("name", "missing"),
    [("sdnet18_all", "layer1.layers.0.conv1.dn.step_size"), ("sdnet34", "layer1.2.conv1.weight")],
)
def test_a_checkpoint_of_another_network_is_refused(name: str, missing: str, official: StateDict, path: Path) -> None:
    model = sdnet.create_model(name, num_classes=10, stem="cifar", image_size=8)
    torch.save(official, path)
    with pytest.raises(ValueError, match=f"missing {missing}"):
        load_official_checkpoint(model, path)


def test_atoms_are_projected_only_where_they_are_off_the_unit_sphere(
    official: StateDict, model: nn.Module, path: Path
) -> None:
    stored = official["layer0.0.dn.weight"].clone()
    stored[0] *= 1.5
    stored[1] *= 1 + 1e-3
    stored[2] *= 1 + 3e-6
    torch.save({**official, "layer0.0.dn.weight": stored}, path)
    load_official_checkpoint(model, path)
    atoms = model.state_dict()["stem.conv.weight"]
    torch.testing.assert_close(atoms[:2].flatten(1).norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(atoms[0], stored[0] / 1.5)
    assert torch.equal(atoms[2:], stored[2:])


def test_the_stored_step_stays_and_the_power_iteration_is_converged(
    official: StateDict, model: nn.Module, path: Path
) -> None:
    torch.save(official, path)
    load_official_checkpoint(model, path)
    state = model.state_dict()
    assert state["stem.conv.step_size"] == torch.tensor(0.123)

    weight, power_vector = state["stem.conv.weight"], state["stem.conv.power_vector"]
    estimate = step_sizes.gram(weight, power_vector, (1, 1), (1, 1)).norm()
    _, eigenvalue = step_sizes.largest_eigenvalue(weight, power_vector, (1, 1), (1, 1), tolerance=1e-8)
    assert estimate.item() == pytest.approx(eigenvalue.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer0.0.dn.weight", float("nan")),
        ("layer0.0.dn.step_size", float("inf")),
        ("layer0.0.dn.step_size", 0.0),
        ("layer2.0.bn1.running_var", float("nan")),
    ],
)
def test_values_that_cannot_be_used_are_named_and_nothing_is_loaded(
    key: str, value: float, official: StateDict, model: nn.Module, path: Path
) -> None:
    broken = official[key].clone()
    broken.view(-1)[0] = value
    torch.save({**official, key: broken}, path)
    before = bits(model)
    with pytest.raises(ValueError, match=rf"not finite, or a step size that is not above 0: {key} \(here "):
        load_official_checkpoint(model, path)
    assert bits(model) == before


def test_a_model_on_the_meta_device_is_refused(official: StateDict, path: Path) -> None:
    torch.save(official, path)
    with torch.device("meta"):
        model = sdnet.create_model("sdnet18", num_classes=10, stem="cifar", image_size=8)
    with pytest.raises(ValueError, match="model is on the meta device"):
        load_official_checkpoint(model, path)


def test_a_step_of_one_element_is_a_step(official: StateDict, model: nn.Module, path: Path) -> None:
    torch.save({**official, "layer0.0.dn.step_size": torch.tensor([0.25])}, path)
    load_official_checkpoint(model, path)
    assert model.state_dict()["stem.conv.step_size"] == torch.tensor(0.25)


def test_a_model_of_another_width_is_refused_in_one_sentence(official: StateDict, path: Path) -> None:
    torch.save(official, path)
    narrow = sdnet.create_model("sdnet18", num_classes=10, stem="cifar", image_size=8, width=16)
    with pytest.raises(ValueError, match="of width 64") as caught:
        load_official_checkpoint(narrow, path)
    assert str(caught.value) == (
        f"'{path}' is of a network of width 64, the model is of width 16: make the model with "
        "create_model(..., width=64)."
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OfficialConfig(), {"name": "sdnet18", "num_classes": 10, "stem": "cifar", "shortcut": True, "n_dict": 1}),
        (
            OfficialConfig(all_layers=True, stem="imagenet", num_classes=1000, shortcut=False),
            {"name": "sdnet18_all", "num_classes": 1000, "stem": "imagenet", "shortcut": False, "n_dict": 1},
        ),
        (
            OfficialConfig(depth=34, all_layers=True, expansion_factor=2),
            {"name": "sdnet34_all", "num_classes": 10, "stem": "cifar", "shortcut": True, "n_dict": 2},
        ),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else "",
)
def test_an_official_file_tells_its_network(config: OfficialConfig, expected: dict[str, Any]) -> None:
    with torch.device("meta"):
        state = OfficialSDNet(config).state_dict()
    found = official_arguments(state, Path("model_best.pth.tar"))
    assert found == expected | {"width": 64, "solver": "sdnet"}


def test_the_network_of_an_official_file_is_built_and_loaded(official: StateDict, path: Path) -> None:
    torch.save(official, path)
    model = sdnet.load_official_model(path, image_size=8, lam=0.3)
    assert not model.training
    assert (model.config["name"], model.config["lam"], model.config["solver"]) == ("sdnet18", 0.3, "sdnet")
    expected = sdnet.create_model("sdnet18", num_classes=10, stem="cifar", image_size=8)
    load_official_checkpoint(expected, path)
    state = expected.state_dict()
    del state["stem.conv.power_vector"]  # not in the file: it converges from a random start
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_file_of_no_official_network_is_refused(path: Path) -> None:
    torch.save(sdnet.create_model("resnet18", 10, stem="cifar", width=4).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"is no checkpoint of an official SDNet-18 or SDNet-34: it has \(0, 0, 0, 0\)"
    ):
        sdnet.load_official_model(path)


@pytest.mark.parametrize("name", ["sdnet18", "sdnet18_all"])
def test_a_checkpoint_is_written_as_it_was_read(name: str, official: StateDict, path: Path) -> None:
    if name == "sdnet18_all":
        official = OfficialSDNet(OfficialConfig(all_layers=True)).state_dict()
        for key in [key for key in official if key.endswith("dn.weight")]:
            official[key] /= official[key].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.save(official, path)
    model = sdnet.load_official_model(path, image_size=8)
    path.unlink()
    sdnet.save_official_checkpoint(model, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    written = torch.load(path, weights_only=True)
    assert {key: (value.shape, value.numpy().tobytes()) for key, value in written.items()} == {
        key: (value.shape, value.numpy().tobytes()) for key, value in official.items()
    }
    again = sdnet.load_official_model(path, image_size=8)
    kept, found = ({key: value for key, value in bits(m).items() if "power_vector" not in key} for m in (model, again))
    assert found == kept


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("sdnet50", {}),
        ("sdnet18", {"learn_lam": "layer"}),
        ("sdnet18", {"in_channels": 1}),
        ("sdnet18", {"num_classes": 0}),
    ],
)
def test_networks_that_the_official_code_lacks_are_not_written(name: str, options: dict[str, Any], path: Path) -> None:
    model = sdnet.create_model(name, **{"num_classes": 3, "width": 4, "stem": "cifar", "image_size": 8} | options)
    with pytest.raises(ValueError, match="the official code has"):
        sdnet.save_official_checkpoint(model, path)
    assert not path.exists()
