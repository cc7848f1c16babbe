"""Dask's scheduler and worker as programs: python -m dask_process scheduler|worker ARGUMENT…

A nanny forks its worker, so that the worker has whatever this process has imported, and finds functions of the test
modules.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import dask

if __name__ == "__main__":
    sys.path += [str(path) for path in Path(__file__).parent.rglob("*") if path.is_dir()]
    dask.config.refresh()  # what the environment says: the server has read its own
    dask.config.set({"distributed.worker.multiprocessing-method": "fork"})
    importlib.import_module(f"distributed.cli.dask_{sys.argv[1]}").main(sys.argv[2:])
