"""Every error a user can cause or meet. Each message says what, where, and what to do."""


class TunesmithError(Exception):
    """The root. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(TunesmithError):
    """A flag, a recipe or a name that cannot be right."""

    exit_code = 2


class DataError(TunesmithError):
    """Training data that cannot be read, or holds nothing to train on."""

    exit_code = 3


class ModelError(TunesmithError):
    """Model files that are missing, broken, or not safe to load."""

    exit_code = 4


class DownloadError(TunesmithError):
    """A download that failed, was refused, or did not verify."""

    exit_code = 5


class RunError(TunesmithError):
    """A run folder that is missing, locked, broken, or does not fit what was asked."""

    exit_code = 6


class TrainingError(TunesmithError):
    """Training that cannot start or cannot go on."""

    exit_code = 7


class EngineError(TunesmithError):
    """An inference engine that did not start or died."""

    exit_code = 8


class EvaluationError(TunesmithError):
    """A standard task whose data cannot be fetched, or that does not run."""

    exit_code = 9
