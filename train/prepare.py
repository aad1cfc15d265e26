"""Make tar shards of a data set: `python -m sdnet.train.prepare --data IN --out OUT`.

Every image is decoded; what cannot be used is left out and listed. An image whose shorter side is longer than `--size`
is shrunk to it and stored as JPEG; any other keeps its bytes. OUT then holds

train-00000.tar ...   shards in the WebDataset layout, the training images in random order
train-00000.idx ...   where the images lie in them
manifest.json         classes, counts per class, size and SHA-256 of the shards, what was left out and why

A shard appears complete or not at all, and the manifest when all shards are done: after an interruption, run the same
command again.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdnet.files import write_text
from sdnet.train.cli import check_paths, user_errors
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.names import printable
from sdnet.train.data.shard_writer import ShardPlan, Sources, Worker, begin_worker, write_in_worker
from sdnet.train.data.shards import MANIFEST, read_manifest
from sdnet.train.data.sources import NOT_IMAGES, read_pictures
from sdnet.train.errors import UserError
from sdnet.train.interrupt import Interrupt
from sdnet.train.lock import RunLock

IMAGES_PER_SHARD = 2500
AGAIN = "run the same command again to finish"
WORK = ".prepare"  # inside OUT until all is done: the plan, and a record of every finished shard


@dataclass(frozen=True)
class Preparation:
    """The facts that decide the bytes of the output."""

    train: str
    val: str
    size: int
    quality: int
    shards: int


def prepare(
    source: Path,
    out: Path,
    *,
    size: int = 400,
    quality: int = 90,
    shards: int = 0,
    workers: int = 1,
    labels: Path | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Make the shards of `source` in `out`, or finish making them, and return the manifest.

    Args:
        source: What `sdnet.train.data.sources.read_pictures` reads; only regular files inside of it are read.
        out: A new folder, or one in which the same preparation was begun.
        size: The longest that a shorter side may be, in pixels; 0 keeps every image as it is.
        quality: The JPEG quality of shrunk images, 1 to 100.
        shards: The number of training shards, 0 for one per 2500 images; the validation set gets its share.
        workers: The number of processes; 1 works in this one.
        labels: The ground truth of a flat validation folder, where it does not lie in `source`.
        say: Called with a line on the progress.

    Raises:
        UserError: Wrong arguments or input, `out` holds something else or is in use, or the disk is full.
        SystemExit: After Ctrl-C or SIGTERM; finished shards are kept.
    """
    for name, value, least, most in (
        ("size", size, 0, 2**16),
        ("quality", quality, 1, 100),
        ("shards", shards, 0, 10**5),
        ("workers", workers, 1, 1024),
    ):
        if not least <= value <= most:
            raise UserError(f"{name} is {value}; it must be between {least} and {most}.")
    if resolved(out).is_relative_to(resolved(source)):
        raise UserError(f"{printable(out)} lies in {printable(source)}: choose a folder outside of it.")
    train, val = read_pictures(source, labels, bad_files="skip")
    sets = {"train": train, "val": val}
    refuse_links(source, sets)
    shards = min(shards or -(-len(train) // IMAGES_PER_SHARD), len(train))
    plan = Preparation(_fingerprint(train), _fingerprint(val), size, quality, shards)
    if (done := _begin(out, plan)) is not None:
        say(f"Already there: {printable(out)}")
        if newer := _newer(sets, out / MANIFEST):
            say(f"{printable(newer)} was written after the shards: remove {printable(out)} to make them again.")
        return done
    counts = {"train": shards, "val": max(1, min(len(val), round(shards * len(val) / len(train))))}
    tasks = [
        ShardPlan(out, split, number, order.tolist(), size, quality)
        for split, images in sets.items()
        for number, order in enumerate(np.array_split(_order(split, len(images)), counts[split]))
    ]
    records = out / WORK
    lock = RunLock(records, "The folder")
    lock.acquire()
    with lock:
        left = [task for task in tasks if not task.is_done(records)]
        images = f"{len(train)} + {len(val)} images in {len(train.classes)} classes"
        say(f"{images}, {len(left)} of {len(tasks)} shards to make")
        try:
            _make(left, sets, records, workers, say)
            manifest = _gather(tasks, sets, plan, records)
            write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"{printable(out)} cannot be written: {error.strerror}. Finished shards are kept: {AGAIN}."
            ) from error
        shutil.rmtree(records)
    return manifest


def resolved(path: Path) -> Path:
    """Return a path without links; one that leads in a circle stays, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def refuse_links(source: Path, sets: dict[str, ImageSet]) -> None:
    """Raise a UserError if a folder or archive that images come from is a link to another place."""
    inside = resolved(source)
    folders = {path.parent for images in sets.values() for path in images.paths()}
    for folder in sorted(folders):
        if not resolved(folder).is_relative_to(inside):
            raise UserError(f"{printable(folder)} leads out of {printable(source)}: only files inside of it are read.")


def _fingerprint(images: ImageSet) -> str:
    return f"{len(images)} pictures, {images.digest()[:16]}"


def _order(split: str, count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count) if split == "train" else np.arange(count)


def _begin(out: Path, plan: Preparation) -> dict[str, Any] | None:
    """Open the output folder and return the manifest if all is done already."""
    manifest = read_manifest(out)
    noted = out / WORK / "plan.json"
    former = manifest["plan"] if manifest else _read_plan(noted) if noted.is_file() else None
    if former is not None:
        differences = [
            f"{key}: {value}, not {former.get(key)}" for key, value in asdict(plan).items() if value != former.get(key)
        ]
        if differences:
            raise UserError(f"{printable(out)} holds shards that were made otherwise; {'; '.join(differences)}.")
        return manifest
    if out.exists() and (not out.is_dir() or any(entry.name != WORK for entry in out.iterdir())):
        raise UserError(f"{printable(out)} holds something else: choose another folder.")
    try:
        noted.parent.mkdir(parents=True, exist_ok=True)
        write_text(noted, json.dumps(asdict(plan)))
    except OSError as error:
        raise UserError(f"{printable(out)} cannot be written: {error.strerror}.") from error
    return None


def _newer(sets: Sources, manifest: Path) -> Path | None:
    """Return a file of the source that was written after the shards were finished; None if there is none."""
    finished = manifest.stat().st_mtime_ns
    paths = (path for images in sets.values() for path in images.paths())
    return next((path for path in paths if path.exists() and path.stat().st_mtime_ns > finished), None)


def _read_plan(file: Path) -> dict[str, Any]:
    """Return the plan of a preparation that was begun.

    Raises:
        UserError: It is damaged.
    """
    try:
        plan = json.loads(file.read_text())
    except (ValueError, RecursionError):
        plan = None
    if not isinstance(plan, dict):
        raise UserError(
            f"{printable(file)} is damaged; remove {printable(file.parent)}, and all shards are made again."
        )
    return plan


def _make(tasks: Sequence[ShardPlan], sets: Sources, records: Path, workers: int, say: Callable[[str], object]) -> None:
    """Write the shards and report the progress every few seconds."""
    begin, made, said = time.monotonic(), 0, 0.0
    total = sum(len(task.indices) for task in tasks)
    with Interrupt() as interrupt:
        run = _alone if workers <= 1 or len(tasks) <= 1 else _together
        for number, task in enumerate(run(tasks, sets, records, interrupt, min(workers, len(tasks))), 1):
            made += len(task.indices)
            elapsed = time.monotonic() - begin
            if elapsed - said > 5 or number == len(tasks):
                said, rate = elapsed, made / elapsed
                left = f"{(total - made) / rate / 60:.0f} min left"
                say(f"{number}/{len(tasks)} shards, {made}/{total} images, {rate:.0f} images/s, {left}")
        if interrupt.signal:
            say(f"Stopped; finished shards are kept: {AGAIN}.")
            raise SystemExit(128 + interrupt.signal)


def _alone(
    tasks: Sequence[ShardPlan], sets: Sources, records: Path, interrupt: Interrupt, workers: int
) -> Iterator[ShardPlan]:
    worker = Worker(sets, records, lambda: bool(interrupt.signal))
    for task in tasks:
        if not worker.write(task):
            return
        yield task


def _together(
    tasks: Sequence[ShardPlan], sets: Sources, records: Path, interrupt: Interrupt, workers: int
) -> Iterator[ShardPlan]:
    """Yield the shards in the order in which worker processes finish them."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, begin_worker, (sets, records, stop)) as executor:
        futures: dict[Future[bool], ShardPlan] = {executor.submit(write_in_worker, task): task for task in tasks}
        try:
            while futures and not interrupt.signal:
                done, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield futures.pop(future)
        except BrokenProcessPool as error:
            raise UserError(f"A worker process was killed; finished shards are kept: {AGAIN}.") from error
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)


def _gather(tasks: Sequence[ShardPlan], sets: Sources, plan: Preparation, records: Path) -> dict[str, Any]:
    """Return the manifest, made from the records of the shards."""
    splits: dict[str, Any] = {}
    for split, images in sets.items():
        made = [json.loads(task.record(records).read_text()) for task in tasks if task.split == split]
        skipped = sorted((entry for record in made for entry in record["skipped"]), key=lambda entry: entry["file"])
        skipped += [{"file": name, "reason": reason} for name, reason in images.lost]
        skipped += [{"file": name, "reason": f"is {NOT_IMAGES}"} for name in images.ignored]
        left_out = {entry["file"] for entry in skipped}
        kept = Counter(images.labels[at] for at in range(len(images)) if images.files[at] not in left_out)
        splits[split] = {
            "pictures": sum(record["pictures"] for record in made),
            "shrunk": sum(record["shrunk"] for record in made),
            "classes": {name: kept[label] for label, name in enumerate(images.classes)},
            "shards": [{key: record[key] for key in ("file", "pictures", "bytes", "sha256")} for record in made],
            "skipped": skipped,
        }
        if not splits[split]["pictures"]:
            raise UserError(f"None of the images of {split} can be used; the first {skipped[0]['reason']}.")
        if emptied := [images.classes[label] for label in sorted(set(images.labels)) if not kept[label]]:
            raise UserError(
                f"None of the images of class {printable(emptied[0])} in {printable(images.root)} can be used."
            )
    return {"version": 1, "plan": asdict(plan), "classes": list(sets["train"].classes), "splits": splits}


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the shards and print a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, metavar="IN", help="ImageFolder, shards, or ImageNet's download"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to make")
    parser.add_argument("--size", type=int, default=400, help="longest shorter side, in pixels; 0: as they are [400]")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of shrunk images [90]")
    parser.add_argument("--shards", type=int, default=0, help=f"for the training set [one per {IMAGES_PER_SHARD}]")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [cores]")
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="ground truth of a flat validation folder")
    given = parser.parse_args(argv)
    with user_errors():
        check_paths(argv)
        manifest = prepare(
            given.data,
            given.out,
            size=given.size,
            quality=given.quality,
            shards=given.shards,
            workers=given.workers,
            labels=given.val_labels,
        )
    for split, facts in manifest["splits"].items():
        print(
            f"{split}: {facts['pictures']} images, {facts['shrunk']} of them shrunk, in {len(facts['shards'])} shards"
            f"; {len(facts['skipped'])} left out"
        )
        for entry in facts["skipped"][:10]:
            print(f"  {printable(entry['file'])} {printable(entry['reason'])}")
    print(f"Ready: {printable(given.out)}")


if __name__ == "__main__":
    main()
