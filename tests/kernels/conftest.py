"""Without a GPU the Triton kernels run under Triton's interpreter, which must be asked for before Triton is imported.

With one they are compiled, and the tests marked `gpu` run; TRITON_INTERPRET=1 in the environment brings back the
interpreter.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
