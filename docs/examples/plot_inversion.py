"""
A photograph rebuilt from every depth
=====================================

In a network of CSC layers without shortcuts the image can be rebuilt from the codes of every layer: reconstruct the
input of a layer from its codes, undo the batch norm before it, and go on. The network here has random weights; how well
the picture survives says what the architecture and the number of steps allow before any training.
"""

# %%
# The batch norms take their statistics from the photograph, as they would in training.
import matplotlib.pyplot as plt
import torch
from skimage import data, transform

import sdnet
from sdnet.inversion import match_contrast

torch.manual_seed(0)
picture = transform.resize(data.astronaut(), (64, 64), anti_aliasing=True)
x = torch.as_tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None]
options = {"stem": "cifar", "width": 32, "image_size": 64, "shortcut": False}
model = sdnet.create_model("sdnet18_all", 10, lam=0.01, n_steps=8, **options)
with torch.no_grad():
    model.train()
    for _ in range(3):
        model(x)
    model.eval()

# %%
# One forward pass gives the inversion of every layer, with its errors.
with torch.no_grad():
    inversions = sdnet.invert_layers(model, x)
for name, found in list(inversions.items())[:6]:
    error = "refused" if found.error is None else f"{float(found.error):.2f}"
    print(f"{name:18} {found.kind:12} {error}, the layer alone {float(found.layer_error):.2f}")

# %%
# The pictures of the first depths. A few steps leave reconstructions with too little
# contrast, so each picture is shown with the gain and offset of the photograph.
shown = [(name, found.picture) for name, found in inversions.items()][:5]
figure, axes = plt.subplots(1, 1 + len(shown), figsize=(12, 2.5), layout="constrained")
axes[0].imshow(x[0].permute(1, 2, 0))
axes[0].set_title("photograph")
for axis, (name, rebuilt) in zip(axes[1:], shown, strict=True):
    assert rebuilt is not None
    axis.imshow(match_contrast(rebuilt, x)[0].permute(1, 2, 0).clamp(0, 1))
    axis.set_title(name)
for axis in axes:
    axis.set_axis_off()
