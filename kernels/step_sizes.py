"""Atoms of unit norm and the step size, 0.9 / (largest eigenvalue of A'A).

All products run in the input's space: M = AA' has the same largest eigenvalue as A'A, its vectors are images
[1, C, H, W] of the size that the layer sees, and they are no larger than the codes.

`update_dictionary` runs after every optimizer step. It scales the atoms to unit norm and estimates the largest
eigenvalue from the power vector of the last step:

1. First directions. When weights move fast, the largest eigenvalue often jumps to a new mode that is constant over the
   image, and that the last power vector u hardly contains. With S[k, c] = sum of the taps of W[k, c], six power
   iterations on S'S give the channel pattern d of the strongest constant image. They start from the mean of u over the
   pixels, scaled to unit norm, plus the equal pattern. q_0 is u, and q_1 the constant image of d, made orthogonal to u.
2. Further directions. Of the vectors s_0 q_0 + s_1 q_1, the eigenvector s of the 2x2 matrix q_i'M q_j gives the best;
   x is this vector with |s_0| and |s_1| raised to at least 0.1. q_2 is M x and q_3 is M q_2, each made orthogonal to
   the directions before it and of unit norm. Each of the four directions costs one product with M.
3. Rayleigh-Ritz. The eigenvector s of H = Q'MQ, 4x4, gives the new power vector u = Q s, its image M u = (MQ) s, the
   Rayleigh quotient theta = u'M u and the residual r = |M u - theta u|, without another product.
4. Estimate. theta is at most the largest eigenvalue L, and falls short of it while weights move. On recorded training
   the estimate theta + 0.75 r^2 / (r + 0.03 theta) covers what is missing. On constant weights theta never falls,
   because Q contains the last power vector, and the estimate equals L once u has converged. The step size is
   0.9 / estimate.

`python -m sdnet.bench margins` measures step size x L after each optimizer step. Nothing waits for the device. Power
vector and step size are replaced by finite values only: they outlast an optimizer step that makes the weights NaN, and
serve again once the weights have been restored. All layers of a network on a GPU share 25 Triton launches
(`triton_path.step_sizes`); elsewhere PyTorch's operators run layer by layer.

`largest_eigenvalue` converges, and waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sdnet.kernels.autocast import outside_autocast
from sdnet.kernels.reference import Pair, analysis, synthesis

SAFETY = 0.9
"""The step size times the largest eigenvalue: the official margin over an estimate that comes from below."""

SEED = 0

LARGEST_WEIGHT = 1e15
"""The largest weight for which fp32 holds the largest eigenvalue with certainty."""

FLOOR = 1e-12
"""The least eigenvalue that a step size is computed from, so that a dictionary of zeros has a finite one."""

ATOM_FLOOR = 1e-12
"""The least norm that an atom is divided by."""

DIRECTIONS = 4
"""Directions of one estimate, each of which costs a product with M."""

LEAST_SHARE = 0.1
"""The least weight of each of the first two directions in the vector that the third one is made from."""

PATTERN_ROUNDS = 6
"""Power iterations for the channel pattern of the constant image."""

RANDOM_SHARE = 0.1
"""The weight of the seeded random vector in `krylov_start`."""

RESIDUAL_SHARE, RESIDUAL_KNEE = 0.75, 0.03
"""The estimate adds this share of a large residual to the eigenvalue, and less below this share of the eigenvalue."""

BREAKDOWN = 1e-6
"""A new direction shorter than this share of its product is rounding error, and left out of the basis."""

SQUARINGS = 12
"""Squarings of a small matrix, which then stands at the power 4096."""

TINY = 1e-30
"""The least number that a norm or a trace is divided by."""


class DictionaryState(NamedTuple):
    """The state of a layer: weight [K, C, kh, kw], power vector [1, C, H, W] and step size, 0-d, in fp32."""

    weight: Tensor
    power_vector: Tensor
    step_size: Tensor
    stride: Pair
    padding: Pair


def initial_power_vector(shape: tuple[int, ...]) -> Tensor:
    """Return a random unit vector, fp32 on the CPU, that is the same in every process whatever its random state."""
    generator = torch.Generator().manual_seed(SEED)
    return normalize(torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32))


def normalize(vector: Tensor) -> Tensor:
    """Return vector / |vector|, and zeros for zeros."""
    return vector / torch.linalg.vector_norm(vector).clamp_min(TINY)


def sign(numbers: Tensor) -> Tensor:
    """Return -1 for negative numbers and 1 for others."""
    return torch.where(numbers < 0, -1, 1).to(numbers.dtype)


def gram(weight: Tensor, image: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Compute M u = A A'u.

    Shape:
        weight: [K, C, kh, kw], used in the image's dtype.
        image: [1, C, H, W].
        return value: [1, C, H, W].
    """
    weight = weight.detach().to(image.dtype)
    size = (image.shape[2], image.shape[3])
    return synthesis(analysis(image, weight, stride, padding), weight, size, stride, padding)


def first_directions(weight: Tensor, power_vector: Tensor) -> Tensor:
    """Compute q_0 and q_1, step 1 at the head of this module.

    A power vector that is not finite, or zero, counts as absent: q_0 is then zero, and only q_1 remains.

    Shape:
        weight: [K, C, kh, kw].
        power_vector: [1, C, H, W].
        return value: [2, C H W].
    """
    _, channels, height, width = power_vector.shape
    vector = power_vector.contiguous()
    vector = normalize(vector.where(torch.linalg.vector_norm(vector).isfinite(), 0))
    sums = weight.detach().to(vector.dtype).sum((2, 3))  # [K, C]
    mean = vector.mean((0, 2, 3))  # [C]
    pattern = normalize(mean) + sign(mean.sum()) / channels**0.5
    for _ in range(PATTERN_ROUNDS):
        pattern = normalize(sums.mT @ (sums @ pattern))
    constant = (pattern / (height * width) ** 0.5).view(1, -1, 1, 1).expand_as(vector)
    return append_direction(vector.view(1, -1), constant.flatten())


def append_direction(basis: Tensor, image: Tensor) -> Tensor:
    """Append to orthonormal rows [n, p] what they leave of an image [p], with unit norm; zeros if nothing is left."""
    rest = image - (basis @ image) @ basis
    rest = rest - (basis @ rest) @ basis  # removes what rounding leaves of the first pass
    kept = torch.linalg.vector_norm(rest) > BREAKDOWN * torch.linalg.vector_norm(image)
    return torch.cat([basis, torch.where(kept, normalize(rest), 0).view(1, -1)])


def overlaps(basis: Tensor, images: list[Tensor]) -> Tensor:
    """Compute the matrix [n, m] of the inner products of n directions [n, p] with m images [p].

    A sum in pairs: the running sums of a matrix product have several times the rounding error.
    """
    return torch.stack([(basis * image).sum(1) for image in images], 1)


def top_eigenvector(matrix: Tensor) -> Tensor:
    """Compute the unit eigenvector of the largest eigenvalue of a small positive semidefinite matrix [n, n].

    Only its upper triangle is used. Squaring leaves the projection onto the eigenvector, whose longest column is taken.
    Unlike `torch.linalg.eigh` this neither waits for the device nor raises for NaN.
    """
    power = matrix.triu() + matrix.triu(1).mT
    for _ in range(SQUARINGS):
        power = power / power.diagonal().sum().clamp_min(TINY)
        power = power @ power
    longest = power.diagonal().argmax().view(1)
    return normalize(power.index_select(1, longest).flatten())


@outside_autocast
def estimate_eigenvalue(
    weight: Tensor, power_vector: Tensor, stride: Pair, padding: Pair, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """Estimate the largest eigenvalue of A'A with four products per iteration and without a host sync.

    The steps are those at the head of this module. The result has the power vector's dtype.

    Args:
        weight: the dictionary.
        power_vector: the vector of the last estimate, or any other to start from.
        stride: the stride of the layer's convolution.
        padding: its padding.
        iterations: how many estimates, each from the vector of the one before.

    Shape:
        weight: [K, C, kh, kw].
        power_vector: [1, C, H, W].

    Returns:
        The new power vector, [1, C, H, W] of unit norm, and the estimate, 0-d. A dictionary of zeros gives the power
        vector back and 0; one with NaN gives it back and NaN.
    """
    shape, eigenvalue = power_vector.shape, power_vector.new_zeros(())
    for _ in range(iterations):
        basis = first_directions(weight, power_vector)
        images = [gram(weight, direction.view(shape), stride, padding).flatten() for direction in basis]
        shares = top_eigenvector(overlaps(basis, images))
        image = (sign(shares) * shares.abs().clamp_min(LEAST_SHARE)) @ torch.stack(images)
        while len(basis) < DIRECTIONS:
            basis = append_direction(basis, image)
            image = gram(weight, basis[-1].view(shape), stride, padding).flatten()
            images.append(image)
        mixture = top_eigenvector(overlaps(basis, images))
        ritz, image = mixture @ basis, mixture @ torch.stack(images)
        theta = ritz @ image
        residual = torch.linalg.vector_norm(image - theta * ritz)
        missing = RESIDUAL_SHARE * residual.square() / (residual + RESIDUAL_KNEE * theta).clamp_min(TINY)
        eigenvalue = theta + missing
        sound = eigenvalue.isfinite() & (eigenvalue > FLOOR)
        power_vector = torch.where(sound, ritz.view(shape), power_vector)
    return power_vector, eigenvalue


@outside_autocast
def largest_eigenvalue(
    weight: Tensor,
    power_vector: Tensor,
    stride: Pair,
    padding: Pair,
    tolerance: float = 1e-5,
    subspace: int = 16,
    max_restarts: int = 100,
) -> tuple[Tensor, Tensor]:
    """Converge to the largest eigenvalue of A'A, 0-d, and its unit vector [1, C, H, W], from a vector to start from.

    `krylov_estimate`, restarted from its vector until a restart raises the eigenvalue by less than `tolerance` of it:
    some ten times fewer products than power iteration alone needs. Waits for the device once in a restart.

    Raises:
        ValueError: the dictionary holds NaN, infinite or very large values.
    """
    if not weight.isfinite().all():
        raise ValueError("weight holds NaN or infinite values; the largest eigenvalue needs finite ones.")
    if (largest := float(weight.abs().max())) > LARGEST_WEIGHT:
        raise ValueError(f"weight holds values of up to {largest:.6g}; they must be at most {LARGEST_WEIGHT:.6g}.")
    power_vector, eigenvalue = krylov_estimate(weight, krylov_start(weight, power_vector), stride, padding, subspace)
    for _ in range(max_restarts - 1):
        previous = float(eigenvalue)
        power_vector, eigenvalue = krylov_estimate(weight, power_vector, stride, padding, subspace)
        if float(eigenvalue) - previous <= tolerance * float(eigenvalue):
            break
    return power_vector, eigenvalue


@outside_autocast
def krylov_start(weight: Tensor, power_vector: Tensor) -> Tensor:
    """Return the power vector [1, C, H, W] plus a constant image and a share of the seeded random vector.

    With them, a power vector which has converged on other weights does not hide the largest eigenvalue.
    """
    random = initial_power_vector(tuple(power_vector.shape)).to(power_vector)
    return first_directions(weight, power_vector).sum(0).view_as(power_vector) + RANDOM_SHARE * random


@outside_autocast
def krylov_estimate(weight: Tensor, start: Tensor, stride: Pair, padding: Pair, products: int) -> tuple[Tensor, Tensor]:
    """Estimate the largest eigenvalue of A'A from below by Rayleigh-Ritz on the Krylov space of `start`.

    Returns:
        The unit vector of the estimate, of the shape of `start`, [1, C, H, W], and the estimate, 0-d.
    """
    image, basis, images = start.flatten(), start.new_zeros(0, start.numel()), []
    for _ in range(min(products, start.numel())):
        basis = append_direction(basis, image)
        image = gram(weight, basis[-1].view(start.shape), stride, padding).flatten()
        images.append(image)
    projected = basis @ torch.stack(images, 1)
    eigenvalues, mixtures = torch.linalg.eigh((projected + projected.mT) / 2)
    return normalize(mixtures[:, -1] @ basis).view(start.shape), eigenvalues[-1]


def step_size_of(eigenvalue: Tensor) -> Tensor:
    """Return 0.9 / eigenvalue."""
    return SAFETY / eigenvalue.clamp_min(FLOOR)


@torch.no_grad()
def project_atoms(weight: Tensor) -> None:
    """Scale every atom weight[k] to unit norm in place; an atom of zeros stays."""
    dtype = torch.promote_types(weight.dtype, torch.float32)  # the norm of an atom can be too large for fp16
    norms = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True, dtype=dtype)
    weight.div_(norms.clamp_min(ATOM_FLOOR))


@torch.no_grad()
def update_dictionary(dictionary: DictionaryState, iterations: int = 1) -> None:
    """Project the atoms of a dictionary and re-estimate its step size in place, without a host sync."""
    weight, power_vector, step_size, stride, padding = dictionary
    project_atoms(weight)
    estimated, eigenvalue = estimate_eigenvalue(weight, power_vector, stride, padding, iterations)
    power_vector.copy_(estimated)
    step_size.copy_(torch.where(eigenvalue.isfinite(), step_size_of(eigenvalue), step_size))
