"""Keras weights files are read and written where there are no locks, whatever HDF5 is told of that from outside."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, Finished, environment

from pipeline.core.errors import IceboxError
from pipeline.core.spec import HeadSpec
from pipeline.training import heads
from pipeline.training.heads.dense import DenseHead, build


def python(script: str, *arguments: str | Path, **env: str) -> Finished:
    command = [sys.executable, "-c", f"import sys\nfrom pathlib import Path\n{script}", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(**env), timeout=300, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def test_without_locks_hdf5_locks_nothing_whatever_its_own_setting_says(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(3)
    script = "import pipeline, h5py\nprint(h5py.File(sys.argv[1])['x'][2], h5py.File(sys.argv[1], locking=False).mode)"
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # HDF5 meets what it meets where there are no locks: it is not given one
        assert "unable to lock file" in python(script, path).err
        for own in ("TRUE", "FALSE", "BEST_EFFORT"):
            done = python(script, path, ICEBOX_LOCKS="off", HDF5_USE_FILE_LOCKING=own)
            assert (done.code, done.out) == (0, "2 r\n"), done.err
        assert python(script, path, ICEBOX_LOCKS="on").code == 1


_AGAIN = """
from pipeline.training import heads
head = heads.load(Path(sys.argv[1]))
head.save(Path(sys.argv[1]))
print(head.parameters)
"""


def test_a_head_is_read_and_written_where_there_are_no_locks(tmp_path: Path) -> None:
    spec = HeadSpec.make("gap", hidden="none")
    DenseHead(build(spec, (8,), 3), spec).save(tmp_path)
    path = tmp_path / "head.weights.h5"
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(IceboxError) as refused:
            heads.load(tmp_path)
        assert f"{path} cannot be locked (Resource temporarily unavailable)" in str(refused.value)
        assert "ICEBOX_LOCKS=off goes on without" in str(refused.value)
        done = python(_AGAIN, tmp_path, ICEBOX_LOCKS="off")
        assert (done.code, done.out) == (0, "27\n"), done.err
    assert heads.load(tmp_path).parameters == 27
