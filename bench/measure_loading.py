"""`load`: images per second of the loaders on a folder, by threads, and the processor time of an image.

A round opens a loader, goes through an epoch, and closes it; loaders take turns by rounds. Images per second are
counted from the first batch to the last, so that starting up does not count; processor time is that of this process
and its workers over the whole round, so that nothing hides in another process.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdnet.bench.common_options import add_common_options, open_ledger
from sdnet.bench.ledger import read
from sdnet.bench.tables import feeding_lines, loading_table
from sdnet.bench.timing import percentiles
from sdnet.train.data.folder import ImageSet, read_image_folder
from sdnet.train.errors import UserError


@dataclass(frozen=True)
class Load:
    """What a loader is asked for."""

    images: ImageSet
    batch: int
    image_size: int
    threads: int
    device: torch.device


Batches = Iterable[Any]
Opener = Callable[[Load], Batches]


def dali(load: Load, device: torch.device) -> Batches:
    """The training loader of `sdnet.train`, decoding on this device."""
    from sdnet.train.data.dali import DaliLoader

    return DaliLoader(
        load.images,
        batch=load.batch,
        size=load.image_size,
        augment=True,
        device=device,
        threads=load.threads,
        channels_last=True,
    )


def dali_gpu(load: Load) -> Batches:
    """DALI decoding on the GPU."""
    if load.device.type != "cuda":
        raise NotImplementedError("there is no GPU to decode on.")
    return dali(load, load.device)


def pil(load: Load) -> Batches:
    """PIL in as many worker processes as there are threads."""
    from sdnet.bench.picture_loader import picture_loader

    return picture_loader(load.images, load.batch, load.image_size, load.threads)


LOADERS: dict[str, Opener] = {
    "dali_cpu": lambda load: dali(load, torch.device("cpu")),
    "dali_gpu": dali_gpu,
    "pil": pil,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="an ImageFolder tree; its training set is read")
    parser.add_argument("--loader", nargs="+", choices=LOADERS, default=list(LOADERS), help="default all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="or workers; default 1 2")
    parser.add_argument("--batch", type=int, default=64, help="default 64")
    parser.add_argument("--image-size", type=int, default=224, help="pixels; default 224")
    parser.add_argument(
        "--images", type=int, default=1024, help="least size of an epoch: a folder repeats; default 1024"
    )
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each loader; default 3")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every loader with every number of threads."""
    device, ledger = open_ledger(options, "load")
    images = repeated(read_image_folder(options.data)[0], max(options.images, 2 * options.batch))
    print(f"Epochs of {len(images)} pictures.")
    loads = [
        (name, Load(images, options.batch, options.image_size, threads, device))
        for threads in options.threads
        for name in options.loader
    ]
    samples: dict[int, list[Round]] = {}
    reasons: dict[int, str] = {}
    for _ in range(options.rounds):
        for place, (name, load) in enumerate(loads):
            try:
                samples.setdefault(place, []).append(measure_round(LOADERS[name], load))
            except (NotImplementedError, ModuleNotFoundError) as error:
                reasons[place] = str(error)
    for place, (name, load) in enumerate(loads):
        shape = {"batch": load.batch, "image_size": load.image_size, "threads": load.threads, "images": len(images)}
        if place in reasons:
            ledger.add(name, "load", shape, status="unsupported", reason=reasons[place])
            continue
        measured = percentiles([sample.ms_per_batch for sample in samples[place]])
        cpu = percentiles([sample.cpu_ms_per_image for sample in samples[place]]).p50
        metrics = {"images_per_second": 1e3 * load.batch / measured.p50, "cpu_ms_per_image": cpu}
        ledger.add(name, "load", shape, time_ms=measured._asdict(), metrics=metrics)
    print("\n" + loading_table(ledger.rows))
    trained = [row for _, row in read(options.out) if row.theme == "train"]
    print("\n" + "\n".join(feeding_lines(ledger.rows, trained)))
    print(f"\n{len(ledger.rows)} rows in {ledger.path}")
    return 0


@dataclass(frozen=True)
class Round:
    """One epoch: wall milliseconds of a batch, processor milliseconds of an image."""

    ms_per_batch: float
    cpu_ms_per_image: float


def measure_round(opener: Opener, load: Load) -> Round:
    """Open, read an epoch, close."""
    cpu = processor_seconds()
    count, begin, first = 0, 0.0, 0
    for images, _ in full_batches(opener(load)):
        count += len(images)
        if not begin:
            begin, first = time.perf_counter(), count
    if load.device.type == "cuda":
        torch.cuda.synchronize(load.device)
    spent = time.perf_counter() - begin
    if count == first:
        raise UserError(f"The epoch has {count} pictures, a single batch: too few to time.")
    return Round(1e3 * spent * load.batch / (count - first), 1e3 * (processor_seconds() - cpu) / count)


def full_batches(batches: Batches) -> Iterator[Any]:
    """The batches; the loader's threads and workers are gone when they end."""
    yield from batches
    close = getattr(batches, "close", None)
    if close is not None:
        close()


def processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def repeated(images: ImageSet, least: int) -> ImageSet:
    """The set, as often as it takes to have `least` pictures."""
    times = -(-least // len(images))
    return replace(images, files=list(images.files) * times, labels=list(images.labels) * times)
