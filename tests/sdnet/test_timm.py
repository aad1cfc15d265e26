"""SDNets in timm: what timm and programs around it ask of a model."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import with_timm  # noqa: F401  # before timm

import timm  # isort: skip
import sdnet.configuration  # isort: skip
import sdnet.timm  # isort: skip
from timm.optim._optim_factory import create_optimizer_v2  # isort: skip
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay  # isort: skip

NAMES = ["sdnet18", "sdnet34", "sdnet50", "sdnet18_all", "sdnet34_all", "sdnet50_all"]
SMALL: dict[str, Any] = {"width": 4, "img_size": 64}


def make(name: str = "sdnet18_all", **options: Any) -> Any:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"num_classes": 5} | SMALL | options
    return timm.create_model(name, **arguments)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_names_are_registered_beside_those_of_timm() -> None:
    assert sorted(timm.list_models("sdnet*")) == sorted(NAMES)
    assert timm.is_model("sdnet18")
    assert type(timm.create_model("resnet18")).__module__ == "timm.models.resnet"
    assert timm.list_pretrained("sdnet*") == []
    with pytest.raises(RuntimeError, match="No pretrained weights exist for sdnet18"):
        make("sdnet18", pretrained=True)


@pytest.mark.parametrize("name", ["sdnet18", "sdnet50", "sdnet18_all"])
def test_a_model_is_that_of_create_model_and_can_be_trained(name: str, x: Tensor) -> None:
    model = make(name)
    own = sdnet.create_model(name, 5, width=4, image_size=64)
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), own(x))
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    for key in ("first_conv", "classifier"):
        assert f"{model.pretrained_cfg[key]}.weight" in model.state_dict()
    model(x).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_features_head_and_classifier(x: Tensor) -> None:
    model = make().eval()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert sdnet.configuration.configuration(model)["num_classes"] == 7
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    with pytest.raises(ValueError, match="global_pool is '', which needs num_classes=0; num_classes is 5"):
        make("sdnet18", global_pool="")
    assert make("sdnet18", num_classes=0)(x).shape == (2, 32)


@pytest.mark.parametrize(("stem", "reductions"), [("imagenet", [2, 4, 8, 16, 32]), ("cifar", [1, 1, 2, 4, 8])])
def test_maps_of_every_depth(stem: str, reductions: list[int], x: Tensor) -> None:
    options: dict[str, Any] = {"stem": stem} | ({"img_size": 32} if stem == "cifar" else {})
    x = x[:, :, :32, :32] if stem == "cifar" else x
    model = make(**options).eval()
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    torch.testing.assert_close(maps[-1], last)
    assert [x.shape[2] // features.shape[2] for features in maps] == reductions
    early = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [maps[0], maps[2]])

    backbone = make(features_only=True, out_indices=(1, 3), **options).eval()
    backbone.load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()}, strict=False)
    found = backbone(x)
    torch.testing.assert_close(found, [maps[1], maps[3]])
    assert backbone.feature_info.channels() == [features.shape[1] for features in found]
    assert backbone.feature_info.reduction() == [reductions[1], reductions[3]]
    assert not [name for name, _ in backbone.named_parameters() if "stages.3" in name or "linear" in name]


def test_checkpointed_blocks_have_the_same_gradients(x: Tensor) -> None:
    model = make()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_groups_of_parameters() -> None:
    model = make(learn_lam="layer")
    unmoved = model.no_weight_decay()
    assert {"stem.conv.weight", "stem.conv.raw_lam", "stages.0.1.conv2.weight"} <= unmoved
    assert not [name for name in unmoved if "norm" in name or "linear" in name]
    decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=unmoved)[1]["params"]
    assert sum(parameter is model.stem.conv.weight for parameter in decayed) == 0
    groups = param_groups_layer_decay(model, 0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    scales = {group["lr_scale"] for group in groups}
    assert len(scales) == 10, "the stem, eight blocks and the classifier"


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_rate is 2; it must be a number of 0 to 1\."):
        make("sdnet18", drop_rate=2)
    with pytest.raises(ValueError, match=r"^global_pool is 'max'; it must be 'avg', or '' with num_classes=0\.$"):
        make("sdnet18", global_pool="max")
    with pytest.raises(TypeError, match="drop_path_rate"):
        make("sdnet18", drop_path_rate=0.1)
    with pytest.raises(ValueError, match=r"^model has no pooling \(global_pool is ''\), which a file cannot say"):
        sdnet.configuration.configuration(make("sdnet18", num_classes=0, global_pool=""))


TRAINING = """
import sys, torch, timm, torch.nn.functional as F
from timm.optim import create_optimizer_v2
model = timm.create_model(sys.argv[1], num_classes=5, width=4, img_size=32, stem="cifar")
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.5, weight_decay=1e-4)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    optimizer.step()
norms = model.stem.conv.weight.flatten(1).norm(dim=1)
print("off by", float((norms - 1).abs().max()))
"""


def test_a_training_program_of_timm_runs_with_attach(tmp_path: Path) -> None:
    """`timm/train.py` makes its optimizer by this function."""
    program = tmp_path / "train.py"
    program.write_text(TRAINING)
    start = (
        "from tests import with_timm; import runpy, sys; sys.argv[0] = 'timm'; "
        "runpy.run_module('sdnet.timm', run_name='__main__')"
    )
    command = [sys.executable, "-c", start, str(program), "sdnet18"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.split()[-1]) < 1e-5


def test_optimizers_of_timm_can_be_attached(x: Tensor) -> None:
    model = make("sdnet18")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1, layer_decay=0.7)
    sdnet.attach(model, optimizer)
    model(x).sum().backward()
    optimizer.step()
    weight: nn.Parameter = model.stem.conv.weight
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_keeps_the_contract_of_timm(name: str, x: Tensor) -> None:
    """What timm's tests of its own models check, in this order: gradients, depths, classifiers, and the prune."""
    model = make(name)
    model(x).mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    model.eval()
    with torch.no_grad():
        out, features = model(x), model.forward_features(x)
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, features)
        for info, depth in zip(model.feature_info, maps, strict=True):
            assert depth.shape[1:] == (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
            assert model.get_submodule(info["module"]) is not None
        model.set_grad_checkpointing()
        torch.testing.assert_close(model(x), out)
        for index in range(len(maps)):
            pruned = copy.deepcopy(model)
            taken = pruned.prune_intermediate_layers([index])
            assert torch.equal(pruned.forward_intermediates(x, indices=taken, intermediates_only=True)[0], maps[index])

        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)
        model.double().reset_classifier(3)
        assert model.global_pool == "avg"
        assert model(x.double()).shape == (2, 3)
        assert not model.get_classifier().training


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_of_an_entry_is_true(name: str) -> None:
    model: Any = timm.create_model(name, device="meta")
    config = model.pretrained_cfg
    features = model.forward_features(torch.empty(1, *config["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *config["pool_size"])
    assert model.num_classes == config["num_classes"] == model.get_classifier().out_features
    assert model.in_chans == config["input_size"][0]
    assert {f"{config[key]}.weight" for key in ("first_conv", "classifier")} <= set(model.state_dict())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_an_entry_takes_the_channels_and_the_type_that_timm_passes_on(x: Tensor) -> None:
    model = make("sdnet18_all", in_chans=1, dtype=torch.float64, device="cpu", drop_rate=1.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model.stem.conv.step_size.dtype == torch.float32
    grey = x[:, :1].double()
    assert model(grey).std(dim=0).max() == 0, "only the bias of the classifier is left"
    assert model.eval()(grey).std(dim=0).max() > 0


def test_graphs_of_torch_fx_have_the_same_outputs(x: Tensor) -> None:
    model = make("sdnet18_all").eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    backbone = make("sdnet18_all", features_only=True, feature_cls="fx", out_indices=(0, 2)).eval()
    backbone.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(backbone(x), model.forward_intermediates(x, indices=[0, 2], intermediates_only=True))


def test_programs_run_one_after_another_and_leave_timm_as_it_was(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, sdnet\n"
        "from timm.optim import create_optimizer_v2\n"
        "optimizer = create_optimizer_v2(sdnet.CSCConv2d(3, 4, 3), opt='sgd', lr=0.1)\n"
        "assert len(optimizer._optimizer_step_post_hooks) == 1\n"
        "assert sys.argv[1:] == ['--lr', '0.1']\n"
    )
    optimizers: Any = sdnet.timm.timm.optim
    before = optimizers.create_optimizer_v2, list(sys.argv)
    for _ in range(2):
        sdnet.timm.run([str(program), "--lr", "0.1"])
        assert (optimizers.create_optimizer_v2, sys.argv) == before
    with pytest.raises(SystemExit, match=r"^There is no program '.*absent\.py'\.$"):
        sdnet.timm.run([str(tmp_path / "absent.py")])


def test_torchscript_is_refused_in_one_sentence() -> None:
    with pytest.raises(NotImplementedError, match=r"^CSCConv2d cannot be compiled by torch.jit.script; use torch\."):
        torch.jit.script(make("sdnet18"))
