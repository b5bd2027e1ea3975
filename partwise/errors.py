"""The errors a user can cause, and the one shape their texts have.

Every text says what is wrong, the value, where (file:line or row) and what to do, in one paragraph.
The command line prints these without a traceback and exits with 1; anything else is a fault of ours.
"""

from __future__ import annotations

import signal


class UserError(Exception):
    """A fault that the user can mend: printed as text, exit code 1."""


class ConfigError(UserError):
    """The config, or a command's arguments, cannot be what was meant."""


class DataError(UserError):
    """A data file, a row or an image cannot be used."""


class PlanError(UserError):
    """The parts, modes or layers asked for do not fit the model."""


class CheckpointError(UserError):
    """A model, adapter or run folder is missing something, broken or the wrong one."""


class TrainingError(UserError):
    """Training cannot go on: a non-finite loss, a trainable tensor without gradient, a full disk."""


class StoppedError(BaseException):
    """SIGTERM or SIGINT ended a run at a step's end; `signal` is which. The text says how to go on.

    No Exception, as KeyboardInterrupt is none: code that tries the next run on an error must not go on.
    """

    def __init__(self, text: str, number: signal.Signals) -> None:
        super().__init__(text)
        self.signal = number
