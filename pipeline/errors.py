"""What can go wrong, each kind also a built-in exception.

Every message says what was expected, what was found and what to do; the command line prints it as it is.
"""


class IceboxError(Exception):
    """Anything a person can mend: the command line prints its text on one line and exits with 1."""


class UsageError(IceboxError, ValueError):
    """An option or argument that cannot be meant: the command line exits with 2."""


class SpecError(IceboxError, ValueError):
    """A feature space that is not the one asked for, or settings that contradict each other."""


class DatasetError(IceboxError, ValueError):
    """A dataset that cannot be listed: no such folder, a malformed manifest, a wrong archive."""


class DecodeError(IceboxError, ValueError):
    """Bytes that are not one whole image. The text is the reason alone, short enough for a table."""


class WeightsError(IceboxError, OSError):
    """Weights that cannot be had, or do not fit the backbone."""


class CacheError(IceboxError, OSError):
    """The cache on disk is damaged, locked, full or not writable."""


class MissingRowsError(CacheError, LookupError):
    """Features that were asked for are not in the cache."""


class RunError(IceboxError, OSError):
    """A run directory that cannot be written or read."""
