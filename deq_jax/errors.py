"""The exceptions that a command shows as one sentence instead of a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the person who launched the run can mend; the message says what and how."""


class Diverged(UsageError):
    """Training was ended because too many updates in a row had a loss or gradient not finite."""


class Interrupted(Exception):  # noqa: N818 - a request that was obeyed, not an error
    """The run was asked to stop, has saved a checkpoint, and can be resumed.

    Attributes:
      signal_number: the signal that asked for it; a shell sees exit code 128 + this number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
