"""What every command that measures takes: the device, the ledger's folder, and a label for its rows."""

import argparse
from pathlib import Path

import torch

from sdnet.bench import environment
from sdnet.bench.ledger import RESULTS, Ledger, Theme


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"the ledger's folder; default {RESULTS}")
    parser.add_argument("--label", default="", help="a word by which a document's mark can choose this run")


def open_ledger(options: argparse.Namespace, theme: Theme) -> tuple[torch.device, Ledger]:
    """The device, made ready, and the ledger of this run.

    Raises:
        UserError: the device is not there, or kernels would be interpreted.
    """
    device = environment.choose_device(options.device)
    return device, Ledger(options.out, theme, environment.describe(device) | {"label": options.label})
