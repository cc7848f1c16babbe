"""Icebox from Python: a data directory, with a method for each command of the command line.

Methods are named as the commands, take the same options with the same defaults (`pipeline.api.options`), and return
results whose `to_dict` is the JSON of the command. Nothing is computed twice: features, runs and sweeps lie in the data
directory, whoever made them.
"""

from __future__ import annotations

from pipeline.api.inspection import Inspection
from pipeline.api.training import Training


class Icebox(Training, Inspection):
    """A data directory, opened anew by each method, so that several programs may use it at once.

    Parameters
    ----------
    data_dir
        Where cache, runs, sweeps, reports and downloads are kept; by default what ICEBOX_DATA names, else "data" in
        the current folder.
    quiet
        Show neither progress nor notices; warnings are logged as ever, under "pipeline".
    progress
        How progress is shown instead of by bars on the terminal or in the notebook.

    Examples
    --------
    >>> box = Icebox("data")
    >>> box.features("photos")
    >>> run = box.train_head("photos", "gap", epochs=20)
    >>> run.accuracy
    """
