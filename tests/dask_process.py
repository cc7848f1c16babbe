"""Dask's scheduler and worker as programs: python -m dask_process scheduler|worker ARGUMENT…

A nanny forks its worker, so that it has whatever this process has imported.
"""

from __future__ import annotations

import importlib
import sys

import dask

if __name__ == "__main__":
    dask.config.refresh()  # what the environment says: the server has read its own
    dask.config.set({"distributed.worker.multiprocessing-method": "fork"})
    importlib.import_module(f"distributed.cli.dask_{sys.argv[1]}").main(sys.argv[2:])
