"""The exceptions of Icebox, most of which also derive from a built-in exception.

Every message says what was expected, what was found and what to do. The command line prints it unchanged.
"""

import difflib
import errno
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean …?" with the most similar of `names`, or "" if none is similar to `name`."""
    lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def exhausted(error: BaseException) -> str | None:
    """Return which resource ran out and what to do, if `error` means that (memory, threads, open files); else None."""
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
        return exhausted(error.__cause__)  # some libraries wrap the cause in long general advice
    if isinstance(error, MemoryError) or number == errno.ENOMEM or unmapped:
        return f"there is no more memory ({text}): {MORE_MEMORY}"
    if type(error).__name__ == "ResourceExhaustedError":  # TensorFlow's class, compared by name to avoid its import
        return f"there is no more memory for TensorFlow ({text}): a smaller --batch-size takes less; {MORE_MEMORY}"
    return None


MORE_MEMORY = "end other programs, or raise the limit of this one (ulimit -v, or its container's)"
MORE_THREADS = "end other programs of this user, or raise the limit (ulimit -u, or its container's)"


class IceboxError(Exception):
    """Base class of errors that the user can correct. The command line prints the text on one line and exits with 1."""


class StoppedError(IceboxError):
    """The program was stopped by Ctrl-C or a batch system. The text says what is kept, and how to continue."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        """Make the text from the notes (PEP 678) that interrupted functions added to `stop`."""
        notes = getattr(stop, "__notes__", None) or ["to go on, run the same command again"]
        super().__init__("; ".join(["stopped", *notes]))


class UsageError(IceboxError, ValueError):
    """An option or argument is not valid. The command line exits with 2."""


class DoNotFitError(UsageError):
    """The requested data do not fit into the allowed memory."""


class SpecError(IceboxError, ValueError):
    """A feature space is not the requested one, or settings contradict each other."""


class DatasetError(IceboxError, ValueError):
    """A dataset cannot be listed: the folder is missing, the manifest is malformed, or the archive is a wrong one."""


class DecodeError(IceboxError, ValueError):
    """The bytes are not one complete image. The text is the reason only, short enough for a table."""


class WeightsError(IceboxError, OSError):
    """Weights are not available, or do not fit the backbone."""


class CacheError(IceboxError, OSError):
    """The cache on disk is damaged, locked, full or not writable."""


class IndexDamagedError(CacheError):
    """The index is damaged. The file `path` is moved aside, and a new index is derived from the shards.

    `certain` if the content is impossible although SQLite's check may pass; `foreign` if the file may never have been
    an index of Icebox.
    """

    def __init__(self, path: Path, reason: str, *, certain: bool = False, foreign: bool = False) -> None:
        self.path = path
        self.certain = certain
        self.foreign = foreign
        self.reason = reason
        self.text = f"the index {path} is damaged ({reason})"
        super().__init__(f"{self.text}; delete it, it is derived again from the shards")


class ShardDamagedError(CacheError):
    """A shard is damaged and must not be read. `problem` describes the damage, without the path."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        self.problem = problem
        remedy = "run `cache verify --read-data --repair`, then `features`: only its rows are computed anew"
        super().__init__(f"shard {path} {problem}; {remedy}")


class ShardUnreadableError(CacheError):
    """A shard cannot be read, but may be undamaged. `problem` is the reason, without the path.

    `from_disk` if the disk failed (EIO). Other reasons are missing permission or too many open files.
    """

    def __init__(self, path: Path, reason: str, *, from_disk: bool) -> None:
        self.path = path
        self.problem = f"cannot be read ({reason})"
        self.from_disk = from_disk
        super().__init__(f"shard {path} {self.problem}; see its permissions, and the state of the disk")


class MissingRowsError(CacheError, LookupError):
    """Requested features are not in the cache."""


class MissingFeaturesError(MissingRowsError):
    """Features of a dataset are not in the cache; `features` can compute them.

    Parameters
    ----------
    problem
        Which features are missing, and where.
    lacking
        Indices of the requested feature spaces that lack rows; (0,) if only one was requested.

    Attributes
    ----------
    options
        For each of `lacking`, the options of `features` that compute the rows; set by `Icebox`.
    commands
        The same as shell commands; set by the command line.
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
    """Features of some of several backbones are not in the cache; `commands` lists the command for each of them."""

    def __str__(self) -> str:
        return self.problem


class RunError(IceboxError, OSError):
    """A run directory cannot be written or read."""


class CheckpointError(RunError):
    """A stopped training cannot be resumed from its checkpoint."""


class InterruptedComputationError(IceboxError):
    """The connection to the Dask scheduler was lost; published shards are kept.

    Calling `recover` connects to another scheduler, or raises an error with the reason why that is not possible.
    """

    def __init__(self, text: str, recover: Callable[[], None]) -> None:
        self.recover = recover
        super().__init__(text)


class UnfitWorkerError(IceboxError):
    """A worker process lacks a file, a folder or a package, or has another version of it.

    The text names the difference, not the worker.
    """


def read_failure(error: OSError) -> str:
    """Return the reason to list for a file that could not be read. Such failures are never stored in the index."""
    return f"cannot be read: {error.strerror or error}"
