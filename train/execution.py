"""How PyTorch computes while a recipe runs: TF32, cuDNN's choice of algorithms, deterministic algorithms."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sdnet.train.recipes import Recipe

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
NOT_COVERED = (
    "--deterministic: equal runs need the same number of processes, the same versions and the same model of GPU or "
    "processor; operations without a deterministic algorithm are named when they run."
)


@contextmanager
def execution(recipe: Recipe, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Let PyTorch compute as a recipe asks, and restore its settings afterwards.

    Args:
        recipe: The recipe.
        say: Receives a sentence for each operation that has no deterministic algorithm, once.
    """
    matmul, cudnn = (
        torch.backends.cuda.matmul,
        _cudnn(),
    )  # their older switches: mixed with the newer ones, torch raises
    before = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic)
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace, show = os.environ.get(CUBLAS_VARIABLE), warnings.showwarning
    cudnn.allow_tf32 = matmul.allow_tf32 = recipe.tf32
    cudnn.benchmark = recipe.cudnn_benchmark and not recipe.deterministic
    try:
        with warnings.catch_warnings():
            if recipe.deterministic:
                os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")  # before cuBLAS is used for the first time
                torch.use_deterministic_algorithms(True, warn_only=True)
                cudnn.deterministic = True
                warnings.filterwarnings("always", message=".*deterministic")
                warnings.showwarning = _announcer(say, show)
                say(NOT_COVERED)
            yield
    finally:
        warnings.showwarning = show
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
        if recipe.deterministic:  # the call alone imports the compiler of PyTorch, which takes a second
            torch.use_deterministic_algorithms(strict, warn_only=warns)
            if workspace is None:
                os.environ.pop(CUBLAS_VARIABLE, None)


def _announcer(say: Callable[[str], None], otherwise: Callable[..., None]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that turns PyTorch's warning about an operation into one sentence."""
    known: set[str] = set()

    def show(message: Warning | str, *rest: Any, **options: Any) -> None:
        found = re.search(r"(\S+) does not have a deterministic implementation", str(message))
        if not found:
            otherwise(message, *rest, **options)
        elif found[1] not in known:
            known.add(found[1])
            say(f"--deterministic: {found[1]} has no deterministic algorithm, so runs may differ in their last bits.")

    return show


def _cudnn() -> Any:
    return torch.backends.cudnn
