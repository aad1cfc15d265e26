"""Makes timm and torchvision importable; import this module before either.

`make setup` installs both into .venv/timm, because the command `accelerate` imports timm wherever it can, and the
torchvision of PyPI fails beside a CPU build of torch: it looks up two operators whose schemas are then missing.
They are defined here; a CUDA build of torch needs nothing.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

if find_spec("timm") is None:
    sys.path.append(str(Path(sys.prefix) / "timm"))

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
