"""`load`: images per second of the loaders by source and threads, and the CPU time of an image.

All loaders are opened, then read one epoch after the other in turns. Workers last from one epoch to the next, and the
first epoch, which starts them, is not counted. What every epoch costs is counted, such as a new pipeline of DALI. CPU
time is that of this process and of its workers.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sdnet.bench.common_options import add_common_options, at_least, open_ledger
from sdnet.bench.ledger import Ledger, print_outcome, read
from sdnet.bench.tables import loading_and_training, loading_table
from sdnet.kernels.qualify.timing import percentiles
from sdnet.train.data.cifar import Arrays, decode_all, read_small_pictures
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.resident import ResidentLoader
from sdnet.train.data.shards import TarSet
from sdnet.train.data.sources import read_pictures
from sdnet.train.errors import UserError

SMALL = 32
"""A folder whose first picture is at most this wide is decoded once and kept in memory, as CIFAR is."""


@dataclass(frozen=True)
class Source:
    """A training set: files of a folder, members of tar shards, or small pictures in memory."""

    label: str
    kind: Literal["folder", "shards", "resident"]
    pictures: ImageSet | Arrays


@dataclass(frozen=True)
class LoadRequest:
    """What a loader reads and returns; pictures in memory keep their own size."""

    source: Source
    batch: int
    image_size: int
    threads: int
    device: torch.device

    @property
    def images(self) -> ImageSet:
        """The pictures of a source on disk."""
        assert isinstance(self.source.pictures, ImageSet)
        return self.source.pictures

    @property
    def arrays(self) -> Arrays:
        """The pictures of a source in memory."""
        assert isinstance(self.source.pictures, Arrays)
        return self.source.pictures


Batches = Iterable[Any]
Opener = Callable[[LoadRequest], Batches]


def dali(load: LoadRequest, device: torch.device) -> Batches:
    """Return the training loader of `sdnet.train`, decoding on this device."""
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


def dali_gpu(load: LoadRequest) -> Batches:
    """Return the training loader, decoding on the GPU."""
    if load.device.type != "cuda":
        raise NotImplementedError("there is no GPU to decode on.")
    return dali(load, load.device)


def pil(load: LoadRequest) -> Batches:
    """Return a loader by PIL with as many worker processes as threads were asked for."""
    from sdnet.bench.picture_loader import picture_loader

    return picture_loader(load.images, load.batch, load.image_size, load.threads)


def resident(load: LoadRequest) -> Batches:
    """Return the training loader of small pictures; on a CPU it uses the threads of PyTorch."""
    images, labels = load.arrays.images, load.arrays.labels
    return ResidentLoader(
        images,
        labels,
        name=load.source.label,
        digest="",
        batch=load.batch,
        augment=True,
        device=load.device,
        channels_last=True,
    )


LOADERS: dict[str, Opener] = {
    "dali_cpu": lambda load: dali(load, torch.device("cpu")),
    "dali_gpu": dali_gpu,
    "pil": pil,
    "resident": resident,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="[LABEL=]DIR",
        help="a data folder of train/imagenet.py or train/cifar.py, whose training set is read; the label is the "
        "name of the folder unless given; ratios are to the first folder",
    )
    parser.add_argument("--loader", nargs="+", choices=LOADERS, default=list(LOADERS), help="default all that fit")
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1, 2], help="or workers; default 1 2")
    parser.add_argument("--batch", type=at_least(1), default=64, help="default 64")
    parser.add_argument(
        "--image-size", type=at_least(1), default=224, help="pixels; default 224; pictures in memory keep theirs"
    )
    parser.add_argument(
        "--images", type=at_least(1), default=1024, help="least size of an epoch: files and shards repeat; default 1024"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="epochs of each loader, after one to warm up; default 5"
    )
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every loader on every source that it can read, with every number of threads."""
    sources = [open_source(text, max(options.images, 2 * options.batch)) for text in options.data]
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        raise UserError(f"--data needs different labels, LABEL=DIR; these are {', '.join(labels)}.")
    fitting = [
        (name, source, threads)
        for threads in options.threads
        for source in sources
        for name in options.loader
        if (name == "resident") == (source.kind == "resident")
    ]
    if not fitting:
        raise UserError(f"None of the loaders {', '.join(options.loader)} can read {', '.join(labels)}.")
    for source in sources:
        if (count := len(source.pictures.labels)) < options.batch:
            raise UserError(f"--batch is {options.batch}; {source.label} has {count} pictures.")
    device, ledger = open_ledger(options, "load")
    loads = [
        (name, LoadRequest(source, options.batch, size_of(source, options.image_size), threads, device))
        for name, source, threads in fitting
    ]
    for source in sources:
        count = len(source.pictures.labels)
        print(f"{source.label}: epochs of {count} pictures, {source.kind}.")
    measure(loads, options.rounds, ledger)
    print("\n" + loading_table(ledger.rows))
    trained = [row for _, row in read(options.out) if row.theme == "train"]
    print("\n" + "\n".join(loading_and_training(ledger.rows, trained)) + "\n")
    return print_outcome(ledger)


def open_source(text: str, least: int) -> Source:
    """Return the training set of [LABEL=]DIR, repeated to `least` pictures unless it is kept in memory.

    Raises:
        UserError: There is no training set.
    """
    label, sign, place = ("", "", "") if Path(text).exists() else text.partition("=")
    root = Path(place if sign else text)
    label = label if sign else root.resolve().name
    try:
        images = read_pictures(root)[0]
    except UserError:  # official CIFAR data, or the same sentence again
        return Source(label, "resident", read_small_pictures(root).train)
    if first_width(images) <= SMALL:
        return Source(label, "resident", decode_all(images))
    return Source(label, "shards" if isinstance(images, TarSet) else "folder", repeated(images, least))


def first_width(images: ImageSet) -> int:
    """Return the width of the first picture."""
    return decode_all(images.select([0])).images.shape[3]


def size_of(source: Source, wanted: int) -> int:
    """Return the height of the images of a batch."""
    return source.pictures.images.shape[2] if isinstance(source.pictures, Arrays) else wanted


def repeated(images: ImageSet, least: int) -> ImageSet:
    """Return the set, repeated until it has at least `least` pictures."""
    return images.select(list(range(len(images))) * -(-least // len(images)))


@dataclass(frozen=True)
class Epoch:
    """Milliseconds of a batch, and CPU milliseconds of an image."""

    ms_per_batch: float
    cpu_ms_per_image: float


def measure(loads: list[tuple[str, LoadRequest]], rounds: int, ledger: Ledger) -> None:
    """Read epochs of the loaders in turns, and add a row for each loader."""
    opened: list[tuple[str, LoadRequest, Batches, list[Epoch]]] = []
    for name, load in loads:
        try:
            opened.append((name, load, LOADERS[name](load), []))
        except (NotImplementedError, ModuleNotFoundError) as error:
            ledger.add(name, "load", **facts_of(load), status="unsupported", reason=str(error))
    threads = torch.get_num_threads()
    try:
        for _ in range(rounds + 1):
            for _, load, batches, epochs in opened:
                torch.set_num_threads(load.threads)
                epochs.append(measure_epoch(batches, load))
    finally:
        torch.set_num_threads(threads)
    for name, load, _, epochs in opened:
        measured = percentiles([epoch.ms_per_batch for epoch in epochs[1:]])
        cpu = percentiles([epoch.cpu_ms_per_image for epoch in epochs[1:]]).p50
        metrics = {"images_per_second": 1e3 * load.batch / measured.p50, "cpu_ms_per_image": cpu}
        ledger.add(name, "load", **facts_of(load), time_ms=measured._asdict(), metrics=metrics)


def facts_of(load: LoadRequest) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    count = len(load.source.pictures.labels)
    shape = {"batch": load.batch, "image_size": load.image_size, "threads": load.threads, "images": count}
    return {"shape": shape, "settings": {"source": load.source.kind, "data": load.source.label}}


def measure_epoch(batches: Batches, load: LoadRequest) -> Epoch:
    """Read an epoch and return its times."""
    cpu, begin = processor_seconds(), time.perf_counter()
    count = sum(len(images) for images, _ in batches)
    if load.device.type == "cuda":
        torch.cuda.synchronize(load.device)
    spent = time.perf_counter() - begin
    return Epoch(1e3 * spent * load.batch / count, 1e3 * (processor_seconds() - cpu) / count)


def processor_seconds() -> float:
    """Return the CPU time of this process, of its workers, and of those that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    workers = sum(worker_seconds(worker.pid) for worker in multiprocessing.active_children())
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + workers


def worker_seconds(pid: int | None) -> float:
    """Return the CPU time of a running process, as Linux counts it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
