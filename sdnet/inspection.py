"""Properties of a dictionary, and the distance of its codes from the minimum. `sdnet.bench look` draws them."""

import copy
from dataclasses import replace
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.kernels import checks
from sdnet.layers import CSCConv2d
from sdnet.state import persistent_state
from sdnet.stored_weight import effective_weight

__all__ = ["ObjectiveCurve", "atom_grid", "mutual_coherence", "objective_curve", "spectrum"]

OPTIMUM_TOLERANCE = 1e-7
"""The relative change of the codes, in fp64, at which the minimum of the objective counts as reached."""

NORM_FLOOR = 1e-12
"""The least norm that an atom is divided by."""


@torch.no_grad()
def atom_grid(weight: Tensor, columns: int | None = None) -> Tensor:
    """Return the atoms of a dictionary side by side, as one picture.

    Each atom is scaled by its own largest absolute value, so that 0 becomes mid-grey. With 3 channels atoms are shown
    in colour, otherwise the channel with the largest norm is shown in grey. A gap of one white pixel separates them.

    Args:
        weight: the dictionary.
        columns: how many atoms stand side by side; None for an almost square picture.

    Shape:
        - weight: [K, C, kh, kw].
        - Output: [3, H, W], values in [0, 1].

    Raises:
        ValueError: an argument has a wrong type, shape or value.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight is {checks.shown(weight)}; it must be a tensor [K, C, kh, kw] with at least one atom."
        )
    atoms = weight.detach().float().cpu()
    if atoms.shape[1] != 3:
        strongest = atoms.flatten(2).norm(dim=2).argmax(1)
        atoms = atoms[torch.arange(len(atoms)), strongest].unsqueeze(1).expand(-1, 3, -1, -1)
    atoms = 0.5 + 0.5 * atoms / atoms.abs().amax((1, 2, 3), keepdim=True).clamp_min(NORM_FLOOR)
    columns = ceil(len(atoms) ** 0.5) if columns is None else checks.integer("columns", columns, 1)
    rows = ceil(len(atoms) / columns)
    atoms = F.pad(atoms, (1, 0, 1, 0), value=1.0)
    atoms = torch.cat([atoms, atoms.new_ones(rows * columns - len(atoms), *atoms.shape[1:])])
    _, channels, height, width = atoms.shape
    grid = atoms.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return F.pad(grid.reshape(channels, rows * height, columns * width), (0, 1, 0, 1), value=1.0)


@torch.no_grad()
def spectrum(layer: CSCConv2d) -> Tensor:
    """Return the singular values of the atoms as rows of a matrix [K, n_dict C kh kw], the largest first.

    A flat spectrum means that the atoms cover all directions equally; for orthonormal atoms all values are 1.

    Args:
        layer: the layer.

    Shape:
        - Output: [min(K, n_dict C kh kw)].

    Raises:
        ValueError: `layer` is no CSC layer.
    """
    return torch.linalg.svdvals(effective_weight(_checked(layer)).flatten(1).double())


@torch.no_grad()
def mutual_coherence(layer: CSCConv2d, shifts: bool = True) -> float:
    """Return the largest |<a, b>| of two different atoms of a dictionary, which have unit norm.

    Args:
        layer: the layer.
        shifts: whether atoms at different places count too: all shifts by multiples of the stride with which two atoms
            overlap, an atom and its own shifts included. This is the coherence of the convolutional dictionary. Without
            shifts it is that of the matrix of `spectrum`.

    Returns:
        A number in [0, 1]. Near 0, sparse codes are unique and stable; at 1, two atoms are the same.

    Raises:
        ValueError: `layer` is no CSC layer, or `shifts` is no bool.
    """
    weight, shifts = effective_weight(_checked(layer)).float(), checks.flag("shifts", shifts)
    weight = weight / weight.flatten(1).norm(dim=1).clamp_min(NORM_FLOOR).view(-1, 1, 1, 1)
    reach = [(k - 1) // s * s if shifts else 0 for k, s in zip(layer.kernel_size, layer.stride, strict=True)]
    products = F.conv2d(weight, weight, stride=layer.stride, padding=(reach[0], reach[1])).abs()
    if products.shape[2:] != (1, 1) or not shifts:
        centre = [r // s for r, s in zip(reach, layer.stride, strict=True)]
    else:
        centre = [0, 0]
    products[:, :, centre[0], centre[1]].fill_diagonal_(0)  # an atom with itself at the same place
    return float(products.max().clamp(max=1))


class ObjectiveCurve(NamedTuple):
    """The objective of one input along the iterations of a layer, and its minimum; sums over the batch.

    Attributes:
        values: after 1, 2, ... steps, [n_steps] in fp64.
        optimum: the minimum.
        optimum_steps: how many steps were made to find it.
    """

    values: Tensor
    optimum: float
    optimum_steps: int

    @property
    def gap(self) -> Tensor:
        """(F(z_k) - F*) / F*, the relative distance from the minimum, [n_steps]."""
        return (self.values - self.optimum) / self.optimum


@persistent_state()
def objective_curve(layer: CSCConv2d, x: Tensor, n_steps: int = 50, optimum_steps: int = 2000) -> ObjectiveCurve:
    """Return the objective of a layer over FISTA iterations, and its minimum, computed in fp64.

    Args:
        layer: the layer; its lambda and its other options count, its `n_steps` does not.
        x: an input of the layer.
        n_steps: the number of iterations.
        optimum_steps: the most iterations for the minimum.

    Shape:
        - x: [N, C, H, W].

    Raises:
        ValueError: an argument has a wrong type, shape or value, or the layer has a `prox`, whose penalty is not known.

    Example:
        >>> layer = sdnet.CSCConv2d(3, 16, 5)
        >>> curve = objective_curve(layer, torch.randn(2, 3, 32, 32))
        >>> curve.gap[1]  # relative distance from the minimum after two steps
    """
    n_steps, optimum_steps = checks.integer("n_steps", n_steps, 1), checks.integer("optimum_steps", optimum_steps, 1)
    exact = copy.deepcopy(_checked(layer)).double().requires_grad_(False)
    exact.coding, exact.impl = replace(exact.coding, solver="fista"), "auto"
    x = x.double() if isinstance(x, Tensor) else x
    values: list[Tensor] = []

    def note(step: int, codes: Tensor) -> None:
        if step <= n_steps:
            values.append(exact.objective(x, codes).sum())

    most = max(n_steps, optimum_steps)
    found = exact.solve(x, n_steps=most, tolerance=OPTIMUM_TOLERANCE, callback=note)
    optimum = exact.objective(x, found.codes).sum()
    values += [optimum] * (n_steps - len(values))  # the iteration stopped earlier
    along = torch.stack(values).cpu()
    return ObjectiveCurve(along, min(float(optimum), float(along.min())), found.n_steps)


def _checked(layer: CSCConv2d) -> CSCConv2d:
    """Return a CSC layer; raise a ValueError if it is none, such as a whole model."""
    if not isinstance(layer, CSCConv2d):
        raise ValueError(f"layer is {checks.shown(layer)}; it must be a CSC layer, such as model.stem.conv.")
    return layer
