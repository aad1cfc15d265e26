"""`CSCLinear`: sparse codes of vectors, in the place of `nn.Linear`."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from sdnet.convolution_arguments import refuse_convolution_only
from sdnet.kernels import checks
from sdnet.kernels.coding import Callback, Prox, coding_of, takes_coding
from sdnet.kernels.csc import Solution
from sdnet.layers import CSCConv2d
from sdnet.state import LearnLam


class CSCLinear(CSCConv2d):
    """Compute sparse codes of vectors, such as features or the tokens of a sequence.

    The codes approximate

        argmin_z lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2,   A z = sum_k z_k a_k,

    for every vector x by itself, by `n_steps` proximal gradient steps from zero. This is a `CSCConv2d` with atoms of
    1x1 pixels: vectors are pixels, and everything that is said there about the step size, `sdnet.attach`, lambda, the
    implementations and the options holds here. The atoms a_k are `weight[k, :, 0, 0]`.

    Args:
        in_features: the length of the input vectors, D.
        out_features: the number of atoms, K.
        lam: the weight of |z|_1, at least 0. A tensor that is given per sample, [N], holds for all tokens of a sample.
        adaptive_lam: multiply lam once by in_features / out_features.
        learn_lam: "no", or "layer" or "atom" to learn one lambda for the layer or one per atom, see `CSCConv2d`.
        prox: takes the place of the proximal operator, see `sdnet.kernels.csc_encode`. It gets vectors as pixels,
            [N, K, T, 1].
        impl: the implementation that computes the codes, see `sdnet.kernels.csc_encode`.
        device: the device of the weight and the state.
        dtype: the floating-point type of the weight. The state stays fp32.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict. For
            `data_term="norm"` the norm is that of a sample, over all its tokens.

    Shape:
        - Input: [N, D], or [N, T, D] for samples of T tokens.
        - Output: [N, K], or [N, T, K].

    Raises:
        ValueError: an argument has a wrong type or value.
        TypeError: there is no such argument.

    Example:
        >>> layer = CSCLinear(64, 256, lam=0.1, n_steps=10)
        >>> layer(torch.randn(8, 50, 64)).shape
        torch.Size([8, 50, 256])
    """

    @takes_coding
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lam: float = 0.1,
        adaptive_lam: bool = False,
        learn_lam: LearnLam = "no",
        prox: Prox | None = None,
        impl: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **coding: Any,
    ) -> None:
        refuse_convolution_only("CSCLinear", coding)
        super().__init__(
            checks.integer("in_features", in_features, 1),
            checks.integer("out_features", out_features, 1),
            kernel_size=1,
            lam=lam,
            adaptive_lam=adaptive_lam,
            learn_lam=learn_lam,
            prox=prox,
            input_size=1,
            impl=impl,
            device=device,
            dtype=dtype,
            **vars(coding_of(CSCLinear.__init__, coding)),
        )

    @property
    def in_features(self) -> int:
        """The length of the input vectors."""
        return self.in_channels

    @property
    def out_features(self) -> int:
        """The number of atoms."""
        return self.out_channels

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the codes of x.

        Args:
            x: the vectors.
            lam: lambda of this call in place of the layer's own, see `CSCConv2d.forward`.

        Shape:
            - x: [N, D] or [N, T, D].
            - Output: [N, K] or [N, T, K].

        Returns:
            The codes, in the dtype of x (autocast's under autocast).

        Raises:
            ValueError: x or lam has a wrong shape, type or device.
        """
        if isinstance(x, Proxy):
            return super().forward(x, lam)
        return vectors(super().forward(self._pixels(x), lam), x.ndim)

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
            x: the vectors, [N, D] or [N, T, D].
            lam: lambda of this call, as in the forward.
            n_steps: see `CSCConv2d.solve`, as tolerance.
            tolerance: see `CSCConv2d.solve`. The test is made for every sample, over all its tokens.
            z0: the codes to start from, [N, K] or [N, T, K].
            callback: called as callback(step, codes) after each step, with codes of the shape of z0.
        """
        given, start = self._pixels(x), z0
        call = (lambda step, codes: callback(step, vectors(codes, x.ndim))) if callable(callback) else callback
        if isinstance(z0, Tensor):
            if z0.shape != (*x.shape[:-1], self.out_channels):
                raise ValueError(
                    f"z0 has shape {list(z0.shape)}; it must be that of the codes, "
                    f"{[*x.shape[:-1], self.out_channels]}."
                )
            start = pixels(z0)
        options: dict[str, Any] = {"n_steps": n_steps, "tolerance": tolerance, "z0": start, "callback": call}
        found = super().solve(given, lam, **options)
        return Solution(vectors(found.codes, x.ndim), found.n_steps)

    def reconstruct(self, codes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute A z, the reconstruction that codes z stand for.

        Args:
            codes: the codes.

        Shape:
            - codes: [N, K] or [N, T, K].
            - Output: [N, n_dict D] or [N, T, n_dict D].

        Raises:
            ValueError: `codes` has another shape.
        """
        if not isinstance(codes, Tensor) or codes.ndim not in (2, 3) or codes.shape[-1] != self.out_channels:
            wanted = f"[N, {self.out_channels}] or [N, T, {self.out_channels}]"
            raise ValueError(f"codes is {checks.shown(codes)}; it must be a tensor {wanted}.")
        return vectors(super().reconstruct(pixels(codes)), codes.ndim)

    def objective(self, x: Tensor, codes: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the objective of each sample, the sum over its tokens, see `CSCConv2d.objective`.

        Args:
            x: the vectors.
            codes: their codes.
            lam: lambda as the forward takes it; None is the layer's own.

        Shape:
            - x: [N, D] or [N, T, D].
            - codes: [N, K] or [N, T, K].
            - Output: [N].

        Raises:
            ValueError: `x`, `codes` or `lam` has a wrong shape.
        """
        vectors_as_pixels, wanted = self._pixels(x), (*x.shape[:-1], self.out_channels)
        if not isinstance(codes, Tensor) or codes.shape != wanted:
            raise ValueError(
                f"codes is {checks.shown(codes)}; for x of shape {list(x.shape)} it must be a tensor {list(wanted)}."
            )
        return super().objective(vectors_as_pixels, pixels(codes), lam)

    def _pixels(self, x: Tensor) -> Tensor:
        """Return vectors as pixels, [N, D, T, 1].

        Raises:
            ValueError: x is no batch of inputs of this layer.
        """
        if not isinstance(x, Tensor) or x.ndim not in (2, 3) or x.shape[-1] != self.in_channels:
            wanted = f"[N, {self.in_channels}] or [N, T, {self.in_channels}]"
            raise ValueError(f"x is {checks.shown(x)}; it must be a tensor {wanted}.")
        return pixels(x)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.described_coding()}"


def pixels(x: Tensor) -> Tensor:
    """Return vectors [N, D] or [N, T, D] as [N, D, T, 1], without a copy."""
    return (x.unsqueeze(1) if x.ndim == 2 else x).transpose(1, 2).unsqueeze(3)


def vectors(x: Tensor, ndim: int) -> Tensor:
    """Return pixels [N, D, T, 1] as vectors [N, T, D], or [N, D] for two dimensions."""
    found = x.squeeze(3).transpose(1, 2)
    return found.squeeze(1) if ndim == 2 else found
