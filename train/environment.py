"""Under what a run happened: versions, commit, devices, command line."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sdnet

PACKAGES = ("sdnet", "torch", "accelerate", "nvidia-dali-cuda130", "safetensors", "numpy")


def describe_environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Facts for environment.json; `commit` is None where sdnet does not run from a checkout."""
    on_gpu = device.type == "cuda"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, with `-dirty` if tracked files differ from it; None outside one."""
    source = Path(sdnet.__file__).resolve()
    tracked = ["git", "-C", str(source.parent), "ls-files", "--error-unmatch", source.name]
    describe = ["git", "-C", str(source.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, check=True, capture_output=True)
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
