"""A bad argument of a layer, a model or a function of `sdnet` gets one sentence, before anything changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sdnet
from sdnet import CSCConv2d

INT = r"; it must be an int of at least 1\."
PAIR = r"; it must be an int or a pair of ints of at least"
NUMBER = r"; it must be a finite number of at least 0"

LAYER: list[tuple[dict[str, Any], str]] = [
    ({"in_channels": "3"}, "in_channels is '3'" + INT),
    ({"in_channels": 3.0}, "in_channels is 3.0" + INT),
    ({"in_channels": None}, "in_channels is None" + INT),
    ({"in_channels": True}, "in_channels is True" + INT),
    ({"out_channels": 0}, "out_channels is 0" + INT),
    ({"out_channels": (8,)}, r"out_channels is \(8,\)" + INT),
    ({"kernel_size": 3.0}, "kernel_size is 3.0" + PAIR),
    ({"kernel_size": None}, "kernel_size is None" + PAIR),
    ({"kernel_size": True}, "kernel_size is True" + PAIR),
    ({"kernel_size": torch.tensor(3)}, r"kernel_size is tensor\(3\)" + PAIR),
    ({"kernel_size": np.array([3.0, 3.0])}, r"kernel_size is of type ndarray and shape \[2\]" + PAIR),
    ({"kernel_size": torch.ones(1, 2)}, r"kernel_size is of type Tensor and shape \[1, 2\]" + PAIR),
    ({"kernel_size": "33"}, "kernel_size is '33'" + PAIR),
    ({"kernel_size": b"33"}, "kernel_size is b'33'" + PAIR),
    ({"kernel_size": 10**12}, "kernel_size is 1000000000000; it must be at most 2147483647"),
    ({"padding": 2**31}, "padding is 2147483648; it must be at most 2147483647"),
    ({"n_steps": 10**30}, "n_steps is 10+; it must be at most 2147483647"),
    ({"kernel_size": (3, 3, 3)}, r"kernel_size is \(3, 3, 3\)" + PAIR),
    ({"stride": 0}, "stride is 0" + PAIR),
    ({"stride": (1, 1.5)}, r"stride is \(1, 1.5\)" + PAIR),
    ({"padding": "same"}, "padding is 'same'" + PAIR),
    ({"padding": -1}, "padding is -1" + PAIR),
    ({"n_steps": 0}, "n_steps is 0" + INT),
    ({"n_steps": 2.5}, "n_steps is 2.5" + INT),
    ({"n_steps": "2"}, "n_steps is '2'" + INT),
    ({"n_steps": True}, "n_steps is True" + INT),
    ({"n_dict": 1.5}, "n_dict is 1.5" + INT),
    ({"lam": -0.1}, "lam is -0.1" + NUMBER),
    ({"lam": "0.1"}, "lam is '0.1'" + NUMBER),
    ({"lam": None}, "lam is None" + NUMBER),
    ({"lam": float("nan")}, "lam is nan" + NUMBER),
    ({"lam": 1e300}, r"lam is 1e\+300; it must be at most 3.40282e\+38, the largest of fp32"),
    ({"lam": 10**400}, r"lam is 10+\.\.\.; it must be at most 3.40282e\+38"),
    ({"lam": torch.full((8,), 0.1)}, r"lam is of type Tensor and shape \[8\]" + NUMBER),
    ({"mu": float("inf")}, "mu is inf" + NUMBER),
    ({"nonnegative": "no"}, r"nonnegative is 'no'; it must be True or False\."),
    ({"nonnegative": np.array([True, False])}, r"nonnegative is of type ndarray and shape \[2\]; it must be True or"),
    ({"adaptive_lam": 2}, r"adaptive_lam is 2; it must be True or False\."),
    ({"solver": "lista"}, "solver is 'lista'; it must be one of ista, fista, sdnet"),
    ({"solver": None}, "solver is None; it must be one of ista, fista, sdnet"),
    ({"data_term": 2}, "data_term is 2; it must be one of squared, norm"),
    ({"impl": "cuda"}, "impl is 'cuda'; it must be one of auto, torch, reference, triton"),
    ({"input_size": "32"}, "input_size is '32'" + PAIR),
    ({"input_size": 64.0}, "input_size is 64.0" + PAIR),
    ({"input_size": 1, "padding": 0}, r"input_size is \[1, 1\], too small for atoms of \[3, 3\]"),
    ({"dtype": torch.int8}, r"dtype is torch.int8; it must be one of torch.float16, .*, torch.float64"),
    ({"dtype": "float32"}, "dtype is 'float32'; it must be one of torch.float16"),
]

NOT_OF_A_LAYER: list[tuple[dict[str, Any], str]] = [
    ({"bias": False}, "CSCConv2d has no argument 'bias': codes have no bias"),
    ({"groups": 2}, "CSCConv2d has no argument 'groups': every atom spans all input channels"),
    ({"dilation": 2}, "CSCConv2d has no argument 'dilation': the atoms are dense"),
    ({"padding_mode": "circular"}, "CSCConv2d has no argument 'padding_mode': the input is padded with zeros"),
    ({"lamda": 0.1}, r"has no argument 'lamda'; its arguments are in_channels, .*, lam, .*, n_dict"),
]

MODEL: list[tuple[dict[str, Any], str]] = [
    ({"name": "sdnet101"}, "name is 'sdnet101'; it must be one of resnet18, .*, sdnet50_all"),
    ({"name": None}, "name is None; it must be one of resnet18"),
    ({"num_classes": 10.0}, r"num_classes is 10.0; it must be an int of at least 0\."),
    ({"num_classes": -1}, r"num_classes is -1; it must be an int of at least 0\."),
    ({"in_channels": 0}, "in_channels is 0" + INT),
    ({"in_channels": 3.0}, "in_channels is 3.0" + INT),
    ({"stem": "patch"}, "stem is 'patch'; it must be one of imagenet, cifar"),
    ({"image_size": "32"}, "image_size is '32'" + PAIR),
    ({"image_size": 64.0}, "image_size is 64.0" + PAIR),
    ({"image_size": 0}, "image_size is 0" + PAIR),
    ({"image_size": (3, 16, 16)}, r"image_size is \(3, 16, 16\)" + PAIR),
    ({"shortcut": None}, "shortcut is None; it must be True or False"),
    ({"shortcut": False}, "shortcut=False is for sdnet18_all, sdnet34_all; sdnet18 needs its shortcuts"),
    ({"name": "resnet34", "shortcut": False}, "resnet34 needs its shortcuts"),
    ({"name": "resnet18", "lam": -1}, "lam is -1" + NUMBER),
    ({"n_steps": 2.5}, "n_steps is 2.5" + INT),
    ({"mu": -0.1}, "mu is -0.1" + NUMBER),
    ({"n_dict": 0}, "n_dict is 0" + INT),
    ({"solver": "lista"}, "solver is 'lista'; it must be one of ista"),
    ({"data_term": "huber"}, "data_term is 'huber'; it must be one of squared"),
    ({"impl": None}, "impl is None; it must be one of auto"),
]


def small() -> CSCConv2d:
    return CSCConv2d(3, 8, 3, lam=0.25, input_size=8)


def images(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


untyped: Any = sdnet
"""The package as untyped code sees it."""

CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "forward: None": (lambda m: m(None), "x is None; it must be a tensor"),
    "forward: numpy": (lambda m: m(np.zeros((1, 3, 8, 8))), "x is of type ndarray and shape"),
    "forward: channels": (lambda m: m(images(1, 4, 8, 8)), r"shape \[1, 4, 8, 8\]; it must be a tensor \[N, 3, H, W\]"),
    "forward: unbatched": (lambda m: m(images(3, 8, 8)), r"add a batch dimension with x\[None\]"),
    "forward: ints": (lambda m: m(images(1, 3, 8, 8).long()), "x is torch.int64 and weight torch.float32"),
    "forward: double": (lambda m: m(images(1, 3, 8, 8).double()), "x is torch.float64 and weight torch.float32"),
    "forward: meta": (lambda m: m(images(1, 3, 8, 8).to("meta")), "x is on meta and weight on cpu"),
    "forward: lam": (lambda m: m(images(1, 3, 8, 8), lam=-1), "lam is -1" + NUMBER),
    "forward: lam of another batch": (
        lambda m: m(images(1, 3, 8, 8), lam=torch.ones(2)),
        r"lam has shape \[2\]; for x of shape \[1, 3, 8, 8\] it must be 0-d",
    ),
    "forward: lam is a string": (lambda m: m(images(1, 3, 8, 8), lam="0.1"), "lam is '0.1'" + NUMBER),
    "forward: lam is a list": (lambda m: m(images(1, 3, 8, 8), lam=[0.1]), r"lam is \[0.1\]" + NUMBER),
    "forward: negative tensor": (
        lambda m: m(images(1, 3, 8, 8), lam=torch.tensor(-1.0)),
        "lam holds -1; its values must be",
    ),
    "forward: sparse": (
        lambda m: m(images(1, 3, 8, 8).to_sparse()),
        "x is of layout torch.sparse_coo; it must be a de",
    ),
    "forward: nested": (
        lambda m: m(torch.nested.nested_tensor([images(3, 8, 8)], layout=torch.jagged)),
        "x is nested; it must be a dense tensor",
    ),
    "forward: lam is a bool tensor": (lambda m: m(images(1, 3, 8, 8), lam=torch.tensor(True)), "lam is torch.bool; it"),
    "forward: sparse lam": (
        lambda m: m(images(1, 3, 8, 8), lam=torch.ones(1).to_sparse()),
        "lam is of layout torch.sparse_coo; it must be a dense tensor",
    ),
    "forward: lam on meta": (
        lambda m: m(images(1, 3, 8, 8), lam=torch.ones((), device="meta")),
        "lam is on the meta device and has no value",
    ),
    "forward: lam beyond fp32": (
        lambda m: m(images(1, 3, 8, 8), lam=torch.tensor(1e300, dtype=torch.float64)),
        r"lam holds 1e\+300; its values must be finite",
    ),
    "lam: sparse": (lambda m: setattr(m, "lam", torch.ones(2).to_sparse()), "lam is of layout torch.sparse_coo"),
    "lam: beyond fp32": (
        lambda m: setattr(m, "lam", torch.tensor(1e300, dtype=torch.float64)),
        r"lam is 1e\+300; it must be",
    ),
    "update_dictionary: no iteration": (lambda m: m.update_dictionary(0), "iterations is 0" + INT),
    "check_lambda: meta": (
        lambda m: untyped.check_lambda(CSCConv2d(3, 8, 3, learn_lam="atom", device="meta")),
        "lam of the layer is on the meta device and has no value",
    ),
    "reconstruct: ints": (
        lambda m: m.reconstruct(images(2, 8, 4, 4).long()),
        "codes is torch.int64; it must be of a floating-point type",
    ),
    "reconstruct: no pixel": (lambda m: m.reconstruct(images(2, 8, 0, 4)), r"codes is .*\[2, 8, 0, 4\]; it must be"),
    "objective: codes": (lambda m: m.objective(images(2, 3, 4, 4), None), "codes is None; it must be a tensor"),
    "objective: codes of another batch": (
        lambda m: m.objective(images(2, 3, 4, 4), images(1, 8, 4, 4)),
        r"codes has shape \[1, 8, 4, 4\]; for 2 inputs it must be \[2, 8, h, w\]",
    ),
    "objective: negative lam with a gradient": (
        lambda m: m.objective(images(2, 3, 4, 4), images(2, 8, 4, 4), torch.tensor(-1.0, requires_grad=True)),
        "lam holds -1; its values must be finite and at least 0",
    ),
    "refresh_step_size: meta": (lambda m: untyped.refresh_step_size(m.to("meta")), "weight is on the meta device and"),
    "step_margins: meta": (lambda m: untyped.step_margins(m.to("meta")), "weight is on the meta device and has no val"),
    "project: meta": (lambda m: untyped.project(m.to("meta")), "weight is on the meta device and has no values"),
    "stride of a layer": (lambda m: setattr(m, "stride", 0), "stride is 0" + PAIR),
    "reconstruct: 3-d codes": (lambda m: m.reconstruct(images(8, 4, 4)), r"codes is .*\[8, 4, 4\]; it must be"),
    "reconstruct: channels": (lambda m: m.reconstruct(images(2, 3, 4, 4)), r"shape \[2, 3, 4, 4\]; .*\[N, 8, h, w\]"),
    "reconstruct: None": (lambda m: m.reconstruct(None), "codes is None; it must be a tensor"),
    "reconstruct: size": (lambda m: m.reconstruct(images(2, 8, 4, 4), 9), r"size is \[9, 9\]; codes of \[4, 4\] stand"),
    "reconstruct: float": (lambda m: m.reconstruct(images(2, 8, 4, 4), 4.0), "size is 4.0" + PAIR),
    "objective: x": (
        lambda m: m.objective(images(2, 4, 4, 4), images(2, 8, 4, 4)),
        r"x is .*; it must be a tensor \[N, 3",
    ),
    "objective: lam": (
        lambda m: m.objective(images(2, 3, 4, 4), images(2, 8, 4, 4), torch.ones(3)),
        r"lam has shape \[3\]; for x of shape \[2, 3, 4, 4\] it must be 0-d",
    ),
    "set_lambda: model": (lambda m: untyped.set_lambda(0.1, m), "model is 0.1; it must be an nn.Module"),
    "set_lambda: no layer": (lambda m: untyped.set_lambda(nn.Linear(2, 2), 0.1), "model has no CSC layers"),
    "set_lambda: dict": (lambda m: untyped.set_lambda(m, {"0": 0.1}), r"lam is {'0': 0.1}" + NUMBER),
    "set_lambda: layers": (
        lambda m: untyped.set_lambda(m, 0.1, "last"),
        "layers is 'last'; it must be one of all, first",
    ),
    "set_lambda: gradient": (
        lambda m: untyped.set_lambda(m, torch.ones((), requires_grad=True)),
        "lam is a tensor that requires a gradient",
    ),
    "set_impl: impl": (lambda m: untyped.set_impl(m, "fused"), "impl is 'fused'; it must be one of auto"),
    "set_impl: model": (lambda m: untyped.set_impl("auto", m), "model is 'auto'; it must be an nn.Module"),
    "n_steps of a layer": (lambda m: setattr(m, "n_steps", 2.5), "n_steps is 2.5" + INT),
    "nonnegative of a layer": (lambda m: setattr(m, "nonnegative", "no"), "nonnegative is 'no'; it must be True"),
    "diagnose: model": (lambda m: untyped.diagnose(images(1), m), "model is of type Tensor and shape"),
    "record: model": (lambda m: untyped.record(None), "model is None; it must be an nn.Module"),
    "official: model": (
        lambda m: untyped.load_official_checkpoint("a.tar", "b"),
        "model is 'a.tar'; it must be a network",
    ),
    "official: path": (
        lambda m: untyped.load_official_checkpoint(m, None),
        "path is None; it must be the path of a file",
    ),
}


def assert_one_sentence(error: BaseException) -> None:
    assert len(str(error).splitlines()) == 1
    assert str(error).rstrip().endswith(".")


def names(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={str(value)[:20]}" for name, value in options.items())


@pytest.mark.parametrize(("options", "sentence"), LAYER, ids=[names(options) for options, _ in LAYER])
def test_of_a_layer(options: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"in_channels": 3, "out_channels": 8, "kernel_size": 3}
    with pytest.raises(ValueError, match=sentence) as caught:
        CSCConv2d(**arguments | options)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(("options", "sentence"), NOT_OF_A_LAYER, ids=[names(options) for options, _ in NOT_OF_A_LAYER])
def test_that_a_layer_does_not_have(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence) as caught:
        CSCConv2d(3, 8, 3, **options)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(("options", "sentence"), MODEL, ids=[names(options) for options, _ in MODEL])
def test_of_a_model(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        sdnet.create_model(**{"name": "sdnet18", "num_classes": 2, "stem": "cifar"} | options)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("value", [None, np.zeros((1, 3, 8, 8)), images(3, 8, 8), images(1, 1, 8, 8)], ids=str)
def test_of_the_forward_of_a_model(value: Any) -> None:
    model = sdnet.create_model("resnet18", num_classes=2, stem="cifar")
    with pytest.raises(ValueError, match=r"x is .*; it must be a tensor \[N, 3, H, W\]") as caught:
        model(value)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(("call", "sentence"), CALLS.values(), ids=CALLS)
def test_of_a_call(call: Callable[[Any], object], sentence: str) -> None:
    layer = small()
    with pytest.raises(ValueError, match=sentence) as caught:
        call(layer)
    assert_one_sentence(caught.value)
    assert (layer.lam.item(), layer.impl, layer.n_steps, layer._recorders) == (0.25, "auto", 2, ())  # pyright: ignore[reportAttributeAccessIssue]


def test_more_than_five_positional_arguments_are_refused() -> None:
    """The sixth of `nn.Conv2d` is the dilation."""
    with pytest.raises(TypeError, match="positional arguments"):
        CSCConv2d(3, 8, 3, 1, 1, 2)  # pyright: ignore[reportCallIssue]


def test_a_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint file at '.*absent'\.") as caught:
        sdnet.load_official_checkpoint(small(), tmp_path / "absent")
    assert_one_sentence(caught.value)


def test_numpy_numbers_are_numbers() -> None:
    numbers: dict[str, Any] = {
        "in_channels": np.int64(3),
        "out_channels": np.int32(8),
        "kernel_size": np.int64(3),
        "stride": np.array([2, 1]),
        "padding": np.int64(1),
        "n_steps": np.int64(3),
        "lam": np.float32(0.25),
        "mu": np.float64(0.5),
        "nonnegative": np.bool_(False),
        "input_size": torch.tensor([8, 8]),
    }
    layer = CSCConv2d(**numbers)
    layer.lam = np.float64(0.5)
    assert repr(layer) == (
        "CSCConv2d(3, 8, kernel_size=(3, 3), stride=(2, 1), padding=(1, 1), lam=0.5, n_steps=3, mu=0.5, "
        "nonnegative=False, solver='fista', data_term='squared', n_dict=1)"
    )
    assert layer(images(1, 3, 8, 8)).shape == (1, 8, 4, 8)
    sizes: dict[str, Any] = {"num_classes": np.int64(2), "image_size": np.int64(8)}
    assert sdnet.create_model("resnet18", stem="cifar", **sizes).linear.out_features == 2
