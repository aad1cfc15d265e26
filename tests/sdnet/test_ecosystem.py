"""What other people's code does with a model of CSC layers: it must compute the same codes afterwards."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import sdnet
from sdnet import CSCConv2d

from .small_network import run_two_ranks

SIZE = (9, 8)
Forward = Callable[[Tensor], Tensor]


class Network(nn.Module):
    """Two CSC layers with lambdas of their own and batch normalisation between them."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.first = CSCConv2d(3, 6, 3, lam=0.3, input_size=size)
        self.norm = nn.BatchNorm2d(6)
        self.second = CSCConv2d(6, 4, 3, stride=2, lam=0.2, n_steps=3, input_size=size)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def network(seed: int = 0, size: tuple[int, int] = SIZE) -> Network:
    """A network in evaluation mode."""
    torch.manual_seed(seed)
    return Network(size).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def layers(model: nn.Module) -> list[CSCConv2d]:
    return [module for module in model.modules() if isinstance(module, CSCConv2d)]


def unpickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: nn.Module) -> nn.Module:
    other = network(seed=1)
    other.load_state_dict(state(model))
    return other


def loaded_with_another_input_size(model: nn.Module) -> nn.Module:
    other = network(seed=1, size=(16, 16))
    other.load_state_dict(state(model))
    return other


def loaded_after_to_empty(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        other = network()
    freed = [torch.full((), 7.0) for _ in range(2000)]
    del freed  # so that memory without a value does not hold zeros
    other.to_empty(device="cpu")
    other.load_state_dict(state(model))
    return other


def assigned_on_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        other = network(size=(16, 16))
    other.load_state_dict(state(model), assign=True)
    return other


def assigned_on_empty_weights(model: nn.Module) -> nn.Module:
    with init_empty_weights():
        other = network()
    other.load_state_dict(state(model), assign=True)
    return other


def assigned_on_empty_weights_and_buffers(model: nn.Module) -> nn.Module:
    with init_empty_weights(include_buffers=True):
        other = network()
    other.load_state_dict(state(model), assign=True)
    return other


def dispatched_by_accelerate(model: nn.Module) -> nn.Module:
    with init_empty_weights():
        other = network()
    with TemporaryDirectory() as folder:
        torch.save(state(model), f"{folder}/pytorch_model.bin")
        return load_checkpoint_and_dispatch(other, f"{folder}/pytorch_model.bin", device_map={"": "cpu"})


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    return average


def averaged_with_buffers(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, use_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    return average


def averaged_by_state_dict(model: nn.Module) -> nn.Module:
    """As timm's ModelEmaV2 does it."""
    average = copy.deepcopy(model)
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        ours.copy_(0.5 * ours + 0.5 * theirs)
    return average


def shared(model: nn.Module) -> nn.Module:
    model.share_memory()
    for layer in layers(model):
        assert layer.power_vector.is_shared()
    return model


def built_in_inference_mode(model: nn.Module) -> nn.Module:
    """The CSC layers alone: batch normalisation cannot be trained when it is built so."""
    other = network()
    with torch.inference_mode():
        built = network(seed=1)
    other.first, other.second = built.first, built.second
    other.load_state_dict(state(model))
    return other


def swapped_to_double_and_back(model: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def in_channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def called_functionally(model: nn.Module) -> Forward:
    values, other = state(model), network(seed=1)
    return lambda x: functional_call(other, values, x)


def called_functionally_on_meta(model: nn.Module) -> Forward:
    """As ensembles do it, with a skeleton without memory."""
    values, skeleton = state(model), copy.deepcopy(model).to("meta")
    return lambda x: functional_call(skeleton, values, x)


def exported(model: nn.Module) -> Forward:
    return torch.export.export(model, (images(),)).module()


def exported_strictly(model: nn.Module) -> Forward:
    return torch.export.export(model, (images(),), strict=True).module()


def compiled(model: nn.Module) -> Forward:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def on_saved_tensors(model: nn.Module) -> Forward:
    def forward(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    return forward


UNCHANGED: dict[str, Callable[[nn.Module], nn.Module | Forward]] = {
    "deepcopy": copy.deepcopy,
    "pickle": unpickled,
    "torch.save of the module": saved_whole,
    "load_state_dict": loaded,
    "load_state_dict over another input_size": loaded_with_another_input_size,
    "meta, to_empty, load_state_dict": loaded_after_to_empty,
    "meta, load_state_dict(assign=True)": assigned_on_meta,
    "init_empty_weights": assigned_on_empty_weights,
    "init_empty_weights(include_buffers=True)": assigned_on_empty_weights_and_buffers,
    "init_empty_weights, load_checkpoint_and_dispatch": dispatched_by_accelerate,
    "AveragedModel": averaged,
    "AveragedModel(use_buffers=True)": averaged_with_buffers,
    "EMA of the state dict": averaged_by_state_dict,
    "share_memory": shared,
    "built in inference mode": built_in_inference_mode,
    "double and back": lambda model: model.double().float(),
    "double and back by swapping": swapped_to_double_and_back,
    "channels_last": in_channels_last,
    "functional_call": called_functionally,
    "functional_call on meta": called_functionally_on_meta,
    "torch.export": exported,
    "torch.export, strict": exported_strictly,
    "torch.compile": compiled,
    "save_on_cpu": on_saved_tensors,
}


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_the_codes_and_their_gradient_stay_the_same(change: Callable[[nn.Module], Forward]) -> None:
    model, x = network(), images().requires_grad_()
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    assert 0.05 < (expected != 0).float().mean() < 0.95
    forward = change(copy.deepcopy(model))
    actual = forward(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x)[0], gradient, rtol=0, atol=1e-5)
    if isinstance(forward, nn.Module) and not isinstance(forward, torch.fx.GraphModule):
        assert [layer.lam.item() for layer in layers(forward)] == [layer.lam.item() for layer in layers(model)]
        for layer in layers(forward):
            assert layer.step_size.dtype == layer.power_vector.dtype == layer.lam.dtype == torch.float32
            assert layer.power_vector.is_contiguous()
        margins = sdnet.step_margins(forward)
        assert list(margins.values()) == pytest.approx(list(sdnet.step_margins(model).values()), rel=1e-4)


def test_a_forward_on_meta_tells_the_shape_and_counts_the_operations() -> None:
    counts = []
    for model, x in ((network(), images()), (network().to("meta"), images().to("meta"))):
        with FlopCounterMode(display=False) as counter:
            codes = model(x)
        counts.append((codes.shape, counter.get_total_flops()))
    assert counts[1] == counts[0]
    assert counts[0][1] > 0


def test_a_copy_of_the_handle_of_attach_ends_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sdnet.attach(model, optimizer)
    for copied in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        copied.remove()
    assert len(optimizer._optimizer_step_post_hooks) == 1
    handle.remove()
    assert len(optimizer._optimizer_step_post_hooks) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_state_keeps_its_precision_when_the_weights_change_theirs(dtype: torch.dtype) -> None:
    model = network()
    before = state(model)
    model.to(dtype)
    for name in ("first", "second"):
        layer = model.get_submodule(name)
        assert isinstance(layer, CSCConv2d)
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.step_size, before[f"{name}.step_size"])
        assert torch.equal(layer.power_vector, before[f"{name}.power_vector"])
    assert model(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_default_dtype_is_that_of_the_weights(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        model = network()
        sdnet.refresh_step_size(model, 12)
        assert max(sdnet.step_margins(model).values()) == pytest.approx(0.9, rel=1e-3)
        assert model.first.weight.dtype == dtype
        assert model.first.step_size.dtype == model.first.power_vector.dtype == torch.float32
        assert model(images().to(dtype)).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_state_made_in_inference_mode_can_be_trained_with() -> None:
    model = network()
    with torch.inference_mode():
        sdnet.refresh_step_size(model, 12)
        sdnet.set_lambda(model, torch.tensor([0.1, 0.2]))
        model.second.double().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sdnet.attach(model, optimizer)
    before = model.first.weight.detach().clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.first.weight, before)


def test_a_layer_takes_device_and_dtype_and_skips_its_initialisation() -> None:
    layer = CSCConv2d(3, 6, 3, device="meta", dtype=torch.float64, lam=0.3)
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.float64
    assert "lam=0.3" in repr(layer)
    layer = nn.utils.skip_init(CSCConv2d, 3, 6, 3, lam=0.3)
    assert isinstance(layer, CSCConv2d)
    assert layer.lam.item() == pytest.approx(0.3)
    assert layer.step_size.isnan()  # nothing can be computed before the weights are there
    assert layer.power_vector.norm().item() == pytest.approx(1)
    layer.reset_parameters()
    assert 0.9 <= sdnet.step_margins(layer)[""] < 1.05


def test_a_state_dict_without_power_vectors_is_loaded_if_asked_for() -> None:
    small = {name: tensor for name, tensor in state(network()).items() if not name.endswith("power_vector")}
    model = network(seed=1)
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\) in state_dict: \"first.power_vector\", \"second.power_vector\""
    ):
        model.load_state_dict(small)
    model.load_state_dict(small, strict=False)
    sdnet.refresh_step_size(model)
    assert max(sdnet.step_margins(model).values()) == pytest.approx(0.9, rel=1e-3)


def test_a_power_vector_of_other_channels_is_refused() -> None:
    wrong = state(network()) | {"first.power_vector": torch.zeros(1, 5, 9, 8)}
    with pytest.raises(RuntimeError, match=r"first\.power_vector is \[1, 5, 9, 8\]; it must be \[1, 3, H, W\]"):
        network().load_state_dict(wrong)


def test_a_compiled_model_is_not_compiled_again_for_another_lambda() -> None:
    model, x, compilations = network(), images(), 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    forward = torch.compile(model, backend=backend, fullgraph=True)
    for lam in (0.3, 0.1, torch.tensor(0.5), 0.4):
        sdnet.set_lambda(model, lam)
        torch.testing.assert_close(forward(x), model(x), rtol=0, atol=1e-6)
    assert compilations == 1
    for per_sample in (torch.tensor([0.1, 0.6]), torch.tensor([0.5, 0.2])):
        sdnet.set_lambda(model, per_sample)
        torch.testing.assert_close(forward(x), model(x), rtol=0, atol=1e-6)
    assert compilations == 2


def test_an_ensemble_is_computed_by_vmap() -> None:
    models = [network(seed) for seed in range(3)]
    parameters, buffers = stack_module_state(cast(list[nn.Module], models))
    skeleton, x = copy.deepcopy(models[0]).to("meta"), images()

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), x)

    torch.testing.assert_close(vmap(call)(parameters, buffers), torch.stack([model(x) for model in models]))


def test_ddp_leaves_lambda_and_power_vectors_of_every_rank_alone(tmp_path: Path) -> None:
    run_two_ranks("ddp_ranks.py", tmp_path)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for each in states:
        torch.testing.assert_close(each["lam"], each["expected lam"], rtol=0, atol=0)
        assert not each["broadcast"]
    assert torch.equal(states[0]["weight"], states[1]["weight"])
    assert torch.equal(states[0]["power_vector"], states[1]["power_vector"])
