"""The errors a user can cause and mend. The command line prints their message alone, without a traceback."""


class DejavuError(Exception):
    """Base of all errors that say what was wrong, what was expected and the way out."""


class ConfigError(DejavuError):
    """A configuration value that cannot work; the message names its key."""


class DataError(DejavuError):
    """A file or table that does not hold what it must; the message names the file and the row or column."""


class WeightsError(DejavuError):
    """Model weights that are missing or do not fit the architecture; the message names both."""
