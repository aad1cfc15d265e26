"""`python -m sdnet.bench`: how fast is it, where does the time go, and compared with what?"""

import argparse
import sys
from importlib import import_module
from typing import Any

from sdnet.train.errors import UserError

COMMANDS = {
    "kernels": ("measure_kernels", "operators over the layer shapes of a model, checked and timed"),
    "paths": ("measure_paths", "the table of steps and tiles for this GPU, measured"),
    "train": ("measure_training", "images per second of training steps, and their split"),
    "load": ("measure_loading", "images per second of the loaders, and their processor time"),
    "profile": ("profile_steps", "the operators, launches and host syncs of a recipe's steps"),
    "report": ("report", "tables and plots from the ledger"),
    "gpu-check": ("gpu_check", "tests that need a GPU, then kernels and train, in ten minutes"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m sdnet.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=module_of(name).__doc__ if name in argv[:1] else "")
        if name in argv[:1]:
            module_of(name).add_arguments(command)
    options = parser.parse_args(argv)
    try:
        return module_of(options.command).run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def module_of(command: str) -> Any:
    """The module of a sub-command; only that of the chosen one is imported."""
    return import_module(f"sdnet.bench.{COMMANDS[command][0]}")


if __name__ == "__main__":
    sys.exit(main())
