"""`python -m sdnet.kernels.qualify`: determine which kernels are right and faster for a model on this machine.

Every distinct CSC layer of the model is compared with PyTorch in fp32 and timed in a child process, and one verdict per
layer, type, memory format and batch class enters the table of this machine, which `impl="auto"` reads. Layers that
have a verdict are skipped, so an interrupted run continues where it stopped. The training programs do the same before
their first step.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import sdnet
from sdnet.kernels.qualify import parent
from sdnet.kernels.qualify.key import Call, Flags, Update
from sdnet.kernels.qualify.verdicts import CACHE_VARIABLE, Store
from sdnet.models import VARIANTS
from sdnet.qualify import planned_calls, target_device, update_of
from sdnet.step_size import csc_layers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sdnet.kernels.qualify", description=(__doc__ or "").split("\n\n")[1]
    )
    models = [name for name, variant in VARIANTS.items() if variant.csc_stem]
    parser.add_argument("--model", choices=models, default="sdnet18", help="whose layers; default sdnet18")
    parser.add_argument("--image-size", type=positive, default=224, help="height and width of the images; default 224")
    parser.add_argument("--batch", type=positive, default=256, help="images of one process in one step; default 256")
    parser.add_argument("--n-steps", type=positive, default=2, help="default 2")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="default bf16")
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last",
                        help="memory format; default channels_last")  # fmt: skip
    parser.add_argument("--deterministic", action="store_true", help="for training with --deterministic, which asks "
                        "cuDNN for deterministic algorithms; without it cuDNN times its algorithms")  # fmt: skip
    parser.add_argument("--device", help="default: the GPU")
    parser.add_argument("--quick", action="store_true", help="try no other tiles than those of the rules")
    parser.add_argument("--fresh", action="store_true", help="qualify layers that have a verdict again")
    parser.add_argument("--budget", type=positive, default=int(parent.BUDGET), metavar="SECONDS",
                        help=f"after which it ends; default {parent.BUDGET:.0f}")  # fmt: skip
    parser.add_argument("--memory", type=positive, metavar="GIB", help="most GPU memory; default all that is free")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder of the verdicts; default the one that "
                        f"{CACHE_VARIABLE} names, else sdnet in XDG_CACHE_HOME or ~/.cache")  # fmt: skip
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """Return the value of an option that takes an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Qualify; return 0 if every key has a verdict, 1 if some have none, 2 if it cannot run here."""
    options = options_of(argv)
    with torch.device("meta"):
        model = sdnet.create_model(
            options.model,
            stem="cifar" if options.image_size <= 64 else "imagenet",
            image_size=options.image_size,
            n_steps=options.n_steps,
        )
    channels_last = options.layout == "channels_last"
    if channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    try:
        device = target_device(model, options.device)
    except (NotImplementedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    store, complete, budget = Store(options.cache), True, float(options.budget)
    for dtype in dict.fromkeys(options.dtype):
        flags = flags_of(dtype, options.deterministic)
        calls = planned_calls(model, options.batch, DTYPES[dtype], channels_last)
        items: list[Call | Update] = [call for found in calls.values() for call in found]
        items += filter(None, [update_of(csc_layers(model).values())])
        outcome = parent.qualify(
            items,
            str(device),
            flags=flags,
            store=store,
            fresh=options.fresh,
            budget=budget,
            memory_gib=options.memory,
            all_tiles=not options.quick,
        )
        for note in outcome.notes:
            print(note, file=sys.stderr)
        if outcome.machine is None:
            return 1
        complete &= not any("budget" in note for note in outcome.notes)
        for key in dict.fromkeys(item.key(flags) for item in items):
            print(f"{key}\n    {outcome.table[key]}")
        print(f"The verdicts are in {store.file_of(outcome.machine) or 'memory alone'}.")
    return 0 if complete else 1


def flags_of(dtype: str, deterministic: bool) -> Flags:
    """Return the flags of PyTorch that the training programs set for a type."""
    flags = Flags.now()._replace(benchmark=not deterministic, deterministic=deterministic)
    return flags if DTYPES[dtype].itemsize == 2 else flags._replace(convolutions="tf32" if dtype == "tf32" else "ieee")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
