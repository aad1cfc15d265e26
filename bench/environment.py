"""Under what a figure was measured: device, driver, versions, commit, command, date."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sdnet.train.errors import UserError

PACKAGES = ("torch", "triton", "numpy", "accelerate", "nvidia-dali-cuda130", "pillow")
SOURCE = Path(__file__).resolve().parent
COMMIT = "SDNET_COMMIT"


def describe(device: torch.device) -> dict[str, Any]:
    """The facts that every line of the ledger carries. `dirty` says whether code differs from `commit`.

    The ledger's own files and generated text do not make a checkout dirty. Outside one, in a copy on another machine
    perhaps, `dirty` is None and `commit` what the environment variable SDNET_COMMIT says, None without it.
    """
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "*.py", "*.toml", "*.json")
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": commit or os.environ.get(COMMIT),
        "dirty": None if changes is None else bool(changes),
        "command": shlex.join(["python", "-m", "sdnet.bench", *map(portable, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def choose_device(name: str) -> torch.device:
    """The device called `name`, made ready for measuring; "auto" is a GPU if there is one.

    Raises:
        UserError: Triton's interpreter is on, whose speed means nothing, or there is no such device.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set: kernels would be interpreted, and their time would mean nothing.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device {name} was asked for, and torch sees no GPU.")
    prepare()
    return device


def prepare() -> None:
    """Settings of every process that measures."""
    torch.backends.cudnn.benchmark = True  # the rival's convolutions deserve cuDNN's best choice


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The installed version, None if it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """What git says about the checkout that this file is tracked in; None without one."""
    tracked = ["git", "-C", str(SOURCE), "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(tracked, check=True, capture_output=True)
        root = ["git", "-C", str(SOURCE.parent)]
        return subprocess.run([*root, *arguments], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def portable(argument: str) -> str:
    """An argument without the folders of this machine: `cifar=/.../cifar10` for an absolute path to cifar10."""
    label, equals, value = argument.rpartition("=")
    return f"{label}{equals}/.../{Path(value).name}" if value.startswith("/") else argument


def first_line(*command: str) -> str | None:
    """The first line that a command prints; None if it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
