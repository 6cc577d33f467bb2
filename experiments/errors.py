"""Errors that are the user's to mend: one line, no traceback."""


class UserError(Exception):
    """What was expected, what came and what to do; ends the command with ``code``."""

    code = 2


class RunStoppedError(UserError):
    """A run that cannot go on, though nothing was misspelt."""

    code = 1
