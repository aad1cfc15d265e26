"""The CSC layer as `kernels` measures it: the inputs that a layer's shape gives it, and the implementations.

| provider    | what it is                                                                                  |
|-------------|---------------------------------------------------------------------------------------------|
| `fused`     | the Triton path whose convolutions include the shrinkage and the residual                   |
| `cudnn`     | the Triton path of cuDNN convolutions with pointwise Triton kernels between them            |
| `torch`     | PyTorch's convolutions with the hand-written loop and backward pass                         |
| `reference` | the same mathematics in plain PyTorch under autograd, without the official code's overhead  |
| `compile`   | `torch.compile` of `reference`                                                              |
| `official`  | the official formulation (`sdnet.bench.official`), under autocast in 16-bit types           |
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.bench.layer_shapes import LayerShape
from sdnet.bench.official import DictConv2d, OfficialConfig
from sdnet.kernels import step_sizes
from sdnet.kernels.coding import Coding
from sdnet.kernels.csc import encode

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAM = 0.1
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """One operator on the shape of one layer."""

    operator: str
    layer: LayerShape
    batch: int
    n_steps: int
    dtype: str
    layout: str
    device: torch.device

    @property
    def geometry(self) -> dict[str, Any]:
        """Stride and padding, as convolutions and `csc_encode` take them."""
        return dict(zip(("stride", "padding"), self.layer.pairs[1:], strict=True))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the operator: those of the official loop, so that the official layer gives the same codes."""
        return {"coding": Coding(n_steps=self.n_steps, solver="sdnet"), **self.geometry}

    def describe(self) -> dict[str, Any]:
        """Return the shape for the ledger."""
        facts = {"operator": self.operator, "layer": str(self.layer.geometry), "batch": self.batch}
        return facts | {"n_steps": self.n_steps} if self.operator == "csc" else facts


class BoundCall(NamedTuple):
    """A provider on one set of inputs: the call, and x and weight as leaves of its graph if it has gradients."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()


Provider = Callable[[Workload, Inputs], BoundCall]
"""It raises NotImplementedError, at the latest when the call runs, for a workload that it does not support."""


@dataclass(frozen=True)
class Operator:
    """The inputs by seed, the modes and the providers of an operator; `reference` in fp64 is the oracle."""

    inputs: Callable[[Workload, int], dict[str, Tensor]]
    modes: tuple[str, ...]
    providers: Mapping[str, Provider]

    def named(self, names: Iterable[str]) -> dict[str, Provider]:
        """Return the providers of these names."""
        return {name: self.providers[name] for name in names}


def layer_inputs(workload: Workload, seed: int) -> dict[str, Tensor]:
    """Return x and grad = dL/dz ~ N(0, 1), atoms of unit norm, and a converged step size."""
    layer, options = workload.layer, {"device": workload.device, "dtype": DTYPES[workload.dtype]}
    # On the device itself: a CPU needs seconds for the random numbers of a large layer.
    generator = torch.Generator(workload.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=workload.device)

    weight = F.normalize(normal(layer.atoms, layer.channels * layer.kernel_size**2), dim=1)
    weight = weight.view(layer.atoms, layer.channels, layer.kernel_size, layer.kernel_size)
    power_vector = step_sizes.initial_power_vector((1, layer.channels, *layer.size))
    _, eigenvalue = step_sizes.largest_eigenvalue(weight, power_vector.to(workload.device), **workload.geometry)
    images, codes = (workload.batch, layer.channels, *layer.size), (workload.batch, layer.atoms, *layer.codes_size)
    tensors = {"x": normal(*images), "weight": weight, "grad": normal(*codes)}
    layout = LAYOUTS[workload.layout]
    inputs = {name: tensor.to(**options).contiguous(memory_format=layout) for name, tensor in tensors.items()}
    lam = torch.tensor(LAM, device=workload.device)
    return inputs | {
        "step_size": step_sizes.step_size_of(eigenvalue),
        "lam": lam,
        "power_vector": power_vector.to(workload.device),
    }


def differentiable(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return x and weight as leaves of a new graph."""
    return inputs["x"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_()


def csc_by(impl: str, path: str = "auto") -> Provider:
    """Return the provider of an implementation and, for "triton", of a path.

    Args:
        impl: An implementation of `csc_encode`.
        path: "auto", "fused", "cudnn" or an encoded `sdnet.kernels.triton_path.paths.Entry`.
    """

    def bind(workload: Workload, inputs: Inputs) -> BoundCall:
        x, weight = differentiable(inputs)
        options: dict[str, Any] = {**workload.options, "impl": impl, "path": path}
        return BoundCall(lambda: encode(x, weight, inputs["step_size"], inputs["lam"], **options), (x, weight))

    return bind


def csc_compiled(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the reference through torch.compile, compiled for this shape."""
    x, weight = differentiable(inputs)
    function = compiled(tuple((workload.options | {"impl": "reference"}).items()))
    return BoundCall(lambda: function(x, weight, inputs["step_size"], inputs["lam"]), (x, weight))


COMPILED: dict[tuple[Any, ...], Callable[..., Tensor]] = {}


def compiled(options: tuple[Any, ...]) -> Callable[..., Tensor]:
    """Return one compiled function for all copies of a workload's inputs, until `forget_compiled`."""
    if options not in COMPILED:
        COMPILED[options] = torch.compile(partial(encode, **dict(options)), fullgraph=True, dynamic=False)
    return COMPILED[options]


def forget_compiled() -> None:
    """Compile anew for the next workload: torch.compile gives up on a function after a number of shapes."""
    if COMPILED:
        COMPILED.clear()
        torch._dynamo.reset()


def csc_official(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the forward pass of the official layer, with its normalisation and without its power iteration."""
    layer = workload.layer
    if layer.stride > 2 or (layer.stride == 2 and any(n % 2 for n in layer.size)):
        raise NotImplementedError("the official formulation supports stride 1, and stride 2 on even sizes.")
    config = OfficialConfig(n_steps=workload.n_steps, lmbd=LAM)
    module = DictConv2d(layer.channels, layer.atoms, layer.kernel_size, layer.stride, config).to(workload.device)
    module.weight.data = inputs["weight"].float().contiguous(memory_format=LAYOUTS[workload.layout])
    module.step_size.copy_(inputs["step_size"])
    module.eigenvector = inputs["grad"][:1]  # else the first forward pass would make one
    x = inputs["x"].detach().requires_grad_()
    half = DTYPES[workload.dtype] != torch.float32

    def run() -> Tensor:
        with torch.autocast(workload.device.type, DTYPES[workload.dtype], enabled=half):
            return module(x)

    return BoundCall(run, (x, module.weight))


CSC = Operator(
    layer_inputs,
    ("forward", "backward", "both"),
    {
        "fused": csc_by("triton", "fused"),
        "cudnn": csc_by("triton", "cudnn"),
        "torch": csc_by("torch"),
        "reference": csc_by("reference"),
        "compile": csc_compiled,
        "official": csc_official,
    },
)

NOT_CAPTURABLE = ("official",)
"""Providers that read device memory on the host, and so cannot be captured in a CUDA graph."""


def in_double(workload: Workload, inputs: Inputs) -> tuple[Workload, dict[str, Tensor]]:
    """Return the same problem in fp64, with the same rounded inputs."""
    return replace(workload, layout="contiguous"), {
        name: tensor.double().contiguous() for name, tensor in inputs.items()
    }
