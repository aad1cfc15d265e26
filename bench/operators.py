"""The CSC layer as `kernels` measures it: the inputs that a layer's shape gives it, and who can compute it.

| provider    | what it is                                                                       |
|-------------|----------------------------------------------------------------------------------|
| `triton`    | the fused kernels, where they support the call                                   |
| `torch`     | torch's convolutions with the hand-written loop and backward                     |
| `reference` | the same mathematics in plain torch under autograd: eager without official waste |
| `compile`   | `torch.compile` of `reference`                                                   |
| `official`  | the official formulation (`sdnet.bench.official`), under autocast in half types  |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.bench.layer_shapes import LayerShape
from sdnet.bench.official import DictConv2d, OfficialConfig
from sdnet.kernels import csc_encode, step_sizes

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAM = 0.1
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operator on one layer's shape."""

    operator: str
    layer: LayerShape
    batch: int
    n_steps: int
    dtype: str
    layout: str
    device: torch.device

    @property
    def geometry(self) -> dict[str, Any]:
        """stride and padding as convolutions and `csc_encode` take them."""
        return {"stride": (self.layer.stride,) * 2, "padding": (self.layer.padding,) * 2}

    @property
    def options(self) -> dict[str, Any]:
        """What `csc_encode` is told: the official loop, whose codes the official layer can be held against."""
        return {"n_steps": self.n_steps, "solver": "sdnet", **self.geometry}

    def describe(self) -> dict[str, Any]:
        """The shape for the ledger."""
        facts = {"operator": self.operator, "layer": str(self.layer.geometry), "batch": self.batch}
        return facts | {"n_steps": self.n_steps} if self.operator == "csc" else facts


class Bound(NamedTuple):
    """A provider on one set of inputs: what to call, and x and weight as leaves if they have gradients."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()


Provider = Callable[[Case, Inputs], Bound]
"""Raises NotImplementedError, with a sentence, for a case that it does not support; at the latest when it runs."""


@dataclass(frozen=True)
class Operator:
    """Inputs from a seed, the modes that make sense, and the providers; `reference` is the oracle, in fp64."""

    inputs: Callable[[Case, int], dict[str, Tensor]]
    modes: tuple[str, ...]
    providers: Mapping[str, Provider]


def layer_inputs(case: Case, seed: int) -> dict[str, Tensor]:
    """x, grad = dL/dz and residual ~ N(0, 1), atoms of unit norm, half of the first codes alive, a converged step."""
    layer, options = case.layer, {"device": case.device, "dtype": DTYPES[case.dtype]}
    # On the device itself: a processor takes seconds for the numbers of a large layer.
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    weight = F.normalize(normal(layer.atoms, layer.channels * layer.kernel_size**2), dim=1)
    weight = weight.view(layer.atoms, layer.channels, layer.kernel_size, layer.kernel_size)
    power_vector = step_sizes.initial_power_vector((1, layer.channels, *layer.size))
    _, eigenvalue = step_sizes.power_iteration(weight, power_vector.to(case.device), **case.geometry, iterations=20)
    images, codes = (case.batch, layer.channels, *layer.size), (case.batch, layer.atoms, *layer.codes_size)
    tensors = {"x": normal(*images), "weight": weight, "grad": normal(*codes)}
    layout = LAYOUTS[case.layout]
    inputs = {name: tensor.to(**options).contiguous(memory_format=layout) for name, tensor in tensors.items()}
    lam = torch.tensor(LAM, device=case.device)
    return inputs | {
        "step_size": step_sizes.step_size_of(eigenvalue),
        "lam": lam,
        "power_vector": power_vector.to(case.device),
    }


def differentiable(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """x and weight as leaves of a graph of their own."""
    return inputs["x"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_()


def csc_by(impl: str) -> Provider:
    """`csc_encode` with this implementation."""

    def bind(case: Case, inputs: Inputs) -> Bound:
        x, weight = differentiable(inputs)
        options: dict[str, Any] = {**case.options, "impl": impl}
        return Bound(lambda: csc_encode(x, weight, inputs["step_size"], inputs["lam"], **options), (x, weight))

    return bind


def csc_compiled(case: Case, inputs: Inputs) -> Bound:
    """The reference through torch.compile, for this shape alone."""
    x, weight = differentiable(inputs)
    options: dict[str, Any] = {**case.options, "impl": "reference"}
    function = compiled(tuple(options.items()))
    return Bound(lambda: function(x, weight, inputs["step_size"], inputs["lam"]), (x, weight))


COMPILED: dict[tuple[Any, ...], Callable[..., Tensor]] = {}


def compiled(options: tuple[Any, ...]) -> Callable[..., Tensor]:
    """One compiled function for all copies of the inputs of a case; `forget_compiled` ends its life."""
    if options not in COMPILED:
        COMPILED[options] = torch.compile(partial(csc_encode, **dict(options)), fullgraph=True, dynamic=False)
    return COMPILED[options]


def forget_compiled() -> None:
    """Let the next case compile afresh: torch.compile gives up on a function that it met in too many shapes."""
    if COMPILED:
        COMPILED.clear()
        torch._dynamo.reset()


def csc_official(case: Case, inputs: Inputs) -> Bound:
    """The official layer's forward, normalisation included, power iteration not."""
    layer = case.layer
    if layer.stride > 2 or (layer.stride == 2 and any(n % 2 for n in layer.size)):
        raise NotImplementedError("the official formulation knows stride 1, and stride 2 on even sizes.")
    config = OfficialConfig(n_steps=case.n_steps, lmbd=LAM)
    module = DictConv2d(layer.channels, layer.atoms, layer.kernel_size, layer.stride, config).to(case.device)
    module.weight.data = inputs["weight"].float().contiguous(memory_format=LAYOUTS[case.layout])
    module.step_size.copy_(inputs["step_size"])
    module.eigenvector = inputs["grad"][:1]  # only its absence would cost a forward anything
    x = inputs["x"].detach().requires_grad_()
    half = DTYPES[case.dtype] != torch.float32

    def run() -> Tensor:
        with torch.autocast(case.device.type, DTYPES[case.dtype], enabled=half):
            return module(x)

    return Bound(run, (x, module.weight))


CSC = Operator(
    layer_inputs,
    ("forward", "backward", "both"),
    {
        "triton": csc_by("triton"),
        "torch": csc_by("torch"),
        "reference": csc_by("reference"),
        "compile": csc_compiled,
        "official": csc_official,
    },
)

NOT_CAPTURABLE = ("official",)
"""Providers that read the device from the host: timed by events around their launches."""


def in_double(case: Case, inputs: Inputs) -> tuple[Case, dict[str, Tensor]]:
    """The same problem in fp64, from the same rounded inputs."""
    return replace(case, layout="contiguous"), {name: tensor.double().contiguous() for name, tensor in inputs.items()}
