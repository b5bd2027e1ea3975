"""The errors a user can cause, and the one shape their texts have.

Every text says what is wrong, the value, where (file:line or row) and what to do, in one paragraph.
The command line prints these without a traceback and exits with 1; anything else is a fault of ours.
"""

from __future__ import annotations


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
