"""The options that every measuring command takes, and the types of its numbers."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sdnet.bench import isolation
from sdnet.bench.ledger import RESULTS, Ledger, Theme
from sdnet.bench.providers import DTYPES, LAYOUTS
from sdnet.models import WIDTH
from sdnet.train.environment import describe_environment
from sdnet.train.errors import UserError


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the device, the folder of the ledger and the label of the run."""
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the ledger's folder; default the checkout's")
    parser.add_argument("--label", default="", help="a name by which a mark in a document selects this run")


def add_setting_options(parser: argparse.ArgumentParser, dtypes: str) -> None:
    """Add image sizes, types, memory formats, the width and the budget; `dtypes` says the types of a GPU's default."""
    parser.add_argument("--image-size", type=at_least(1), nargs="+", help="pixels; default 224 and 32, on a CPU 32")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help=f"default {dtypes}, on a CPU fp32")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default both, on a CPU contiguous")
    add_width_option(parser)
    parser.add_argument("--budget", type=seconds, default=float("inf"), help="seconds after which nothing is begun")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the pictures that training steps read."""
    parser.add_argument("--data", type=Path, help="an ImageFolder tree; without it, noise on the device")
    parser.add_argument("--threads", type=at_least(1), default=2, help="decoding threads for --data; default 2")


def add_width_option(parser: argparse.ArgumentParser) -> None:
    """Add the width of the models."""
    text = f"channels of the stem and the first stage of the models; default {WIDTH}"
    parser.add_argument("--width", type=at_least(1), default=WIDTH, help=text)


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes integers of at least `least`."""

    def integer(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {least}")
        return int(text)

    return integer


def number(text: str) -> float:
    """Return the value of an option that takes finite numbers of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def seconds(text: str) -> float:
    """Return the value of an option that takes a number of seconds, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds of at least 0")
    return value


def open_ledger(options: argparse.Namespace, theme: Theme) -> tuple[torch.device, Ledger]:
    """Return the device, prepared for measuring, and the ledger of this run.

    Raises:
        UserError: There is no such device, it lacks a type, Triton's interpreter is on, or the folder cannot be written
            to.
    """
    device = choose_device(options.device)
    if device.type == "cpu" and "tf32" in (getattr(options, "dtype", None) or ()):
        raise UserError("--dtype is tf32, which needs a GPU: a CPU computes the same as for fp32.")
    variables = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("SDNET_"))
    command = shlex.join(map(without_folders, [*variables, "python", "-m", "sdnet.bench", *sys.argv[1:]]))
    facts = {"command": command, "label": options.label}
    ledger = Ledger(options.out, theme, describe_environment(device) | facts)
    ledger.prepare()
    return device, ledger


def choose_device(name: str) -> torch.device:
    """Return the device called `name`, prepared for measuring; "auto" is a GPU if there is one.

    Raises:
        UserError: There is no such device, or Triton's interpreter is on, whose times mean nothing.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set; kernels would be interpreted, and their times would mean nothing.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name}; it must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {name}, but torch finds no GPU.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name}, but torch finds {torch.cuda.device_count()} GPUs, numbered from 0.")
    isolation.prepare()
    return device if device.type == "cpu" else torch.device("cuda", device.index or 0)  # set_device needs a number


def without_folders(argument: str) -> str:
    """Return an argument without the folders of this machine: `cifar=/.../cifar10` for an absolute path to cifar10."""
    label, equals, value = argument.rpartition("=")
    return f"{label}{equals}/.../{Path(value).name}" if value.startswith("/") else argument
