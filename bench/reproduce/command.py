"""`reproduce`: trains the networks of the paper at one scale, evaluates them, and writes a card of results for each.

    python -m sdnet.bench reproduce --scale small --data DIR --out DIR

Scale "small" is all of CIFAR-10 at width 16 for 15 epochs, which two CPU cores train in hours; "full" is the published
width of 64 for 220 epochs, for a GPU; "tiny" is 10 000 training pictures at width 16 for 5 epochs, which shows that
every part works. The same command continues after an interruption at any point. It can run in several terminals at
once: each takes the next network on which no other works.

In --out: <scale>/runs/<network>-seed<n>/, a run folder of train/cifar.py, with the results of its evaluation in
evaluation/. The cards, <scale>_<network>-seed<n>.json, go to --cards, by default bench/results/cards, from which
`python -m sdnet.bench report` makes the tables of docs/robustness.md and docs/reproduction.md. The weights of two
networks go to --weights, by default bench/results/weights, where `create_model(..., pretrained="small_sdnet18")` finds
them.
"""

import argparse
import fcntl
import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdnet.bench.common_options import choose_device
from sdnet.bench.ledger import RESULTS, writable_folder
from sdnet.bench.reproduce.cards import CARDS, WEIGHTS, write_card, write_weights
from sdnet.bench.reproduce.evaluation import Evaluation
from sdnet.bench.reproduce.scales import SCALES, Cell, Scale
from sdnet.bench.robustness.attack_runs import autoattack_class
from sdnet.train.errors import UserError
from sdnet.train.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--scale", choices=list(SCALES), required=True, help="how large the experiment is")
    parser.add_argument("--data", type=Path, required=True, help="the folder of CIFAR-10, as train/cifar.py takes it")
    parser.add_argument("--out", type=Path, default=Path("runs", "reproduce"), help="default runs/reproduce")
    parser.add_argument("--cards", type=Path, default=RESULTS / CARDS, help="default bench/results/cards")
    parser.add_argument("--weights", type=Path, default=RESULTS / WEIGHTS, help="default bench/results/weights")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks, such as sdnet18-seed0; default all")
    parser.add_argument("--stage", choices=["all", "train", "evaluate"], default="all", help="default all")
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--note", default="", help="a sentence about the data or the machine, for the cards")


def run(options: argparse.Namespace) -> int:
    """Train and evaluate what is not done yet; return 1 if a training failed."""
    scale, device = SCALES[options.scale], choose_device(options.device)
    names = {cell.name: cell for cell in scale.cells}
    if unknown := sorted(set(options.only or ()) - set(names)):
        raise UserError(f"--only is {unknown[0]}; it must be among {', '.join(names)}.")
    out = options.out / scale.name
    for folder in (out, options.cards, options.weights):
        writable_folder(folder)
    if options.stage != "train" and scale.attacks.autoattack:
        autoattack_class()  # before hours of work, whether it is installed
    data = pictures_of(options.data, scale, out)
    failed = False
    for cell in (names[name] for name in options.only or names):
        run_folder = out / "runs" / cell.name
        with alone(run_folder) as free:
            if not free:
                print(f"{cell.name}: another process works on it", flush=True)
                continue
            if options.stage != "evaluate" and not trained(run_folder, scale):
                print(f"{cell.name}: training", flush=True)
                if train(cell, scale, data, run_folder):
                    print(f"{cell.name}: training ended early; the same command continues it", flush=True)
                    failed = True
                    continue
            if options.stage == "train":
                continue
            if not trained(run_folder, scale):
                print(f"{cell.name}: not trained to the end, so it is not evaluated", flush=True)
                continue
            print(f"{cell.name}: evaluation", flush=True)
            evaluation = Evaluation(cell, scale, data, run_folder, device)
            write_card(options.cards, evaluation, device, options.note)  # the accuracy, before what takes hours
            if cell.weights:
                write_weights(options.weights, evaluation, options.note)
            for _ in evaluation.measure():
                write_card(options.cards, evaluation, device, options.note)
    return int(failed)


def pictures_of(data: Path, scale: Scale, out: Path) -> Path:
    """Return the folder of the pictures of a scale: `data`, or a folder of links to the first pictures of each class.

    Raises:
        UserError: the scale takes a part of the pictures, and `data` is no folder of train/<class>/ and test/<class>/,
            or the links of an earlier call are to other pictures.
    """
    if scale.per_class is None:
        return data
    part, places = out / "data", set[Path]()
    for split, count in zip(("train", "test"), scale.per_class, strict=True):
        if not (data / split).is_dir():
            raise UserError(f"{data} has no folder {split}; scale {scale.name} needs train/<class>/ and test/<class>/.")
        for folder in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            (part / split / folder.name).mkdir(parents=True, exist_ok=True)
            visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
            for picture in visible[:count]:
                link(picture, part / split / folder.name / picture.name)
                places.add(part / split / folder.name / picture.name)
    if strays := sorted({path for path in part.glob("*/*/*") if not path.name.startswith(".")} - places):
        raise UserError(f"{strays[0]} is of another --data than {data}; choose another --out, or remove {part}.")
    return part


def link(picture: Path, place: Path) -> None:
    """Make a hard link of a file, or a copy where the file system has none.

    Raises:
        UserError: there is a link already, to another picture.
    """
    if place.exists():
        if not os.path.samefile(picture, place) and not filecmp.cmp(picture, place, shallow=False):
            raise UserError(f"{place} is another picture than {picture}; choose another --out, or remove the former.")
        return
    try:
        os.link(picture, place)
    except OSError:
        temporary = place.with_name(f".{place.name}.tmp")
        shutil.copyfile(picture, temporary)
        os.replace(temporary, place)


@contextmanager
def alone(run_folder: Path) -> Iterator[bool]:
    """Hold a lock on a network for the block; yield False at once if another process holds it."""
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    with run_folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def trained(run_folder: Path, scale: Scale) -> bool:
    """Return whether a run has finished its last epoch."""
    run = RunFolder(run_folder)
    return run.recipe_file.exists() and any(line["epoch"] == scale.epochs for line in run.metrics())


def train(cell: Cell, scale: Scale, data: Path, run_folder: Path) -> int:
    """Train one network by the training program, from its last checkpoint if there is one; return its exit status."""
    command = [sys.executable, "-m", "sdnet.train.cifar", "--data", data, "--out", run_folder, "--resume", "auto"]
    command += ["--recipe", "cifar_sdnet18", "--name", cell.name, "--model", cell.model]
    command += [] if cell.shortcut else ["--no-shortcut"]
    command += ["--width", scale.width, "--epochs", scale.epochs, "--holdout", scale.holdout, "--seed", cell.seed]
    command += ["--channels-last"]
    return subprocess.run(list(map(str, command)), check=False).returncode
