"""Compare the training of two commits: `python -m sdnet.train.compare REF [REF]`.

Both commits are checked out into worktrees of their own, train the same short run, and must give the same losses and
the same weights to the bit; else the first step that differs is named, and the exit status is 1. With one REF the other
side is this checkout with its uncommitted changes. Options after `--` go to both training programs:

    python -m sdnet.train.compare main -- --model sdnet18_all --optimizer adamw

Both sides run with deterministic algorithms where their commit has the option, on the same device, one after the other.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdnet.train.cli import user_errors
from sdnet.train.data.loader import Program
from sdnet.train.environment import SOURCE
from sdnet.train.errors import UserError

ROOT = SOURCE.parents[1]
HERE = "this checkout"
PICTURES, SIDE, CLASSES = 16, 32, 3
SHORT_RUN = {
    "imagenet": ("--recipe=demo", "--image-size=32", "--eval-resize=36", "--epochs=2", "--batch=8", "--threads=1"),
    "cifar": ("--recipe=cifar_sdnet18", "--epochs=2", "--batch=8"),
}


@dataclass(frozen=True)
class Course:
    """What a run did.

    Attributes:
        losses: The training loss of each step.
        weights: The weights at its end.
    """

    losses: tuple[float, ...]
    weights: dict[str, Tensor]


def write_images(folder: Path) -> Path:
    """Write a small image folder, the same on every machine, and return it: PNG files, 16 + 2 of each class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", PICTURES), ("val", 2)):
        for label in range(CLASSES):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 256, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
                noise[..., label] //= 2
                Image.fromarray(noise).resize((SIDE, SIDE)).save(place / f"{number:02}.png")
    return folder


@contextmanager
def checkout(ref: str, folder: Path) -> Iterator[Path]:
    """Yield a folder with the files of a commit.

    Raises:
        UserError: There is no such commit, or sdnet does not run from a checkout.
    """
    if ref == HERE:
        yield ROOT
        return
    _git(ref, "worktree", "add", "--detach", "--quiet", str(folder), ref)
    try:
        yield folder
    finally:
        _git(ref, "worktree", "remove", "--force", str(folder))


def _git(ref: str, *arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise UserError(f"The commit {ref} cannot be checked out: {reason}.")


def train(ref: str, program: Program, data: Path, run: Path, options: Sequence[str]) -> Course:
    """Train the short run at a commit.

    Args:
        ref: The commit, or `HERE`.
        program: The entry script.
        data: The images.
        run: The run folder.
        options: More options of the entry script.

    Raises:
        UserError: The commit cannot be checked out, or its program fails.
    """
    with checkout(ref, run.with_suffix(".source")) as source:
        settings = source / "train" / "recipes.py"
        strict = ["--deterministic"] if settings.is_file() and "deterministic:" in settings.read_text() else []
        command = [sys.executable, str(source / "train" / f"{program}.py"), "--data", str(data), "--out", str(run)]
        command += [*SHORT_RUN[program], "--log-every=1", *strict, *options]
        environment = os.environ | {"PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise UserError(f"The training of {ref} failed: {reason}")
    return read_course(run)


def read_course(run: Path) -> Course:
    """Return what a run with --log-every 1 did, from its run folder.

    Raises:
        UserError: It had another tracker than TensorBoard.
    """
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (run / "tensorboard").is_dir():
        raise UserError("The training has no losses in TensorBoard, from which they are read: leave out --tracker.")
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    losses = tuple(event.value for event in events.Scalars("train/loss"))
    return Course(losses, load_file(run / "last.safetensors"))


def difference(one: Course, two: Course, names: tuple[str, str]) -> str:
    """Return a sentence about the first thing that differs; "" if everything is equal to the bit."""
    for step, (left, right) in enumerate(zip(one.losses, two.losses, strict=False), 1):
        if left != right:
            relative = abs(left - right) / max(abs(left), abs(right))
            return (
                f"Step {step} is the first that differs: the loss is {left:.9g} at {names[0]} and {right:.9g} at "
                f"{names[1]}, relative difference {relative:.1e}."
            )
    if len(one.losses) != len(two.losses):
        return f"{names[0]} took {len(one.losses)} steps and {names[1]} took {len(two.losses)}."
    if differing := sorted(one.weights.keys() ^ two.weights.keys()):
        return f"The losses are equal, but only one side has the weights {differing[0]}."
    for name, value in one.weights.items():
        if not torch.equal(value, two.weights[name]):
            return f"The losses of all {len(one.losses)} steps are equal, but the weights {name} differ at the end."
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what a command line names; return 0 if both are equal, else 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m sdnet.train.compare",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("refs", nargs="+", metavar="REF", help="a commit, branch or tag; one or two")
    parser.add_argument("--program", choices=tuple(SHORT_RUN), default="imagenet", help="default imagenet")
    parser.add_argument("--data", type=Path, metavar="DIR", help="images; default a small set that is made for this")
    parsed = parser.parse_args(arguments)
    with user_errors():
        if len(parsed.refs) > 2:
            raise UserError(f"{len(parsed.refs)} commits are given; give one or two.")
        names = (parsed.refs[0], parsed.refs[1] if len(parsed.refs) == 2 else HERE)
        with tempfile.TemporaryDirectory(prefix="sdnet-compare-") as place:
            data = parsed.data.absolute() if parsed.data else write_images(Path(place, "images"))
            courses = []
            for number, name in enumerate(names):
                print(f"Training {name}", flush=True)
                courses.append(train(name, parsed.program, data, Path(place, f"run{number}"), options))
        found = difference(courses[0], courses[1], names)
        print(found or f"The losses of {len(courses[0].losses)} steps and the weights are equal to the bit.")
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
