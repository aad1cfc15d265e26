"""The parts of a CSC layer one by one, each with its Triton kernels, its torch version and the reference.

    encode              shrink(z + step A'r, step lam)
    residual            x - A z
    weight_correlation  step corr(r, z) + corr(r, z) - corr(r, z): three pairs, as in the backward pass of two steps
    power_iteration     AA'u of one layer's power vector

`fused` and `cudnn` are the two Triton paths. They share the kernel of the weight correlation.
"""

from torch import Tensor
from torch.nn.grad import conv2d_weight

from sdnet.bench.providers import LAYOUTS, BoundCall, Inputs, Provider, Workload
from sdnet.kernels import reference, step_sizes, torch_path
from sdnet.kernels.coding import Coding
from sdnet.kernels.dispatch import obstacle_to_triton


def problem_of(workload: Workload, inputs: Inputs) -> torch_path.Problem:
    """Return the published problem: two steps, non-negative codes."""
    return torch_path.Problem(
        step_size=inputs["step_size"], lam=inputs["lam"], coding=Coding(solver="sdnet"), **workload.geometry
    )


def encode_torch(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the torch version of `encode`."""
    problem, weight = problem_of(workload, inputs), inputs["weight"]
    return BoundCall(lambda: torch_path.shrink_step(inputs["grad"], inputs["x"], problem.scaled(weight), problem))


def encode_reference(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the reference of `encode`."""
    step_size, lam = inputs["step_size"].to(inputs["x"].dtype), inputs["lam"].to(inputs["x"].dtype)

    def run() -> Tensor:
        v = inputs["grad"] + step_size * reference.analysis(inputs["x"], inputs["weight"], **workload.geometry)
        return reference.proximal(v, step_size, lam, 0.0, nonnegative=True)

    return BoundCall(run)


def residual_torch(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the torch version of `residual`."""
    problem = problem_of(workload, inputs)
    return BoundCall(lambda: torch_path.residual_of(inputs["x"], inputs["grad"], inputs["weight"], problem))


def residual_reference(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the reference of `residual`."""
    size = workload.layer.size
    return BoundCall(
        lambda: inputs["x"] - reference.synthesis(inputs["grad"], inputs["weight"], size, **workload.geometry)
    )


def correlation_torch(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the torch version of `weight_correlation`."""
    problem, weight = problem_of(workload, inputs), inputs["weight"]

    def run() -> Tensor:
        first, second, third = (
            torch_path.weight_correlation(inputs["x"], inputs["grad"], weight, problem) for _ in range(3)
        )
        gradient = torch_path.weight_gradient(first.add_(second), third, problem)
        assert gradient is not None
        return gradient

    return BoundCall(run)


def correlation_reference(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the reference of `weight_correlation`."""
    weight, step_size = inputs["weight"], inputs["step_size"].to(inputs["x"].dtype)

    def correlation() -> Tensor:
        return conv2d_weight(inputs["x"], weight.shape, inputs["grad"], **workload.geometry)

    return BoundCall(lambda: step_size * (correlation() + correlation()) - correlation())


def power_iteration_torch(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the torch version of `power_iteration`."""
    return BoundCall(lambda: step_sizes.gram(inputs["weight"], inputs["power_vector"], **workload.geometry))


def power_iteration_reference(workload: Workload, inputs: Inputs) -> BoundCall:
    """Return the reference of `power_iteration`."""
    size, weight = workload.layer.size, inputs["weight"]
    power_vector = inputs["power_vector"].to(weight.dtype)

    def run() -> Tensor:
        codes = reference.analysis(power_vector, weight, **workload.geometry)
        return reference.synthesis(codes, weight, size, **workload.geometry)

    return BoundCall(run)


def by_triton(name: str, path: str) -> Provider:
    """The kernel for a part, on the path "fused" (all fused) or "cudnn".

    Raises:
        NotImplementedError: the reason that `sdnet.kernels` gives for not using Triton here.
    """

    def bind(workload: Workload, inputs: Inputs) -> BoundCall:
        x, weight, codes = inputs["x"], inputs["weight"], inputs["grad"]
        if obstacle := obstacle_to_triton(x, weight, problem_of(workload, inputs).padding):
            raise NotImplementedError(f"{obstacle}.")
        from sdnet.kernels.triton_path import loop
        from sdnet.kernels.triton_path.correlation.weight_gradient import weight_correlation

        problem, step_size = problem_of(workload, inputs), inputs["step_size"]
        layer = loop.layer_of(x, weight, problem.stride, problem.padding, LAYOUTS[workload.layout])
        products = loop.path_of(layer, problem, loop.choice_of(layer, path))
        pairs = [(x, codes, step_size), (x, codes, step_size), (x, codes, -1.0)]
        runs = {
            "encode": lambda: products.proximal_step(x, codes)[0],
            "residual": lambda: products.residual(x, codes),
            "weight_correlation": lambda: weight_correlation(
                pairs, weight, problem.stride, problem.padding, layer.precision
            ),
        }
        return BoundCall(runs[name])

    return bind


PROVIDERS: dict[str, dict[str, Provider]] = {
    "encode": {
        "fused": by_triton("encode", "fused"),
        "cudnn": by_triton("encode", "cudnn"),
        "torch": encode_torch,
        "reference": encode_reference,
    },
    "residual": {
        "fused": by_triton("residual", "fused"),
        "cudnn": by_triton("residual", "cudnn"),
        "torch": residual_torch,
        "reference": residual_reference,
    },
    "weight_correlation": {
        "fused": by_triton("weight_correlation", "fused"),
        "torch": correlation_torch,
        "reference": correlation_reference,
    },
    "power_iteration": {"torch": power_iteration_torch, "reference": power_iteration_reference},
}
