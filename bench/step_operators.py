"""The parts of a CSC layer one by one, each with its Triton kernel, its torch twin and its plain mathematics.

    encode              shrink(z + step A'r, step lam)
    residual            x - A z
    weight_correlation  step corr(r, z) + corr(r, z) - corr(r, z): three pairs, as the backward pass of two steps has
    power_iteration     AA'u of one layer's vector

`cudnn` are cuDNN's convolutions with our kernels around them: the Triton path where cuDNN's products win.
"""

from torch import Tensor
from torch.nn.grad import conv2d_weight

from sdnet.bench.operators import LAYOUTS, Bound, Case, Inputs, Provider
from sdnet.kernels import reference, step_sizes, torch_path
from sdnet.kernels.coding import Coding
from sdnet.kernels.dispatch import obstacle_to_triton


def problem_of(case: Case, inputs: Inputs) -> torch_path.Problem:
    """The published problem: two steps, non-negative codes."""
    return torch_path.Problem(
        step_size=inputs["step_size"], lam=inputs["lam"], coding=Coding(solver="sdnet"), **case.geometry
    )


def encode_torch(case: Case, inputs: Inputs) -> Bound:
    problem, weight = problem_of(case, inputs), inputs["weight"]
    return Bound(lambda: torch_path.shrink_step(inputs["grad"], inputs["x"], problem.scaled(weight), problem))


def encode_reference(case: Case, inputs: Inputs) -> Bound:
    step_size, lam = inputs["step_size"].to(inputs["x"].dtype), inputs["lam"].to(inputs["x"].dtype)

    def run() -> Tensor:
        v = inputs["grad"] + step_size * reference.analysis(inputs["x"], inputs["weight"], **case.geometry)
        return reference.proximal(v, step_size, lam, 0.0, nonnegative=True)

    return Bound(run)


def residual_torch(case: Case, inputs: Inputs) -> Bound:
    problem = problem_of(case, inputs)
    return Bound(lambda: torch_path.residual_of(inputs["x"], inputs["grad"], inputs["weight"], problem))


def residual_reference(case: Case, inputs: Inputs) -> Bound:
    size = case.layer.size
    return Bound(lambda: inputs["x"] - reference.synthesis(inputs["grad"], inputs["weight"], size, **case.geometry))


def correlation_torch(case: Case, inputs: Inputs) -> Bound:
    problem, weight = problem_of(case, inputs), inputs["weight"]

    def run() -> Tensor:
        first, second, third = (
            torch_path.weight_correlation(inputs["x"], inputs["grad"], weight, problem) for _ in range(3)
        )
        gradient = torch_path.weight_gradient(first.add_(second), third, problem)
        assert gradient is not None
        return gradient

    return Bound(run)


def correlation_reference(case: Case, inputs: Inputs) -> Bound:
    weight, step_size = inputs["weight"], inputs["step_size"].to(inputs["x"].dtype)

    def correlation() -> Tensor:
        return conv2d_weight(inputs["x"], weight.shape, inputs["grad"], **case.geometry)

    return Bound(lambda: step_size * (correlation() + correlation()) - correlation())


def power_iteration_torch(case: Case, inputs: Inputs) -> Bound:
    def run() -> Tensor:
        power_vector, eigenvalue = step_sizes.power_iteration(inputs["weight"], inputs["power_vector"], **case.geometry)
        return power_vector * eigenvalue

    return Bound(run)


def power_iteration_reference(case: Case, inputs: Inputs) -> Bound:
    size, weight = case.layer.size, inputs["weight"]
    power_vector = inputs["power_vector"].to(weight.dtype)

    def run() -> Tensor:
        codes = reference.analysis(power_vector, weight, **case.geometry)
        return reference.synthesis(codes, weight, size, **case.geometry)

    return Bound(run)


def by_triton(name: str, path: str) -> Provider:
    """The kernel for a part, on the path "fused" (all fused) or "cudnn".

    Raises:
        NotImplementedError: the reason that `sdnet.kernels` gives for not using Triton here.
    """

    def bind(case: Case, inputs: Inputs) -> Bound:
        x, weight, codes = inputs["x"], inputs["weight"], inputs["grad"]
        if obstacle := obstacle_to_triton(x, weight):
            raise NotImplementedError(f"{obstacle}.")
        from sdnet.kernels.triton_path import correlation, cudnn, fused, loop

        problem, step_size = problem_of(case, inputs), inputs["step_size"]
        layer = loop.layer_of(x, weight, problem.stride, problem.padding, LAYOUTS[case.layout])
        steps = {"fused": fused, "cudnn": cudnn}[path]
        pairs = [(x, codes, step_size), (x, codes, step_size), (x, codes, -1.0)]
        runs = {
            "encode": lambda: steps.encode(layer, x, problem, codes)[0],
            "residual": lambda: steps.residual(layer, x, codes, problem),
            "weight_correlation": lambda: correlation.weight_correlation(
                pairs, weight, problem.stride, problem.padding, layer.precision
            ),
        }
        return Bound(runs[name])

    return bind


PROVIDERS: dict[str, dict[str, Provider]] = {
    "encode": {
        "triton": by_triton("encode", "fused"),
        "cudnn": by_triton("encode", "cudnn"),
        "torch": encode_torch,
        "reference": encode_reference,
    },
    "residual": {
        "triton": by_triton("residual", "fused"),
        "cudnn": by_triton("residual", "cudnn"),
        "torch": residual_torch,
        "reference": residual_reference,
    },
    "weight_correlation": {
        "triton": by_triton("weight_correlation", "fused"),
        "torch": correlation_torch,
        "reference": correlation_reference,
    },
    "power_iteration": {"torch": power_iteration_torch, "reference": power_iteration_reference},
}
