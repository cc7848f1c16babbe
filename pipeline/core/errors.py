"""What can go wrong, each kind also a built-in exception.

Every message says what was expected, what was found and what to do; the command line prints it as it is.
"""

import difflib
import errno
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean …?" with the one of `names` that is nearly `name`, or "" if none is."""
    lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def exhausted(error: BaseException) -> str | None:
    """Return what ran out and what to do, if an error of Python or of a library says that; None if it is another."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, FileNotFoundError) and "usable temporary directory" in text:
        return "no folder takes temporary files: set TMPDIR to one that can be written, with room in it"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"no more files may be opened ({text}): raise the limit (ulimit -n)"
    if (number == errno.EAGAIN and "lock" not in text) or (
        isinstance(error, RuntimeError) and "can't start new thread" in text
    ):
        return f"no more threads or processes may be started ({text}): {MORE_THREADS}"
    unmapped = isinstance(error, ImportError) and ("failed to map segment" in text or "allocate memory" in text)
    if isinstance(error, ImportError) and not unmapped and isinstance(error.__cause__, ImportError | MemoryError):
        return exhausted(error.__cause__)  # some libraries put pages of advice before it
    if isinstance(error, MemoryError) or number == errno.ENOMEM or unmapped:
        return f"there is no more memory ({text}): {MORE_MEMORY}"
    if type(error).__name__ == "ResourceExhaustedError":  # TensorFlow's, which is not imported for this
        return f"there is no more memory for TensorFlow ({text}): a smaller --batch-size takes less; {MORE_MEMORY}"
    return None


MORE_MEMORY = "end other programs, or raise the limit of this one (ulimit -v, or its container's)"
MORE_THREADS = "end other programs of this user, or raise the limit (ulimit -u, or its container's)"


class IceboxError(Exception):
    """Anything a person can mend: the command line prints its text on one line and exits with 1."""


class StoppedError(IceboxError):
    """The program was told to stop: by Ctrl-C, or by a batch system. The text says what is kept, and how to go on."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        """Say what those who were interrupted noted on `stop`, each in a sentence without its end."""
        notes = getattr(stop, "__notes__", None) or ["to go on, run the same command again"]
        super().__init__("; ".join(["stopped", *notes]))


class UsageError(IceboxError, ValueError):
    """An option or argument that cannot be meant: the command line exits with 2."""


class DoNotFitError(UsageError):
    """More must be in memory than may be."""


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


class IndexDamagedError(CacheError):
    """The index cannot be read any more. `path` is the file, to be set aside; it is derived again.

    `certain` if what it holds cannot be, though SQLite finds no fault; `foreign` if it may never have been one.
    """

    def __init__(self, path: Path, reason: str, *, certain: bool = False, foreign: bool = False) -> None:
        self.path = path
        self.certain = certain
        self.foreign = foreign
        self.reason = reason
        self.text = f"the index {path} is damaged ({reason})"
        super().__init__(f"{self.text}; delete it, it is derived again from the shards")


class ShardDamagedError(CacheError):
    """A shard that is not to be read from. `problem` is what is wrong with it, without its path."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        self.problem = problem
        remedy = "run `cache verify --read-data --repair`, then `features`: only its rows are computed anew"
        super().__init__(f"shard {path} {problem}; {remedy}")


class ShardUnreadableError(CacheError):
    """A shard that may be whole, but cannot be read. `problem` is why, without its path.

    `from_disk` if the disk does not give it back; else permission is lacking, or there are too many open files.
    """

    def __init__(self, path: Path, reason: str, *, from_disk: bool) -> None:
        self.path = path
        self.problem = f"cannot be read ({reason})"
        self.from_disk = from_disk
        super().__init__(f"shard {path} {self.problem}; see its permissions, and the state of the disk")


class MissingRowsError(CacheError, LookupError):
    """Features that were requested are not in the cache."""


class MissingFeaturesError(MissingRowsError):
    """Features of a dataset are not in the cache, and `features` computes them.

    Parameters
    ----------
    problem
        What is missing, where.
    lacking
        Which of the requested feature spaces lack rows, as indices; 0 where there is one.

    Attributes
    ----------
    options
        For each of `lacking` the options of `features` that compute the rows; set by `Icebox`.
    commands
        The same as lines to type; set by the command line.
    """

    def __init__(self, problem: str, lacking: Iterable[int] = (0,)) -> None:
        self.problem = problem
        self.lacking = tuple(lacking)
        self.options: tuple[Mapping[str, Any], ...] = ()
        self.commands: tuple[str, ...] = ()
        super().__init__(problem)

    def __str__(self) -> str:
        how = f"make them by: {self.commands[0]}" if self.commands else f"compute them by {self._call()}"
        return f"{self.problem}; {how} (`cache explain` tells why)"

    def _call(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in (self.options[0] if self.options else {}).items())
        return f"Icebox.features({given})"


class MissingBackbonesError(MissingFeaturesError):
    """Features of some of several backbones are not in the cache; what to do stands in `commands`, one a line."""

    def __str__(self) -> str:
        return self.problem


class RunError(IceboxError, OSError):
    """A run directory that cannot be written or read."""


class CheckpointError(RunError):
    """What a stopped training left cannot be gone on with."""


class InterruptedComputationError(IceboxError):
    """Whoever gave work out was lost, with nothing that was published. `recover` finds another, or raises why not."""

    def __init__(self, text: str, recover: Callable[[], None]) -> None:
        self.recover = recover
        super().__init__(text)


class UnfitWorkerError(IceboxError):
    """A process that was to compute lacks something or has another version of it; the text says what, not where."""


def read_failure(error: OSError) -> str:
    """Return the reason to list for a file that could not be read; such a failure is never remembered."""
    return f"cannot be read: {error.strerror or error}"
