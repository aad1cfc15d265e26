"""What the processes of one run do together: fail with one sentence, be equal, and notice that one of them is lost."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from sdnet.train.errors import LostProcessError, UserError

Result = TypeVar("Result")

START_TIMEOUT = timedelta(days=1)
"""How long processes wait for each other before the first step: for the check of all images, above all."""


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Let the main process do something while the others wait.

    Raises:
        UserError: It could not; all processes raise the same sentence.
    """
    sentence = ""
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            if accelerator.num_processes == 1:
                raise
            sentence = str(error)
    if accelerator.num_processes > 1:
        sentence = broadcast_object_list([sentence])[0]
    if sentence:
        raise UserError(sentence)


def on_all(accelerator: Accelerator, action: Callable[[], Result], first: bool = False) -> Result:
    """Do something in every process and return this process's result.

    Args:
        accelerator: The processes.
        action: What to do.
        first: Whether the first process of each machine does it before the others.

    Raises:
        UserError: Some process could not; all raise the sentence of the first that could not.
    """
    if accelerator.num_processes == 1:
        return action()
    result: Result | None = None
    sentence = ""
    if first and not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        result = action()
    except UserError as error:
        sentence = str(error)
    if first and accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    sentences: list[str] = gather_object([sentence])
    for rank, said in enumerate(sentences):
        if said:
            raise UserError(said if sentences[0] else f"In process {rank}: {said}")
    return result  # pyright: ignore[reportReturnType]


def check_equal(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Check that something is the same in all processes, on whatever machine they run.

    Args:
        accelerator: The processes.
        facts: What must be equal, by the name that the message uses.

    Raises:
        UserError: Something differs; all processes raise the same sentence.
    """
    everywhere: list[dict[str, Any]] = gather_object([dict(facts)])
    for rank, others in enumerate(everywhere):
        for name, value in everywhere[0].items():
            if others.get(name) != value:
                raise UserError(
                    f"The processes of the run differ: {name} is {_shown(value)} in process 0 and "
                    f"{_shown(others.get(name))} in process {rank}."
                )


def set_timeout(seconds: float) -> None:
    """Let a process wait so long for the others, from now on."""
    if torch.distributed.is_initialized():
        from torch.distributed.distributed_c10d import _set_pg_timeout

        _set_pg_timeout(timedelta(seconds=seconds))


@contextmanager
def naming_lost_process(accelerator: Accelerator, timeout: float, kept: str) -> Iterator[None]:
    """Turn what torch raises when another process ended or does not answer into one sentence.

    Args:
        accelerator: The processes.
        timeout: How many seconds they wait for each other.
        kept: What is left to resume from, as the end of the sentence.

    Raises:
        LostProcessError: Another process is lost.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _is_of_a_collective(error):
            raise
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = f"did not answer within {timeout:g} seconds (--timeout)" if late else "has ended"
        raise LostProcessError(
            f"Process {accelerator.process_index} cannot go on: another process of the run {what}; {kept}."
        ) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer")
    )


def _shown(value: Any) -> str:
    return str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}..."
