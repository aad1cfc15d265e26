"""Errors that a user can cause and correct."""


class UserError(Exception):
    """Wrong input from the user: the message is one clear sentence, shown without a traceback."""


class NonFiniteLossError(UserError):
    """A loss or a weight became infinite or NaN."""


class DataError(UserError):
    """An image could not be read during the run; only the process that met it can report it.

    Attributes:
        image: The image as messages name it; empty if it is not known.
        reason: What is wrong with it.
    """

    def __init__(self, message: str, image: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.image, self.reason = image, reason


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer; each process that is left reports it."""
