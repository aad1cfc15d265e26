"""`python -m sdnet.bench`: measurements of speed and memory, and the report made from them."""

import argparse
import sys
from importlib import import_module
from typing import Any

from sdnet.train.errors import UserError

COMMANDS = {
    "kernels": ("measure_kernels", "operators over the layer shapes of a model, checked and timed"),
    "paths": ("measure_paths", "the Triton path and tiles of each layer on this GPU, measured and kept in a table"),
    "train": ("measure_training", "images per second of training steps, and the phases of a step"),
    "infer": ("measure_inference", "images per second of inference, eager and exported"),
    "load": ("measure_loading", "images per second of the loaders, and the CPU time of an image"),
    "profile": ("profile_steps", "operators, launches and host syncs of a recipe's training steps"),
    "margins": ("measure_margins", "how far step sizes are from divergence while networks learn"),
    "robustness": ("robustness.sweep", "accuracy of a checkpoint over lambda and severity"),
    "adversaries": ("robustness.adversaries", "accuracy of a checkpoint under PGD and AutoAttack"),
    "reproduce": ("reproduce.command", "the paper's claims: training, rules for lambda, attacks, and cards of results"),
    "look": ("look", "pictures of a checkpoint: atoms, codes, inversions, objective, dictionaries"),
    "counts": ("measure_counts", "the counted work of each layer, and what its launches cost the host"),
    "report": ("report", "tables and plots from the ledger"),
    "gpu-check": (
        "gpu_check",
        "the first checks and measurements on a GPU, in 15 minutes: tests, verdicts and speed",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
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
    except (UserError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or options.command}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the rows that were written until now are kept.", file=sys.stderr)
        return 130


def module_of(command: str) -> Any:
    """Return the module of a command; only that of the chosen one is imported."""
    return import_module(f"sdnet.bench.{COMMANDS[command][0]}")


if __name__ == "__main__":
    sys.exit(main())
