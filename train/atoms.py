"""The atoms of the first CSC layer as a picture, in the run folder and in TensorBoard."""

from io import BytesIO
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from torch import nn

from sdnet.files import write_atomically
from sdnet.inspection import atom_grid
from sdnet.step_size import csc_layers
from sdnet.train.ema import Ema

FILE = "atoms.png"
SIDE = 600
"""The picture is enlarged by a whole number to about this height, in pixels."""


def draw_atoms(accelerator: Accelerator, model: nn.Module | Ema, folder: Path, step: int) -> None:
    """Write `atoms.png` into a run folder, and the same picture to TensorBoard; nothing for a model without CSC layers.

    The main process calls it.
    """
    layers = csc_layers(model) if isinstance(model, nn.Module) else {}
    if not layers:
        return
    name, layer = next(iter(layers.items()))
    pixels = (atom_grid(layer.weight) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    scale = max(1, SIDE // picture.height)
    content = BytesIO()
    picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST).save(content, "PNG")
    write_atomically(folder / FILE, lambda path: path.write_bytes(content.getvalue()))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({f"atoms/{name}": pixels[None]}, step, dataformats="NHWC")
