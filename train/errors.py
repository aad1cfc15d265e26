"""Errors that a user can cause and mend."""


class UserError(Exception):
    """Wrong input from the user: the message is one clear sentence, shown without a traceback."""


class NonFiniteLossError(UserError):
    """The training loss became infinite or NaN."""


class DataError(UserError):
    """A picture broke during the run: on one process alone, which must say so itself."""
