r"""
Learn a dictionary on one photograph, and denoise it by lambda
==============================================================

Sparse coding approximates every patch of a photograph by few atoms of a dictionary. Few atoms cannot approximate noise,
so the reconstruction from the codes is less noisy than the photograph, and lambda determines how much is removed.

This example learns a dictionary on the patches of one noisy photograph with :class:`sdnet.CSCLinear`, and does the same
with scikit-learn. Both minimise

::

    min_{A, z}  sum_i  λ |z_i|_1 + 1/2 |x_i − A z_i|²

over codes and atoms, where atoms have unit norm, so their results can be compared.
"""

# %%
# A noisy photograph, as overlapping patches
# ------------------------------------------
# A patch is a vector of 36 pixels. Its mean is subtracted, and added again after the reconstruction.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from skimage import color, data
from sklearn.decomposition import MiniBatchDictionaryLearning, sparse_encode

import sdnet
from sdnet.inspection import atom_grid

SIDE, ATOMS, NOISE, LAM = 6, 72, 0.1, 0.15

torch.manual_seed(0)
photograph = torch.from_numpy(color.rgb2gray(data.chelsea())).float()[90:154, 150:214]
noisy = photograph + NOISE * torch.randn(photograph.shape)


def patches_of(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all patches [N, 36] without their means, and the means [N, 1]."""
    patches = F.unfold(picture[None, None], SIDE, stride=2)[0].T
    means = patches.mean(1, keepdim=True)
    return patches - means, means


def picture_of(patches: torch.Tensor) -> torch.Tensor:
    """Return the picture whose pixels are means over the patches [N, 36] that cover them."""
    size = (photograph.shape[0], photograph.shape[1])
    added = F.fold(patches.T[None], size, SIDE, stride=2)
    return (added / F.fold(torch.ones_like(patches.T[None]), size, SIDE, stride=2))[0, 0]


def psnr(picture: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio against the photograph without noise, in dB."""
    return float(-10 * (picture - photograph).square().mean().log10())


x, means = patches_of(noisy)

# %%
# Learn with SDNet
# ----------------
# The codes are computed with the present dictionary, by FISTA with a stopping rule. Then the optimizer moves the atoms
# along the gradient of the objective for these codes, and ``sdnet.attach`` projects them to unit norm and keeps the
# step size safe. The dictionary starts from patches.

layer = sdnet.CSCLinear(SIDE**2, ATOMS, lam=LAM, nonnegative=False)
with torch.no_grad():
    layer.weight.copy_(x[torch.randperm(len(x))[:ATOMS]].view_as(layer.weight))
sdnet.project(layer)

optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
sdnet.attach(layer, optimizer)
for _ in range(100):
    batch = x[torch.randint(len(x), (256,))]
    codes = layer.solve(batch, n_steps=50, tolerance=1e-2).codes.detach()
    optimizer.zero_grad()
    layer.objective(batch, codes).mean().backward()
    optimizer.step()
    schedule.step()
sdnet.refresh_step_size(layer)
atoms = layer.weight.detach().flatten(1)

# %%
# Learn with scikit-learn
# -----------------------
# The same problem with the same lambda, which is called alpha there.

learner = MiniBatchDictionaryLearning(ATOMS, alpha=LAM, batch_size=256, max_iter=10, random_state=0)  # pyright: ignore[reportArgumentType]
sklearn_atoms = torch.from_numpy(learner.fit(x.double().numpy()).components_)
sklearn_atoms = F.normalize(sklearn_atoms, dim=1)

# %%
# Compare the two
# ---------------
# With the same dictionary, the codes of both are equal.

codes = layer.solve(x, n_steps=1000, tolerance=1e-5).codes.detach()
expected = torch.from_numpy(sparse_encode(x.double().numpy(), atoms.double().numpy(), algorithm="lasso_cd", alpha=LAM))
difference = float((codes - expected).abs().max())
print(f"largest difference of codes: {difference:.1e}; largest code {float(codes.abs().max()):.2f}")


def objective(dictionary: torch.Tensor) -> float:
    """Return the mean objective of the patches with codes by scikit-learn."""
    found = sparse_encode(x.double().numpy(), dictionary.double().numpy(), algorithm="lasso_cd", alpha=LAM)
    z = torch.from_numpy(found)
    return float((LAM * z.abs().sum(1) + (x - z @ dictionary.double()).square().sum(1) / 2).mean())


ours, theirs = objective(atoms), objective(sklearn_atoms)
print(f"mean objective: SDNet {ours:.4f}, scikit-learn {theirs:.4f}")

figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for each, dictionary, title in zip(axes, (atoms, sklearn_atoms), ("SDNet", "scikit-learn"), strict=True):
    grid = atom_grid(dictionary.view(-1, 1, SIDE, SIDE), columns=9)
    each.imshow(grid.permute(1, 2, 0))
    each.set_title(f"atoms, {title}")
    each.set_axis_off()

# %%
# Denoise by lambda
# -----------------
# A larger lambda removes more: first noise, then the photograph.

lambdas = [0.05, 0.1, 0.2, 0.3, 0.5]
denoised = {}
for lam in lambdas:
    codes = layer.solve(x, lam, n_steps=200, tolerance=1e-3).codes.detach()
    denoised[lam] = picture_of(layer.reconstruct(codes).detach() + means)
curve = [psnr(denoised[lam]) for lam in lambdas]

sklearn_curve = []
for lam in lambdas:
    found = sparse_encode(x.double().numpy(), sklearn_atoms.double().numpy(), algorithm="lasso_cd", alpha=lam)
    sklearn_curve.append(psnr(picture_of((torch.from_numpy(found) @ sklearn_atoms.double()).float() + means)))

best, sklearn_best = max(curve), max(sklearn_curve)
best_lam = lambdas[curve.index(best)]
print(f"noisy {psnr(noisy):.2f} dB; SDNet {best:.2f} dB at lambda {best_lam}; scikit-learn {sklearn_best:.2f} dB")

figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", width_ratios=(1.3, 1))
axes[0].plot(lambdas, curve, "o-", color="#0072b2", label="SDNet")
axes[0].plot(lambdas, sklearn_curve, "s--", color="#d55e00", label="scikit-learn")
axes[0].axhline(psnr(noisy), color="black", linewidth=0.8, label="noisy photograph")
axes[0].set_xlabel("lambda")
axes[0].set_ylabel("PSNR, dB")
axes[0].legend()
shown = torch.cat([photograph, noisy, denoised[best_lam]]).clamp(0, 1)
axes[1].imshow(shown.view(3, *photograph.shape).permute(1, 0, 2).flatten(1), cmap="gray", vmin=0, vmax=1)
axes[1].set_title("photograph, noisy, denoised")
axes[1].set_axis_off()
plt.show()
