"""Errors that a user can cause. Shown as one message without a traceback (see `fastft.cli.guard`)."""


class FastftError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""


class ConfigError(FastftError):
    """The configuration is wrong; the message lists every problem, one a line."""


class DataError(FastftError):
    """A data file or dataset is missing, empty or malformed."""


class ModelError(FastftError):
    """A model, adapter or tokenizer cannot be loaded or does not fit."""


class NonFiniteLossError(FastftError):
    """The loss or the gradient is inf or nan."""


class Interrupted(FastftError):
    """The run was stopped by a signal after a checkpoint was written."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
