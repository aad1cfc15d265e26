"""Which Triton path a layer runs on, and with which tiles: what the caller asks for, or a rule.

There are three paths, and all provide the four products of the loop (`Path`):

  * "fused": each convolution with all that surrounds it in one kernel (`fused.path`).
  * "padded": the same kernels on images of few channels, filled up with channels of zeros (`padding`).
  * "cudnn": cuDNN's convolutions with pointwise kernels between them (`cudnn`).

`choose_path` depends on its arguments alone. `requested_path` reads the environment, once per call of the operator.
Under `impl="auto"` the caller is `sdnet.kernels.qualify.job`, which asks for what this machine has shown to be right
and faster. The rule serves `impl="triton"`, which needs no verdict.
"""

import json
import os
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from sdnet.kernels.triton_path.tiles import FEW, Form, Shape, Tile, Tiles, by_rule

PathName = Literal["fused", "padded", "cudnn"]

ENVIRONMENT_VARIABLE = "SDNET_TRITON_PATH"

AUTO = "auto"
"""The request that leaves the choice to the rule."""

PLAIN = "plain"
"""The request for the cudnn path without a Triton kernel that multiplies: the dictionary's gradient is cuDNN's too."""

FUSED_CHANNELS = 128
"""The most channels for which the fused path without descriptors is the rule."""


class Path(Protocol):
    """What a path provides: the products of one step and of its gradient, for one layer and one problem.

    s is the step size, damping = 1 / (1 + s mu), gamma = s damping, and c one number per sample (None stands for 1).
    Tensors are images [N, C, H, W] and codes [N, K, h, w] in the layer's memory format.
    """

    def proximal_step(
        self,
        residual: Tensor,
        codes: Tensor | None = None,
        previous: Tensor | None = None,
        beta: float = 0.0,
        scale: Tensor | None = None,
        next_beta: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return z' = shrink(damping y + gamma c A'r, gamma lam) with y = z + beta (z - z_prev), and y' or None.

        Args:
            residual: r; x itself in the first step.
            codes: z; None stands for zero.
            previous: z_prev, read only if beta is not 0.
            beta: the extrapolation of this step.
            scale: c.
            next_beta: beta' of y' = z' + beta' (z' - z); 0 for no y'.
        """
        ...

    def residual(self, x: Tensor, point: Tensor) -> Tensor:
        """Return r = x - A p, [N, n_dict C, H, W] for x [N, C, H, W] and the codes p."""
        ...

    def residual_gradient(self, m: Tensor, scale: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """Return dr = gamma c A m + add, the gradient for the residual from the masked gradient m of the codes."""
        ...

    def codes_gradient(
        self,
        d_residual: Tensor,
        m: Tensor,
        codes: Tensor,
        beta: float = 0.0,
        after: Tensor | None = None,
        next_beta: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return m' = [z != 0] g, the masked gradient for the codes z before a step, and `after` for the next call.

        For FISTA, d_y = damping m - A'dr and g = (1 + beta) d_y - beta' d_y'; the second result is d_y where beta is
        not 0. For the other solvers, d_y = damping m and g = (1 + beta) d_y - A'dr - beta' d_y'; it is m.

        Args:
            d_residual: dr.
            m: the masked gradient of the codes after the step.
            codes: z.
            beta: the extrapolation of this step.
            after: the second result of the call before; None where beta' is 0.
            next_beta: beta'.
        """
        ...


class Entry(NamedTuple):
    """What a verdict takes, or what is asked for: a path, and the tiles of the fused kernels and the correlation."""

    path: PathName
    tiles: Tiles

    def fitted(self, shape: Shape) -> Tiles:
        """Return the tiles, with the rules' in the place of those that a layer cannot run with on this path."""
        return self.tiles.fitted(shape.padded if self.path == "padded" else shape)

    def encoded(self) -> str:
        """Return the entry as JSON, which `choose_path` takes."""
        return json.dumps([self.path, *(tile._asdict() for tile in self.tiles)])

    @staticmethod
    def decoded(text: str) -> "Entry":
        """Return the entry that `encoded` described.

        Raises:
            ValueError: `text` describes no entry.
        """
        try:
            path, *tiles = json.loads(text)
            entry = Entry(path, Tiles(*(Tile(**tile) for tile in tiles)))
            integers = [value for tile in entry.tiles for value in tile[1:-1]]
            if path not in get_args(PathName) or any(type(value) is not int or value < 1 for value in integers):
                raise ValueError("a wrong path or number")
            if any(tile.form not in get_args(Form) or type(tile.swapped) is not bool for tile in entry.tiles):
                raise ValueError("a wrong form")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{text[:100]!r} describes no path with its tiles: {error}") from error
        return entry


class ChosenPath(NamedTuple):
    """A path, its tiles, and the reason for it in a clause.

    Attributes:
        name: the path.
        tiles: the tiles of its kernels.
        reason: why, a clause.
        correlation: whether the Triton kernel makes the gradient of the dictionary; cuDNN does otherwise.
    """

    name: PathName
    tiles: Tiles
    reason: str
    correlation: bool = True

    def __str__(self) -> str:
        if self.name == "cudnn":
            return self.reason
        return f"{self.reason}; A' in tiles of {self.tiles.analysis}, A of {self.tiles.synthesis}"


def requested_path() -> str:
    """Return the path that the environment variable SDNET_TRITON_PATH asks for, "auto" without it.

    Raises:
        ValueError: the variable names no path.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE, AUTO)
    if asked not in (AUTO, *get_args(PathName)):
        raise ValueError(
            f"The environment variable {ENVIRONMENT_VARIABLE} is {asked!r}; it must be fused, padded or cudnn."
        )
    return asked


@lru_cache(maxsize=4096)
def choose_path(shape: Shape, asked: str = AUTO) -> ChosenPath:
    """Return the path of a layer: what is asked for, else a rule.

    No GPU has confirmed the rule. Descriptors leave the products with the padding out, which makes up for cuDNN's
    better products where there are few pixels, as the saved passes over memory do where there are many. Without them a
    fused step saves more than it loses up to 128 channels, and with a few image channels, where cuDNN is weak; beyond,
    and for fp32 without tf32, cuDNN's products win. In 16 bits the taps of contiguous NCHW images start at odd
    addresses, which neither wide nor asynchronous loads can take.

    Args:
        shape: the layer.
        asked: "auto", "plain", the name of a path, or an encoded `Entry`, which gives the tiles too. Tiles that the
            layer cannot run with are replaced by the rule's.
    """
    if asked.startswith("["):
        given = Entry.decoded(asked)
        return ChosenPath(given.path, given.fitted(shape), f"the caller asks for the {given.path} path")
    if asked == PLAIN:
        return ChosenPath("cudnn", by_rule(shape), "the caller asks for cuDNN's convolutions", correlation=False)
    if asked == "fused" or asked == "padded" or asked == "cudnn":
        tiles = by_rule(shape.padded if asked == "padded" else shape)
        return ChosenPath(asked, tiles, f"the caller asks for the {asked} path")
    return ChosenPath(*_path_by_rule(shape))


def _path_by_rule(shape: Shape) -> tuple[PathName, Tiles, str]:
    tiles = by_rule(shape)
    if shape.itemsize == 4 and shape.precision == "ieee":
        return "cudnn", tiles, "the cudnn path, by rule, for fp32 without tf32"
    if shape.channels <= FEW:
        return "fused", tiles, f"the fused path, by rule, for up to {FEW} image channels"
    if shape.described_images:
        return "fused", tiles, "the fused path, by rule, for 16-bit channels_last tensors in large batches"
    if not shape.channels_last:
        return "cudnn", tiles, "the cudnn path, by rule, for tensors that are not channels_last"
    if max(shape.channels, shape.atoms) > FUSED_CHANNELS:
        return "cudnn", tiles, f"the cudnn path, by rule, for more than {FUSED_CHANNELS} channels"
    return "fused", tiles, f"the fused path, by rule, for up to {FUSED_CHANNELS} channels"
