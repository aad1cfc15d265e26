"""Settings that a loader does not use are refused, so that no run records what had no effect."""

from collections.abc import Mapping

from sdnet.train.errors import UserError
from sdnet.train.job import Job


def refuse_unused(job: Job, program: str, reasons: Mapping[str, str]) -> None:
    """Check that settings which have no effect keep their defaults.

    Args:
        job: The job.
        program: The name of the program, for the message.
        reasons: The settings of `Job` and `Recipe` that the program's loader does not use, and what does instead.

    Raises:
        UserError: One of them has another value.
    """
    for name, reason in reasons.items():
        owner = job if hasattr(job, name) else job.recipe
        value, default = getattr(owner, name), type(owner).__dataclass_fields__[name].default
        if value != default:
            raise UserError(f"{name} is {value}, which has no effect in {program}: {reason}.")
