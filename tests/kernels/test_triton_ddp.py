"""The Triton path under DDP: two real processes over gloo, on a CPU, kernels interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("triton_ranks.py")
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "SDNET_TRITON_PATH": "fused",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.mark.slow
def test_two_ranks_with_half_the_batch_have_the_gradients_of_one_with_the_whole(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, tmp_path, str(rank), "2"],
            env=os.environ | ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "Grad strides" not in errors  # which DDP would copy at every step
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["whole"]) == 4
    for mine, other, whole in zip(first["shared"], second["shared"], first["whole"], strict=True):
        assert torch.equal(mine, other)
        assert whole.any()
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-7)
