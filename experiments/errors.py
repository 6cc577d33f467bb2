"""Errors that the user can correct; the commands print them in one line, without a traceback."""


class UserError(Exception):
    """A mistake of the user: the message says what was expected, what was received and what to do.

    The command ends with the exit code ``code``.
    """

    code = 2


class RunStoppedError(UserError):
    """A run that cannot continue although its settings are valid."""

    code = 1
