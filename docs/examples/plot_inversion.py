"""
A photograph rebuilt from the codes of every layer
==================================================

In a network of CSC layers without shortcuts the image can be rebuilt from the codes of every layer: reconstruct the
input of a layer from its codes, undo the batch norm before it, and go on. The network here was trained on CIFAR-10.
"""

# %%
# The weights come with a checkout: width 16, 15 epochs, a top-1 accuracy of 82.4 %. The photograph is reduced to the
# size of CIFAR's images.
import matplotlib.pyplot as plt
import torch
from skimage import data, transform

import sdnet
from sdnet.inversion import match_contrast

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))

weights = "small_sdnet18_all_noshortcut"
model = sdnet.create_model("sdnet18_all", width=16, shortcut=False, pretrained=weights)
picture = transform.resize(data.astronaut(), (32, 32), anti_aliasing=True)
photograph = torch.as_tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None]
x = (photograph - MEAN) / STD

# %%
# One forward pass gives the inversion of every layer, with its errors. Two steps leave reconstructions with too little
# contrast; `restore_contrast` multiplies each by one number, to the mean square that the batch norm below it gives.
with torch.no_grad():
    inversions = sdnet.invert_layers(model, x, restore_contrast=True)
for name, found in list(inversions.items())[:6]:
    error = "refused" if found.error is None else f"{float(found.error):.2f}"
    print(f"{name:18} {found.kind:12} {error}, the layer alone {float(found.layer_error):.2f}")

# %%
# The images rebuilt from the first layers, shown with the gain and offset of the photograph.
shown = [(name, found.picture) for name, found in inversions.items()][:5]
figure, axes = plt.subplots(1, 1 + len(shown), figsize=(12, 2.5), layout="constrained")
axes[0].imshow(photograph[0].permute(1, 2, 0).numpy())
axes[0].set_title("photograph")
for axis, (name, rebuilt) in zip(axes[1:], shown, strict=True):
    assert rebuilt is not None
    axis.imshow(match_contrast(rebuilt, photograph)[0].permute(1, 2, 0).clamp(0, 1).numpy())
    axis.set_title(name)
for axis in axes:
    axis.set_axis_off()
