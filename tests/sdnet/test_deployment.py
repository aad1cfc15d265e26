"""Exported files compute what the model computes, for batches and images of other sizes too."""

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import sdnet
from sdnet import deployment
from sdnet.kernels import reference, torch_path
from sdnet.step_size import csc_layers


def network(name: str = "sdnet18", **options: Any) -> sdnet.SDNet:
    """A network in evaluation mode whose batch norms do something, and whose layers are active."""
    torch.manual_seed(0)
    model = sdnet.create_model(name, 5, **{"width": 4, "stem": "cifar", "image_size": 16} | options).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.load_state_dict({key: value.float().uniform_(0.5, 1.5) for key, value in norm.state_dict().items()})
    return model


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def check_onnx(model: sdnet.SDNet, file: Path) -> None:
    exported = sdnet.export(model, file, images(1, 16, 20))
    assert exported.difference < 1e-4
    assert [place.name for place in file.parent.iterdir()] == [file.name]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((1, 16, 20), (3, 16, 16), (5, 23, 18)):
        x = images(*shape)
        (found,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-4, rtol=1e-4)
    operators = [node.op_type for node in onnx.load(file).graph.node]
    assert operators.count("BatchNormalization") == len(csc_layers(model)), "only those after CSC layers are left"


def test_onnx_file_of_any_size(tmp_path: Path) -> None:
    check_onnx(network(lam=0.05), tmp_path / "model.onnx")


@pytest.mark.slow
def test_onnx_file_of_a_network_of_csc_layers(tmp_path: Path) -> None:
    check_onnx(network("sdnet18_all", lam=0.02), tmp_path / "model.onnx")


def test_pt2_file_of_strided_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    csc = [sdnet.CSCConv2d(3, 4, 3, 2), sdnet.CSCConv2d(4, 5, 4, 3, n_steps=3, solver="sdnet", nonnegative=False)]
    model = nn.Sequential(*csc, nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)).eval()
    assert [(layer.impl, type(layer)) for layer in csc] == [("auto", sdnet.CSCConv2d)] * 2
    sdnet.export(model, tmp_path / "model.pt2", images(2, 32, 35))
    assert [layer.impl for layer in csc] == ["auto"] * 2, "the model is unchanged"
    program = torch.export.load(tmp_path / "model.pt2")
    assert not [node for node in program.graph.nodes if "sdnet" in str(node.target)]
    for shape in ((1, 32, 35), (4, 29, 40)):
        x = images(*shape)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


def hard_threshold(v: Tensor, step_size: Tensor, lam: Tensor, least: float) -> Tensor:
    """A proximal operator."""
    return torch.where(v.abs() > step_size * lam + least, v, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"n_steps": 1},
        {"n_steps": 4, "solver": "sdnet", "mu": 0.3},
        {"n_steps": 4, "solver": "fista", "nonnegative": False, "data_term": "norm"},
        {"n_dict": 2, "stride": 2},
        {"learn_lam": "atom"},
        {"prox": partial(hard_threshold, least=0.02)},
    ],
    ids=", ".join,
)
def test_every_option_is_exported_as_plain_operators(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = sdnet.CSCConv2d(3, 6, 3, lam=0.05, input_size=12, **options).eval()
    if layer.raw_lam is not None:
        nn.init.uniform_(layer.raw_lam, -4, 0)
    x = images(2, 12, 12)
    with torch.no_grad():
        program = deployment.traced(nn.Sequential(layer), x, dynamic_size=False)
        assert not [node for node in program.graph.nodes if "sdnet" in str(node.target)]
        codes = program.module()(x)
        torch.testing.assert_close(codes, layer(x), atol=1e-5, rtol=1e-4)
    assert 0.05 < float((codes != 0).float().mean()) < 1


def test_the_examples_to_compare_with_carry_no_gradient() -> None:
    examples = deployment.examples_of(images(1, 8, 8).requires_grad_(), dynamic_size=True)
    assert [list(example.shape) for example in examples] == [[2, 3, 8, 8], [1, 3, 8, 8], [2, 3, 11, 13]]
    assert not any(example.requires_grad for example in examples)


def test_outputs_that_are_not_numbers_for_one_example_alone_are_refused() -> None:
    right, wrong = torch.zeros(2, 3), torch.full((2, 3), torch.nan)
    assert deployment.largest_difference([right, right + 1e-5], [right, right]) == pytest.approx(1e-5)
    with pytest.raises(RuntimeError, match="differ from those of the model by nan"):
        deployment.largest_difference([right, wrong, right], [right, right, right])
    with pytest.raises(
        RuntimeError, match=r"gives outputs \[1, 3\] where the model gives \[2, 3\]; no file was written"
    ):
        deployment.largest_difference([right[:1]], [right])


def test_wrong_outputs_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_a_bias(model: nn.Module) -> None:
        model.get_parameter("2.bias").data += 0.01

    monkeypatch.setattr(deployment, "fold_batch_norms", forget_a_bias)
    model = nn.Sequential(sdnet.CSCConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(RuntimeError, match=r"differ from those of the model .* no file was written"):
        sdnet.export(model, tmp_path / "model.pt2", images(2, 12, 12))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "model.pth"}, r"path is 'model\.pth'; it must be the path of a file that ends in \.pt2 or \.onnx"),
        ({"path": "nowhere/model.pt2"}, "there is no folder 'nowhere'"),
        ({"example": torch.zeros(3, 8, 8)}, r"example is .*; it must be a tensor \[N, C, H, W\]"),
        ({"model": nn.Conv2d(3, 2, 3).half()}, r"model has parameters of torch\.float16; export model\.float\(\)"),
        ({"model": None}, r"it must be an nn\.Module"),
        ({"path": "folder.pt2"}, r"path is 'folder\.pt2', a folder; it must be the path of a file"),
        ({"example": torch.ones(1, 3, 8, 8, dtype=torch.uint8)}, "example is torch.uint8; it must be floating point"),
        ({"example": torch.full((1, 3, 8, 8), float("nan"))}, "example holds NaN or infinite values"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt2").mkdir()
    given: dict[str, Any] = {"model": nn.Conv2d(3, 2, 3), "path": "model.pt2", "example": images(1, 8, 8)} | arguments
    with pytest.raises(ValueError, match=message):
        sdnet.export(**given)


def test_folded_batch_norms_compute_the_same() -> None:
    model = network("resnet18")
    x = images(2, 16, 16)
    expected = model(x)
    deployment.fold_batch_norms(model)
    assert not [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_plain_onnx_export_says_what_to_do(tmp_path: Path) -> None:
    layer = sdnet.CSCConv2d(3, 4, 3)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"impl is 'auto', .* use sdnet\.export\(model, path, examp"):
        torch.onnx.export(layer, (images(1, 8, 8),), tmp_path / "layer.onnx", dynamo=True, verbose=False)


def test_csc_layers_are_leaves_of_torch_fx() -> None:
    model = network("sdnet18_all")
    graph = symbolic_trace(model)
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert set(csc_layers(model)) <= called
    x = images(2, 16, 16)
    torch.testing.assert_close(graph(x), model(x))
    converted = nn.Sequential(nn.Conv2d(3, 4, 3))
    sdnet.convert(converted, x)
    torch.testing.assert_close(symbolic_trace(converted)(x), converted(x))  # the bias is added once
    linear = nn.Sequential(sdnet.CSCLinear(9, 5))
    vectors = torch.randn(2, 9)
    torch.testing.assert_close(symbolic_trace(linear)(vectors), linear(vectors))


@pytest.mark.parametrize(
    ("impl", "module", "step"), [("torch", torch_path, "shrink_step"), ("reference", reference, "proximal")]
)
def test_inference_keeps_no_earlier_codes(impl: str, module: Any, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the codes of all steps never more than three are in memory: two that are read, and the new ones."""
    compute, made, alive = getattr(module, step), [], []

    def counted(*arguments: Any) -> Tensor:
        codes = compute(*arguments)
        made.append(weakref.ref(codes))
        alive.append(sum(reference() is not None for reference in made))
        return codes

    monkeypatch.setattr(module, step, counted)
    layer = sdnet.CSCConv2d(2, 8, 3, impl=impl, n_steps=12, solver="fista")
    with torch.no_grad():
        layer(torch.randn(1, 2, 8, 8))
    assert len(made) == 12
    assert max(alive) <= 3
