"""The picture of the atoms in a run folder; that a run writes it, and TensorBoard too, is in test_trainer.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

import sdnet
from sdnet.inspection import atom_grid
from sdnet.train.atoms import draw_atoms


@pytest.mark.parametrize("name", ["sdnet18", "resnet18"])
def test_the_picture_shows_the_atoms_of_the_first_csc_layer_enlarged(name: str, tmp_path: Path) -> None:
    model = sdnet.create_model(name, 4, stem="cifar", width=8, image_size=8)
    draw_atoms(Accelerator(cpu=True), model, tmp_path, 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    if name == "resnet18":
        assert list(tmp_path.iterdir()) == []
        return
    grid = (atom_grid(model.get_parameter("stem.conv.weight")) * 255).round().byte().permute(1, 2, 0)
    shown = torch.from_numpy(np.array(Image.open(tmp_path / "atoms.png")))
    scale = len(shown) // len(grid)
    assert scale > 20
    assert torch.equal(shown[scale // 2 :: scale, scale // 2 :: scale], grid)
