"""
Codes after more steps
======================

The codes of a photograph after 1, 2, 8 and 32 steps of FISTA, and their reconstructions.
"""

# %%
# A layer with 16 atoms of 7x7 pixels. They are random here; a network learns its own.
import matplotlib.pyplot as plt
import torch
from skimage import data, transform

import sdnet

torch.manual_seed(0)
picture = transform.resize(data.camera(), (96, 96), anti_aliasing=True)
x = torch.as_tensor(picture, dtype=torch.float32)[None, None]
x = x - x.mean()
layer = sdnet.CSCConv2d(1, 16, 7, lam=0.05, nonnegative=False, solver="fista", input_size=96)

# %%
# The objective decreases with every step, and the reconstruction approaches the photograph.
steps = (1, 2, 8, 32)
figure, axes = plt.subplots(1, 1 + len(steps), figsize=(11, 2.6), layout="constrained")
axes[0].imshow(x[0, 0], cmap="gray")
axes[0].set_title("photograph")
with torch.no_grad():
    for axis, n_steps in zip(axes[1:], steps, strict=True):
        codes = layer.solve(x, n_steps=n_steps).codes
        axis.imshow(layer.reconstruct(codes)[0, 0], cmap="gray", vmin=x.min(), vmax=x.max())
        objective = float(layer.objective(x, codes))
        axis.set_title(f"{n_steps} steps\nobjective {objective:.0f}\n{float((codes == 0).float().mean()):.0%} zeros")
for axis in axes:
    axis.set_axis_off()

# %%
# A larger lambda leaves fewer codes and a coarser reconstruction.
lambdas = (0.01, 0.05, 0.2, 0.5)
figure, axes = plt.subplots(1, len(lambdas), figsize=(9, 2.6), layout="constrained")
with torch.no_grad():
    for axis, lam in zip(axes, lambdas, strict=True):
        codes = layer.solve(x, lam=lam, n_steps=32).codes
        axis.imshow(layer.reconstruct(codes)[0, 0], cmap="gray", vmin=x.min(), vmax=x.max())
        axis.set_title(f"lambda {lam}\n{float((codes == 0).float().mean()):.0%} zeros")
        axis.set_axis_off()
