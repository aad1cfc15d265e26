"""`CSCConv2d`: a layer whose output is the convolutional sparse code of its input."""

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sdnet.convolution_arguments import refuse_convolution_only
from sdnet.kernels import checks, reference, step_sizes
from sdnet.kernels.arguments import DTYPES, as_tensor, check_codes, check_dense
from sdnet.kernels.autocast import without_autocast
from sdnet.kernels.coding import CODING_FIELDS, Callback, Coding, Iteration, Prox, coding_of, takes_coding
from sdnet.kernels.csc import Solution, encode, solve
from sdnet.kernels.dictionaries import update_dictionaries
from sdnet.kernels.dispatch import IMPLEMENTATIONS
from sdnet.kernels.reference import Pair, codes_size
from sdnet.kernels.step_sizes import DictionaryState
from sdnet.recorder import Recordable
from sdnet.state import CodingState, LearnLam, persistent_state

DEFAULT_INPUT_SIZE = 32
FIRST_PRODUCTS = 11
"""Products with AA' for the first step size, which exceeds 0.9 / (largest eigenvalue) by some percent at most."""


class CSCConv2d(CodingState, Recordable):
    """Compute convolutional sparse codes of the input.

    The codes approximate

        argmin_z lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2,   A z = conv_transpose2d(z, weight),

    by `n_steps` proximal gradient steps from zero. The atoms weight[k] have unit norm.

    A forward pass changes no state, in training or in evaluation. After `sdnet.attach(model, optimizer)`, every step of
    the optimizer is followed by the projection of the atoms and an update of the step size.
    `sdnet.refresh_step_size(model)` makes the step size exact.

    This is not a drop-in replacement for `nn.Conv2d`: the output is sparse and not linear in the input, the padding is
    kernel_size // 2 unless given, and there are no bias, groups, dilation, padding modes or inputs without a batch
    dimension. docs/conv2d.md lists all differences.

    Args:
        in_channels: the number of input channels, C.
        out_channels: the number of atoms, K.
        kernel_size: height and width of the atoms, an int or a pair.
        stride: the stride of the convolution, an int or a pair.
        padding: the zero padding on both sides, an int or a pair. None is kernel_size // 2.
        lam: the weight of |z|_1, at least 0.
        adaptive_lam: multiply lam once by numel(x) / numel(z), for inputs of `input_size`.
        learn_lam: "no", or "layer" or "atom" to learn one lambda for the layer or one per atom. Lambda is then
            softplus(raw_lam), with the parameter `raw_lam` in the state dict, and starts at `lam`, which must be
            above 0. Do not let weight decay act on it.
        prox: takes the place of the proximal operator of lam |z|_1 + mu/2 |z|^2, see `sdnet.kernels.csc_encode`; a
            function at the top level of a module, if the layer is to be pickled.
        input_size: the height and width of the inputs on which the step size is estimated, an int or a pair. None
            is 32. The forward takes inputs of other sizes with the same step size.
        impl: the implementation that computes the codes, see `sdnet.kernels.csc_encode`.
        device: the device of the weight and the state.
        dtype: the floating-point type of the weight. The state stays fp32.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Shape:
        - Input: [N, C, H, W].
        - Output: [N, K, h, w] with h = (H + 2 padding - kernel_size) // stride + 1, and w likewise.

    Attributes:
        coding: the `Coding` in use. Its fields are attributes of the layer too: `layer.n_steps = 50` replaces it.
        weight: the dictionary [K, n_dict C, kh, kw], a parameter.
        stride, padding: pairs. After another one is assigned, call `sdnet.refresh_step_size`.
        step_size: the step size, 0-d, 0.9 / (largest eigenvalue of A'A); a buffer, always fp32.
        power_vector: the unit vector [1, n_dict C, H, W] of the eigenvalue estimate, always fp32. It is saved in the
            state dict, is as large as one input of the layer (600 kB for a 3-channel input of 224 pixels), and can be
            made again by `sdnet.refresh_step_size`.
        lam: lambda, 0-d, [N, 1, 1, 1] or [1, K, 1, 1], fp32 or, in a double layer, fp64. It is not saved in the state
            dict, unless it is learned.
        prox: the proximal operator in place of P, or None.
        keep_residuals: whether a forward keeps the residuals for the backward pass, see `sdnet.kernels.csc_encode`;
            None, at first, for its default.

    Raises:
        ValueError: an argument has a wrong type or value.
        TypeError: there is no such argument.

    Example:
        >>> layer = CSCConv2d(3, 64, kernel_size=3, lam=0.1, n_steps=2)
        >>> layer(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 64, 32, 32])
    """

    coding: Coding

    @takes_coding
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        *,
        lam: float = 0.1,
        adaptive_lam: bool = False,
        learn_lam: LearnLam = "no",
        prox: Prox | None = None,
        input_size: int | Pair | None = None,
        impl: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **coding: Any,
    ) -> None:
        super().__init__()
        refuse_convolution_only(type(self).__name__, coding)
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        self.out_channels = checks.integer("out_channels", out_channels, 1)
        self.kernel_size, self.stride = checks.pair("kernel_size", kernel_size, 1), checks.pair("stride", stride, 1)
        half = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        self.padding = half if padding is None else checks.pair("padding", padding, 0)
        self.coding = coding_of(type(self).__init__, coding)
        self.impl = checks.choice("impl", impl, IMPLEMENTATIONS)
        self.keep_residuals: bool | None = None
        self.prox = prox
        Iteration(prox=prox).check_penalty(self.coding)
        lam = checks.number("lam", lam)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {checks.shown(dtype)}; it must be one of {', '.join(map(str, DTYPES))}.")

        size = checks.pair("input_size", DEFAULT_INPUT_SIZE if input_size is None else input_size, 1)
        out_size = self.codes_size(size)
        if min(out_size) < 1:
            raise ValueError(f"input_size is {list(size)}, too small for atoms of {list(self.kernel_size)}.")
        if checks.flag("adaptive_lam", adaptive_lam):
            pixels, codes = self.in_channels * size[0] * size[1], self.out_channels * out_size[0] * out_size[1]
            lam = lam * pixels / codes
        channels = self.coding.n_dict * self.in_channels
        self._versions: tuple[int, int, int] | None = None
        with persistent_state():
            empty = torch.empty(self.out_channels, channels, *self.kernel_size, device=device, dtype=dtype)
            self.weight = nn.Parameter(empty)
            self.create_state(lam, channels, size, learn_lam)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the atoms (Kaiming uniform, then unit norm), the power vector and the step size.

        lambda and the options stay as they are; a lambda that is learned gets its last assigned value. On the meta
        device nothing can be computed: call this method after `to_empty`, or load a state dict.
        """
        nn.init.kaiming_uniform_(self.weight)
        self.reset_learned_lambda()
        self.reset_power_vector()
        if not self.weight.is_meta:
            self.estimate_first_step_size()

    @torch.no_grad()
    def estimate_first_step_size(self) -> None:
        """Project the atoms and compute the step size from weights that no power vector is known for."""
        step_sizes.project_atoms(self.weight)
        start = step_sizes.krylov_start(self.weight, self.power_vector)
        power_vector, eigenvalue = step_sizes.krylov_estimate(
            self.weight, start, self.stride, self.padding, FIRST_PRODUCTS
        )
        self.power_vector.copy_(power_vector)
        self.step_size.copy_(step_sizes.step_size_of(eigenvalue))

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the codes of x.

        Args:
            x: the input.
            lam: lambda of this call in place of the layer's own: a number, or a tensor that is 0-d, [N], [N, 1, 1, 1],
                [1, K, 1, 1] or [N, K, 1, 1]. Gradients reach it.

        Shape:
            - x: [N, C, H, W].
            - Output: [N, K, h, w].

        Returns:
            The codes, in the dtype of x (autocast's under autocast).

        Raises:
            ValueError: x or lam has a wrong shape, type or device.
        """
        if isinstance(x, Proxy):  # torch.fx traces: this layer is a leaf of the graph
            tracer: Any = x.tracer
            return tracer.create_proxy(
                "call_module", tracer.path_of_module(self), (x,) if lam is None else (x, lam), {}
            )
        self._check_input(x)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_if_stale()
        lam = self.forward_lambda() if lam is None else lam
        options = self.coding, self.stride, self.padding, self.impl, self.keep_residuals
        if self.prox is None:
            codes = encode(x, self.weight, self.step_size, lam, *options)
        else:
            codes = solve(x, self.weight, self.step_size, lam, *options, Iteration(prox=self.prox)).codes
        for recorder in self._recorders:
            recorder.keep(x, codes, lam)
        return codes

    def solve(
        self,
        x: Tensor,
        lam: float | Tensor | None = None,
        *,
        n_steps: int | None = None,
        tolerance: float | None = None,
        z0: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Compute codes of x with another number of steps, a stopping rule, a start or a callback.

        Args:
            x: the input.
            lam: lambda of this call, as in the forward.
            n_steps: the most steps; None is the layer's own number.
            tolerance: see `sdnet.kernels.csc_encode`, as z0 and callback.
            z0: the codes to start from.
            callback: called as callback(step, codes) after each step.

        Returns:
            The codes and the number of steps that were made. Gradients reach x, the weight, lam and z0.

        Raises:
            ValueError: an argument has a wrong type, shape or value.
        """
        self._check_input(x)
        lam = self.forward_lambda() if lam is None else lam
        coding = self.coding if n_steps is None else replace(self.coding, n_steps=n_steps)
        iteration = Iteration(z0, tolerance, callback, self.prox)
        options = coding, self.stride, self.padding, self.impl, self.keep_residuals, iteration
        return solve(x, self.weight, self.step_size, lam, *options)

    def _warn_if_stale(self) -> None:
        """Warn, once in a process, if the weight changed since the last training forward and the step size did not.

        Tensors count their changes, so this neither reads values nor waits for a device.
        """
        weight = self._parameters.get("weight")
        if weight is None or hasattr(weight, "full_tensor") or weight.is_inference():
            return  # computed from other parameters, or sharded: the tensor of this call says nothing
        before, now = self._versions, (id(weight), weight._version, self.step_size._version)
        self._versions = now
        if before is not None and before[0] == now[0] and before[1] != now[1] and before[2] == now[2]:
            warn_once(
                "The weight of a CSC layer changed since the last forward, but its step size did not: call "
                "sdnet.attach(model, optimizer) before training, and sdnet.project(model) after other changes."
            )

    def reconstruct(self, codes: Tensor, size: int | Pair | None = None) -> Tensor:
        """Compute A z, the reconstruction that codes z stand for.

        Args:
            codes: the codes.
            size: height and width of the input, an int or a pair. None is the stride times the size of the codes.

        Shape:
            - codes: [N, K, h, w].
            - Output: [N, n_dict C, H, W].

        Raises:
            ValueError: `codes` has another shape, or no input of `size` has codes of this size.
        """
        check_codes(codes, self.out_channels)
        given = (codes.shape[2], codes.shape[3])
        height, width = given[0] * self.stride[0], given[1] * self.stride[1]
        size = (height, width) if size is None else checks.pair("size", size, 1)
        if self.codes_size(size) != given:
            geometry = zip(given, self.stride, self.padding, self.kernel_size, strict=True)
            least = [(n - 1) * s - 2 * p + k for n, s, p, k in geometry]
            most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
            raise ValueError(f"size is {list(size)}; codes of {list(given)} stand for inputs of {least} to {most}.")
        return reference.synthesis(codes, self.weight.to(codes.dtype), size, self.stride, self.padding)

    def objective(self, x: Tensor, codes: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the objective of each sample, lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2.

        For `data_term="norm"` the last term is |x - A z|. The sums are computed in fp32 or better.

        Args:
            x: the input.
            codes: its codes.
            lam: lambda as the forward takes it; None is the layer's own.

        Shape:
            - x: [N, C, H, W].
            - codes: [N, K, h, w].
            - Output: [N].

        Raises:
            ValueError: `x`, `codes` or `lam` has a wrong shape, or the layer has a `prox`, which gives no penalty.
        """
        self._check_input(x)
        if self.prox is not None:
            raise ValueError("prox is given; the proximal operator does not determine the penalty.")
        check_codes(codes, self.out_channels, x.shape[0])
        with without_autocast(x.device):
            x, codes = at_least_single(x), at_least_single(codes)
            reconstruction = CSCConv2d.reconstruct(self, codes, (x.shape[2], x.shape[3]))
            lam = as_tensor("lam", self.forward_lambda() if lam is None else lam, x, self.out_channels)
            return reference.objective(x, codes, reconstruction, lam, self.coding)

    def _check_input(self, x: Tensor) -> None:
        """Raise a ValueError if x is no batch of inputs of this layer."""
        if isinstance(x, Tensor):
            check_dense("x", x)
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.in_channels:
            unbatched = "; add a batch dimension with x[None]" if getattr(x, "ndim", 0) == 3 else ""
            raise ValueError(f"x is {checks.shown(x)}; it must be a tensor [N, {self.in_channels}, H, W]{unbatched}.")

    def codes_size(self, size: Pair) -> Pair:
        """Return height and width of the codes of an input with height and width `size`."""
        return codes_size(size, self.kernel_size, self.stride, self.padding)

    @property
    def dictionary(self) -> DictionaryState:
        """The atoms, the power vector and the step size, as the functions of `sdnet.kernels.step_sizes` take them."""
        return DictionaryState(self.weight, self.power_vector, self.step_size, self.stride, self.padding)

    def update_dictionary(self, iterations: int = 1) -> None:
        """Project the atoms onto the unit sphere and update power vector and step size, without a host sync.

        Args:
            iterations: how often `sdnet.kernels.step_sizes.estimate_eigenvalue` runs.
        """
        update_dictionaries([self.dictionary], checks.integer("iterations", iterations, 1), [self.impl])

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, {self.described_coding()}"
        )

    def described_coding(self) -> str:
        """Return lambda and the options of the coding, for `repr`."""
        lam = self._exact_lam
        shown = f"of shape {list(lam.shape)}" if isinstance(lam, Tensor) and lam.ndim else f"{float(lam):.4g}"
        if self.learn_lam != "no":
            shown = f"learned per {self.learn_lam} from {shown}"
        return ", ".join([f"lam={shown}", *(f"{name}={value!r}" for name, value in vars(self.coding).items())])

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that a copy or a pickle takes over: not recordings, nor the versions of tensors."""
        return {**super().__getstate__(), "_versions": None}


@cache
def warn_once(text: str) -> None:
    """Give a warning the first time that it is called with this text."""
    warnings.warn(text, stacklevel=6)


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in fp32, or as it is if it has a higher precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _coding_attribute(name: str) -> property:
    """Return a property for a field of the layer's `Coding`: an assignment checks the value and replaces `coding`."""

    def get(layer: CSCConv2d) -> Any:
        return getattr(layer.coding, name)

    def assign(layer: CSCConv2d, value: Any) -> None:
        layer.coding = replace(layer.coding, **{name: value})

    return property(get, assign)


for _name in CODING_FIELDS:
    setattr(CSCConv2d, _name, _coding_attribute(_name))
