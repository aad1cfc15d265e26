"""What a run records about images that cannot be used, so that a resume trains on the same ones.

`bad_images.jsonl` in the run folder has one line for each event: an image was left out at the start, broke during the
run, or is left out from a step on. Images are named relative to the data folder.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdnet.train.data.names import printable
from sdnet.train.errors import DataError

if TYPE_CHECKING:  # they import this module
    from sdnet.train.checkpoint import TrainState
    from sdnet.train.data.loader import Data
    from sdnet.train.run_folder import RunFolder

NAME = "bad_images.jsonl"


@dataclass(frozen=True)
class BadImages:
    """The images that a run has recorded, each with the reason.

    Attributes:
        at_start: Those left out when the run began; they do not belong to its data.
        broken: Those that broke during the run and ended it.
        dropped: Those that a resume left out; they keep their places in the data.
    """

    at_start: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def read_bad_images(run: Path) -> BadImages:
    """Return what is recorded in a run folder; a line that a crash cut off is left out."""
    kinds: dict[str, dict[str, str]] = {"at_start": {}, "broken": {}, "dropped": {}}
    try:
        lines = (run / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            event = json.loads(line)
            kinds[event["event"]][event["image"]] = event["reason"]
        except (ValueError, KeyError, TypeError):
            continue
    return BadImages(**kinds)


def note_bad_images(run: Path, event: str, images: Iterable[tuple[str, str]], **facts: Any) -> None:
    """Append an event for each image.

    Args:
        run: The run folder.
        event: "at_start", "broken" or "dropped".
        images: (image, reason).
        facts: What else is worth knowing, such as the step.
    """
    lines = [json.dumps({"event": event, "image": image, "reason": reason, **facts}) for image, reason in images]
    if lines:
        with (run / NAME).open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def image_key(name: str, root: str) -> str:
    """Return the name of an image relative to the data folder, both as in messages."""
    return name.removeprefix(root).lstrip("/")


def record_bad_images(run: "RunFolder", data: "Data", resume: bool, step: int) -> None:
    """Record the images that a run leaves out, as lists for people and for a later resume.

    Args:
        run: The run folder.
        data: The data of this start or resume.
        resume: Whether the run is resumed.
        step: The step from which on they are left out.
    """
    run.note_left_out(data.left_out)
    if not resume:
        (run.path / NAME).unlink(missing_ok=True)
        note_bad_images(run.path, "at_start", data.bad_images)
    known = read_bad_images(run.path).dropped
    note_bad_images(run.path, "dropped", [image for image in data.dropped if image[0] not in known], step=step)


@contextmanager
def noting_broken_image(run: "RunFolder", data: Path, state: "TrainState") -> Iterator[None]:
    """Record an image that breaks during a run, so that a resume can leave it out.

    Args:
        run: The run folder.
        data: The data folder.
        state: Where the run stands.

    Raises:
        DataError: An image broke; the message says how to go on.
    """
    try:
        yield
    except DataError as error:
        if not error.image:
            raise
        key = image_key(error.image, printable(data))
        with suppress(OSError):
            note_bad_images(run.path, "broken", [(key, error.reason)], step=state.step)
        raise DataError(f"{error} Repair it, or resume with --bad-files skip to leave it out.") from error
