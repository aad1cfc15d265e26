"""The environment of a run or a measurement: versions, commit, device and date.

This module imports nothing but the standard library, PyTorch and `sdnet`, so that benchmarks can use it on a machine
without the training packages.
"""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sdnet
from sdnet.kernels.qualify.key import driver_version

PACKAGES = ("sdnet", "torch", "triton", "numpy", "accelerate", "nvidia-dali-cuda130", "safetensors", "pillow")
COMMIT_VARIABLE = "SDNET_COMMIT"
SOURCE = Path(sdnet.__file__).resolve()


def describe_environment(device: torch.device, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return the facts that decide whether a result can be reproduced.

    Args:
        device: The device that the program computes on.
        packages: The packages whose versions are reported.

    Returns:
        A dictionary that `json` can write. `commit` is None outside a checkout, unless the environment variable
        SDNET_COMMIT names one; `dirty` says whether code differs from that commit, without the results in
        bench/results, and is None where this is unknown.
    """
    changes = git("status", "--porcelain", "--", "*.py", "*.toml", "*.json", ":(exclude)bench/results")
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": driver_version() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in packages},
        "commit": commit_of_checkout(),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_software(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return the versions that have to be equal in all processes of a run."""
    versions = {name: package_version(name) for name in packages}
    return {"Python": platform.python_version(), **versions, "the commit of sdnet": commit_of_checkout()}


def device_name(device: torch.device) -> str:
    """Return the model name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit_of_checkout() -> str | None:
    """Return the commit that sdnet runs from, else the value of SDNET_COMMIT, else None."""
    return git("rev-parse", "HEAD") or os.environ.get(COMMIT_VARIABLE)


def git(*arguments: str) -> str | None:
    """Return the output of a git command in the checkout of sdnet, or None if sdnet does not run from a checkout."""
    tracked = ["git", "-C", str(SOURCE.parent), "ls-files", "--error-unmatch", SOURCE.name]
    command = ["git", "-C", str(SOURCE.parents[1]), *arguments]
    try:
        subprocess.run(tracked, check=True, capture_output=True)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
