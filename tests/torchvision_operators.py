"""What the torchvision of PyPI needs beside a CPU build of torch: the schemas of two operators that it looks up.

Import this module before torchvision, or before timm, which imports it. A CUDA build of torch needs nothing.
"""

import torch

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
